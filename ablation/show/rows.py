"""Result files of the ablation: which there are, what they are called, and which of them the story is about."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import yaml

from zsaa.kit.figures.style import DATA_SETS


def title_of(task: str) -> str:
    return "A verdict at a random depth" if task == "depth" else DATA_SETS.get(task, (task,))[0]


@lru_cache
def config() -> dict:
    """The configuration as it stands in the file; ablation.run.load_config checks it."""
    return yaml.safe_load((Path(__file__).parents[1] / "config.yaml").read_text(encoding="utf-8"))


def load(folder: str | Path, task: str) -> dict[str, dict]:
    """Result files of one task by row; of several seeds or budgets of a row, each under its file's name. In the order
    of the configuration; a row's runs on the task's own budget first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder, task).glob("*.json"))}
    return {name: found[name] for name in sorted(found, key=lambda name: _place(found[name]))}


def _place(result: dict) -> tuple:
    rows = list(config()["rows"])
    return (rows.index(result["row"]) if result["row"] in rows else len(rows), not is_main(result), seed_of(result))


def cell_at(result: dict, control: str, target: float) -> dict | None:
    return next((r for r in result["rows"] if (r["control"], r["target"]) == (control, target)), None)


def curves(results: dict[str, dict]):
    """(name, result, control) of every curve. A scorer alone is a point, not a curve: see `scorer_of`."""
    for name, result in results.items():
        for control in dict.fromkeys(r["control"] for r in result["rows"]):
            if control != "scorer":
                yield (name if control == "alpha" else f"{name}, {control} tokens"), result, control


def scorer_of(result: dict) -> dict | None:
    """What the learned scores know by themselves: the first scored layer's votes, summed."""
    return next((r for r in result["rows"] if r["control"] == "scorer"), None)


def seed_of(result: dict) -> int:
    return result.get("training", {}).get("seed", 0)


def budget_of(result: dict) -> str:
    """What a run was trained for, where it is not the task's own epochs in ablation/config.yaml; else ""."""
    training = result.get("training", {})
    if training.get("compute") is not None:
        return f"compute of {training['compute']:g} epoch" + "s" * (training["compute"] != 1)
    task = config()["tasks"].get(result.get("task", {}).get("name"), {})
    epochs = training.get("epochs")
    if training.get("seconds") is not None:
        return f"{epochs:g} epochs or {training['seconds']:g} s"
    if epochs in (None, task.get("training", {}).get("epochs", 1)):
        return ""
    return f"{epochs:g} epochs" + " more" * bool(training.get("start"))


def is_main(result: dict) -> bool:
    """Trained for the task's own epochs, neither for others nor to equal compute?"""
    return not budget_of(result)


def points_of(result: dict, control: str) -> tuple[list[dict], list[float], list[float]]:
    """(rows, MAC reductions, accuracies) of a curve, the mildest setting first; of settings that the dial cannot tell
    apart (tau) the last."""
    rows = sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])
    rows = [r for r, after in zip(rows, [*rows[1:], None]) if not after or after["mac_reduction"] > r["mac_reduction"]]
    return rows, [r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows]


# Those that the story is about: name, colour, marker, dashes, control, and the rows that may play it. The first that
# was run plays it: rivals at the learning rate of zsaa+, or else at the paper's.
ROLES = (
    ("salience (zsaa+)", "#0072B2", "o", "-", "alpha", ("wide-tau2",)),
    ("evidence, one drop", "#882255", "^", "-", "alpha", ("evidence-smooth",)),
    ("paper's recipe, dial", "#D55E00", "s", "-", "alpha", ("paper-faster", "paper")),
    ("conventional, dial", "#000000", "P", "-", "alpha", ("conventional-faster", "conventional")),
    ("tuned on both ends", "#CC79A7", "D", "--", "ends", ("truncated-ends-faster", "truncated-ends")),
    ("tuned on last tokens", "#009E73", "v", "--", "last", ("truncated-last-faster", "truncated-last")),
)

OURS, EVIDENCE = ROLES[0][-1], ROLES[1][0]


def protagonists(results: dict[str, dict]) -> dict[tuple[str, str], tuple[str, str, str, str]]:
    """(row, control) -> name, colour, marker, dashes of those that the story is about, as far as they were run for the
    task's epochs (see `is_main`). All others are grey."""
    run = {result["row"] for result in results.values() if is_main(result)}
    played = ((next((row for row in rows if row in run), None), control, look) for *look, control, rows in ROLES)
    return {(row, control): tuple(look) for row, control, look in played if row}


def own_row(results: dict[str, dict]) -> str | None:
    """The row that plays zsaa+ on this task."""
    return next((row for row, _ in protagonists(results) if row in OURS), None)


def short(row: str) -> str:
    """ "salience" of "salience (zsaa+)"; a row that is no protagonist by its own name."""
    return next((name for name, *_, rows in ROLES if row in rows), row).split(" (")[0]
