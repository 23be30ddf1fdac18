"""What the second study's committed answers say: `python -m ablation.answers.verdict` (results/answers/second).

Whatever is chosen (the dial's scorer, over all settings; the control of each cell, among those that were read on
validation and on the test stories) is chosen by mean F1 on the validation stories; the test stories are then read once.
A difference is paired: each question's F1, meaned over the seeds that both have, the dial's less the control's;
intervals of 95% and P values resample the stories, 10,000 times; Holm's correction is over the cells of a data set. The
lease ended before every seed had every control.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ablation.answers.compare import REDUCTIONS, TARGETS, said
from ablation.answers.results import over_stories
from ablation.answers.second import SEEDS
from ablation.answers.second_results import NO_RIVALS, SPLITS, unpack
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import holm

VALIDATION, TEST = SPLITS["validation"][1], SPLITS["test"][1]
Cell = tuple[str, str, float]  # task, split, reduction


class Second:
    """Rows by (model, kind, cell), and the story of each question by (task, split)."""

    def __init__(self, folder: Path = RESULTS / "answers" / "second"):
        held = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        asked = held.pop("questions")["stories"]
        self.stories = {tuple(name.split(", ", 1)): found for name, found in asked.items()}
        self.scorers, _ = held.pop("scorers", None), held.pop("kept", None)
        self.files = held
        self.rows = {
            (name, r["kind"], (r["task"], r["split"], r["target"])): r for name, d in held.items() for r in d["rows"]
        }

    def seeds(self, stem: str, kind: str, cell: Cell) -> dict[int, dict]:
        """The rows of every seed that was run; a dial's scorer has the seed of its model."""
        names = {s: (f"{stem}-{s}", kind.replace("*", str(s)), cell) for s in SEEDS}
        return {s: self.rows[name] for s, name in names.items() if name in self.rows}

    def mean(self, stem: str, kind: str, cell: Cell, seeds: Iterable[int] = SEEDS) -> float:
        found = self.seeds(stem, kind, cell)
        return float(np.mean([found[s]["f1"] for s in seeds if s in found] or [np.nan]))

    def f1s(self, stem: str, kind: str, cell: Cell, seeds: Iterable[int] = SEEDS) -> np.ndarray:
        found = self.seeds(stem, kind, cell)
        return np.mean([unpack(found[s]["packed"]) for s in seeds if s in found], axis=0)

    def kinds(self, stem: str, cell: Cell) -> list[str]:
        """What was read of a cell; dials' names without their seeds."""
        found = [k for name, k, at in self.rows if name.rsplit("-", 1)[0] == stem and at == cell]
        return list(dict.fromkeys(k.rsplit(".", 1)[0] + ".*" if k.startswith("dial:") else k for k in found))

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

    def common(self, one: tuple[str, str, Cell], other: tuple[str, str, Cell]) -> list[int]:
        return sorted(set(self.seeds(*one)) & set(self.seeds(*other)))

    def apart(self, one: tuple[str, str, Cell], other: tuple[str, str, Cell]) -> tuple[float, float, float, float]:
        """The first's F1 over the other's, on the seeds that both have: mean, bounds of its interval, and P
        (two-sided)."""
        seeds = self.common(one, other)
        values = self.f1s(*one, seeds) - self.f1s(*other, seeds)
        drawn = over_stories(values, self.stories[one[2][:2]])
        tail = 2 * min((1 + (drawn <= 0).sum()) / (1 + len(drawn)), (1 + (drawn >= 0).sum()) / (1 + len(drawn)))
        return (float(values.mean()), *map(float, np.quantile(drawn, [0.025, 0.975])), min(1.0, float(tail)))


def cells(tasks: Iterable[str], split: str, reductions: Iterable[float] = REDUCTIONS) -> list[Cell]:
    return [(task, split, target) for task in tasks for target in reductions]


def dial_of(a: Second, stem: str) -> str:
    """The scorer that did best on validation, over all of its settings."""
    return max(found := on_validation(a, stem), key=lambda kind: found[kind])


def on_validation(a: Second, stem: str) -> dict[str, float]:
    """Of every scorer: mean F1 over the settings, on the seeds that have all scorers."""
    known = cells(("coqa-1", "coqa-3"), VALIDATION)
    known = [cell for cell in known if any(k.startswith("dial:") for k in a.kinds(stem, cell))]
    kinds = sorted({k for cell in known for k in a.kinds(stem, cell) if k.startswith("dial:")})
    seeds = [s for s in SEEDS if all(s in a.seeds(stem, kind, cell) for kind in kinds for cell in known)]
    return {kind: float(np.mean([a.mean(stem, kind, cell, seeds) for cell in known])) for kind in kinds}


def against(a: Second, ours: tuple[str, str], theirs: str, at: list[Cell], rival: str | None = None) -> list[dict]:
    """Of every cell: the dial's F1, its shares of alpha = 1, and the difference to the control. ours: model and kind;
    theirs: the model that reads the controls' prompts."""
    found = []
    for cell in at:
        if not a.seeds(*ours, cell):
            continue
        kind = rival or a.best(theirs, cell)
        seeds = a.common((*ours, cell), (theirs, kind, cell))
        if not seeds:
            continue
        mean, low, high, p = a.apart((*ours, cell), (theirs, kind, cell))
        own = a.mean(*ours, cell, seeds)
        share = 100 * own / a.mean(ours[0], "whole", (cell[0], cell[1], 1.0), seeds)
        found.append({"cell": cell, "f1": own, "own": share, "kind": kind, "seeds": seeds,
                      "control": a.mean(theirs, kind, cell, seeds), "gain": (mean, low, high), "p": p})  # fmt: skip
    for row, fair in zip(found, holm([row["p"] for row in found])):
        row["holm"] = fair
    return found


def told(rows: list[dict]) -> list[str]:
    return [
        f"  {r['cell'][0]} {r['cell'][2]:g}x: {r['f1']:.1f}, {r['own']:.1f}% of alpha = 1; {r['kind']} "
        f"{r['control']:.1f}: {said(*r['gain'])} P {r['p']:.4f}, Holm {r['holm']:.4f}; seeds {r['seeds']}"
        for r in rows
    ]


def table(a: Second, stem: str, split: str, tasks: Iterable[str], reductions=REDUCTIONS) -> list[str]:
    """Mean F1 over the seeds that were run, and how many these are."""
    lines = []
    for task in tasks:
        whole = (task, split, 1.0)
        lines.append(f"{stem}, {task}, {split}: alpha = 1 {a.mean(stem, 'whole', whole):.1f} "
                     f"({len(a.seeds(stem, 'whole', whole))} seeds)")  # fmt: skip
        at = [(task, split, r) for r in reductions]
        kinds = {kind for cell in at for kind in a.kinds(stem, cell)} - {"whole"}
        for kind in sorted(kinds, key=lambda k: (k.startswith("dial"), k)):
            values = [f"{a.mean(stem, kind, cell):6.1f} ({len(a.seeds(stem, kind, cell))})" for cell in at]
            lines.append(f"  {kind:24}" + " ".join(values))
    return lines


def main() -> None:
    a, tasks = Second(), ("coqa-1", "coqa-3")
    print("Mean F1 on validation:", {kind: round(f1, 2) for kind, f1 in on_validation(a, "plain").items()})
    print("Goals:", TARGETS)
    for split in (VALIDATION, TEST):
        print(*table(a, "plain", split, tasks), sep="\n")
    for kind in (dial_of(a, "plain"), *(k for k in on_validation(a, "plain") if k != dial_of(a, "plain"))):
        print(f"{kind}, on the conventional models, against the control chosen on validation")
        print(*told(against(a, ("plain", kind), "plain", cells(tasks, TEST))), sep="\n")
        print(f"{kind}, against BM25 sentences, turns among them")
        print(*told(against(a, ("plain", kind), "plain", cells(tasks, TEST), "bm25-all")), sep="\n")
    print("At alpha = 1, against the conventional models")
    for stem in ("dial", "cuts", "more"):
        for task in tasks:
            cell = (task, TEST, 1.0)
            if seeds := a.common((stem, "whole", cell), ("plain", "whole", cell)):
                gain = a.apart((stem, "whole", cell), ("plain", "whole", cell))
                print(f"  {stem} {task}", said(*gain[:3]), f"seeds {seeds}")
    for split in ("squad", "drop"):
        print(*table(a, "plain", SPLITS[split][1], (f"{split}-1", f"{split}-3")), sep="\n")
    lengths = ("needles-1024", "needles-2048", "needles-4096", "needles-7680")
    print(*table(a, "plain", SPLITS["needles"][1], lengths), sep="\n")


if __name__ == "__main__":
    main()
