"""One fine-tuning experiment from the command line: train, evaluate along the dial and its controls, time, record.

    python -m zsaa.experiment --task imdb --method alpha-sampled --output-dir outputs/experiments
    torchrun --nproc-per-node 2 -m zsaa.experiment ...     (the same on two GPUs)

Every committed file in results/ that holds an accuracy curve was written by this module; its "command" says how.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

import zsaa
from zsaa.dial import rule, settings, with_schedule
from zsaa.evaluation.accuracy import CONTROLS, TARGETS, check_targets, curve, plan
from zsaa.evaluation.latency import longest, time_batch
from zsaa.families import find_decoder
from zsaa.finetune import RECIPES, Recipe, describe, fine_tune, load, resolve_precision
from zsaa.kit.energy import energy
from zsaa.kit.store import RESULTS, load_results, measured
from zsaa.measure import cached, hash_of, output_folder, provenance, write_json
from zsaa.measure.checks import check_number, check_whole
from zsaa.measure.distributed import on_first, place, start
from zsaa.rule import RULE, check_schedule

# For Figure 2 B and C, which cost no forward pass.
FINE_TARGETS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 11)


def task_record(data) -> dict:
    """What a result file says of its data set (a `zsaa.data.tasks.Task` or a `zsaa.data.corpora.Corpus`)."""
    fields = ("name", "source", "substitute", "metric", "paper_column", "fingerprint")
    fields += ("training_substitute",) * bool(data.training_substitute)
    return {field: getattr(data, field) for field in fields}


def model_record(name: str) -> dict:
    """What a result file says of its model: name, where it came from, revision or hash."""
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
    schedule: str = "geometric",
    targets=TARGETS,
    repeats: int = 15,
    settings_of: str | Path | None = None,
    output_dir: str | Path = "outputs/experiments",
    name: str | None = None,
    command: str | None = None,
) -> dict:
    """Time the untrained model (time does not depend on the weights) at each target MAC reduction, for the dial and for
    inputs cut to the same compute, on batches of the longest samples; write output_dir/results/<name>.json.

    settings_of: a result file of this kind. Its settings are timed again, on random tokens and random weights of the
    same shapes, which needs neither model nor data."""
    from zsaa.data.tasks import load_task, tokenize
    from zsaa.models import load_model

    output_dir = output_folder(output_dir)
    check_whole("repeats", repeats)
    for batch in batches:
        check_whole("a batch to time", batch)
    if place()[1] > 1:
        raise RuntimeError(f"{place()[1]} processes would disturb each other's clocks: time without torchrun.")
    device = _device()
    precision = resolve_precision()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    if settings_of is not None:
        return _latency_again(Path(settings_of), batches, repeats, device, dtype, output_dir, name, command)
    data = load_task(task, source=source, test=test, seed=0)
    net, tokenizer = load_model(
        model, kind="sequence-classification", num_labels=len(data.label_names), device=device, dtype=dtype
    )
    zsaa.enable(net, tau=tau, schedule=schedule)
    samples = list(tokenize(data.test, tokenizer, max_length)["input_ids"])
    started = time.perf_counter()
    # Solved for the data set, as the accuracy curve is, so that the rows of both can be read side by side.
    check_targets(find_decoder(net)[0].config, map(len, samples), targets, ("alpha", "first"), **rule(net))
    solved = plan(net, map(len, samples), targets, ("alpha", "first"))
    rows = []
    for batch in batches:
        rows += time_batch(net, [dict(row) for row in solved], tokenizer, longest(samples, batch), repeats)
    name = name or f"{task}-latency-{device}"
    facts = {"eval_samples": len(samples), "repeats": repeats, "seconds": round(time.perf_counter() - started, 1)}
    result = {
        "name": name,
        "kind": "latency",
        "command": command,
        "model": model_record(model),
        "task": task_record(data),
        "recipe": {
            "tau": tau,
            "score": settings(net)["score"],
            "schedule": schedule,
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": max_length,
        },
        "provenance": provenance(seed=0, **facts),
        "rows": rows,
    }
    write_json(output_dir / "results" / f"{name}.json", result)
    return result


def _latency_again(earlier: Path, batches, repeats: int, device, dtype, output_dir, name, command) -> dict:
    """`latency` at the settings of an earlier result of it, with random tokens and weights."""
    from types import SimpleNamespace

    from transformers import AutoConfig, AutoModelForSequenceClassification

    from zsaa.bench import MODELS

    before = json.loads(earlier.read_text(encoding="utf-8"))
    if before.get("kind") != "latency":
        raise ValueError(f"{earlier} is of the kind {before.get('kind')!r}: give a file that --latency-only wrote.")
    shape, recipe = before["model"]["name"], with_schedule(before["recipe"])
    if shape not in MODELS:
        raise ValueError(f"the shape of {shape!r} is not known here; these are: {', '.join(MODELS)}")
    config = dict(MODELS[shape])
    torch.manual_seed(0)
    with torch.device(device):
        net = AutoModelForSequenceClassification.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config, num_labels=2, pad_token_id=0), dtype=dtype
        )
    zsaa.enable(net.eval(), tau=recipe["tau"], schedule=recipe["schedule"])
    generator, rows = torch.Generator().manual_seed(0), []
    with energy() as spent:
        for batch in batches:
            same = [row for row in before["rows"] if row["latency_batch"] == batch]
            if not same:
                raise ValueError(f"{earlier} holds no batch of {batch}")
            ids = torch.randint(1, net.config.vocab_size, (batch, same[0]["latency_tokens"]), generator=generator)
            kept = ("control", "target", "alpha", "keep_tokens", "mac_reduction")
            plain = [{key: row[key] for key in kept} for row in same]
            rows += time_batch(net, plain, SimpleNamespace(bos_token_id=None), ids.tolist(), repeats)
            for row, old in zip(plain, same):  # the earlier batch had no padding either, or this would be another
                if row["latency_mac_reduction"] != old["latency_mac_reduction"]:
                    raise ValueError(f"{earlier} timed another model, or texts of unequal lengths: {old}")
    facts = {"eval_samples": before["provenance"]["eval_samples"], "repeats": repeats}
    result = {
        **{key: before[key] for key in ("name", "kind", "task")},
        "name": name or before["name"],
        "command": command,
        "recipe": {**recipe, "dtype": str(dtype).removeprefix("torch.")},
        "model": {"name": shape, "kind": "random weights", "timed on": "random tokens"},
        "provenance": provenance(seed=0, **facts, **spent),
        "rows": rows,
    }
    write_json(output_dir / "results" / f"{result['name']}.json", result)
    return result


def lengths(
    *,
    model: str = "smollm2-135m",
    shape: str | None = None,
    task: str = "imdb",
    source: str = "auto",
    test: int | None = None,
    max_length: int = 512,
    tau: int = 5,
    schedule: str = "geometric",
    targets=FINE_TARGETS,
    output_dir: str | Path = "outputs/experiments",
    name: str | None = None,
    command: str | None = None,
) -> dict:
    """What follows from the lengths of a task's held-out samples alone (Figure 2 B and C): per target MAC reduction the
    alpha that reaches it, and the share of hidden activations that it preserves: the sum of N_l over all layers and
    samples, over that of N_0. Writes output_dir/results/<name>.json, of kind "lengths".

    model: its tokenizer cuts the texts, and its layers are counted; shape: "gpt2" counts those of GPT-2 (12 layers, the
    paper's) instead.
    """
    from transformers import GPT2Config

    from zsaa.data.tasks import load_task
    from zsaa.models import load_model

    shapes = {None: None, "gpt2": GPT2Config()}
    if shape not in shapes:
        raise ValueError(f"shape must be 'gpt2' or None (the model's own), got {shape!r}.")
    output_dir = output_folder(output_dir)
    name = name or "-".join(("lengths", Path(task).name, Path(model).name, *([shape] if shape else [])))
    data = load_task(task, source=source, train=1, test=test, seed=0)
    net, tokenizer = load_model(model)
    fixed = {"tau": tau, "schedule": check_schedule(schedule)}
    recipe = {**fixed, "max_length": max_length, "shape": shape}
    header = {"name": name, "kind": "lengths", "command": command, "model": model_record(model)}
    header |= {"task": task_record(data), "recipe": recipe}

    def compute() -> dict:
        config = shapes[shape] or find_decoder(net)[0].config
        counted = Counter(map(len, _tokenized(data.test, tokenizer, max_length, net)["input_ids"]))
        check_targets(config, counted.elements(), targets, ("alpha",), **fixed)
        rows = []
        for target in targets:
            try:
                alpha = zsaa.alpha_for(config, list(counted.elements()), target, **fixed)
            except ValueError:  # tau keeps it out of reach
                continue
            kept = {n: sum(zsaa.kept_counts(n, alpha, config.num_hidden_layers, **fixed)) for n in counted}
            preserved = sum(kept[n] * times for n, times in counted.items())
            preserved /= config.num_hidden_layers * sum(n * times for n, times in counted.items())
            reached = zsaa.mac_reduction(config, counted.elements(), alpha, **fixed)
            row = {"control": "alpha", "target": target, "alpha": alpha, "mac_reduction": round(reached, 4)}
            rows.append({**row, "preserved": round(preserved, 5)})
        tokens = sorted(counted.elements())
        facts = {"tokens_mean": round(sum(tokens) / len(tokens), 1), "tokens_median": tokens[len(tokens) // 2]}
        facts |= {"layers": config.num_hidden_layers}
        origin = provenance(torch.device("cpu"), seed=0, eval_samples=len(tokens))
        return {**header, **facts, "provenance": origin, "rows": rows}

    settings = {k: v for k, v in header.items() if k != "command"} | {"targets": list(targets)}
    return _once(output_dir / "results" / f"{name}.json", settings, compute)


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
    latency_batch: int = 8,
    latency_repeats: int = 15,
    save_steps: int | None = 500,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Run one experiment and write output_dir/results/<name>.json; returns its content. The trained model (or adapter)
    stays under output_dir/trained; both MNLI tasks share one. Several processes share the work, the first one writes,
    and latency is left out.

    What is finished is not done again: the training, the curve of each control, and the whole, as `measure.cached` has
    it. A training that was cut short goes on from its last checkpoint (`save_steps`).
    """
    from zsaa.data.tasks import fingerprint, load_task

    _check_evaluation(eval_batch_size, latency_batch, latency_repeats)
    output_dir = output_folder(output_dir)
    start()
    name = name or "-".join((Path(task).name, Path(model).name, recipe.method, recipe.tuning, f"seed{recipe.seed}"))
    data = load_task(task, source=source, train=train, test=test, seed=0)
    net = tokenizer = None
    if model_record(model)["revision"] == "None":  # not fetched from the hub yet
        net, tokenizer = _load(model, data)
    trained = {"model": model_record(model), "train": fingerprint(data.train), "recipe": asdict(recipe)}
    key = hash_of(trained)[:8]
    folder = output_dir / "trained" / f"{name.replace('_mismatched', '').replace('_matched', '')}-{key}"
    fresh = False

    def learn() -> dict:
        nonlocal net, tokenizer, fresh
        if net is None:
            net, tokenizer = _load(model, data)
        fresh = True
        held_out = map(len, _tokenized(data.test, tokenizer, recipe.max_length, net)["input_ids"])
        given = {name: getattr(recipe, name) for name in RULE}
        check_targets(find_decoder(net)[0].config, held_out, targets, controls, **given)  # a training can take hours
        train_set = _tokenized(data.train, tokenizer, recipe.max_length, net)
        described = describe(recipe, net)
        net, log = fine_tune(net, tokenizer, train_set, recipe, folder, save_steps=save_steps, progress=progress)
        return {"recipe": described, "train": log}

    learned = _once(folder / "train.json", trained, learn, folder / "model")
    if not fresh:
        net, tokenizer = load(folder / "model", kind="sequence-classification", device=_device())
    header = {"name": name, "kind": "curve", "command": command, "model": trained["model"]}
    header |= {"task": task_record(data), "recipe": learned["recipe"], "train": learned["train"]}
    header["trained"] = (folder / "model").relative_to(output_dir).as_posix()
    facts = {"seed": recipe.seed, "train_samples": len(data.train)}
    spent = learned.get("provenance", {})
    return _evaluated(
        net, tokenizer, data, header, facts, spent, output_dir, learned["train"]["precision"], recipe.max_length,
        targets, controls, eval_batch_size, latency_batch, latency_repeats, progress,
    )  # fmt: skip


def run_adapter(
    adapter: str,
    *,
    task: str | None = None,
    source: str = "auto",
    test: int | None = None,
    output_dir: str | Path = "outputs/experiments",
    name: str | None = None,
    targets=TARGETS,
    controls=CONTROLS,
    eval_batch_size: int | None = None,
    latency_batch: int = 8,
    latency_repeats: int = 15,
    max_length: int | None = None,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Evaluate a committed adapter (a folder of results/adapters) here, without training; otherwise as `run`.
    max_length: tokens of a sample; None takes that of the training.

    What the result says of the training is copied from the adapter's own result file.
    """
    from zsaa.data.tasks import load_task

    trained = next((r for r in load_results(kind="curve") if r["name"] == adapter), None)
    folder = RESULTS / "adapters" / adapter
    if trained is None or not folder.is_dir():
        known = ", ".join(sorted(p.name for p in (RESULTS / "adapters").glob("*")))
        raise ValueError(f"no committed adapter {adapter!r}. There are: {known}.")
    _check_evaluation(eval_batch_size, latency_batch, latency_repeats)
    output_dir = output_folder(output_dir)
    start()
    task = task or trained["task"]["name"]
    data = load_task(task, source=source, train=1, test=test, seed=0)
    net, tokenizer = load(folder, kind="sequence-classification", device=_device())
    if (classes := len(data.label_names)) != net.config.num_labels:
        raise ValueError(
            f"{task} has {classes} classes ({', '.join(data.label_names)}), and the adapter {adapter} was trained for "
            f"{net.config.num_labels}: take another data set, or fine-tune on this one."
        )
    net = net.merge_and_unload()  # the adapter's products go into the weights: the speed of the plain model
    header = {"name": name or f"{adapter}-here", "kind": "curve", "command": command, "adapter": adapter}
    header |= {k: trained[k] for k in ("model", "recipe")} | {"task": task_record(data)}
    facts = {"seed": trained["recipe"]["seed"], "train_samples": trained["provenance"]["train_samples"]}
    max_length = max_length or trained["recipe"]["max_length"]
    return _evaluated(
        net, tokenizer, data, header, facts, {}, output_dir, resolve_precision(), max_length,
        targets, controls, eval_batch_size, latency_batch, latency_repeats, progress,
    )  # fmt: skip


def _check_evaluation(batch_size: int | None, latency_batch: int, latency_repeats: int) -> None:
    check_whole("eval_batch_size", batch_size, also={None: "8, on a GPU 64"})
    check_whole("latency_batch", latency_batch)
    check_whole("latency_repeats", latency_repeats, least=0)


def _evaluated(
    net, tokenizer, data, header, facts, spent, output_dir, precision, max_length,
    targets, controls, batch_size, latency_batch, latency_repeats, progress,
) -> dict:  # fmt: skip
    """The result file of a trained model: `header`, and the curves of the controls."""
    test_set = _tokenized(data.test, tokenizer, max_length, net)
    batch_size = batch_size or (64 if _device() == "cuda" else 8)
    header["evaluation"] = {"precision": precision, "batch_size": batch_size, "max_length": max_length}
    path = output_dir / "results" / f"{header['name']}.json"
    # "command" is how the file was asked for, not what is in it; "trained" stands for the training and its log.
    settings = {k: v for k, v in header.items() if k not in ("command", "train")}
    settings |= {"facts": facts, "targets": list(targets)}

    texts = list(map(len, test_set["input_ids"]))
    check_targets(find_decoder(net)[0].config, texts, targets, controls, **rule(net))

    def evaluate() -> dict:
        parts = []
        for control in [c for c in controls if plan(net, texts, targets, (c,))]:  # at 1x there is but one
            part = output_dir / "parts" / header["name"] / f"{control}.json"
            options = (targets, (control,), batch_size, precision, progress, data.metric)
            parts.append(_once(part, settings, lambda: {"rows": curve(net, tokenizer, test_set, *options)}))  # noqa: B023
        rows = [row for part in parts for row in part["rows"]]
        started = time.perf_counter()
        if latency_repeats and place()[1] == 1:
            time_batch(net, rows, tokenizer, longest(test_set["input_ids"], latency_batch), latency_repeats, precision)
        # What the units took, in this run or in earlier ones.
        units = [p["provenance"] for p in ({"provenance": spent}, *parts) if p.get("provenance")]
        seconds = sum(u["seconds"] for u in units) + time.perf_counter() - started
        more = {"eval_samples": len(test_set), "seconds": round(seconds, 1)}
        for counter in ("gpu_joules", "cpu_joules"):
            known = [u[counter] for u in units]
            more[counter] = None if None in known or not known else round(sum(known), 1)
        return {**header, "provenance": provenance(**facts, **more), "rows": rows}

    whole = {"controls": list(controls), "latency": [latency_batch, latency_repeats]}
    return _once(path, {**settings, **whole}, evaluate)


def _once(path: Path, settings: dict, compute: Callable[[], dict], needs: Path | None = None) -> dict:
    """`measure.cached`, which counts only if `needs` is there too. Of several processes, which would write over each
    other, the first one writes, and nothing is taken up but a training's checkpoints."""
    if place()[1] == 1:
        if needs is not None and not needs.exists():
            path.unlink(missing_ok=True)
        return cached(path, settings, compute)
    result = compute()
    on_first(partial(write_json, path, result))
    return result


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(model: str, data):
    from zsaa.models import load_model

    return load_model(model, kind="sequence-classification", num_labels=len(data.label_names), device=_device())


def _tokenized(split, tokenizer, max_length: int, net):
    """`tokenize`, if the model has that many positions: a tokenizer may not know the limit of its model."""
    from zsaa.data.tasks import tokenize

    limit = find_decoder(net)[0].config.max_position_embeddings
    if max_length > limit:
        raise ValueError(f"max_length is {max_length}, but the model has {limit} positions: choose 1 to {limit}.")
    return tokenize(split, tokenizer, max_length)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """An option for each field of a Recipe, and --recipe, whose fields they change."""
    parser.add_argument("--recipe", choices=RECIPES, default="paper", help="the fields that the options below change")
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif field.name == "alpha_range":
            parser.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"), default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS)


def recipe_of(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> Recipe:
    """The Recipe in parsed arguments; one that there cannot be ends the program, as other wrong arguments do."""
    given = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(Recipe) if hasattr(chosen, f.name)}
    try:
        return Recipe.named(chosen.recipe, **given)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def targets_of(given: Sequence[float], parser: argparse.ArgumentParser) -> tuple:
    """The MAC reductions in parsed arguments, whole ones as such."""
    try:
        reductions = [check_number("--targets", target, "[1, inf)") for target in given]
    except ValueError as error:
        parser.error(str(error))
    return tuple(int(target) if target == int(target) else target for target in reductions)


def command_of(module: str, arguments: Sequence[str]) -> str:
    """The command line for a result file."""
    given = list(arguments)
    if "--output-dir" in given:  # a path of one machine, and no part of how
        found = given.index("--output-dir")
        del given[found : found + 2]
    launcher = "python" if place()[1] == 1 else f"torchrun --nproc-per-node {place()[1]}"
    return " ".join([f"{launcher} -m {module}", *given])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.experiment", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="imdb")
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, or a folder in the hub's layout")
    parser.add_argument("--train", type=int, help="number of training samples (default: all)")
    parser.add_argument("--test", type=int, help="number of held-out samples (default: all)")
    parser.add_argument("--output-dir", default="outputs/experiments")
    parser.add_argument("--name")
    parser.add_argument("--targets", nargs="+", type=float, help="MAC reductions (default: the paper's speed-ups)")
    parser.add_argument(
        "--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS, help="which curves to evaluate"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="one experiment, and one result file, for each seed")
    parser.add_argument("--adapter", help="no training: evaluate a committed adapter, a folder of results/adapters")
    parser.add_argument("--latency-only", action="store_true", help="no training: only time the dial")
    parser.add_argument("--latency-batches", type=int, nargs="+", default=[1, 8, 32], help="for --latency-only")
    parser.add_argument("--latency-repeats", type=int, default=15, help="0 leaves latency out, as torchrun does")
    parser.add_argument("--settings-of", help="for --latency-only: time the settings of this result file again, with "
                        "random weights and tokens")  # fmt: skip
    parser.add_argument("--lengths-only", action="store_true", help="no training: what the lengths say (Figure 2 B, C)")
    parser.add_argument("--shape", choices=["gpt2"], help="for --lengths-only: count GPT-2's layers, not the model's")
    parser.add_argument("--eval-batch-size", type=int, help="default: 8, on a GPU 64")
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints; 0 leaves them out")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    add_recipe(parser)
    chosen = parser.parse_args(arguments)
    recipe = recipe_of(chosen, parser)
    start()

    def given_as(*names: str) -> dict:
        return {name: getattr(chosen, name) for name in names}

    shared = given_as("task", "source", "test", "output_dir", "name")
    shared["command"] = command_of("zsaa.experiment", sys.argv[1:] if arguments is None else arguments)
    if chosen.targets:
        shared["targets"] = targets_of(chosen.targets, parser)
    evaluation = given_as("controls", "eval_batch_size", "latency_repeats", "progress")
    if chosen.lengths_only:
        fixed = {"tau": recipe.tau, "schedule": recipe.schedule, "max_length": recipe.max_length}
        done = [lengths(**shared, **given_as("model", "shape"), **fixed)]
    elif chosen.latency_only:
        fixed = {"tau": recipe.tau, "schedule": recipe.schedule, "max_length": recipe.max_length}
        fixed["repeats"] = chosen.latency_repeats
        done = [latency(**shared, **given_as("model", "settings_of"), **fixed, batches=chosen.latency_batches)]
    elif chosen.adapter:
        done = [run_adapter(chosen.adapter, **shared, **evaluation)]
    else:
        done = []
        for seed in chosen.seeds or [recipe.seed]:
            named = f"{chosen.name}-seed{seed}" if chosen.name and chosen.seeds else chosen.name
            options = {**shared, **evaluation, **given_as("model", "train"), "name": named}
            done.append(run(replace(recipe, seed=seed), **options, save_steps=chosen.save_steps or None))
    for result in done if place()[0] == 0 else ():
        print(result["name"])
        for row in result["rows"]:
            print(" ", _line(row))
    return 0


def exit_code(main: Callable[[], int], module: str) -> int:
    """Of the program `main`; 1, and the error in a line, where the user can mend it: that needs no traceback."""
    from zsaa.models import AssetError

    try:
        return main()
    except (AssetError, ValueError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 1


def _line(row: dict) -> str:
    parts = [f"{row['control']:>6} {row['mac_reduction']:6.2f}x"]
    if "accuracy" in row:
        parts.append(f"{'F1' if 'f1' in row else 'accuracy'} {measured(row):.2f} [{row['ci95'][0]}, {row['ci95'][1]}]")
    if "preserved" in row:
        parts.append(f"alpha {row['alpha']:.4f}  preserved {row['preserved']:.3f}")
    if "latency_batch" in row:
        parts.append(f"speed-up {row['speedup']} on batch {row['latency_batch']} x {row['latency_tokens']}")
    return "  ".join(parts)


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.experiment"))
