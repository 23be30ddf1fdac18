"""Tables of the study from its records: `python -m ablation.answers.show RESULTS [split]`.

One line a row or control: F1 (exact match) by reduction. Then, for every dial, its F1 in per cent of its own at
alpha = 1, and the paired difference to the best control of the same setting, with a bootstrap interval of 95%.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ablation.answers.judge import REDUCTIONS

MODELS = ("reference", "cuts")  # controls are read by these
CHEATS = ("oracle",)  # no rival: it knows the answer


def records(folder: str | Path, split: str) -> dict[tuple[str, int, float], dict]:
    """By (name, passages, reduction); the last one where a row was run again."""
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_text().splitlines():
            r = json.loads(line)
            if r.get("split") == split and "f1s" in r:
                found[r["name"], r["passages"], r["reduction"]] = r
    return found


def is_control(name: str) -> bool:
    model, _, kind = name.partition("-")
    return model in MODELS and bool(kind) and kind not in CHEATS and not kind.startswith(("dial", "learned"))


def difference(ours: list[float], theirs: list[float], draws: int = 2000) -> tuple[float, float, float]:
    """Mean paired difference and the bounds of its 95% interval, over questions."""
    d = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    index = np.random.default_rng(0).integers(0, len(d), (draws, len(d)))
    low, high = np.quantile(d[index].mean(1), [0.025, 0.975])
    return float(d.mean()), float(low), float(high)


def table(found: dict, passages: int) -> list[str]:
    names = sorted({n for n, k, _ in found if k == passages})
    lines = [f"{passages} passages, F1 (exact match): " + ", ".join(f"{r:g}x" for r in (1.0, *REDUCTIONS))]
    for name in names:
        cells = [found.get((name, passages, r)) for r in (1.0, *REDUCTIONS)]
        lines.append(f"{name:24}" + "  ".join(f"{c['f1']:5.1f} ({c['em']:4.1f})" if c else " " * 12 for c in cells))
    return lines


def against(found: dict, passages: int) -> list[str]:
    """What each dial keeps, and how it stands to the best control."""
    lines = [f"{passages} passages: % of its own F1 at alpha = 1; difference in F1 to the best control [95%]"]
    for name in sorted({n for n, k, _ in found if k == passages and n not in MODELS and not is_control(n)}):
        whole = found.get((name, passages, 1.0), found.get((name.partition("-")[0], passages, 1.0)))
        cells = []
        for r in REDUCTIONS:
            ours = found.get((name, passages, r))
            rivals = [(v["f1"], n, v) for (n, k, x), v in found.items() if (k, x) == (passages, r) and is_control(n)]
            if ours is None or whole is None or not rivals:
                continue
            _, rival, best = max(rivals, key=lambda v: v[0])
            mean, low, high = difference(ours["f1s"], best["f1s"])
            share = 100 * ours["f1"] / max(whole["f1"], 1e-9)
            cells.append(f"{r:g}x {share:.1f}% {mean:+.1f} [{low:+.1f}, {high:+.1f}] {rival} (MACs {ours['reached']})")
        lines += [f"{name}", *(f"    {c}" for c in cells)]
    return lines


def main() -> None:
    found = records(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "test")
    for passages in sorted({k for _, k, _ in found}):
        print("\n".join([*table(found, passages), "", *against(found, passages), ""]))


if __name__ == "__main__":
    main()
