"""The test part of imdb_films: how far the dial is ahead of its rivals, and whether it loses what the paper prints.

python -m ablation.show.films      prints the tables, as docs/findings/films.md has them

Reviews of one film are not independent, so intervals and p-values take reviews by runs of neighbouring rows
(`ablation.films.runs`), which hold whole films but for their ends; and they cover the chance in the trainings, on every
side that has several seeds (`zsaa.measure.stats.over_runs`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from ablation import films
from ablation.show.rows import cell_at
from zsaa.kit import paper
from zsaa.kit.equal import at_equal_macs, right
from zsaa.kit.store import RESULTS, with_interval
from zsaa.measure.stats import Difference, holm, mean_difference, over_runs, sure

PART = RESULTS / "ablation" / "imdb_films" / "test"
FOLDS = RESULTS / "ablation" / "folds"
DEV_SETS = {"mrpc": "MRPC", "rte": "RTE", "boolq": "BoolQ"}
FOLDED = {  # row, control, MAC reduction
    "whole texts, by adapters": ("lora-conventional-crops", "alpha", 1),
    **{f"the dial, {target}x": ("steady", "alpha", target) for target in (1, 2, 3, 5)},
    "text cut to the last tokens, 3x": ("steady-cut-last", "last", 3),
    "the first ten layers (3x)": ("layers-10", "layers", 3),
}
MARGIN = 0.5  # points by which two equivalent losses may differ
TARGETS = (1, 2, 3, 5, 7, 9, 11)
# Declared by what validation showed (`long_table("validation")`), before any reading of the test part was looked at so.
LONGEST, AT = 0.75, (2, 3, 5)  # reviews with more words than this share of the validation part's; settings
LAYERS = {2: 15, 3: 10, 5: 6, 11: 3}  # the dial's MAC reduction -> layers. Three of 30 are 10x: the dial costs less


def seeds_of(name: str, suffix: str) -> list[str]:
    """The results of a row that were read, one for each seed."""
    names = [f"{name}{f'-seed{seed}' if seed else ''}{suffix}" for seed in range(5)]
    return [found for found in names if (PART / f"{found}.json").is_file()]


def by_layers(name: str, rates: dict[int, str]) -> dict[int, tuple[list[str], str]]:
    """A row of so many layers, at the learning rates that validation chose: MAC reduction -> suffix of the results."""
    return {t: (seeds_of(f"layers-{k}{name}", rates.get(t, "")), "layers") for t, k in LAYERS.items()}


def always(results: list[str], control: str) -> dict[int, tuple[list[str], str]]:
    return dict.fromkeys(TARGETS, (results, control))


def _paper(rate: str) -> dict[int, tuple[list[str], str]]:
    return always(seeds_of("paper", f"-epochs5-rate{float(rate):g}"), "alpha")


DIAL = seeds_of("steady", "-epochs3-seconds660")
# Before its learning rate rose for longer: the second training failed.
EARLIER = {f"before, seed {seed}": [name] for seed, name in enumerate(seeds_of("lora-crops", "-epochs3"))}
BETTER = seeds_of("layers-10-tutored", "-rate0.0002")  # of 15 layers one was read, of 6 and 3 none
RATES = ("1e-4", "2e-4", "4e-5", "4e-4")  # of the paper's recipe; validation chose the first
LORA = {"1e-3": "paper-lora-epochs5-rate0.001-seconds400", "2e-4": "paper-lora-epochs5-rate0.0002-seconds260"}  # too
NOT_CHOSEN = (*(f"the paper's recipe, {rate}" for rate in RATES[1:]), "the paper's recipe by LoRA, 2e-4")
# rival -> the dial's MAC reduction -> (results, one per seed; their control)
RIVALS = {
    "first layers": by_layers("", {2: "-rate0.0001", 5: "-rate0.0001"}),
    "first layers, distilled": by_layers("-taught", {}),
    "first layers, distilled by a better teacher": {3: (BETTER, "layers")},
    "half of the layers, distilled by a better teacher": {2: (["layers-15-tutored-rate0.0001"], "layers")},
    "text cut to both ends": always(seeds_of("lora-cut-ends", "-epochs3"), "ends"),
    "text cut to the last tokens": always(seeds_of("steady-cut-last", "-epochs3-seconds520"), "last"),
    **{f"the paper's recipe, {rate}": _paper(rate) for rate in RATES if _paper(rate)[1][0]},
    **{f"the paper's recipe by LoRA, {rate}": always([name], "alpha") for rate, name in LORA.items()},
    "TF-IDF": always(["bag"], "bag"),
}
# Shown and not compared: its reductions are of its own 12 layers' MACs, which are two fifths of the others' at 1x.
APART = {"the paper's recipe on 12 layers": always(["paper-12-epochs5-seconds230"], "alpha")}


def chosen() -> dict[str, dict]:
    """RIVALS at the learning rates that validation chose."""
    return {name: cells for name, cells in RIVALS.items() if name not in NOT_CHOSEN}


def held(name: str, control: str, target: int, folder: Path = PART) -> np.ndarray:
    """Which reviews a result has right at a setting (shares, where cut inputs have none with just the dial's MACs); of
    layers and bags of words at their one."""
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if control in ("ends", "last"):
        return right(at_equal_macs([row for row in result["rows"] if row["control"] == control], target))
    return right(cell_at(result, control, target if control == "alpha" else result["rows"][0]["target"]))


def all_held(cell: tuple[list[str], str], target: int, folder: Path = PART) -> list[np.ndarray]:
    """`held` of each seed."""
    names, control = cell
    return [held(name, control, target, folder) for name in names]


def settings(cells: dict[int, tuple[list[str], str]], seed: int, folder: Path = PART) -> list[dict]:
    """The rows of one training of a way, or of its models of so many layers that share a seed; where some have fewer
    seeds, their last."""
    found = {(names[min(seed, len(names) - 1)], control) for names, control in cells.values() if names}
    read = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name, _ in found}
    return [row for name, control in sorted(found) for row in read[name]["rows"] if row["control"] == control]


def interval(name: str, control: str, target: int, folder: Path = PART) -> tuple[float, float]:
    """The 95% interval of an accuracy, films together."""
    found = held(name, control, target, folder)
    return mean_difference([found], [0 * found], clusters=films.runs("test"))[1]


def ways() -> dict[str, dict]:
    """All that the tables show, the dial first."""
    earlier = {name: always(results, "alpha") for name, results in EARLIER.items()}
    return {"the dial": always(DIAL, "alpha"), **earlier, **RIVALS, **APART}


def accuracies_table(folder: Path = PART):
    """A line per method: its accuracy at each MAC reduction, the mean of its seeds, and their range."""
    import pandas as pd

    lines = []
    for name, cells in ways().items():
        line = {"accuracy": _named(name, cells)}
        for target in TARGETS:
            found = [100 * run.mean() for run in all_held(cells[target], target, folder)] if target in cells else []
            line[f"{target}x"] = _mean_and_range(found)
        lines.append(line)
    return pd.DataFrame(lines)


def _mean_and_range(found: list[float]) -> str:
    if not found:
        return ""
    mean = f"{np.mean(found):.1f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.1f} to {max(found):.1f})"


def leads(folder: Path = PART) -> dict[tuple[str, int], Difference]:
    """Of the dial's seeds over those of each rival, at each MAC reduction that the rival has."""
    together, found = films.runs("test"), {}
    ours = {target: all_held((DIAL, "alpha"), target, folder) for target in TARGETS}
    for name, cells in RIVALS.items():
        for target, cell in cells.items():
            found[name, target] = over_runs(ours[target], all_held(cell, target, folder), together)
    return found


def ahead_table(folder: Path = PART):
    """A line per rival, the paper's recipe at the rates that validation chose: points by which the dial is ahead, the
    mean of its seeds over that of the rival's, with 95% intervals that cover reviews, films and trainings. A star: not
    0 by Holm's correction over the whole table and the rates that were not chosen."""
    import pandas as pd

    found = leads(folder)
    stars = sure(found)
    lines = []
    for name, cells in chosen().items():
        said = {t: points(found[name, t]) + "*" * ((name, t) in stars) for t in cells}
        lines.append({"ahead of": _named(name, cells), **{f"{t}x": said.get(t, "") for t in TARGETS}})
    return pd.DataFrame(lines)


def behind_table(folder: Path = PART):
    """A line per training of the paper's recipe, at the rates that validation chose, and way to cut texts: points by
    which the recipe is behind the mean of that way's seeds, as in `ahead_table`, stars too."""
    import pandas as pd

    ours, cuts = ([name for name in RIVALS if name.startswith(start)] for start in ("the paper's", "text cut"))
    together, sides = films.runs("test"), lambda name, t: all_held(RIVALS[name][t], t, folder)
    found = {(o, c, t): over_runs(sides(c, t), sides(o, t), together) for o in ours for c in cuts for t in TARGETS}
    stars = sure(found)
    return pd.DataFrame(
        [
            {"recipe": name, "is behind": _named(cut, RIVALS[cut])}
            | {f"{t}x": points(found[name, cut, t]) + "*" * ((name, cut, t) in stars) for t in TARGETS}
            for name in ours
            if name in chosen()
            for cut in cuts
        ]
    )


@functools.cache
def words(part: str) -> np.ndarray:
    """How many words each review of a part has."""
    return np.array([len(text.split()) for text in films.side(part)[0]["text"][:]])


def longest(part: str) -> np.ndarray:
    """Which reviews of a part have more words than the share LONGEST of the validation part's."""
    return words(part) > np.quantile(words("validation"), LONGEST)


def long_leads(part: str) -> dict[tuple[str, int], tuple[Difference, float, float]]:
    """`leads` among the longest reviews, at AT: (lead, the dial's accuracy, the rival's). Rivals that have no readings
    of the part are left out."""
    folder, pick, together, found = PART if part == "test" else PART.parent, longest(part), films.runs(part), {}
    for name, cells in RIVALS.items():
        for target in AT:
            there = target in cells and all((folder / f"{result}.json").is_file() for result in cells[target][0])
            if there:
                sides = (all_held(cell, target, folder) for cell in ((DIAL, "alpha"), cells[target]))
                ours, theirs = ([right[pick] for right in side] for side in sides)
                lead = over_runs(ours, theirs, together[pick])
                found[name, target] = lead, 100 * float(np.mean(ours)), 100 * float(np.mean(theirs))
    return found


def long_table(part: str = "test"):
    """A line per rival: its accuracy on the longest reviews, and by how much the dial, in the first line, is ahead of
    it. A star: not 0 by Holm's correction over this table and the rates that validation did not choose."""
    import pandas as pd

    found = long_leads(part)
    stars = sure({cell: lead for cell, (lead, *_) in found.items()})
    head = f"reviews of more words than {LONGEST:.0%} of validation's ({part}, {longest(part).sum():,})"
    dial = {f"{t}x": next((f"{ours:.1f}" for (_, at), (_, ours, _) in found.items() if at == t), "") for t in AT}
    lines = [{head: _named("the dial", always(DIAL, "alpha")), **dial}]
    for name in dict.fromkeys(name for name, _ in found if name in chosen()):
        line = {head: _named(name, RIVALS[name])}
        for target in AT:
            if cell := found.get((name, target)):
                star = "*" * ((name, target) in stars)
                line[f"{target}x"] = f"{cell[2]:.1f}: {points(cell[0])}{star}"
        lines.append({**dict.fromkeys(lines[0], ""), **line})
    return pd.DataFrame(lines)


def points(lead: Difference) -> str:
    low, high = lead.interval
    return f"{100 * lead.mean:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _named(name: str, cells: dict) -> str:
    least, most = min(seeds := [len(names) for names, _ in cells.values()]), max(seeds)
    if most == 1:
        return name
    return f"{name} ({most} seeds)" if least == most else f"{name} ({least} to {most} seeds)"


def losses_table(folder: Path = PART):
    """A line per MAC reduction: what the dial loses of its own accuracy at 1x, the mean of its seeds, what the paper
    prints, and the p-value that the two are within MARGIN (two one-sided tests, Holm over the lines)."""
    import pandas as pd

    whole, together = all_held((DIAL, "alpha"), 1, folder), films.runs("test")
    lines, ps = [], []
    for target in TARGETS[1:]:
        there = all_held((DIAL, "alpha"), target, folder)
        lost = over_runs([w - t for w, t in zip(whole, there)], [np.zeros(len(together))], together)
        printed = paper.TABLE_1[1]["IMDB"] - paper.TABLE_1[target]["IMDB"]
        ps.append(lost.within(MARGIN / 100, printed / 100))
        low, high = lost.interval
        said = f"{100 * lost.mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        lines.append({"at": f"{target}x", "lost": said, "paper": f"{printed:.1f}"})
    name = f"within {MARGIN:g} points: p (Holm)"
    return pd.DataFrame([{**line, name: f"{p:.2g}"} for line, p in zip(lines, holm(ps))])


def folds_table(folder: Path = FOLDS):
    """Of tasks with a dev set alone: a line per way, trained once for each of five folds; 95% intervals of the chance
    in the samples."""
    import pandas as pd

    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    most = {task: results[f"{task}-layers-10"]["log"]["majority"] for task in DEV_SETS}
    lines = [{"within the dev set": "the more frequent label", **{DEV_SETS[t]: f"{most[t]:.1f}" for t in DEV_SETS}}]
    bags = {t: json.loads((folder.parent / f"bags/{t}-folds.json").read_text(encoding="utf-8")) for t in DEV_SETS}
    lines.append({"within the dev set": "TF-IDF", **{DEV_SETS[t]: with_interval(bags[t]["rows"][0]) for t in DEV_SETS}})
    for name, (row, control, target) in FOLDED.items():
        line = {"within the dev set": name}
        for task in DEV_SETS:
            found = results.get(f"{task}-{row}")
            line[DEV_SETS[task]] = with_interval(cell_at(found, control, target)) if found else ""
        lines.append(line)
    return pd.DataFrame(lines)


def tables() -> list:
    """What docs/findings/films.md shows: accuracies, leads, searches, losses, other models, long reviews, other
    tasks."""
    from ablation.show import models, searches  # which take from here how results are read

    told = [
        accuracies_table(),
        ahead_table(),
        behind_table(),
        searches.search_table(),
        searches.before_table(),
        searches.undone_table(),
        losses_table(),
    ]
    return [*told, *models.tables(), long_table(), folds_table()]


def markdown(table) -> str:
    return table.to_markdown(index=False, disable_numparse=True)


def main() -> int:
    for table in [*tables(), long_table("validation")]:  # the last: what long reviews were declared by
        print(markdown(table), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
