"""The test part of imdb_films: how far the dial is ahead of its rivals, and whether it loses what the paper prints.

python -m ablation.show.films      prints the tables, as docs/findings/films.md has them

Reviews of one film are not independent, so intervals and p-values take reviews by runs of neighbouring rows
(`ablation.films.runs`), which hold whole films but for their ends.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ablation import films
from ablation.show.rows import cell_at
from zsaa.kit import paper
from zsaa.kit.equal import at_equal_macs, right, said
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import equivalence, holm, mean_difference, p_value

PART = RESULTS / "ablation" / "imdb_films" / "test"
DIAL = ("lora-crops-epochs3", "lora-crops-seed1-epochs3")  # the second is a failed training
MARGIN = 0.5  # points by which two equivalent losses may differ
TARGETS = (1, 2, 3, 5, 7, 9, 11)
LAYERS = {2: 15, 3: 10, 5: 6, 11: 3}  # the dial's MAC reduction -> layers. Three of 30 are 10x: the dial costs less


def by_layers(suffix: str) -> dict[int, tuple[list[str], str]]:
    seeds = ("", "-seed1", "-seed2")
    return {t: ([f"layers-{count}{suffix}{seed}" for seed in seeds], "layers") for t, count in LAYERS.items()}


def always(results: list[str], control: str) -> dict[int, tuple[list[str], str]]:
    return dict.fromkeys(TARGETS, (results, control))


# rival -> the dial's MAC reduction -> (results, one per seed; their control)
RIVALS = {
    "first layers": by_layers(""),
    "first layers, distilled": by_layers("-taught"),
    "text cut to both ends": always(["lora-cut-ends-epochs3", "lora-cut-ends-seed1-epochs3"], "ends"),
    "the paper's recipe, 2e-4": always(["paper-epochs5-rate0.0002"], "alpha"),  # validation's choice
    "the paper's recipe, 4e-5": always(["paper-epochs5-rate4e-05"], "alpha"),
    "TF-IDF": always(["bag"], "bag"),
}


def held(name: str, control: str, target: int, folder: Path = PART) -> np.ndarray:
    """Which reviews a result has right at a setting (shares, where cut inputs have none with just the dial's MACs); of
    layers and bags of words at their one."""
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if control == "ends":
        return right(at_equal_macs([row for row in result["rows"] if row["control"] == control], target))
    return right(cell_at(result, control, target if control == "alpha" else result["rows"][0]["target"]))


def interval(name: str, control: str, target: int, folder: Path = PART) -> tuple[float, float]:
    """The 95% interval of an accuracy, films together."""
    found = held(name, control, target, folder)
    return mean_difference([found], [0 * found], clusters=films.runs("test"))[1]


def accuracies_table(folder: Path = PART):
    """A line per method: its accuracy at each MAC reduction, the mean of its seeds."""
    import pandas as pd

    ways = {f"the dial, seed {seed}": always([name], "alpha") for seed, name in enumerate(DIAL)} | RIVALS
    lines = []
    for name, cells in ways.items():
        found = {
            t: 100 * np.mean([held(r, control, t, folder) for r in names]) for t, (names, control) in cells.items()
        }
        lines.append({"accuracy": _named(name, cells), **{f"{t}x": _cell(found, t, "{:.1f}") for t in TARGETS}})
    return pd.DataFrame(lines)


def ahead_table(dial: Sequence[str], folder: Path = PART):
    """A line per rival: points by which the dial (the mean of the seeds named) is ahead of the mean of the rival's
    seeds, with paired 95% intervals, films together. A star: not 0 by Holm's correction over the whole table."""
    import pandas as pd

    leads, ps, together = {}, {}, films.runs("test")
    for name, cells in RIVALS.items():
        for target, (names, control) in cells.items():
            ours = [held(seed, "alpha", target, folder) for seed in dial]
            theirs = [held(seed, control, target, folder) for seed in names]
            leads[name, target] = mean_difference(ours, theirs, clusters=together)
            ps[name, target] = p_value(np.mean(ours, axis=0) - np.mean(theirs, axis=0), together)
    sure = {cell for cell, p in zip(ps, holm(list(ps.values()))) if p < 0.05}
    lines = []
    for name, cells in RIVALS.items():
        found = {t: said(leads[name, t]) + "*" * ((name, t) in sure) for t in cells}
        lines.append({"ahead of": _named(name, cells), **{f"{t}x": _cell(found, t, "{}") for t in TARGETS}})
    return pd.DataFrame(lines)


def _named(name: str, cells: dict) -> str:
    seeds = len(next(iter(cells.values()))[0])
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def _cell(found: dict, target: int, form: str) -> str:
    return form.format(found[target]) if target in found else ""


def losses_table(folder: Path = PART):
    """A line per MAC reduction: what the dial's seed 0 loses of its own accuracy at 1x, what the paper prints, and the
    p-value that the two are within MARGIN (two one-sided tests, Holm over the lines)."""
    import pandas as pd

    whole, together = held(DIAL[0], "alpha", 1, folder), films.runs("test")
    lines, ps = [], []
    for target in TARGETS[1:]:
        there = held(DIAL[0], "alpha", target, folder)
        lost, (low, high) = mean_difference([whole], [there], clusters=together)
        printed = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[target]["IMDB"]
        ps.append(equivalence(100 * (whole - there), printed, MARGIN, together))
        lines.append({"at": f"{target}x", "lost": f"{lost:.1f} [{low:.1f}, {high:.1f}]", "paper": f"{printed:.1f}"})
    name = f"within {MARGIN:g} points: p (Holm)"
    return pd.DataFrame([{**line, name: f"{p:.2g}"} for line, p in zip(lines, holm(ps))])


def tables() -> list:
    """What docs/findings/films.md shows: accuracies, leads of seed 0 and of both seeds' mean, losses."""
    return [accuracies_table(), ahead_table(DIAL[:1]), ahead_table(DIAL), losses_table()]


def markdown(table) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def main() -> int:
    for table in tables():
        print(markdown(table), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
