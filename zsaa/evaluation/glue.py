"""Predictions on GLUE's test sets, whose labels are not public, as files for its server (gluebenchmark.com).

    python -m zsaa.glue outputs/experiments/trained/mrpc-.../model --task mrpc --mac-reduction 2
    python -m zsaa.glue --zip                                            # after all tasks: submission.zip

One file a task, named as the server wants it: a header "index<TAB>prediction", then a line per sample. Predictions are
0 or 1 for SST-2, MRPC and QQP, and the label's name for MNLI, QNLI and RTE. The server also asks for tasks that the
paper does not have (CoLA, STS-B, WNLI and the diagnostic set AX): take those files from its sample submission.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import torch
from torch import nn

import zsaa
from zsaa.data.tasks import TASKS, load_glue_test, tokenize
from zsaa.dial import rule
from zsaa.evaluation.accuracy import predict
from zsaa.families import find_decoder
from zsaa.finetune import load, resolve_precision
from zsaa.kit.files import draft, is_stray, write_text
from zsaa.measure import provenance, write_json
from zsaa.rule import check_alpha

FILES = {
    "mnli_matched": "MNLI-m.tsv",
    "mnli_mismatched": "MNLI-mm.tsv",
    "rte": "RTE.tsv",
    "qqp": "QQP.tsv",
    "qnli": "QNLI.tsv",
    "sst2": "SST-2.tsv",
    "mrpc": "MRPC.tsv",
}
AS_WORDS = ("mnli_matched", "mnli_mismatched", "rte", "qnli")


def write_predictions(
    model: nn.Module,
    tokenizer,
    task: str,
    folder: str | Path,
    *,
    alpha: float | None = None,
    mac_reduction: float | None = None,
    source: str = "hub",
    max_length: int = 512,
    batch_size: int = 8,
    precision: str = "fp32",
    progress: bool = True,
) -> Path:
    """Predict the test split of `task` (a key of FILES) at `alpha`, or at the alpha that reduces MACs on it so many
    times, with a classifier that has the dial on. Returns the path of its file in `folder`; beside it lies a .json with
    alpha and provenance. Raises ValueError for a model of another number of classes, and what `load_glue_test` does.
    """
    from tqdm import tqdm

    if (alpha is None) == (mac_reduction is None):
        raise ValueError(f"give alpha or mac_reduction, one of them; got alpha={alpha!r}, {mac_reduction=!r}.")
    split, origin = load_glue_test(task, source)
    names = TASKS[task].label_names
    decoder, _ = find_decoder(model)
    if model.config.num_labels != len(names):
        raise ValueError(
            f"the model has {model.config.num_labels} classes, but {task} has {len(names)}: {', '.join(names)}. "
            f"Fine-tune it on {task} first (python -m zsaa.experiment --task {task})."
        )
    samples = list(tokenize(split, tokenizer, max_length)["input_ids"])
    chosen, lengths = rule(model), list(map(len, samples))
    if alpha is None:
        alpha = zsaa.alpha_for(decoder.config, lengths, mac_reduction, **chosen)
    alpha = check_alpha(alpha)
    bar = tqdm(total=len(samples), unit="text", desc=task, disable=not progress, mininterval=10.0)
    with bar, zsaa.at(model, alpha):
        predicted = predict(model, samples, batch_size, precision, bar)
    path = Path(folder) / FILES[task]
    ordered = sorted(zip(split["index"], predicted))
    lines = [f"{index}\t{names[label] if task in AS_WORDS else label}\n" for index, label in ordered]
    write_text(path, "index\tprediction\n" + "".join(lines))
    reached = round(zsaa.mac_reduction(decoder.config, lengths, alpha, **chosen), 4)
    facts = {"task": task, "source": origin, "alpha": alpha, **chosen, "mac_reduction": reached}
    write_json(path.with_suffix(".json"), {**facts, "provenance": provenance(eval_samples=len(samples))})
    return path


def pack(folder: str | Path) -> Path:
    """folder/submission.zip of the prediction files in `folder`. Raises FileNotFoundError if there are none."""
    found = sorted(p for p in Path(folder).glob("*.tsv") if not is_stray(p, Path(folder)))
    if not found:
        raise FileNotFoundError(f"no prediction file (*.tsv) in {folder}: make them first, with write_predictions.")
    path = Path(folder) / "submission.zip"
    with draft(path) as own, zipfile.ZipFile(own, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in found:
            archive.write(file, file.name)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.glue", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a folder saved by zsaa.experiment or zsaa.finetune")
    parser.add_argument("--task", choices=FILES)
    parser.add_argument("--alpha", type=float)
    parser.add_argument("--mac-reduction", type=float, help="instead of alpha")
    parser.add_argument("--source", default="hub", help="hub, or a folder in the hub's layout")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output-dir", default="outputs/glue")
    parser.add_argument("--zip", action="store_true", help="pack what is in the output folder")
    chosen = parser.parse_args(arguments)
    if not chosen.zip and not (chosen.model and chosen.task):
        parser.error("give a model and --task, or --zip")
    if chosen.model:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load(chosen.model, kind="sequence-classification", device=device)
        names = ("alpha", "mac_reduction", "source", "max_length", "batch_size")
        options = {name: getattr(chosen, name) for name in names}
        precision = resolve_precision()
        print(write_predictions(model, tokenizer, chosen.task, chosen.output_dir, **options, precision=precision))
    if chosen.zip:
        print(pack(chosen.output_dir))
    return 0
