"""Result files: reading them, and the rows in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from zsaa.kit.labels import schedule_of
from zsaa.measure import stats
from zsaa.measure.stats import from_bits

RESULTS = Path(__file__).resolve().parents[2] / "results"  # measurements committed with the source, by question:
QUESTIONS = ("accuracy", "language", "choices", "speed", "depth", "audit")  # what the kit's tables and figures show
STUDIES = ("ablation/", "answers/")  # studies, which have tables and figures of their own


def load_results(*folders: str | Path, kind: str | None = None) -> list[dict]:
    """Result files (*.json) of the folders and of the QUESTIONS in them, by name; by default those of the checkout. A
    damaged one raises ValueError with its path."""
    found = []
    for folder in (Path(given) / part for given in folders or (RESULTS,) for part in ("", *QUESTIONS)):
        for path in sorted(folder.glob("*.json")):
            try:
                result = json.loads(path.read_text())
                if kind is None or result["kind"] == kind:
                    found.append(result)
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is not a result file ({error!r}). Remove it and run it again.") from error
    return found


def all_results(folder: str | Path = RESULTS) -> list[tuple[str, dict]]:
    """(path from `folder`, content) of every result file, those in subfolders too."""
    folder, found = Path(folder), []
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a result file ({error!r}). Remove it and run it again.") from error
        if isinstance(content, dict) and isinstance(content.get("provenance"), dict):
            found.append((path.relative_to(folder).as_posix(), content))
    return found


def over_seeds(results: Sequence[dict]) -> list[dict]:
    """Runs that differ in their seed alone become one, with "seeds" and rows of means; see `stats.over_seeds`. Each row
    gets "covers": what chance its interval stands for."""
    groups: dict[str, list[dict]] = {}
    for result in results:
        recipe = {k: v for k, v in result["recipe"].items() if k not in ("seed", "file")} | {
            "schedule": schedule_of(result)
        }
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
    mean, interval, covers = stats.over_seeds([measured(r) for r in rows], [ends(r) for r in rows])
    # Of several seeds, only what they share and the means: sample by sample they have their own files.
    shared = {k: v for k, v in rows[0].items() if all(k in r and r[k] == v for r in rows)}
    return {**shared, metric: mean, "ci95": list(interval), "covers": covers}


def rows_of(result: dict, control: str) -> list[dict]:
    return sorted((r for r in result["rows"] if r["control"] == control), key=lambda r: r["target"])


def measured(row: dict) -> float:
    """The task's metric: F1 where the row has it, else accuracy; percent. As counted: files have it rounded, and what
    is rounded twice may end on another digit."""
    return 100 * row["correct"] / row["n"] if _counted(row) else row.get("f1", row["accuracy"])


def ends(row: dict) -> tuple[float, float]:
    """The 95% interval of `measured`."""
    return stats.interval(row["correct"], row["n"], digits=None) if _counted(row) else tuple(row["ci95"])


def _counted(row: dict) -> bool:
    """Is the row's metric a share of its samples, of one run?"""
    return "f1" not in row and "covers" not in row and "correct" in row


def with_interval(row: dict) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(measured(row), *ends(row))


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
