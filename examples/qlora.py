"""QLoRA for the dial (section 4.3 of the paper): a 4-bit model, LoRA adapters, and a new alpha at every step.

    python examples/qlora.py                     # a few tiny steps, to see it work on a CPU
    python examples/qlora.py --model google/gemma-2-2b --train 20000 --test 2000 --steps 2500 --batch-size 8 \\
        --max-length 512                         # the real thing, on a GPU; made for a T4 too (float16)

Needs bitsandbytes: pip install 'zsaa[quant]'.
"""

import argparse

import torch

import zsaa
from zsaa import finetune
from zsaa.data.tasks import load_task, tokenize
from zsaa.evaluation.accuracy import predict
from zsaa.models import load_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a packaged model, a hub id or a folder")
    parser.add_argument("--task", default="imdb")
    parser.add_argument("--quantization", default="nf4", choices=["nf4", "int8"])
    parser.add_argument("--train", type=int, default=64, help="samples to draw from")
    parser.add_argument("--test", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a sample")
    parser.add_argument("--output", default="outputs/qlora")
    arguments = parser.parse_args()

    data = load_task(arguments.task, train=arguments.train, test=arguments.test)
    options = {
        "kind": "sequence-classification",
        "num_labels": len(data.label_names),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    model, tokenizer = load_model(arguments.model, quantization=arguments.quantization, **options)
    print(f"{arguments.model} as {arguments.quantization}: {model.get_memory_footprint() / 1e6:.0f} MB")

    train, test = (tokenize(split, tokenizer, arguments.max_length) for split in (data.train, data.test))
    recipe = finetune.Recipe(
        tuning="lora", learning_rate=2e-4, max_steps=arguments.steps, batch_size=arguments.batch_size,
        gradient_checkpointing=torch.cuda.is_available(),
    )  # fmt: skip
    model, log = finetune.fine_tune(
        model, tokenizer, train, recipe, arguments.output, resume=False, log_steps=max(1, arguments.steps // 6)
    )
    low, high = log["alpha_range"]
    print(f"{log['steps']} steps in {log['seconds']} s, {log['precision']}, alpha from {low} to {high}: {log['loss']}")

    # The adapter goes onto a quantized base, or onto one in full precision.
    for quantization in (arguments.quantization, None):
        model, tokenizer = finetune.load(f"{arguments.output}/model", quantization=quantization, **options)
        for alpha in (1.0, (low + 1) / 2):
            with zsaa.at(model, alpha):
                right = sum(p == y for p, y in zip(predict(model, test["input_ids"]), test["labels"]))
            print(f"base {quantization or 'as it is'}, alpha {alpha}: {right} of {len(test)} right")


if __name__ == "__main__":
    main()
