"""What the third study's committed answers say: `python -m ablation.answers.third` (results/answers/third; fourth and
long: what was read later, of the row that ships and of rows that were trained anew, as their weights were gone).

Models that are tuned at the reductions they are judged at: by the dial (`tuned4`; its scorer was taught before, and
left as it is), and their rivals on prompts that these cut (`rival4`), as many steps from the same conventional models
(`plain`). The control of a cell is the best on the validation stories of all that three seeds have, of any of these;
then the test stories are read once. Intervals, P and Holm's correction are those of `ablation.answers.verdict`.

A dial may number anew what it leaves (`dial:close:`): so it is read if its F1 is higher, on average over the ten
settings of the validation stories and the seeds that have both. That was settled before the fourth was run. On other
data sets nothing was trained or chosen: what is chosen on CoQA is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ablation.answers.compare import TARGETS, said
from ablation.answers.results import over_stories
from ablation.answers.second import FEW, SEEDS
from ablation.answers.second_results import NO_RIVALS, SPLITS
from ablation.answers.verdict import TEST, VALIDATION, Cell, Second, cells, table
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import holm

OURS, THEIRS = "tuned4", ("plain", "rival4", "lexical4", "last4")
DIAL, CLOSE = "dial:s16-also.*", "dial:close:s16-also.*"
TASKS = ("coqa-1", "coqa-3")
FOLDERS = tuple(RESULTS / "answers" / name for name in ("third", "fourth", "long"))
OTHERS = {
    "squad": ("squad-1", "squad-3"),
    "drop": ("drop-1", "drop-3"),
    "qasper": ("qasper-1",),
    "needles": ("needles-1024", "needles-2048", "needles-4096", "needles-7680"),
    "test": ("coqa-2", "coqa-4", "coqa-8", "coqa-16"),
}
Way = tuple[str, str]  # stem of the models, kind
UNTUNED: Way = ("plain", DIAL)


class Third(Second):
    def __init__(self, first=FOLDERS[0], *later):
        """What was read later goes before; of a row that was trained anew, nothing else counts."""
        super().__init__(first)
        for folder in filter(Path.is_dir, later or FOLDERS[1:]):
            more = Second(folder)
            anew = {name for name, d in more.files.items() if d.get("log")}
            self.rows = {at: row for at, row in self.rows.items() if at[0] not in anew} | more.rows
            self.stories |= more.stories
            self.files |= more.files

    def seeds(self, stem: str, kind: str, cell: Cell) -> dict[int, dict]:
        """A dial's scorer has the seed of its model or, of those that were trained anew, 0."""
        found = super().seeds(stem, kind.replace("*", "0"), cell) if kind.startswith("dial:") else {}
        return dict(sorted((found | super().seeds(stem, kind, cell)).items()))

    def share(self, one: tuple[str, str, Cell], whole: tuple[str, str, Cell], seeds: Sequence[int]):
        """What one has of whole's F1 (per cent), and the bounds of its interval: stories resampled, for both alike."""
        if not seeds:
            return (float("nan"),) * 3
        values = [self.f1s(*at, seeds) for at in (one, whole)]
        drawn = [over_stories(found, self.stories[one[2][:2]]) for found in values]
        low, high = np.quantile(100 * drawn[0] / drawn[1], [0.025, 0.975])
        return float(100 * values[0].mean() / values[1].mean()), float(low), float(high)

    def dial(self) -> str:
        """The dial that is read."""
        at = [(s, cell) for cell in cells(TASKS, VALIDATION) for s in SEEDS
              if all(s in self.seeds(OURS, kind, cell) for kind in (DIAL, CLOSE))]  # fmt: skip
        means = {kind: [self.mean(OURS, kind, cell, [s]) for s, cell in at] for kind in (DIAL, CLOSE)}
        return max(means, key=lambda kind: sum(means[kind]))

    def controls(self, cell: Cell, known: Cell, theirs: Sequence[str], seeds: set[int]) -> list[Way]:
        """All that these seeds have in a cell and on validation."""
        return [
            (stem, kind)
            for stem in theirs
            for kind in self.kinds(stem, cell)
            if not kind.startswith("dial:") and kind not in NO_RIVALS
            and seeds <= set(self.seeds(stem, kind, cell)) & set(self.seeds(stem, kind, known))
        ]  # fmt: skip

    def control(self, cell: Cell, ours: Way = (OURS, DIAL), theirs: Sequence[str] = THEIRS) -> Way | None:
        """The best on validation of what all seeds of ours have; of other data sets, on CoQA's validation stories with
        as many passages, or three."""
        passages = cell[0].rsplit("-", 1)[1]
        known = (f"coqa-{passages if passages in '13' else 3}", VALIDATION, cell[2])
        found = self.controls(cell, known, theirs, set(self.seeds(*ours, cell)))
        return max(found, key=lambda way: self.mean(*way, known)) if found else None

    def elsewhere(self, cell: Cell) -> Way | None:
        """Of another data set, read by our model alone: the control that did best on CoQA's validation stories, by the
        models of any of theirs."""
        passages = cell[0].rsplit("-", 1)[1]
        known = (f"coqa-{passages if passages in '13' else 3}", VALIDATION, cell[2])
        here = {kind for _, kind in self.controls(cell, cell, (OURS,), {0})}
        found = [way for way in self.controls(known, known, THEIRS, {0}) if way[1] in here]
        return (OURS, max(found, key=lambda way: self.mean(*way, known))[1]) if found else None

    def best(self, cell: Cell, ours: Way = (OURS, DIAL), theirs: Sequence[str] = THEIRS) -> Way | None:  # type: ignore[override]
        """The best control of a cell in hindsight."""
        found = self.controls(cell, cell, theirs, set(self.seeds(*ours, cell)))
        return max(found, key=lambda way: self.mean(*way, cell)) if found else None


def against(a: Third, ours: Way, at: Sequence[Cell], rival, base: str | None = None) -> list[dict]:
    """Of every cell: ours, the rival's (a way, or a function of the cell), the paired difference. base: the stem whose
    F1 at alpha = 1 ours is a share of; ours' own by default."""
    found = []
    for cell in at:
        if not a.seeds(*ours, cell):
            continue
        theirs = rival(cell) if callable(rival) else rival
        if theirs is None or not (seeds := a.common((*ours, cell), (*theirs, cell))):
            continue
        mean, low, high, p = a.apart((*ours, cell), (*theirs, cell))
        at_one, own = (base or ours[0], "whole", (cell[0], cell[1], 1.0)), a.mean(*ours, cell, seeds)
        both = [s for s in seeds if s in a.seeds(*at_one)]
        share = a.share((*ours, cell), at_one, both)
        found.append({"cell": cell, "f1": own, "share": share, "rival": theirs, "seeds": seeds,
                      "theirs": a.mean(*theirs, cell, seeds), "gain": (mean, low, high), "p": p})  # fmt: skip
    for row, fair in zip(found, holm([row["p"] for row in found])):
        row["holm"] = fair
    return found


def told(rows: list[dict]) -> list[str]:
    return [
        f"  {r['cell'][0]} {r['cell'][2]:g}x: {r['f1']:.1f}, {r['share'][0]:.1f} [{r['share'][1]:.1f}, "
        f"{r['share'][2]:.1f}]% of alpha = 1; {' '.join(r['rival'])} "
        f"{r['theirs']:.1f}: {said(*r['gain'])} P {r['p']:.4f}, Holm {r['holm']:.4f}; seeds {r['seeds']}"
        for r in rows
    ]


def stems(a: Third) -> list[str]:
    return list(dict.fromkeys(name.rsplit("-", 1)[0] for name in a.files))


def main() -> None:
    a, at = Third(), cells(TASKS, TEST)
    ours = (OURS, a.dial())
    print("Goals:", TARGETS, "; the dial that is read:", ours[1])
    for split in (VALIDATION, TEST):
        for stem in stems(a):
            print(*table(a, stem, split, TASKS), sep="\n")
    print("The tuned dial against the control chosen on validation")
    print(*told(against(a, ours, at, a.control)), sep="\n")
    print("... against the best control in hindsight")
    print(*told(against(a, ours, at, a.best)), sep="\n")
    print("On validation, against the best control there")
    print(*told(against(a, ours, cells(TASKS, VALIDATION), a.best)), sep="\n")
    print("... against the same dial untuned; shares of the conventional models' F1")
    print(*told(against(a, ours, at, UNTUNED, "plain")), sep="\n")
    print("The untuned dial against the untuned control chosen on validation")
    print(*told(against(a, UNTUNED, at, lambda cell: a.control(cell, UNTUNED, ("plain",)))), sep="\n")
    print("... against the best in hindsight")
    print(*told(against(a, UNTUNED, at, lambda cell: a.best(cell, UNTUNED, ("plain",)))), sep="\n")
    print("BM25 tuned against untuned")
    print(*told(against(a, ("rival4", "bm25-all"), at, ("plain", "bm25-all"))), sep="\n")
    print("At alpha = 1, against the conventional models")
    for stem in (OURS, "rival4"):
        print(stem, *told(against(a, (stem, "whole"), [(t, TEST, 1.0) for t in TASKS], ("plain", "whole"))), sep="\n")
    for split, tasks in OTHERS.items():
        print(*table(a, OURS, SPLITS[split][1], tasks, FEW), sep="\n")
        there = cells(tasks, SPLITS[split][1], FEW)
        print("The tuned dial, on what it has not learned, against the control chosen on CoQA; against the best there")
        print(*told(against(a, ours, there, a.elsewhere)), sep="\n")
        print(*told(against(a, ours, there, lambda cell: a.best(cell, ours, (OURS,)))), sep="\n")
    print(json.dumps({stem: len(a.seeds(stem, "whole", ("coqa-1", TEST, 1.0))) for stem in stems(a)}))


if __name__ == "__main__":
    main()
