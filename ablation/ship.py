"""Turns what `ablation.run --save` left of a row into a folder that zsaa.finetune.load reads, with the dial on.

python -m ablation.run --task imdb --rows lora-crops --epochs 5 --save outputs/rows
python -m ablation.ship outputs/rows/lora-crops --task imdb

With --curve, the row's result becomes one of the kit's: results/accuracy/<the folder's name>.json, of which Table 1,
the figures and the slider know how a committed adapter was trained, and what it can do.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ablation import run
from ablation.training import STRONGEST, Training
from ablation.variants import Variant
from zsaa.data.tasks import load_task
from zsaa.experiment import model_record, task_record, write_json
from zsaa.finetune import SETTINGS_FILE, Recipe, alpha_range, method_of
from zsaa.kit.store import RESULTS
from zsaa.learned import salience
from zsaa.models import load_model
from zsaa.rule import LEARNED, SPREAD, check_score

METHODS = {"alpha": "alpha-sampled"}  # where the bench and the package have different names for what is drawn


def settings_of(folder: Path, variant: Variant, training: Training, lengths: Sequence[int]) -> dict:
    """The dial's settings for a trained row; ValueError for a variant that the package does not have. lengths: tokens
    of the samples that it was trained on."""
    learned = (folder / salience.FILE).is_file()
    if training.probe not in ("", "wide") or learned != bool(training.probe):
        raise ValueError(
            f"{folder} was trained with probe={training.probe!r}, and {salience.FILE} is{'' if learned else ' not'} "
            "there: of learned scores the package knows the one whose heads have a hidden layer and are taught by "
            "gradients, probe='wide'."
        )
    free = {name: getattr(variant, name) for name in ("score", "schedule", "tau", "scorer_macs")}
    if training.bends or variant.schedule not in SPREAD or variant != Variant(**free):
        raise ValueError(
            f"the package has no {variant}{', learned' * training.bends}: its schedules are {' and '.join(SPREAD)}, "
            "with no reference, and sinks, recent, smooth and dropped are as in the paper."
        )
    score = LEARNED if learned else check_score(variant.score)
    rule = {"tau": variant.tau, "score": score, "schedule": variant.schedule}
    drawn = {"alpha_range": training.alpha_range}
    if training.sampling in ("sandwich", "ladder", "log"):
        drawn = {"sampling": "ladder", "strongest": STRONGEST}
    elif training.sampling != "alpha":  # nothing was drawn, but where it went on from an adapter that has met the dial
        earlier = Path(training.start) / SETTINGS_FILE
        known = training.start and earlier.is_file() and json.loads(earlier.read_text(encoding="utf-8"))["alpha_range"]
        return {"alpha": 1.0, **rule, "alpha_range": known or None}
    model, _ = load_model(str(folder), kind="sequence-classification")
    return {"alpha": 1.0, **rule, "alpha_range": alpha_range(Recipe(**rule, **drawn), model, lengths)}


def ship(folder: str | Path, variant: Variant, training: Training, lengths: Sequence[int], base: str) -> Path:
    """Write the settings into `folder`, beside the weights and the scorer that lie there already. base: the name by
    which an adapter finds its base model anywhere (the bench notes the folder that it was loaded from)."""
    folder = Path(folder)
    adapter, config = folder / "adapter_config.json", folder / "config.json"
    settings = settings_of(folder, variant, training, lengths)
    if adapter.is_file():
        noted = json.loads(adapter.read_text(encoding="utf-8"))
        adapter.write_text(json.dumps({**noted, "base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    else:
        noted = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**noted, "zsaa": settings}, indent=2) + "\n", encoding="utf-8")
    return folder


def curve_of(result: dict, folder: Path, length: int) -> dict:
    """The result of a row as one of the kind "curve", named after `folder`. Its recipe says what the row has in common
    with zsaa.finetune.Recipe, and what it went on from. length: the longest text in tokens."""
    training, variant = result["training"], result["variant"]
    rule = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    shared = ("sampling", "distill", "crops", "learning_rate", "batch_size", "epochs", "dropout", "seed", "start")
    recipe = {
        "method": method_of(training["sampling"], METHODS.get(training["sampling"], training["sampling"])),
        "tuning": "lora" if training["lora"] else "full",
        **{key: rule[key] for key in ("alpha_range", "score", "schedule")},
        **{key: training[key] for key in shared},
        "tau": variant["tau"], "lora_rank": training["lora"], "max_length": length, "precision": "bf16",
    }  # fmt: skip
    data = load_task(result["task"]["name"], train=1, test=result["provenance"]["eval_samples"], seed=0)
    return {
        "name": folder.name, "kind": "curve", "command": None, "row": result["row"],
        "model": model_record(result["model"]["name"]), "task": task_record(data), "recipe": recipe,
        "train": {k: result["log"][k] for k in ("steps", "seconds")}, "evaluation": {"precision": "bf16"},
        "provenance": result["provenance"], "rows": [r for r in result["rows"] if r["control"] != "scorer"],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    config = run.load_config()
    parser = argparse.ArgumentParser(prog="python -m ablation.ship", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="the row's folder below that of --save")
    parser.add_argument("--row", choices=list(config["rows"]), metavar="ROW", help="default: the folder's name")
    parser.add_argument("--task", choices=list(config["tasks"]), default="imdb")
    parser.add_argument("--model", default="smollm2-135m", help="the base model, by name")
    parser.add_argument("--train", type=int, help="as for the run")
    parser.add_argument("--curve", type=Path, metavar="RESULT", help="the row's result file: make it one of results/")
    options = parser.parse_args(arguments)
    row, settings = config["rows"][options.row or options.folder.name], config["tasks"][options.task]
    variant = Variant(**row.get("variant", {}))
    training = Training(**{**settings.get("training", {}), **row.get("training", {})})
    limits = {"train": min(settings["train"], options.train or settings["train"]), "test": 1}
    _, tokenizer = load_model(options.model, kind="sequence-classification", num_labels=2)
    (texts, _), *_ = run._data(options.task, settings, tokenizer, limits)
    ship(options.folder, variant, training, list(map(len, texts)), options.model)
    print(f"{options.folder} is ready for zsaa.finetune.load.")
    if options.curve:
        curve = curve_of(json.loads(options.curve.read_text()), options.folder, settings["max_length"])
        write_json(RESULTS / "accuracy" / f"{curve['name']}.json", curve)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
