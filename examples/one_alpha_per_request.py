"""One alpha for each request of a batch: a hurried one, a patient one and one at full accuracy, served together.

python examples/one_alpha_per_request.py [--model smollm2-135m]
"""

import argparse

import torch

import zsaa
from zsaa.models import load_model

TEXT = "A film about two brothers who build a boat in a garden far from any sea, and about the summer when they leave. "


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()

    model, tokenizer = load_model(arguments.model)
    tokenizer.padding_side = "left"
    batch = tokenizer([TEXT * 2, TEXT * 4, TEXT], return_tensors="pt", padding=True)
    alphas = [0.8, 0.95, 1.0]

    zsaa.enable(model, alpha=alphas, score="column_mean")
    with torch.inference_mode(), zsaa.trace(model) as trace:
        together = model(**batch).logits[:, -1]
    for b, alpha in enumerate(alphas):
        real = batch.attention_mask[b] == 1
        with torch.inference_mode(), zsaa.at(model, alpha):
            alone = model(batch.input_ids[b][real][None]).logits[0, -1]
        kept = trace.counts[-1][b]
        difference = (together[b] - alone).abs().max().item()
        print(
            f"alpha {alpha}: {int(real.sum())} tokens in, {kept} leave the last layer; "
            f"largest difference of a logit to a separate call {difference:.1e}"
        )


if __name__ == "__main__":
    main()
