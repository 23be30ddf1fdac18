"""What the committed answers say: `python -m ablation.answers.compare` (results/answers).

The dial is chosen by its mean F1 on the validation stories, over all settings. Controls were read on the test stories
alone, so none is chosen: the dial is ahead where it is ahead of every one of them, which the best on these very
questions decides. Differences are paired, over questions; intervals of 95% and P values resample the stories, 10,000
times, and Holm's correction is over the cells of a data set.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ablation.answers.results import MODELS, over_stories, whose
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import holm

REDUCTIONS = (2.0, 3.0, 5.0, 7.0, 11.0)
TARGETS = dict(zip(REDUCTIONS, (98, 96, 92, 90, 86)))  # of the F1 at alpha = 1, three passages
CHEAT = "oracle"  # no rival: it knows the answer
SAME = {"coqa": "CoQA, 100 test stories", "squad": "SQuAD", "drop": "DROP"}


class Answers:
    """Rows by (file, task, split, reduction), and the story of each question."""

    def __init__(self, folder: Path = RESULTS / "answers"):
        held = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
        asked = held.pop("questions")["questions"]
        names = {"validation": "CoQA, 40 validation stories", "test": SAME["coqa"], "squad": "SQuAD", "drop": "DROP"}
        self.stories = {names[split]: found["stories"] for split, found in asked.items()}
        held.pop("scorers")
        self.files = list(held)
        self.rows = {(name, r["task"], r["split"], r["target"]): r for name, d in held.items() for r in d["rows"]}

    def f1s(self, name: str, task: str, split: str, target: float) -> np.ndarray:
        return np.array([int(v) for v in self.rows[name, task, split, target]["f1s"].split()], dtype=float)

    @property
    def controls(self) -> list[str]:
        """Prompts cut in plain ways, read by a model that is tuned conventionally or on cut prompts."""
        plain = [n for n in self.files if n not in MODELS]
        return [n for n in plain if not n.endswith((CHEAT, "learned")) and "-dial-" not in n]

    @property
    def dials(self) -> list[str]:
        """Seed 0, trained."""
        return [n for n in self.files if n in MODELS and MODELS[n].method == "dial" and not MODELS[n].seed]

    def on_validation(self, name: str) -> float:
        cells = [(f"coqa-{k}", "CoQA, 40 validation stories", r) for k in (1, 3) for r in REDUCTIONS]
        return float(np.mean([self.rows[(name, *cell)]["f1"] for cell in cells]))

    def chosen(self) -> str:
        return max(self.dials, key=self.on_validation)

    def best(self, task: str, split: str, target: float) -> str:
        return max(self.controls, key=lambda n: self.rows[n, task, split, target]["f1"])

    def apart(self, one: tuple, other: tuple) -> tuple[float, float, float, float]:
        """The first's F1 over the other's: mean, bounds of its interval, and P (two-sided)."""
        values = self.f1s(*one) - self.f1s(*other)
        drawn = over_stories(values, self.stories[one[2]])
        tail = 2 * min((1 + (drawn <= 0).sum()) / (1 + len(drawn)), (1 + (drawn >= 0).sum()) / (1 + len(drawn)))
        return (float(values.mean()), *map(float, np.quantile(drawn, [0.025, 0.975])), min(1.0, float(tail)))


def said(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def against(a: Answers, name: str, data: str, rival: str | None = None) -> list[str]:
    """Of every setting of a data set: F1, its share of the same model's at alpha = 1, and the difference to `rival`,
    or to the best control."""
    split, cells, lines = SAME[data], [], []
    for task in (f"{data}-{k}" for k in (1, 3)):
        for target in REDUCTIONS:
            if (name, task, split, target) in a.rows:
                other = rival or a.best(task, split, target)
                cells.append((task, target, other, a.apart((name, task, split, target), (other, task, split, target))))
    for (task, target, other, (mean, low, high, p)), fair in zip(cells, holm([c[3][3] for c in cells])):
        row, whole = a.rows[name, task, split, target], a.rows[whose(name)[0], task, split, 1.0]
        share = 100 * row["f1"] / whole["f1"]
        gain = f"{other} {said(mean, low, high)} P {p:.4f}, Holm {fair:.4f}"
        lines.append(f"  {task} {target:g}x: {row['f1']:.1f}, {share:.1f}% of alpha = 1; {gain}")
    return lines


def main() -> None:
    a = Answers()
    print("Mean F1 on validation:", {n: round(a.on_validation(n), 2) for n in a.dials})
    best = a.chosen()
    for name in (best, "reference-dial-once", "reference-learned", "cuts-learned"):
        for data in SAME:
            print(f"{name}, {SAME[data]}, against the best control there", *against(a, name, data), sep="\n")
        print(f"{name}, against BM25 sentences", *against(a, name, "coqa", "reference-bm25"), sep="\n")
    print(f"{best}, against the conventionally tuned model's dial", *against(a, best, "coqa", "reference-dial-once"),
          sep="\n")  # fmt: skip
    print("At alpha = 1, against conventional tuning")
    for name in (*a.dials, "once-seed1", "rising-seed1", "cuts"):
        for task in ("coqa-1", "coqa-3"):
            cell = (task, SAME["coqa"], 1.0)
            print(f"  {name} {task}", said(*a.apart((name, *cell), ("reference", *cell))[:3]))


if __name__ == "__main__":
    main()
