"""Questions that are read again, with more, where the first answer is not sure: CoQA by the dials, at equal MACs.

    python -m ablation.answers.again      # of the files of ablation.answers.both

A prompt is read at a strong reduction and answered; where the model holds its answer less likely than a threshold, the
prompt is read anew at a weaker one. Both passes are paid for, and each token of the answer that is thrown away as one
of the prompt. Which two settings, and which threshold, is chosen on the validation stories among those that keep to the
budget; on the test stories they cost what they cost there, and rivals may spend as much: between two of their settings
so many questions count from either that both cost that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablation.answers.both import FOLDER, PASSAGE, REDUCTIONS, TYPICAL, held
from ablation.answers.compare import said
from ablation.answers.results import over_stories
from ablation.answers.second_results import SPLITS, unpack
from zsaa.measure.stats import holm

TEST = SPLITS["test"][1]
CHOICES = {  # which settings (of one model) a way may use, and whether twice
    "fewer tokens": (lambda depth, layers: depth == layers, False),
    "fewer tokens, when sure": (lambda depth, layers: depth == layers, True),
    "both": (lambda depth, layers: True, False),
    "both, when sure": (lambda depth, layers: True, True),
}


@dataclass(frozen=True)
class Reading:
    """One setting on the stories of one split. cost: of the whole prompt's MACs; f1, sure: of each question, percent;
    said: tokens of an answer, as many of a prompt's."""

    cost: float
    f1: np.ndarray
    sure: np.ndarray
    said: float


Readings = dict[tuple[float, int], Reading]  # by (reduction, depth)


def readings(rows: Iterable[dict], test: bool) -> Readings:
    return {
        (row["target"], row["depth"]): Reading(1 / row["mac_reduction"], unpack(row["packed"]), unpack(row["sure"]),
                                               row["said"] / TYPICAL[0])
        for row in rows if (row["split"] == TEST) is test and "sure" in row
    }  # fmt: skip


def twice(first: Reading, second: Reading | None, threshold: float) -> tuple[float, np.ndarray]:
    """(cost, F1 of each question) where answers below `threshold` percent are thrown away and asked for anew."""
    if second is None:
        return first.cost, first.f1
    again = first.sure < threshold
    return first.cost + again.mean() * (second.cost + first.said), np.where(again, second.f1, first.f1)


Way = tuple[tuple[float, int], tuple[float, int] | None, float]


def chosen(there: Readings, reduction: float, again: bool) -> Way:
    """(first setting, second setting or none, threshold) of the best F1 among those that cost at most 1 / reduction."""
    ways: list[Way] = [(key, None, 0.0) for key in there]
    if again:
        ways += [(one, other, threshold) for one in there for other in there if there[one].cost < there[other].cost
                 for threshold in np.unique(np.quantile(there[one].sure, np.linspace(0.05, 0.95, 19)))]  # fmt: skip
    found = [(float(f1.mean()), -cost, way) for way in ways
             for cost, f1 in [twice(there[way[0]], way[1] and there[way[1]], way[2])]
             if cost * reduction <= 1.01]  # fmt: skip
    return max(found, key=lambda one: one[:2])[2]


def at_cost(there: Sequence[Reading], cost: float) -> np.ndarray:
    """F1 of each question by single settings at this cost: a mixture of the two around it."""
    order = sorted(there, key=lambda one: one.cost)
    cheap = max((one for one in order if one.cost <= cost), key=lambda one: one.cost, default=order[0])
    dear = min((one for one in order if one.cost > cost), key=lambda one: one.cost, default=order[-1])
    share = 0.0 if dear.cost <= cheap.cost else (cost - cheap.cost) / (dear.cost - cheap.cost)
    return (1 - share) * cheap.f1 + share * dear.f1


def read(folder: Path = FOLDER) -> dict[tuple[str, int], tuple[Readings, Readings]]:
    """(validation, test) readings of each training, by (kind, seed), of those files that say how sure answers were."""
    files = {key: (readings(rows, False), readings(rows, True)) for key, rows in held(folder).items()}
    return {key: (known, asked) for key, (known, asked) in files.items() if known and asked}


def within(there: Readings, name: str) -> Readings:
    layers = max(depth for _, depth in there)
    return {key: one for key, one in there.items() if CHOICES[name][0](key[1], layers)}


def table(kind: str, folder: Path = FOLDER):
    """A line for each budget and way: F1 and reduction on the test stories, mean of the trainings, and how far `kind`,
    by both dials, is ahead of it at as many MACs."""
    import pandas as pd

    files, lines, ps = read(folder), [], []
    stories = next(row["stories"] for rows in held(folder).values() for row in rows
                   if row["split"] == TEST and "stories" in row)  # fmt: skip
    seeds = sorted(seed for name, seed in files if name == kind)
    for reduction in REDUCTIONS:
        ours: dict[str, dict[int, tuple[float, np.ndarray]]] = {}
        for name in ("both", "both, when sure"):
            for seed in seeds:
                known, asked = files[kind, seed]
                first, second, threshold = chosen({k: v for k, v in known.items() if k in asked}, reduction,
                                                  CHOICES[name][1])  # fmt: skip
                ours.setdefault(name, {})[seed] = twice(asked[first], second and asked[second], threshold)
        for rival in ("tokens", kind):
            for name, (_, again) in CHOICES.items():
                if rival == "tokens" and name.startswith("both"):
                    continue
                line = {"reduction": f"{reduction:g}x", "trained for": rival, "turned": name}
                mine, leads = [], {way: [] for way in ours}
                for seed in (s for s in seeds if (rival, s) in files):
                    known, asked = (within(part, name) for part in files[rival, seed])
                    way = chosen({k: v for k, v in known.items() if k in asked}, reduction, again)
                    mine.append(twice(asked[way[0]], way[1] and asked[way[1]], way[2]))
                    for ahead, by in ours.items():
                        cost, f1 = by[seed]
                        theirs = at_cost([*asked.values()], cost) if not again else mine[-1][1]
                        leads[ahead].append(f1 - theirs)
                if not mine:
                    continue
                line |= {"MACs": f"{1 / np.mean([cost for cost, _ in mine]):.1f}x",
                         "F1 (trainings)": f"{np.mean([f1.mean() for _, f1 in mine]):.1f} ({len(mine)})"}  # fmt: skip
                for ahead, apart in leads.items():
                    if rival == kind and name.startswith("both"):
                        line[f"{ahead}: ahead by"] = ""
                        continue
                    mean = np.mean(apart, 0)
                    drawn = over_stories(mean, stories)
                    line[f"{ahead}: ahead by"] = said(mean.mean(), *np.quantile(drawn, [0.025, 0.975]))
                    tail = min(1 + (drawn <= 0).sum(), 1 + (drawn >= 0).sum()) / (1 + len(drawn))
                    ps.append((line, ahead, min(1.0, 2 * float(tail))))
                lines.append(line)
    for (line, ahead, _), p in zip(ps, holm([p for *_, p in ps])):
        line[f"{ahead}: ahead by"] += f"{'*' * (p < 0.05)}"
    return pd.DataFrame(lines).fillna("")


def main() -> None:
    for kind in PASSAGE:
        if any(name == kind for name, _ in read()):
            print(table(kind).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
