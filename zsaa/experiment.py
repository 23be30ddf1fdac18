"""One fine-tuning experiment from the command line: train, evaluate along the dial and its controls, time, record.

    python -m zsaa.experiment --task imdb --method alpha-sampled --output-dir outputs/experiments
    torchrun --nproc-per-node 2 -m zsaa.experiment ...     (the same on two GPUs)

Every committed file in results/ that holds an accuracy curve was written by this module; its "command" says how.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from functools import partial
from pathlib import Path

import torch

import zsaa
from zsaa.dial import settings
from zsaa.distributed import on_first, place, start
from zsaa.evaluate import CONTROLS, TARGETS, add_latency, curve, plan
from zsaa.finetune import Recipe, describe, fine_tune, resolve_precision
from zsaa.measure import provenance, write_json


def longest(samples, count: int) -> list:
    """The `count` longest samples: a batch without padding when they all reach the maximum length."""
    return sorted(samples, key=len, reverse=True)[:count]


def _task_record(data) -> dict:
    fields = ("name", "source", "substitute", "metric", "paper_column", "fingerprint")
    return {field: getattr(data, field) for field in fields}


def _model_record(name: str) -> dict:
    from zsaa.models import resolve

    return {"name": name, **{k: str(v) for k, v in resolve(name).items() if k not in ("name", "path")}}


def latency(
    *,
    model: str = "smollm2-135m",
    task: str = "imdb",
    source: str = "auto",
    test: int | None = None,
    batches: tuple[int, ...] = (1, 8),
    max_length: int = 512,
    tau: int = 5,
    targets=TARGETS,
    repeats: int = 15,
    output_dir: str | Path = "outputs/experiments",
    name: str | None = None,
    command: str | None = None,
) -> dict:
    """Time the untrained model (time does not depend on the weights) at each target MAC reduction, for the dial and for
    inputs cut to the same compute, on batches of the longest samples; write output_dir/results/<name>.json."""
    from zsaa.models import load_model
    from zsaa.tasks import load_task, tokenize

    if place()[1] > 1:
        raise RuntimeError(f"{place()[1]} processes would disturb each other's clocks: time without torchrun.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    data = load_task(task, source=source, test=test, seed=0)
    net, tokenizer = load_model(
        model, kind="sequence-classification", num_labels=len(data.label_names), device=device, dtype=dtype
    )
    zsaa.enable(net, tau=tau)
    samples = list(tokenize(data.test, tokenizer, max_length)["input_ids"])
    started = time.perf_counter()
    # Solved for the data set, as the accuracy curve is, so that the rows of both can be read side by side.
    solved = plan(net, map(len, samples), targets, ("alpha", "first"))
    rows = []
    for batch in batches:
        rows += add_latency(net, [dict(row) for row in solved], tokenizer, longest(samples, batch), repeats)
    name = name or f"{task}-latency-{device}"
    facts = {"eval_samples": len(samples), "repeats": repeats, "seconds": round(time.perf_counter() - started, 1)}
    result = {
        "name": name,
        "kind": "latency",
        "command": command,
        "model": _model_record(model),
        "task": _task_record(data),
        "recipe": {
            "tau": tau,
            "score": settings(net)["score"],
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": max_length,
        },
        "provenance": provenance(seed=0, **facts),
        "rows": rows,
    }
    write_json(Path(output_dir) / "results" / f"{name}.json", result)
    return result


def run(
    recipe: Recipe,
    *,
    model: str = "smollm2-135m",
    task: str = "imdb",
    source: str = "auto",
    train: int | None = None,
    test: int | None = None,
    output_dir: str | Path = "outputs/experiments",
    name: str | None = None,
    targets=TARGETS,
    controls=CONTROLS,
    eval_batch_size: int | None = None,
    latency_repeats: int = 15,
    save_steps: int | None = 500,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Run one experiment and write output_dir/results/<name>.json; returns its content. The trained model (or adapter)
    stays in output_dir/<name>/model. Several processes share the work, the first one writes, and latency is left out.
    """
    from zsaa.models import load_model
    from zsaa.tasks import load_task, tokenize

    start()
    output_dir = Path(output_dir)
    name = name or f"{task}-{recipe.method}-{recipe.tuning}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_task(task, source=source, train=train, test=test, seed=0)
    if data.metric != "accuracy":
        raise NotImplementedError(
            f"{task} is measured by {data.metric} in the paper; curves report accuracy only so far."
        )
    net, tokenizer = load_model(model, kind="sequence-classification", num_labels=len(data.label_names), device=device)
    train_set, test_set = (tokenize(split, tokenizer, recipe.max_length) for split in (data.train, data.test))
    described = describe(recipe, net)
    started = time.perf_counter()
    net, log = fine_tune(net, tokenizer, train_set, recipe, output_dir / name, save_steps=save_steps, progress=progress)
    precision = log["precision"]
    batch = eval_batch_size or (64 if device == "cuda" else 8)
    result = {
        "name": name,
        "kind": "curve",
        "command": command,
        "model": _model_record(model),
        "task": _task_record(data),
        "recipe": described,
        "train": log,
        "evaluation": {"precision": precision, "batch_size": batch},
    }
    rows = []
    for control in controls:  # written after each, so that a run cut short keeps what it has
        rows += curve(net, tokenizer, test_set, targets, (control,), batch, precision, progress)
        if latency_repeats and control == controls[-1] and place()[1] == 1:
            add_latency(net, rows, tokenizer, longest(test_set["input_ids"], 8), latency_repeats, precision)
        seconds = round(time.perf_counter() - started, 1)
        facts = {"train_samples": len(train_set), "eval_samples": len(test_set), "seconds": seconds}
        result |= {"provenance": provenance(seed=recipe.seed, **facts), "rows": rows}
        on_first(partial(write_json, output_dir / "results" / f"{name}.json", result))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="imdb")
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, or a folder in the hub's layout")
    parser.add_argument("--train", type=int, help="number of training samples (default: all)")
    parser.add_argument("--test", type=int, help="number of held-out samples (default: all)")
    parser.add_argument("--output-dir", default="outputs/experiments")
    parser.add_argument("--name")
    parser.add_argument(
        "--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS, help="which curves to evaluate"
    )
    parser.add_argument("--latency-only", action="store_true", help="no training: only time the dial")
    parser.add_argument("--latency-batches", type=int, nargs="+", default=[1, 8, 32], help="for --latency-only")
    parser.add_argument("--latency-repeats", type=int, default=15, help="0 leaves latency out, as torchrun does")
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints; 0 leaves them out")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.name == "alpha_range":
            parser.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"))
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    chosen = vars(parser.parse_args(arguments))
    recipe = Recipe(**{f.name: chosen.pop(f.name) for f in dataclasses.fields(Recipe)})
    chosen["save_steps"] = chosen["save_steps"] or None
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--output-dir" in given:  # a path of one machine, and no part of how
        found = given.index("--output-dir")
        del given[found : found + 2]
    start()
    launcher = "python" if place()[1] == 1 else f"torchrun --nproc-per-node {place()[1]}"
    command = " ".join([launcher, "-m zsaa.experiment", *given])
    only, batches = chosen.pop("latency_only"), chosen.pop("latency_batches")
    if only:
        shared = {k: chosen[k] for k in ("model", "task", "source", "test", "output_dir", "name")}
        shared |= {"repeats": chosen["latency_repeats"], "batches": batches, "command": command}
        result = latency(**shared, tau=recipe.tau, max_length=recipe.max_length)
    else:
        result = run(recipe, **chosen, command=command)
    for row in result["rows"] if place()[0] == 0 else ():
        shape = f"batch {row['latency_batch']} x {row['latency_tokens']}" if "latency_batch" in row else ""
        print(
            f"{row['control']:>6} {row['mac_reduction']:6.2f}x  accuracy {row.get('accuracy', '-')}"
            f"  speed-up {row.get('speedup', '-')} {shape}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
