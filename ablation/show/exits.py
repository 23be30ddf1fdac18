"""One model, any depth, on the test part of imdb_films: beside models of so many layers, and beside fewer tokens.

python -m ablation.show.exits      prints the tables, as docs/findings/depth.md has them

What a method does at a budget (a confidence, a split between both dials) is chosen on the validation part, among the
settings that save as many MACs; the test part says what that choice is worth, and what it costs there: confidences
that save 5x on validation save 4.7x on the test part. So both dials are compared with rivals that spend as much as they
do there. Intervals of one table as in ablation.show.films; those of both dials against one hold for further trainings,
too (`stats.over_runs`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ablation import films
from ablation.show.films import MARGIN, NOT_CHOSEN, RIVALS, points, settings
from zsaa.kit import paper
from zsaa.kit.equal import at_equal_macs, right
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import holm, mean_difference, over_runs, sure

FOLDER, EARLIER = RESULTS / "depth" / "films", RESULTS / "ablation" / "imdb_films"
EXITS = ("exits", "exits-seed1", "exits-seed2")
STEADY = tuple(f"steady{seed}-epochs3-seconds660" for seed in ("", "-seed1", "-seed2", "-seed3", "-seed4"))
JOINT = tuple(f"exits-first{seed}-seconds520" for seed in ("", "-seed1", "-seed2"))
AHEAD = "both, when sure, are ahead of"
WORDS = {"words-first": "a bag of words where it is sure, else a model", "words-first-dial": "... else fewer tokens"}
SINGLE, BOTH = ("fewer layers", "fewer layers, when sure", "fewer tokens"), "both, when sure"
TARGETS = (3, 5)  # at which both dials are to be ahead
BUDGETS = (2, 3, 5, 7)
SHOWN = (30, 27, 24, 22, 20, 18, 15, 10, 6, 3)  # layers
TAUGHT = {15: "layers-15-taught", 10: "layers-10-taught", 6: "layers-6-taught", 3: "layers-3-taught"}
KEYS = (
    "control",
    "layers",
    "sure",
    "tokens",
    "target",
    "stages",
)  # what tells a setting from another of the same result


@lru_cache
def rows(name: str, part: str, folder: Path = FOLDER) -> tuple[dict, ...]:
    """The rows of a result of this folder, or of an earlier row, of the part "validation" or "test"; none, if it was
    not run."""
    for place in (folder, EARLIER):
        path = place / (f"{name}.json" if part == "validation" else f"test/{name}.json")
        if path.is_file():
            return tuple(json.loads(path.read_text(encoding="utf-8"))["rows"])
    return ()


def there(names: Sequence[str], folder: Path = FOLDER) -> list[str]:
    """Those of the results that were read on the test part."""
    return [name for name in names if rows(name, "test", folder)]


def at_depth(name: str, layers: int, part: str = "test", folder: Path = FOLDER) -> dict:
    """The row of a result's first so many layers, whole texts."""
    return next(r for r in rows(name, part, folder) if r["control"] == "layers" and r["layers"] == layers)


def chosen(name: str, controls: Sequence[str], budget: float, folder: Path = FOLDER) -> dict | None:
    """The test row of the setting that is most accurate on validation among those of these controls that save as many
    MACs there; of equals the one that saves most. Ways (ablation/cascade.py) were chosen before. None if none does."""
    found = [r for r in rows(name, "validation", folder) if r["control"] in controls]
    found = [r for r in found if (r["target"] == budget if "stages" in r else r["mac_reduction"] >= 0.999 * budget)]
    if not found:
        return None
    best = max(found, key=lambda r: (r["accuracy"], r["mac_reduction"]))
    same = [r for r in rows(name, "test", folder) if all(r.get(k) == best.get(k) for k in KEYS)]
    return same[0] if same else None


def saved(found: Sequence[dict]) -> float:
    """The MAC reduction of rows of several trainings: what they cost in the mean."""
    return len(found) / sum(1 / row["mac_reduction"] for row in found)


def as_dear(found: Sequence[dict], reduction: float) -> np.ndarray:
    """How much of each review a training has right at this MAC reduction, by these of its settings: between two of them
    a mixture (zsaa.kit.equal); beyond the first or the last, that one. One setting stands for itself."""
    if len(found) == 1:
        return right(found[0])
    ends = min(found, key=lambda row: abs(row["mac_reduction"] - reduction))
    return right(at_equal_macs(found, reduction) or ends)


def difference(ours: Sequence[dict], theirs: Sequence[dict]) -> tuple[float, tuple[float, float]]:
    """Points by which the mean of rows is ahead of that of others on the same reviews, and its 95% interval."""
    return mean_difference([right(r) for r in ours], [right(r) for r in theirs], clusters=films.runs("test"))


def said(ours: Sequence[dict], theirs: Sequence[dict]) -> str:
    mean, (low, high) = difference(ours, theirs)
    return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"


def mean(found: Sequence[dict]) -> str:
    return f"{np.mean([100 * right(r).mean() for r in found]):.1f}"


def depths_table(folder: Path = FOLDER):
    """A line per depth: one model, in the mean of its seeds, what it loses of its whole, and models of their own."""
    import pandas as pd

    names, lines = there(EXITS, folder), []
    for layers in SHOWN:
        own = [at_depth(name, layers, folder=folder) for name in names]
        whole = [at_depth(name, 30, folder=folder) for name in names]
        alone = there([TAUGHT[layers] + seed for seed in ("", "-seed1", "-seed2")], folder) if layers in TAUGHT else []
        others = [rows(name, "test", folder)[0] for name in alone]
        lines.append({
            "layers": layers, "MACs": f"{30 / layers:.2f}x", f"one model (trainings: {len(names)})": mean(own),
            "ahead of all its layers": said(own, whole) if layers < 30 else "",
            "a model of its own, distilled": mean(others) if others else "",
            "one model is ahead by": said(own, others) if others else "",
        })  # fmt: skip
    return pd.DataFrame(lines)


def ways(folder: Path = FOLDER) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """name -> (results, one per seed; controls among which validation chooses). The first three turn one dial; the
    others are of one training for both."""
    found = {
        "fewer layers": (there(EXITS, folder), ("layers",)),
        "fewer layers, when sure": (there(EXITS, folder), ("confidence",)),
        "fewer tokens": (there(STEADY, folder), ("alpha",)),
    }
    joint = there(JOINT, folder)
    kinds = {"layers, when sure": "layers-sure", "tokens": "alpha", "tokens, when sure": "tokens-sure"}
    found |= {f"trained for both: fewer {kind}": (joint, (control,)) for kind, control in kinds.items()}
    return found | {"both, fixed": (joint, ("both-fixed",)), BOTH: (joint, ("both-sure",))}


def cells(names: Sequence[str], controls: Sequence[str], budget: float, folder: Path = FOLDER) -> list[dict]:
    found = [chosen(name, controls, budget, folder) for name in names]
    return [row for row in found if row is not None]


def budgets_table(folder: Path = FOLDER):
    """A line per way: its test accuracy at each budget, by settings that validation chose; the MACs that it saved."""
    import pandas as pd

    lines = []
    for name, (names, controls) in ways(folder).items():
        line = {"accuracy": name, "trainings": len(names)}
        for budget in BUDGETS:
            found = cells(names, controls, budget, folder)
            line[f"{budget}x"] = f"{mean(found)} at {saved(found):.1f}x" if found else ""
        lines.append(line)
    alone = {"accuracy": "models of so many layers, distilled", "trainings": 3}
    for budget in BUDGETS:
        model = TAUGHT.get(30 // budget, "none")
        at = [rows(model + seed, "test", folder) for seed in ("", "-seed1", "-seed2")]
        alone[f"{budget}x"] = f"{mean([found[0] for found in at])} at {budget:.1f}x" if all(at) else ""
    return pd.DataFrame([*lines, alone])


def both(folder: Path = FOLDER) -> dict[float, list[dict]]:
    """Of each budget the test rows of both dials, when sure; {}, if none was read."""
    names, controls = ways(folder)[BOTH]
    return {budget: cells(names, controls, budget, folder) for budget in BUDGETS} if names else {}


def column(ours: dict[float, list[dict]], budget: float) -> str:
    """A column's head: the MAC reduction that a budget came to on the test part."""
    return f"{saved(ours[budget]):.1f}x"


def single(budget: float, folder: Path = FOLDER) -> str:
    """The better of the ways that turn one dial, by validation."""
    best = None
    for name in SINGLE:
        names, controls = ways(folder)[name]
        at = [max((r["accuracy"] for r in rows(n, "validation", folder) if r["control"] in controls
                   and r["mac_reduction"] >= 0.999 * budget), default=0.0) for n in names]  # fmt: skip
        if at and (best is None or np.mean(at) > best[0]):
            best = np.mean(at), name
    return best[1] if best else ""


def joint_table(folder: Path = FOLDER):
    """A line per rival: how far both dials, when sure, are ahead of it at as many MACs as they spend, with what a
    further training may differ by; and of the better single dial p, corrected for the budgets that were asked about
    (Holm)."""
    import pandas as pd

    ours = both(folder)
    if not ours:
        return pd.DataFrame()

    def apart(name: str, budget: float):
        names, kind = ways(folder)[name]
        tried = [[row for b in BUDGETS if (row := chosen(n, kind, b, folder))] for n in names]
        theirs = [as_dear(found, saved(ours[budget])) for found in tried if found]
        return over_runs([right(r) for r in ours[budget]], theirs, clusters=films.runs("test"))

    better = {budget: single(budget, folder) for budget in BUDGETS}
    p = dict(zip(TARGETS, holm([apart(better[budget], budget).p for budget in TARGETS])))
    best = {AHEAD: "**the better single dial**"}
    for budget in BUDGETS:
        more = f", Holm {p[budget]:.3f}" if budget in p else ""
        best[column(ours, budget)] = f"{points(apart(better[budget], budget))} ({better[budget]}{more})"
    lines = [best]
    for name, (names, kind) in ways(folder).items():
        if name != BOTH:
            line = {AHEAD: name}
            for budget in BUDGETS:
                line[column(ours, budget)] = points(apart(name, budget)) if cells(names, kind, budget, folder) else ""
            lines.append(line)
    return pd.DataFrame(lines)


def rivals_table(folder: Path = FOLDER):
    """A line per rival that has no dial (ablation.show.films): how far both dials, when sure, are ahead of it at as
    many MACs as they spend, as in `joint_table`. A star: not 0 by Holm's correction over this table and the rates of
    the paper's recipe that validation did not choose."""
    import pandas as pd

    ours, theirs = both(folder), {}
    for name, way in RIVALS.items():
        theirs |= {(name, b): [settings(way, seed) for seed in range(len(way[b][0]))] for b in BUDGETS if b in way}
    theirs |= {(WORDS["words-first"], b): words_settings("words-first", b) for b in BUDGETS}
    found = {}
    for (name, b), tried in theirs.items() if ours else ():
        mine = [right(row) for row in ours[b]]
        found[name, b] = over_runs(mine, [as_dear(rows, saved(ours[b])) for rows in tried], films.runs("test"))
    stars = sure(found)

    def said_of(cell: tuple) -> str:
        return points(found[cell]) + "*" * (cell in stars) if cell in found else ""

    return pd.DataFrame([
        {AHEAD: name} | {column(ours, b): said_of((name, b)) for b in BUDGETS}
        for name in dict.fromkeys(name for name, _ in found if name not in NOT_CHOSEN)
    ])  # fmt: skip


def words_settings(control: str, budget: float) -> list[list[dict]]:
    """The rows of a bag of words, and behind it a model, at all budgets; a list for each seed that this one has."""
    found: dict[float, list[dict]] = {}
    for row in rows("words-first", "test"):
        if row["control"] == control:
            found.setdefault(row["target"], []).append(row)
    return [[at[min(seed, len(at) - 1)] for at in found.values()] for seed in range(len(found.get(budget, ())))]


def words_first(control: str, budget: float) -> list[np.ndarray]:
    """Which test reviews a bag of words, and behind it a model, has right (ablation.words_first); a seed each."""
    return [right(r) for r in rows("words-first", "test") if (r["control"], r["target"]) == (control, budget)]


def words_table():
    """A line per way to go on where a bag of words is not sure, its accuracy at each budget, and what the dial adds."""
    import pandas as pd

    budgets = sorted({r["target"] for r in rows("words-first", "test")})
    lines = [
        {"accuracy": name}
        | {f"{b:g}x": f"{np.mean([100 * run.mean() for run in words_first(control, b)]):.1f}" for b in budgets}
        for control, name in WORDS.items()
    ]
    lead = {"accuracy": "the second is ahead by"}
    for b in budgets:
        sides = (words_first(control, b) for control in reversed(WORDS))
        lead[f"{b:g}x"] = points(over_runs(*sides, clusters=films.runs("test")))
    return pd.DataFrame([*lines, lead])


def losses_table(folder: Path = FOLDER):
    """A line per budget: what both dials, when sure, lose of their own model's accuracy at 1x, what the paper prints,
    and the p-values (Holm over the lines) that the two are within MARGIN, and ours at most MARGIN above."""
    import pandas as pd

    names, ours = ways(folder)[BOTH][0], both(folder)
    if not names:
        return pd.DataFrame()
    whole, together = [right(at_depth(name, 30, folder=folder)) for name in names], films.runs("test")
    lines, within, above = [], [], []
    for budget in BUDGETS:
        there = [right(row) for row in ours[budget]]
        lost = over_runs([w - t for w, t in zip(whole, there)], [np.zeros(len(together))], clusters=together)
        printed = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[budget]["IMDB"]
        within.append(lost.within(MARGIN / 100, printed / 100))
        # The lower bound lies a whole accuracy below, which is never reached: one-sided.
        above.append(lost.within(1.0, printed / 100 + MARGIN / 100 - 1.0))
        lines.append({"at": column(ours, budget), "lost": points(lost), "paper": f"{printed:.1f} at {budget}x"})
    name = f"within {MARGIN:g} points: p (Holm)", f"at most {MARGIN:g} points more: p (Holm)"
    return pd.DataFrame(
        [{**line, name[0]: f"{p:.2g}", name[1]: f"{q:.2g}"} for line, p, q in zip(lines, holm(within), holm(above))]
    )


def main() -> int:
    for table in (depths_table, budgets_table, joint_table, rivals_table, losses_table, words_table):
        print(table().to_markdown(index=False, disable_numparse=True), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
