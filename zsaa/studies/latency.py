"""The objective "latency": the clock of a classifier along the dial and of cut inputs, which no training decides."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import zsaa
from zsaa.data.tasks import load_task, tokenize
from zsaa.dial import rule, settings
from zsaa.dials.settings import with_schedule
from zsaa.evaluation.controls import check_targets, plan
from zsaa.evaluation.latency import longest, time_batch
from zsaa.families import find_decoder
from zsaa.finetune import resolve_precision
from zsaa.kit.energy import energy
from zsaa.measure import output_folder, provenance, write_json
from zsaa.measure.distributed import place
from zsaa.models import load_model
from zsaa.studies.accuracy import KIND
from zsaa.studies.job import Job
from zsaa.studies.records import device, model_record, result_file, task_record

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONTROLS = ("alpha", "first")  # all cuts leave as many tokens


def measure(job: Job) -> dict:
    """Time the untrained model at each target MAC reduction, for the dial and for inputs cut to the same compute, on
    batches of the longest samples; write job.output/results/NAME.json and return its content."""
    output_folder(job.output)
    if place()[1] > 1:
        raise RuntimeError(f"{place()[1]} processes would disturb each other's clocks: time without torchrun.")
    dtype = DTYPES[resolve_precision()]
    result = _again(job, dtype) if job.settings.settings_of else _of_data(job, dtype)
    write_json(result_file(job, result["name"]), result)
    return result


def _of_data(job: Job, dtype: torch.dtype) -> dict:
    asked = job.settings
    data = load_task(job.data, source=job.source, test=job.test, seed=0)
    net, tokenizer = load_model(
        job.model, kind=KIND, num_labels=len(data.label_names), device=device(), dtype=dtype
    )  # fmt: skip
    zsaa.enable(net, tau=asked.tau, schedule=asked.schedule)
    samples = list(tokenize(data.test, tokenizer, asked.max_length)["input_ids"])
    started = time.perf_counter()
    # Solved for the data set, as the accuracy curve is, so that the rows of both can be read side by side.
    check_targets(find_decoder(net)[0].config, map(len, samples), asked.targets, CONTROLS, **rule(net))
    solved = plan(net, map(len, samples), asked.targets, CONTROLS)
    rows = []
    for batch in asked.batches:
        rows += time_batch(net, [dict(row) for row in solved], tokenizer, longest(samples, batch), asked.repeats)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "name": job.named(f"{Path(job.data).name}-latency-{device()}"),
        "kind": "latency",
        "command": job.command,
        "model": model_record(job.model),
        "task": task_record(data),
        "recipe": {
            "tau": asked.tau,
            "score": settings(net)["score"],
            "schedule": asked.schedule,
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": asked.max_length,
        },
        "provenance": provenance(seed=0, eval_samples=len(samples), repeats=asked.repeats, seconds=seconds),
        "rows": rows,
    }


def _again(job: Job, dtype: torch.dtype) -> dict:
    """The settings of an earlier result, with random tokens and weights of the same shapes: neither model nor data."""
    earlier, repeats = Path(job.settings.settings_of), job.settings.repeats
    before = json.loads(earlier.read_text(encoding="utf-8"))
    if before.get("kind") != "latency":
        raise ValueError(f"{earlier} is of the kind {before.get('kind')!r}: give a file that --latency-only wrote.")
    recipe = with_schedule(before["recipe"])
    net = _of_shape(before["model"]["name"], dtype)
    zsaa.enable(net, tau=recipe["tau"], schedule=recipe["schedule"])
    generator, rows = torch.Generator().manual_seed(0), []
    with energy() as spent:
        for batch in job.settings.batches:
            same = [row for row in before["rows"] if row["latency_batch"] == batch]
            if not same:
                raise ValueError(f"{earlier} holds no batch of {batch}")
            ids = torch.randint(0, net.config.vocab_size, (batch, same[0]["latency_tokens"]), generator=generator)
            kept = ("control", "target", "alpha", "keep_tokens", "mac_reduction")
            plain = [{key: row[key] for key in kept} for row in same]
            rows += time_batch(net, plain, SimpleNamespace(bos_token_id=None), ids.tolist(), repeats)
            for row, old in zip(plain, same):  # the earlier batch had no padding either, or this would be another
                if row["latency_mac_reduction"] != old["latency_mac_reduction"]:
                    raise ValueError(f"{earlier} timed another model, or texts of unequal lengths: {old}")
    facts = {"eval_samples": before["provenance"]["eval_samples"], "repeats": repeats}
    return {
        **{key: before[key] for key in ("name", "kind", "task")},
        "name": job.named(before["name"]),
        "command": job.command,
        "recipe": {**recipe, "dtype": str(dtype).removeprefix("torch.")},
        "model": {"name": before["model"]["name"], "kind": "random weights", "timed on": "random tokens"},
        "provenance": provenance(seed=0, **facts, **spent),
        "rows": rows,
    }


def _of_shape(name: str, dtype: torch.dtype):
    """A classifier of a known shape (zsaa.bench.MODELS) with random weights."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from zsaa.bench.shapes import MODELS

    if name not in MODELS:
        raise ValueError(f"the shape of {name!r} is not known here; these are: {', '.join(MODELS)}")
    config = dict(MODELS[name])
    torch.manual_seed(0)
    with torch.device(device()):
        made = AutoConfig.for_model(config.pop("model_type"), **config, num_labels=2, pad_token_id=0)
        return AutoModelForSequenceClassification.from_config(made, dtype=dtype).eval()
