"""What the paper beside the main one prints of fewer layers, and what of it adds up.

"LLM optimization strategies" (no arXiv number in the copy that was read) removes blocks by angular distance, distils,
caches and quantizes. Its Tables 1 to 3 as data, and each statement of its text that follows from them, recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

# Table 1: (model, share pruned, cache) -> perplexity, LMentry, latency in s, tokens/s, improvement in %.
TABLE_1 = {
    ("1B", 0, "None"): (15.38, 59.2, 2.42, 1066.7, None),
    ("1B", 0, "Dynamic"): (15.38, 59.2, 1.99, 1272.0, 17.8),
    ("1B", 0, "Static"): (15.38, 59.2, 2.32, 1180.5, 4.1),
    ("1B", 20, "Dynamic"): (19.85, 51.8, 1.83, 1445.1, 24.4),
    ("1B", 40, "Dynamic"): (26.19, 43.6, 1.53, 1633.3, 36.8),
    ("1B+KD", 0, "Dynamic"): (13.92, 61.7, 1.97, 1268.0, 15.1),
    ("1B+KD", 0, "Static"): (13.92, 61.7, 2.32, 1149.5, 0.0),
    ("1B+KD", 20, "Dynamic"): (17.47, 56.3, 1.81, 1434.1, 22.0),
    ("1B+KD", 40, "Dynamic"): (22.64, 49.4, 1.51, 1551.3, 34.9),
    ("8B", 0, "None"): (10.32, 60.1, 2.91, 844.4, None),
    ("8B", 0, "Dynamic"): (10.32, 60.1, 2.53, 1009.8, 13.1),
    ("8B", 20, "Dynamic"): (14.78, 55.6, 2.33, 1151.8, 19.9),
    ("8B", 40, "Dynamic"): (20.92, 47.5, 1.92, 1342.8, 34.0),
    ("8B+KD", 0, "Dynamic"): (9.18, 63.5, 2.42, 1029.8, 16.3),
    ("8B+KD", 20, "Dynamic"): (12.97, 59.8, 2.25, 1162.8, 22.1),
    ("8B+KD", 40, "Dynamic"): (18.26, 52.9, 1.94, 1310.9, 32.9),
    ("32B", 0, "None"): (11.54, 65.9, 3.74, 673.1, None),
    ("32B", 0, "Dynamic"): (11.54, 65.9, 3.53, 795.4, 5.6),
    ("32B", 20, "Dynamic"): (15.37, 56.4, 2.79, 917.6, 25.4),
    ("32B", 40, "Dynamic"): (22.11, 48.7, 2.34, 1124.6, 37.4),
}
# Table 2: (model, share pruned) -> ROUGE-L, exact match in %, accuracy in %.
TABLE_2 = {
    ("1B", 0): (0.31, 18.7, 78.3), ("1B", 20): (0.30, 15.8, 73.6), ("1B", 40): (0.25, 12.6, 68.2),
    ("1B+KD", 0): (0.34, 21.3, 83.7), ("1B+KD", 20): (0.33, 19.1, 80.6), ("1B+KD", 40): (0.29, 15.8, 74.5),
    ("8B", 0): (0.36, 23.5, 84.9), ("8B", 20): (0.33, 20.7, 81.3), ("8B", 40): (0.26, 16.4, 75.8),
    ("8B+KD", 0): (0.38, 26.7, 89.5), ("8B+KD", 20): (0.36, 24.3, 87.1), ("8B+KD", 40): (0.30, 20.2, 82.4),
    ("32B", 0): (0.39, 27.8, 91.7), ("32B", 20): (0.35, 23.5, 88.0), ("32B", 40): (0.28, 19.6, 82.1),
}  # fmt: skip
# Table 3: (model, share pruned) -> seconds without quantization, in BF16, INT8, INT4, on Inferentia.
TABLE_3 = {
    ("1B", 0): (2.42, 0.97, 1.01, 0.94, 0.012), ("1B", 20): (1.93, 1.02, 1.06, 0.96, 0.007),
    ("8B", 0): (2.91, 1.32, 2.03, 0.91, 0.043), ("8B", 20): (2.05, 1.97, 2.01, 1.98, 0.037),
    ("32B", 0): (3.74, 2.66, 2.78, 2.30, 0.872), ("32B", 20): (3.65, 3.46, 3.72, 3.66, 0.641),
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A statement of the text, the number it prints, and what the tables make of it. agrees: within half of the last
    printed digit."""

    said: str
    printed: float
    found: float
    unit: str
    digits: int = 1

    @property
    def agrees(self) -> bool:
        return abs(self.printed - self.found) <= 0.5 * 10**-self.digits + 1e-9


def recovered(model: str, column: int) -> float:
    """Percent of what 20% pruning costs `model` in a column of Table 1 that distillation gives back, by the rule of the
    text: against the undistilled whole model."""
    whole, pruned, healed = (
        TABLE_1[name, share, "Dynamic"][column] for name, share in ((model, 0), (model, 20), (f"{model}+KD", 20))
    )
    return 100 * (healed - pruned) / (whole - pruned)


def pruning_alone(model: str, share: int) -> float:
    """Percent of latency that pruning saves where both models cache: the printed ones count the cache, too."""
    return 100 * (1 - TABLE_1[model, share, "Dynamic"][2] / TABLE_1[model, 0, "Dynamic"][2])


def claims() -> list[Claim]:
    """Statements that follow from the tables, in the order of the text."""
    lmentry = {key: row[1] for key, row in TABLE_1.items()}
    exact, inferentia = {key: row[1] for key, row in TABLE_2.items()}, {key: row[4] for key, row in TABLE_3.items()}
    first = {key: row[0] for key, row in TABLE_3.items()}
    dynamic = 100 * (1 - TABLE_1["8B", 0, "Dynamic"][2] / TABLE_1["8B", 0, "None"][2])
    return [
        Claim("exact match of 1B falls at 20% by", 2.9, exact["1B", 0] - exact["1B", 20], "points"),
        Claim("exact match of 8B falls at 20% by", 2.8, exact["8B", 0] - exact["8B", 20], "points"),
        Claim("exact match of 32B falls at 20% by", 3.3, exact["32B", 0] - exact["32B", 20], "points"),
        Claim("exact match of 32B at 40% falls by", 8.2, exact["32B", 0] - exact["32B", 40], "points"),
        Claim("dynamic caching saves 8B", 13.0, dynamic, "%"),
        Claim("distillation gives 1B at 20% back", 4.5, lmentry["1B+KD", 20, "Dynamic"] - 51.8, "points"),
        Claim("... of a loss of", 7.4, lmentry["1B", 0, "Dynamic"] - lmentry["1B", 20, "Dynamic"], "points"),
        Claim("distillation gives 8B at 20% back", 4.2, lmentry["8B+KD", 20, "Dynamic"] - 55.6, "points"),
        Claim("Inferentia speeds 1B up", 201.7, first["1B", 0] / inferentia["1B", 0], "x"),
        Claim("Inferentia speeds 8B up", 35.8, first["8B", 0] / inferentia["8B", 0], "x"),
        Claim("Inferentia speeds 32B up", 3.6, first["32B", 0] / inferentia["32B", 0], "x"),
        Claim("pruning saves 1B on Inferentia", 41.7, 100 * (1 - inferentia["1B", 20] / inferentia["1B", 0]), "%"),
        Claim("8B+KD at 20% has of 32B's LMentry", 96.4, 100 * lmentry["8B+KD", 20, "Dynamic"] / 65.9, "%"),
        Claim("... in less time by", 39.8, 100 * (1 - TABLE_1["8B+KD", 20, "Dynamic"][2] / 3.74), "%"),
        Claim("8B+KD at 20% on Inferentia is faster than 32B", 101.1, 3.74 / inferentia["8B", 20], "x"),
        Claim("... at an exact match of its", 87.4, 100 * exact["8B+KD", 20] / exact["32B", 0], "%"),
    ]


def table() -> str:
    """Those that do not agree, as Markdown."""
    lines = ["| their text says | printed | their tables give |", "|---|---|---|"]
    lines += [
        f"| {c.said} | {c.printed:g}{'' if c.unit in '%x' else ' '}{c.unit} "
        f"| {c.found:.{c.digits}f}{'' if c.unit in '%x' else ' '}{c.unit} |"
        for c in claims()
        if not c.agrees
    ]
    return "\n".join(lines)
