"""What the second study's committed answers say: `python -m ablation.answers.verdict` (results/answers/second).

Whatever is chosen (the dial's scorer, and the control of each cell) is chosen by mean F1 on the validation stories over
the seeds; the test stories are then read once. A difference is paired: each question's F1, meaned over the seeds, the
dial's less the control's; intervals of 95% and P values resample the stories, 10,000 times; Holm's correction is over
the cells of a data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ablation.answers.compare import REDUCTIONS, TARGETS, holm, said
from ablation.answers.results import over_stories
from ablation.answers.second import SEEDS
from ablation.answers.second_results import NO_RIVALS, SPLITS, unpack
from zsaa.kit.store import RESULTS

VALIDATION, TEST = SPLITS["validation"][1], SPLITS["test"][1]
Cell = tuple[str, str, float]  # task, split, reduction


class Second:
    """Rows by (model, kind, cell), and the story of each question by (task, split)."""

    def __init__(self, folder: Path = RESULTS / "answers" / "second"):
        held = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        asked = held.pop("questions")["stories"]
        self.stories = {tuple(name.split(", ", 1)): found for name, found in asked.items()}
        self.scorers = held.pop("scorers", None)
        self.files = held
        self.rows = {
            (name, r["kind"], (r["task"], r["split"], r["target"])): r for name, d in held.items() for r in d["rows"]
        }

    def seeds(self, stem: str, kind: str, cell: Cell) -> list[dict]:
        """The rows of every seed; a dial's scorer has the seed of its model."""
        names = [(f"{stem}-{s}", kind.replace("*", str(s)), cell) for s in SEEDS]
        return [self.rows[name] for name in names if name in self.rows]

    def mean(self, stem: str, kind: str, cell: Cell) -> float:
        return float(np.mean([row["f1"] for row in self.seeds(stem, kind, cell)] or [np.nan]))

    def f1s(self, stem: str, kind: str, cell: Cell) -> np.ndarray:
        return np.mean([unpack(row["packed"]) for row in self.seeds(stem, kind, cell)], axis=0)

    def kinds(self, stem: str, cell: Cell) -> list[str]:
        """What was read on every seed that answered at all; dials' names without their seeds."""
        found = {}
        for name, kind, at in self.rows:
            if name.rsplit("-", 1)[0] == stem and at == cell:
                plain = kind.rsplit(".", 1)[0] + ".*" if kind.startswith("dial:") and "." in kind else kind
                found.setdefault(plain, []).append(name)
        most = max(map(len, found.values()), default=0)
        return [kind for kind, names in found.items() if len(names) == most]

    def rivals(self, stem: str, cell: Cell) -> list[str]:
        return [k for k in self.kinds(stem, cell) if not k.startswith("dial:") and k not in NO_RIVALS]

    def best(self, stem: str, cell: Cell) -> str:
        """The control of a cell: the best there on validation; of other data sets, the best at that reduction on CoQA's
        validation stories with as many passages, or with three."""
        task, _, target = cell
        passages = task.rsplit("-", 1)[1]
        known = (f"coqa-{passages if passages in '13' else 3}", VALIDATION, target)
        rivals = [k for k in self.rivals(stem, known) if k in self.rivals(stem, cell)]
        return max(rivals, key=lambda kind: self.mean(stem, kind, known))

    def apart(self, one: tuple[str, str, Cell], other: tuple[str, str, Cell]) -> tuple[float, float, float, float]:
        """The first's F1 over the other's: mean, bounds of its interval, and P (two-sided)."""
        values = self.f1s(*one) - self.f1s(*other)
        drawn = over_stories(values, self.stories[one[2][:2]])
        tail = 2 * min((1 + (drawn <= 0).sum()) / (1 + len(drawn)), (1 + (drawn >= 0).sum()) / (1 + len(drawn)))
        return (float(values.mean()), *map(float, np.quantile(drawn, [0.025, 0.975])), min(1.0, float(tail)))


def cells(tasks: Iterable[str], split: str, reductions: Iterable[float] = REDUCTIONS) -> list[Cell]:
    return [(task, split, target) for task in tasks for target in reductions]


def dial_of(a: Second, stem: str) -> str:
    """The scorer that did best on validation, over all of its settings."""
    known = cells(("coqa-1", "coqa-3"), VALIDATION)
    kinds = {k for cell in known for k in a.kinds(stem, cell) if k.startswith("dial:")}
    return max(kinds, key=lambda kind: np.nanmean([a.mean(stem, kind, cell) for cell in known]))


def against(a: Second, ours: tuple[str, str], theirs: str, at: list[Cell], rival: str | None = None) -> list[dict]:
    """Of every cell: the dial's F1, its shares of alpha = 1, and the difference to the control. ours: model and kind;
    theirs: the model that reads the controls' prompts."""
    found = []
    for cell in at:
        if not a.seeds(*ours, cell):
            continue
        kind = rival or a.best(theirs, cell)
        whole = (cell[0], cell[1], 1.0)
        mean, low, high, p = a.apart((*ours, cell), (theirs, kind, cell))
        shares = [100 * a.mean(*ours, cell) / a.mean(stem, "whole", whole) for stem in (ours[0], theirs)]
        found.append({"cell": cell, "f1": a.mean(*ours, cell), "own": shares[0], "theirs": shares[1], "kind": kind,
                      "control": a.mean(theirs, kind, cell), "gain": (mean, low, high), "p": p})  # fmt: skip
    for row, fair in zip(found, holm([row["p"] for row in found])):
        row["holm"] = fair
    return found


def told(rows: list[dict]) -> list[str]:
    return [
        f"  {r['cell'][0]} {r['cell'][2]:g}x: {r['f1']:.1f}, {r['own']:.1f}% of its alpha = 1 ({r['theirs']:.1f}% of "
        f"the control's); {r['kind']} {r['control']:.1f}: {said(*r['gain'])} P {r['p']:.4f}, Holm {r['holm']:.4f}"
        for r in rows
    ]


def table(a: Second, stem: str, split: str, tasks: Iterable[str], reductions=REDUCTIONS) -> list[str]:
    lines = []
    for task in tasks:
        lines.append(f"{stem}, {task}, {split}: alpha = 1 {a.mean(stem, 'whole', (task, split, 1.0)):.1f}")
        for kind in sorted(a.kinds(stem, (task, split, reductions[0])), key=lambda k: (k.startswith("dial"), k)):
            values = [a.mean(stem, kind, (task, split, r)) for r in reductions]
            if kind != "whole":
                lines.append(f"  {kind:24}" + " ".join(f"{v:6.1f}" for v in values))
    return lines


def main() -> None:
    a, tasks = Second(), ("coqa-1", "coqa-3")
    untuned = dial_of(a, "plain")
    print(f"The scorer by validation, on the conventional models: {untuned}; goals: {TARGETS}")
    for stem in ("plain", "dial", "cuts"):
        if any(name.startswith(stem) for name in a.files):
            print(*table(a, stem, VALIDATION, tasks), *table(a, stem, TEST, tasks), sep="\n")
    data = {split: [f"{split}-1", f"{split}-3"] for split in ("squad", "drop")}
    print("The conventional models' dial against the control chosen on validation")
    print(*told(against(a, ("plain", untuned), "plain", cells(tasks, TEST))), sep="\n")
    for split, names in data.items():
        print(*told(against(a, ("plain", untuned), "plain", cells(names, SPLITS[split][1]))), sep="\n")
    if any(name.startswith("dial") for name in a.files):
        tuned = dial_of(a, "dial")
        for rival in ("cuts", "plain", "more"):
            if any(name.startswith(rival) for name in a.files) and a.rivals(rival, (tasks[0], TEST, 3.0)):
                print(f"The tuned dial ({tuned}) against the controls of {rival}")
                print(*told(against(a, ("dial", tuned), rival, cells(tasks, TEST))), sep="\n")
        for split, names in data.items():
            print(*told(against(a, ("dial", tuned), "plain", cells(names, SPLITS[split][1]))), sep="\n")
    print("At alpha = 1, against more conventional tuning")
    for stem in ("plain", "dial", "cuts"):
        for task in tasks:
            cell = (task, TEST, 1.0)
            if a.seeds(stem, "whole", cell) and a.seeds("more", "whole", cell):
                print(f"  {stem} {task}", said(*a.apart((stem, "whole", cell), ("more", "whole", cell))[:3]))


if __name__ == "__main__":
    main()
