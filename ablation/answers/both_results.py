"""What became of CoQA by both dials: tables of the files of ablation.answers.both.

    python -m ablation.answers.both_results

Each training is set beside one that learned fewer tokens alone, as long, of the same rank and seed, at the same
reduction of MACs. How a reduction is split is chosen on the validation stories.

The second table is of questions that are read again, with more, where the first answer is not sure: where the model
holds it less likely than a threshold, it is thrown away, and the prompt is read anew at a weaker reduction. Both passes
are paid for, and each token of the answer as one of the prompt. Which two settings, and which threshold, is chosen on
validation, too; a rival may spend what that costs on the test stories: between two of its settings so many questions
count from either that both cost that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ablation.answers.both import MORE, REDUCTIONS, TYPICAL
from ablation.answers.compare import said
from ablation.answers.results import over_stories
from ablation.answers.second_results import SPLITS, unpack
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import holm

FOLDER = RESULTS / "answers" / "both"
TEST = SPLITS["test"][1]
NAMES = {"tokens": "fewer tokens", "tokens32": "fewer tokens", "layers": "fewer layers", "both": "both, by exits",
         "passage": "both, the passage standing still", "guess18": "both, the passage foretold",
         "guess20": "both, the passage foretold"}  # fmt: skip
BESIDE = {"layers": "tokens", "both": "tokens", "passage": "tokens", "guess18": "tokens32", "guess20": "tokens32"}


def held(folder: Path = FOLDER) -> dict[tuple[str, int], list[dict]]:
    """Rows by (kind, seed)."""
    files = {p.stem: json.loads(p.read_text("utf-8"))["rows"] for p in sorted(folder.glob("*-?.json"))}
    return {(name[:-2], int(name[-1])): rows for name, rows in files.items()}


def f1s(files: dict, kind: str, reduction: float) -> dict[int, tuple[int, np.ndarray]]:
    """(depth, F1 of each test question) by seed; the depth that validation prefers."""
    found = {}
    for (name, seed), rows in files.items():
        at = {part: {r["depth"]: r for r in rows if r["target"] == reduction and (r["split"] == TEST) is part}
              for part in (False, True)}  # fmt: skip
        if name == kind and at[True]:
            depth = max(at[False], key=lambda d: at[False][d]["f1"])
            if depth in at[True]:
                found[seed] = depth, unpack(at[True][depth]["packed"])
    return found


def stories_of(files: dict) -> dict[int, list[int]]:
    """The story of each test question, by how many there are."""
    return {len(r["stories"]): r["stories"] for rows in files.values() for r in rows
            if r["split"] == TEST and "stories" in r}  # fmt: skip


def table(folder: Path = FOLDER):
    """A line per reduction and way: F1 on the test stories, and how far it is ahead of fewer tokens alone, by stories,
    on the seeds and questions that both have; Holm's correction over the table."""
    import pandas as pd

    files, lines, ps = held(folder), [], []
    stories = stories_of(files)
    for reduction in sorted((*REDUCTIONS, *MORE)):
        for kind, beside in BESIDE.items():
            ours, theirs = f1s(files, kind, reduction), f1s(files, beside, reduction)
            if not (seeds := sorted({*ours} & {*theirs})):
                continue
            apart = np.mean([ours[s][1] - theirs[s][1] for s in seeds], 0)
            drawn = over_stories(apart, stories[len(apart)])
            tail = min((1 + (drawn <= 0).sum()), (1 + (drawn >= 0).sum())) / (1 + len(drawn))
            ps.append(min(1.0, 2 * float(tail)))
            lines.append({
                "reduction": f"{reduction:g}x", "trained for": NAMES[kind],
                "layers": ", ".join(map(str, sorted({ours[s][0] for s in seeds}))),
                "F1 (seeds)": f"{np.mean([ours[s][1].mean() for s in seeds]):.1f} ({len(seeds)})",
                "fewer tokens": f"{np.mean([theirs[s][1].mean() for s in seeds]):.1f}",
                "ahead by": said(apart.mean(), *np.quantile(drawn, [0.025, 0.975])),
            })  # fmt: skip
    for line, p in zip(lines, holm(ps)):
        line["Holm"] = f"{p:.3f}"
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class Reading:
    """One setting on the stories of one split. cost: of the whole prompt's MACs; f1, sure: of each question, percent;
    said: tokens of an answer, as many of a prompt's."""

    cost: float
    f1: np.ndarray
    sure: np.ndarray
    said: float


Readings = dict[tuple[float, int], Reading]  # by (reduction, depth)


def readings(rows: Iterable[dict], test: bool, unsure: bool = False) -> Readings:
    """Of one split; unsure: those, too, that do not say how sure answers were."""
    found = {}
    for row in rows:
        if (row["split"] == TEST) is test and ("sure" in row or unsure):
            f1 = unpack(row["packed"])
            sure = unpack(row["sure"]) if "sure" in row else np.zeros_like(f1)
            found[row["target"], row["depth"]] = Reading(
                1 / row["mac_reduction"], f1, sure, row.get("said", 0) / TYPICAL[0]
            )
    return found


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


def sure_table(folder: Path = FOLDER):
    """A line per reduction and training that says how sure its answers were: read again where they were not, and how
    far that is ahead of reading once, with fewer tokens alone, at as many MACs; by stories, on the seeds of both."""
    import pandas as pd

    files, lines = held(folder), []
    beside = {"tokens": "tokens", "tokens32": "tokens32", **BESIDE}
    for reduction in REDUCTIONS:
        for kind, other in beside.items():
            mine = {seed: (readings(rows, False), readings(rows, True)) for (name, seed), rows in files.items()
                    if name == kind and (other, seed) in files}  # fmt: skip
            found = []
            for seed, (known, asked) in mine.items():
                theirs = [*readings(files[other, seed], True, unsure=True).values()]
                if known and asked:
                    way = chosen({key: one for key, one in known.items() if key in asked}, reduction, True)
                    cost, f1 = twice(asked[way[0]], way[1] and asked[way[1]], way[2])
                    found.append((cost, f1, f1 - at_cost(theirs, cost)))
            if not found:
                continue
            apart = np.mean([one[2] for one in found], 0)
            drawn = over_stories(apart, stories_of(files)[len(apart)])
            lines.append({
                "reduction": f"{reduction:g}x", "trained for": NAMES[kind],
                "MACs": f"{1 / np.mean([one[0] for one in found]):.2f}x",
                "F1 (seeds)": f"{np.mean([one[1].mean() for one in found]):.1f} ({len(found)})",
                "ahead of fewer tokens, once, by": said(apart.mean(), *np.quantile(drawn, [0.025, 0.975])),
            })  # fmt: skip
    return pd.DataFrame(lines)


def main() -> None:
    for made in (made for made in (table(), sure_table()) if len(made)):
        print(made.to_markdown(index=False, disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    main()
