"""Runs rows of the ablation (ablation/config.yaml), one result file each; finished ones are not run again.

python -m ablation.run --task imdb --rows paper truncated-ends --seeds 0 1 2
python -m ablation.run --continuation
python -m ablation.run --task imdb --compute 1        (all rows, at equal training compute)
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file

from ablation import continuation, depth, exits, films, kept, words
from ablation.curves import curve
from ablation.scorers import Evidence, make, price
from ablation.train import train
from ablation.training import Training
from ablation.variants import Variant
from zsaa.data.tasks import load_task, tokenize
from zsaa.learned.salience import FILE as SALIENCE_FILE
from zsaa.measure import cached, provenance, write_json
from zsaa.models import load_model

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "ablation"
SCHEDULE_FILE = "schedule.json"  # of a row that learned its schedule
EVIDENCE_FILE = "evidence.safetensors"  # of a scorer that the bench alone knows


def _code(*modules: str) -> str:
    digest = hashlib.sha256()
    for name in modules:
        digest.update((FOLDER / f"{name}.py").read_bytes())
    return digest.hexdigest()


def load_config(path: str | Path = FOLDER / "config.yaml") -> dict:
    """The configuration, with every row's fields checked."""
    config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for name, row in config["rows"].items():
        if unknown := set(row) - {"variant", "training", "sides", "group", "about"}:
            raise ValueError(
                f"{path}: row {name!r} has {sorted(unknown)}; a row takes variant, training, sides, group, about."
            )
        if "group" in row and row["group"] not in config.get("groups", {}):
            groups = ", ".join(config.get("groups", {}))
            raise ValueError(f"{path}: row {name!r}: no group {row['group']!r}; the groups are {groups}.")
        try:
            Variant(**row.get("variant", {})), Training(**row.get("training", {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {name!r}: {error}") from error
    return config


_tokenized: dict[str, tuple] = {}  # for the next row of the same call


def _data(task: str, settings: dict, tokenizer, limits: dict):
    """((train samples, labels), (test samples, labels), provenance line)"""
    key = str((task, settings, limits, tokenizer.name_or_path))
    if key not in _tokenized:
        _tokenized[key] = _load_data(task, settings, tokenizer, limits)
    return _tokenized[key]


def _load_data(task: str, settings: dict, tokenizer, limits: dict):
    source = settings.get("source", task)
    if "films" in settings:  # the second side is a part of its own; the test part is for ablation.reading alone
        (one, _), (other, origin) = films.side("train"), films.side(settings["films"])
        splits = one.select(range(limits["train"])), other.select(range(limits["test"]))
    elif "cut" in settings:
        data = load_task(source)
        splits, origin = _cut_anew(data, settings["cut"], **limits), f"{data.source}, cut anew"
    else:
        data = load_task(source, train=limits["train"], test=limits["test"], seed=0)
        splits, origin = (data.train, data.test), data.source
    sides = []
    for split in splits:
        if "sentences" in settings:
            from datasets import Dataset

            split = Dataset.from_dict(dict(zip(("text", "label"), passages_of(split, settings))))
        tokens = tokenize(split, tokenizer, settings["max_length"])
        sides.append((list(tokens["input_ids"]), list(tokens["labels"])))
    return *sides, origin


def passages_of(split, settings: dict) -> tuple[list[str], list[int]]:
    """The texts and labels of a split, as they are or made into passages of so many sentences."""
    texts, labels = list(split["text"]), list(split["label"])
    return (
        depth.passages(texts, labels, settings["sentences"], seed=0)[:2] if "sentences" in settings else (texts, labels)
    )


def _cut_anew(data, seed: int, train: int, test: int) -> tuple:
    """(train, test) of other texts: both sides of a task are mixed, and dealt out anew."""
    from datasets import concatenate_datasets

    mixed = concatenate_datasets([data.train, data.test]).shuffle(seed=seed)
    return mixed.select(range(test, test + train)), mixed.select(range(test))


def _file(scorer: torch.nn.Module) -> str:
    """The name of a saved scorer's file; the package reads the second kind, too."""
    return EVIDENCE_FILE if isinstance(scorer, Evidence) else SALIENCE_FILE


def _read(folder: Path, model, rule: Variant, training: Training) -> tuple:
    """(model, scorer, log) of a row that --save left: nothing is trained, and the log says so."""
    from peft import PeftModel

    learned, log = folder / SCHEDULE_FILE, {}
    if training.bends:
        if not learned.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {SCHEDULE_FILE}, and this row is judged under the schedule that it learned, not "
                "the one that it began with. Train and --save it anew, or write the file from the row's result: "
                '{"schedule": what its log says under "schedule"}.'
            )
        log["schedule"] = json.loads(learned.read_text(encoding="utf-8"))["schedule"]
        if len(log["schedule"]) != model.config.num_hidden_layers:
            raise ValueError(
                f"{learned} has {len(log['schedule'])} weights, and the model has {model.config.num_hidden_layers} "
                "layers: give one for each, or the folder of this model's row."
            )
    model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    probe = make(training.probe, model.config, rule, model.config.num_labels).eval()
    probe.load_state_dict({k: v.float() for k, v in load_file(folder / _file(probe)).items()})
    return model, probe, {"steps": 0, "samples": 0, "epochs_of_compute": 0.0, "loss": [], "seconds": 0.0, **log}


def run_row(name: str, task: str, seed: int, options: argparse.Namespace, config: dict) -> dict:
    """One row's result, from results/ablation/<task>/<name>[-seed N].json if it is there."""
    row, settings = config["rows"][name], config["tasks"][task]
    given = {**settings.get("training", {}), **row.get("training", {}), "seed": seed}
    if options.compute is not None:
        given |= {"compute": options.compute, "epochs": None}
    if options.epochs is not None:
        given |= {"epochs": options.epochs}
    for field in ("learning_rate", "seconds"):
        if getattr(options, field) is not None:
            given |= {field: getattr(options, field)}
    given |= {"rows": options.pass_rows} if options.pass_rows is not None else {}
    variant, training = Variant(**row.get("variant", {})), Training(**given)
    limits = {side: min(settings[side], getattr(options, side) or settings[side]) for side in ("train", "test")}
    targets = options.targets or config["targets"]
    suffix = (f"-seed{seed}" if seed else "") + ("-compute" if options.compute is not None else "")
    suffix += f"-epochs{options.epochs:g}" if options.epochs is not None else ""
    suffix += f"-rate{options.learning_rate:g}" if options.learning_rate is not None else ""
    suffix += f"-seconds{options.seconds:g}" if options.seconds is not None else ""
    path = Path(options.output_dir) / task / f"{name}{suffix}.json"
    modules = ("forward", "train", "scorers", "depth", "kept", "films", *("exits", "cascade") * bool(training.exits))
    unit = {
        "row": name, "task": task, "model": options.model, "variant": asdict(variant), "training": asdict(training),
        "data": {**settings, **limits}, "targets": targets, "sides": row.get("sides", []),
        "ablation": _code(*modules),
        **({"saved": options.saved} if options.saved else {}),
    }  # fmt: skip

    def compute() -> dict:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, for milliseconds, at every new shape
        begun = replace(training, start="", lora=0) if options.saved else training  # what is saved brings its adapter
        model, tokenizer = kept.build(options.model, begun, device)
        rule = replace(variant, scorer_macs=price(training.probe, model.config, variant, classes=2))
        (texts, labels), (held_out, answers), source = _data(task, settings, tokenizer, limits)
        if options.saved:
            model, probe, log = _read(Path(options.saved), model, rule, training)
            model = model.to(torch.bfloat16 if device == "cuda" or training.half else torch.float32).eval()
        else:
            more = {"verdicts": _taught(options, task, training, texts, device)} if training.teacher else {}
            probe, log = train(model, texts, labels, rule, training, **more)
        rule = replace(rule, schedule=tuple(log["schedule"])) if training.bends else rule
        if options.save:
            model.half().save_pretrained(Path(options.save) / name)
            tokenizer.save_pretrained(Path(options.save) / name)
            if isinstance(probe, torch.nn.Module):
                weights = {k: v.half() for k, v in probe.state_dict().items()}
                save_file(weights, Path(options.save) / name / _file(probe))
            if training.bends:
                write_json(Path(options.save) / name / SCHEDULE_FILE, {"schedule": list(rule.schedule)})
            model.to(torch.bfloat16 if device == "cuda" or training.half else torch.float32)
        if options.weights:
            kept.keep(options.weights, path.stem, model, probe, rule)
        raw = Path(options.weights) / f"{path.stem}-said.npz" if options.weights else None
        rows = judge(model, held_out, answers, rule, training, probe, targets, row.get("sides", []), raw=raw)
        for found in rows:
            print(f"  {name} {found['control']} {found['mac_reduction']:.2f}x: {found['accuracy']}%", flush=True)
        return {
            "name": f"{task}-{name}", "kind": "ablation", "row": name, "about": row["about"],
            "model": {"name": options.model},
            "task": {"name": task, "source": source, "substitute": True, "split": settings.get("films", "test")},
            "variant": asdict(rule), "training": asdict(training), "log": log, "rows": rows,
            "provenance": provenance(seed=seed, train_samples=len(texts), eval_samples=len(held_out)),
        }  # fmt: skip

    return cached(path, unit, compute)


def judge(model, samples, labels, rule, training: Training, probe, targets, sides, ways=None, raw=None) -> list[dict]:
    """The curve of a trained row; of a shortened model without a dial its one point. ways, raw: see `exits.curve`."""
    if training.exits:
        return exits.curve(model, samples, labels, rule, training, probe, targets, ways, raw)
    if not training.layers or training.sampling != "conventional":
        return curve(model, samples, labels, rule, training, probe, targets, sides=sides)
    return kept.by_fewer_layers(curve(model, samples, labels, rule, training, probe, [1]), model)


def _taught(options: argparse.Namespace, task: str, training: Training, texts: list, device: str) -> torch.Tensor:
    """The teacher's verdicts on whole texts."""
    result = Path(options.output_dir) / task / f"{training.teacher}.json"
    if not options.weights or not result.is_file():
        raise FileNotFoundError(
            f"the teacher {training.teacher!r} is not there: run it first, with the same --weights and --output-dir "
            f"(looked for {result})."
        )
    model, *_ = kept.read(options.weights, training.teacher, json.loads(result.read_text()), device)
    return kept.verdicts(model, texts)


def run_continuation(options: argparse.Namespace, config: dict) -> dict:
    """The untuned model on held-out reviews, all variants, one result file."""
    settings = config["continuation"]
    count = options.windows or settings["windows"]
    variants = {name: Variant(**fields) for name, fields in settings["variants"].items()}
    targets = options.targets or settings["targets"]
    unit = {"model": options.model, "windows": count, "targets": targets, "ablation": _code("forward", "continuation"),
            "variants": {name: asdict(v) for name, v in variants.items()}}  # fmt: skip

    def compute() -> dict:
        model, tokenizer = load_model(options.model, device="cuda" if torch.cuda.is_available() else "cpu")
        data = load_task("imdb", train=1, test=min(8 * count, 4900), seed=0)
        texts = [tokenizer(text.replace("<br />", " ")).input_ids for text in data.test["text"]]
        ids = continuation.windows(texts, settings["prompt"], settings["scored"], count).to(model.device)
        return {
            "name": "continuation", "kind": "ablation", "row": "continuation",
            "about": "untuned: the next 32 tokens behind a pruned prompt of 224",
            "model": {"name": options.model}, "task": {"name": "imdb", "source": data.source, "substitute": True},
            "variants": unit["variants"], "rows": continuation.curve(model, ids, settings["scored"], variants, targets),
            "provenance": provenance(seed=0, eval_samples=count),
        }  # fmt: skip

    return cached(Path(options.output_dir) / "continuation.json", unit, compute)


def run_words(options: argparse.Namespace, config: dict) -> dict:
    """What a bag of words makes of the tokens that each rule keeps, on one task."""
    settings = config["tasks"][options.task]
    limits = {side: min(settings[side], getattr(options, side) or settings[side]) for side in ("train", "test")}
    targets = options.targets or config["targets"]
    unit = {"model": options.model, "task": options.task, "data": {**settings, **limits}, "targets": targets,
            "ablation": _code("words", "depth")}  # fmt: skip

    def compute() -> dict:
        model, tokenizer = load_model(options.model, kind="sequence-classification", num_labels=2)
        train, test, source = _data(options.task, settings, tokenizer, limits)
        return {
            "name": f"words-{options.task}", "kind": "ablation", "row": "words",
            "about": "a bag of words on what each rule keeps",
            "model": {"name": f"bag of words, tokens of {options.model}"},
            "task": {"name": options.task, "source": source, "substitute": True},
            "rows": words.curve(train, test, model.config, targets),
            "provenance": provenance(seed=0, train_samples=len(train[0]), eval_samples=len(test[0])),
        }  # fmt: skip

    return cached(Path(options.output_dir) / f"words-{options.task}.json", unit, compute)


def main(arguments: list[str] | None = None) -> int:
    config = load_config()
    parser = argparse.ArgumentParser(prog="python -m ablation.run", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--task", choices=list(config["tasks"]), default="imdb")
    add("--rows", nargs="+", choices=list(config["rows"]), metavar="ROW", help="default: all, in the order of the file")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--model", default="smollm2-135m")
    add("--epochs", type=float, help="in place of the task's")
    add("--learning-rate", type=float, help="in place of the row's")
    add("--compute", type=float, help="equal compute: stop after so many epochs' worth of MACs at alpha = 1")
    add("--seconds", type=float, help="training ends by then, its learning rate at 0, whatever its epochs")
    add("--pass-rows", type=int, help="rows of a training pass, padding included: fewer take less memory")
    add("--train", type=int, help="at most so many training samples")
    add("--test", type=int, help="at most so many held-out samples")
    add("--targets", nargs="+", type=float, help="MAC reductions to evaluate")
    add("--continuation", action="store_true", help="the untuned rows instead")
    add("--words", action="store_true", help="a bag of words on what each rule keeps, instead")
    add("--windows", type=int, help="held-out windows, with --continuation")
    add("--save", help="a folder for the trained models (adapters), in float16, and their scorers")
    add("--weights", help="a folder where each row's model is left as it was judged, and where teachers are read")
    add("--saved", help="evaluate an adapter and its scorer in this folder, as --save leaves them, without training")
    add("--output-dir", default=str(RESULTS))
    add("--list", action="store_true", help="list the rows, and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, row in config["rows"].items():
            print(f"{name:26} {row['about']}")
        return 0
    if options.continuation:
        for row in run_continuation(options, config)["rows"]:
            print(json.dumps({k: v for k, v in row.items() if k != "nll"}))
        return 0
    if options.words:
        for row in run_words(options, config)["rows"]:
            print(f"{row['control']:8} {row['target']:4g}x  {row['accuracy']:.1f}%")
        return 0
    for seed in options.seeds:
        for name in options.rows or config["rows"]:
            print(f"{options.task}, {name}, seed {seed}", flush=True)
            result = run_row(name, options.task, seed, options, config)
            print(f"  {result['log']['steps']} steps, {result['log']['seconds']} s training", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
