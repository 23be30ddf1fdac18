"""The objective "accuracy": a classifier is trained by a recipe, or a committed adapter is taken, and evaluated along
the dial, beside its controls (Table 1)."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from pathlib import Path

from zsaa.data.tasks import fingerprint, load_task, tokenize
from zsaa.dial import rule
from zsaa.evaluation.accuracy import curve
from zsaa.evaluation.controls import check_targets, plan
from zsaa.evaluation.latency import longest, time_batch
from zsaa.families import find_decoder
from zsaa.finetune import load, resolve_precision
from zsaa.kit.store import RESULTS, load_results
from zsaa.measure import hash_of, output_folder, provenance
from zsaa.measure.distributed import place, start
from zsaa.models import load_model
from zsaa.rule import RULE
from zsaa.studies.job import Job
from zsaa.studies.records import device, model_record, once, result_file, task_record
from zsaa.studies.training import tuned

KIND = "sequence-classification"


def measure(job: Job) -> dict:
    """Write job.output/results/NAME.json of a job with one seed; returns its content. The trained model (or adapter)
    stays under output/trained; both MNLI tasks share one. Several processes share the work, the first one writes, and
    latency is left out.

    What is finished is not done again: the training, the curve of each control, and the whole, as `measure.cached` has
    it. A training that was cut short goes on from its last checkpoint.
    """
    if job.recipe is None:
        return _of_an_adapter(job)
    recipe, settings, output = job.recipe, job.settings, output_folder(job.output)
    start()
    parts = (Path(job.data).name, Path(job.model).name, recipe.method, recipe.tuning, f"seed{job.seed}")
    name = job.named("-".join(parts))
    data = load_task(job.data, source=job.source, train=job.train, test=job.test, seed=0)

    @functools.cache
    def base():
        return load_model(job.model, kind=KIND, num_labels=len(data.label_names), device=device())

    def samples(net, tokenizer):
        held_out = map(len, tokenized(data.test, tokenizer, recipe.max_length, net)["input_ids"])
        given = {name: getattr(recipe, name) for name in RULE}
        check_targets(find_decoder(net)[0].config, held_out, settings.targets, settings.controls, **given)
        return tokenized(data.train, tokenizer, recipe.max_length, net)

    if model_record(job.model)["revision"] == "None":  # not fetched from the hub yet: what it is, it says then
        base()
    decides = {"model": model_record(job.model), "train": fingerprint(data.train), "recipe": asdict(recipe)}
    both = name.replace("_mismatched", "").replace("_matched", "")
    folder = output / "trained" / f"{both}-{hash_of(decides)[:8]}"
    trained = tuned(job, folder, decides, base, samples, kind=KIND)
    header = {"name": name, "kind": "curve", "command": job.command, "model": decides["model"]}
    header |= {"task": task_record(data), "recipe": trained.recipe, "train": trained.log}
    header["trained"] = (folder / "model").relative_to(output).as_posix()
    facts = {"seed": job.seed, "train_samples": len(data.train)}
    length = settings.max_length or recipe.max_length
    whole = trained.model, trained.tokenizer
    return _evaluated(job, *whole, data, header, facts, trained.spent, trained.log["precision"], length)


def _of_an_adapter(job: Job) -> dict:
    """A committed adapter, evaluated here. What the result says of the training is copied from its own result file."""
    folder = RESULTS / "adapters"
    known = {r["name"]: r for r in load_results(kind="curve") if (folder / r["name"]).is_dir()}
    if job.model not in known:
        raise ValueError(
            f"no committed adapter {job.model!r}. There are: {', '.join(sorted(known))}. Without a recipe nothing is "
            "trained: name one of them as the model, or a recipe to train by (--recipe paper)."
        )
    trained, folder = known[job.model], folder / job.model
    output_folder(job.output)
    start()
    data = load_task(job.data, source=job.source, train=1, test=job.test, seed=0)
    net, tokenizer = load(folder, kind=KIND, device=device())
    if (classes := len(data.label_names)) != net.config.num_labels:
        raise ValueError(
            f"{job.data} has {classes} classes ({', '.join(data.label_names)}), and the adapter {job.model} was "
            f"trained for {net.config.num_labels}: take another data set, or fine-tune on this one."
        )
    net = net.merge_and_unload()  # the adapter's products go into the weights: the speed of the plain model
    header = {"name": job.named(f"{job.model}-here"), "kind": "curve", "command": job.command, "adapter": job.model}
    header |= {k: trained[k] for k in ("model", "recipe")} | {"task": task_record(data)}
    facts = {"seed": trained["recipe"]["seed"], "train_samples": trained["provenance"]["train_samples"]}
    length = job.settings.max_length or trained["recipe"]["max_length"]
    return _evaluated(job, net, tokenizer, data, header, facts, {}, resolve_precision(), length)


def _evaluated(job: Job, net, tokenizer, data, header: dict, facts: dict, spent: dict, precision: str, length: int):
    """The result of a trained model: `header`, and the curves of the controls, each in a file of its own first."""
    settings = job.settings
    test_set = tokenized(data.test, tokenizer, length, net)
    batch_size = settings.batch_size or (64 if device() == "cuda" else 8)
    header["evaluation"] = {"precision": precision, "batch_size": batch_size, "max_length": length}
    # "command" is how the file was asked for, not what is in it; "trained" stands for the training and its log.
    decides = {k: v for k, v in header.items() if k not in ("command", "train")}
    decides |= {"facts": facts, "targets": list(settings.targets)}
    texts = list(map(len, test_set["input_ids"]))
    check_targets(find_decoder(net)[0].config, texts, settings.targets, settings.controls, **rule(net))

    def part(control: str) -> dict:
        options = (settings.targets, (control,), batch_size, precision, job.progress, data.metric)
        path = output_folder(job.output) / "parts" / header["name"] / f"{control}.json"
        return once(path, decides, lambda: {"rows": curve(net, tokenizer, test_set, *options)})

    def evaluate() -> dict:
        # At 1x there is but one.
        parts = [part(control) for control in settings.controls if plan(net, texts, settings.targets, (control,))]
        rows = [row for part in parts for row in part["rows"]]
        started = time.perf_counter()
        if settings.latency_repeats and place()[1] == 1:
            batch = longest(test_set["input_ids"], settings.latency_batch)
            time_batch(net, rows, tokenizer, batch, settings.latency_repeats, precision)
        more = {"eval_samples": len(test_set), **_together([{"provenance": spent}, *parts])}
        more["seconds"] = round(more["seconds"] + time.perf_counter() - started, 1)
        return {**header, "provenance": provenance(**facts, **more), "rows": rows}

    whole = {"controls": list(settings.controls), "latency": [settings.latency_batch, settings.latency_repeats]}
    return once(result_file(job, header["name"]), {**decides, **whole}, evaluate)


def _together(results: list[dict]) -> dict:
    """Seconds and joules of several results, in this run or in earlier ones."""
    units = [result["provenance"] for result in results if result.get("provenance")]
    spent = {"seconds": sum(unit["seconds"] for unit in units)}
    for counter in ("gpu_joules", "cpu_joules"):
        known = [unit[counter] for unit in units]
        spent[counter] = None if None in known or not known else round(sum(known), 1)
    return spent


def tokenized(split, tokenizer, max_length: int, net):
    """`tokenize`, if the model has that many positions: a tokenizer may not know the limit of its model."""
    limit = find_decoder(net)[0].config.max_position_embeddings
    if max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model has {limit} positions: choose 1 to {limit}.")
    return tokenize(split, tokenizer, max_length)
