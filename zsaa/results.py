"""Result files: reading them, and what a row of one is called and stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zsaa import paper, stats

RESULTS = Path(__file__).resolve().parent.parent / "results"  # measurements committed with the source


def load_results(*folders: str | Path, kind: str | None = None) -> list[dict]:
    """Result files (*.json) of the folders, by name; a damaged one raises ValueError with its path."""
    found = []
    for folder in folders or (RESULTS,):
        for path in sorted(Path(folder).glob("*.json")):
            try:
                result = json.loads(path.read_text())
                if kind is None or result["kind"] == kind:
                    found.append(result)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a result file ({error!r}). Remove it and run it again.") from error
    return found


def label(result: dict, short: bool = False) -> str:
    """What a curve is: how it was trained; unless `short`, also data set, model, and on what it ran."""
    recipe, hardware = result["recipe"], result["provenance"]["hardware"]
    training = f"{recipe['method']} ({'LoRA' if recipe['tuning'] == 'lora' else 'full'})"
    return (
        training if short else f"{result['task']['name']}, {result['model']['name']}, {training}, {hardware['device']}"
    )


def training(result: dict, samples: str) -> str:
    """How the model of a result of the kind "perplexity" or "choice" was trained for it: "untuned", "tuned before", or
    the method and, behind a semicolon, epochs (if these, and no number of steps, were asked for), steps, `samples`
    (what they are called) in a step and in all, and the seed."""
    recipe, log = result["recipe"], result.get("train")
    if not log:
        return "untuned" if recipe["method"] in ("untuned", "none") else "tuned before"
    how = f"{recipe['method']} {'LoRA ' if recipe['tuning'] == 'lora' else ''}fine-tuning"
    many = f"{result['provenance']['train_samples']:,} {samples}"
    epochs = f"{recipe['epochs']:g} epochs, " if recipe.get("max_steps") == -1 else ""
    return f"{how}; {epochs}{log['steps']:,} steps of {step_size(result)} of {many}, seed {recipe['seed']}"


def step_size(result: dict) -> int:
    """Samples that a step of a result's training took, of all processes."""
    recipe = result["recipe"]
    return recipe["batch_size"] * recipe["gradient_accumulation"] * result["train"]["processes"]


def schedule_of(result: dict) -> str:
    """The schedule by which the dial dropped; results that name none are of the paper's."""
    return result["recipe"].get("schedule", "geometric")


def by_eq_2(result: dict) -> bool:
    """Did the dial drop by the paper's schedule?"""
    return schedule_of(result) == "geometric"


def trained_as_in_paper(result: dict) -> bool:
    """By section 4.2's settings, on the data set's own training split?"""
    recipe = result["recipe"]
    as_set = all(recipe.get(key, value) == value for key, value in paper.TABLE_1_RECIPE.items())
    return as_set and not result["task"].get("training_substitute")


def stand_ins(result: dict) -> str:
    """What of the paper's Table 1 a curve replaces: "" or "model", "model, data and training", ... A model counts as
    the paper's if it came from its repository on the hub; data, if they are held out for real."""
    model = result["model"]
    found = [] if model["name"] in paper.TABLE_1_HUB and model.get("kind") == "hub" else ["model"]
    found += ["data"] if result["task"]["substitute"] else []
    found += [] if trained_as_in_paper(result) else ["training"]
    return " and ".join(part for part in (", ".join(found[:-1]), *found[-1:]) if part)


def status(result: dict) -> str:
    return f"substitute: {stand_ins(result)}" if stand_ins(result) else "the paper's model, data and settings"


def over_seeds(results: Sequence[dict]) -> list[dict]:
    """Runs that differ in their seed alone become one, with "seeds" and rows of means; see `stats.over_seeds`. Each row
    gets "covers": what chance its interval stands for."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        recipe = {k: v for k, v in result["recipe"].items() if k != "seed"} | {"schedule": schedule_of(result)}
        same = [result["model"]["name"], result["task"], recipe, result.get("adapter"), result.get("evaluation")]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(result)
    merged = []
    for group in groups.values():
        group = list({r["recipe"].get("seed", r["provenance"]["seed"]): r for r in group}.values())
        rows: dict[tuple, list[dict]] = {}
        for result in group:
            for row in result["rows"]:
                rows.setdefault((row["control"], row["target"]), []).append(row)
        first = {**group[0], "seeds": sorted(r["recipe"].get("seed", r["provenance"]["seed"]) for r in group)}
        first["rows"] = [_mean(same) for same in rows.values()]
        merged.append({**first, "name": ", ".join(r["name"] for r in group)})
    return merged


def _mean(rows: list[dict]) -> dict:
    metric = "f1" if "f1" in rows[0] else "accuracy"
    mean, interval, covers = stats.over_seeds([r[metric] for r in rows], [r["ci95"] for r in rows])
    # Of several seeds, only what they share and the means: sample by sample they have their own files.
    shared = {k: v for k, v in rows[0].items() if all(k in r and r[k] == v for r in rows)}
    return {**shared, metric: round(mean, 2), "ci95": list(interval), "covers": covers}


def rows_of(result: dict, control: str) -> list[dict]:
    return sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])


def measured(row: dict) -> float:
    """The task's metric: F1 where the row has it, else accuracy; percent. "ci95" is its interval."""
    return row["f1"] if "f1" in row else row["accuracy"]


def with_interval(row: dict) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(measured(row), *row["ci95"])


def to_bits(flags: Sequence[int]) -> str:
    """0s and 1s as a hexadecimal number, the first one its highest bit."""
    return f"{int(''.join(map(str, flags)), 2):0{(len(flags) + 3) // 4}x}"


def from_bits(bits: str, n: int) -> list[int]:
    """The `n` flags that `to_bits` packed."""
    return [int(bit) for bit in f"{int(bits, 16):0{n}b}"]


def per_sample(row: dict) -> tuple[list[int], list[int]]:
    """(labels, predictions) of an F1 row; of an accuracy row all 1, and which samples were right."""
    right = from_bits(row["right"], row["n"])
    if "predicted" not in row:
        return [1] * row["n"], right
    predicted = from_bits(row["predicted"], row["n"])
    return [p if r else 1 - p for p, r in zip(predicted, right)], predicted


def pack(kept: dict[float, list[list[int]]], tokens: Sequence[str]) -> dict:
    """What `preservation_figure` draws, small enough for a result file: per alpha and layer a hexadecimal bit mask of
    the kept positions (position 0 is the lowest bit)."""
    masks = {str(a): [f"{sum(1 << p for p in layer):x}" for layer in layers] for a, layers in kept.items()}
    return {"tokens": list(tokens), "kept": masks}


def unpack(row: dict) -> tuple[dict[float, list[list[int]]], list[str]]:
    """The arguments of `preservation_figure` from a row written by `pack`."""
    n = len(row["tokens"])
    kept = {
        float(alpha): [[p for p in range(n) if int(mask, 16) >> p & 1] for mask in masks]
        for alpha, masks in row["kept"].items()
    }
    return kept, row["tokens"]
