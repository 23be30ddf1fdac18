"""Comparisons at equal MACs: of two settings that cost the same, which has more samples right?

Short texts are cut to whole tokens, and few of them, so a control may have no setting with just the dial's MACs. Then
so large a share of the samples is taken from its next setting with more MACs, and the rest from the next with fewer,
that both together cost what the dial does: that is what one would do who had to spend that much.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from zsaa.kit.store import rows_of
from zsaa.measure.stats import difference, from_bits, mean_difference

NEAR = 0.01  # by so large a share MAC reductions may differ, and count as equal
BEYOND = 0.1  # and so many more MACs may a control's last setting have, and stand for those that were not run


def at_equal_macs(rows: Sequence[dict], reduction: float) -> dict | None:
    """What `rows` of one control, of one result, have at this MAC reduction: one of them, or the mixture of two (its
    "shares": how much of each sample is right; "mixed": their MAC reductions). Where rows do not say which samples they
    have right, and of F1, which no mixture has, the next with more MACs. None where that was not run."""
    rows = sorted(rows, key=lambda row: row["mac_reduction"])
    near = [row for row in rows if abs(row["mac_reduction"] / reduction - 1) <= NEAR]
    if near:
        return min(near, key=lambda row: abs(row["mac_reduction"] - reduction))
    more = [row for row in rows if row["mac_reduction"] < reduction]
    fewer = [row for row in rows if row["mac_reduction"] > reduction]
    if not more or not fewer:
        return more[-1] if more and more[-1]["mac_reduction"] * (1 + BEYOND) >= reduction else None
    one, other = more[-1], fewer[0]
    if one["n"] != other["n"] or "right" not in one or "right" not in other or "f1" in one:
        return one
    dear, cheap = 1 / one["mac_reduction"], 1 / other["mac_reduction"]
    share = (1 / reduction - cheap) / (dear - cheap)
    shares = share * right(one) + (1 - share) * right(other)
    return {
        "control": one["control"], "target": None, "mac_reduction": reduction, "n": one["n"], "shares": shares.tolist(),
        "accuracy": round(100 * float(shares.mean()), 2), "mixed": (one["mac_reduction"], other["mac_reduction"]),
    }  # fmt: skip


def control_rows(result: dict, control: str) -> list[dict]:
    """The rows of a control, and as its first the model on whole texts."""
    whole = [] if control == "alpha" else [row for row in rows_of(result, "alpha") if row["mac_reduction"] == 1]
    rows = rows_of(result, control)
    return rows if any(row["mac_reduction"] == 1 for row in rows) else whole + rows


def right(row: dict) -> np.ndarray:
    """How much of each sample a row has right: 0 or 1, and in a mixture of two rows between."""
    return np.array(row["shares"] if "shares" in row else _flags(row["right"], row["n"]), dtype=float)


@lru_cache(maxsize=2048)  # a table sets each row beside each other
def _flags(bits: str, n: int) -> np.ndarray:
    return np.array(from_bits(bits, n), dtype=np.int8)


def ahead(ours: dict | list[dict], rival: dict | list[dict]) -> tuple[float, tuple[float, float]]:
    """Points by which one row is ahead of another in accuracy on the same samples, and the paired interval; of lists,
    the rows of several seeds, their means."""
    if isinstance(ours, list):
        return mean_difference(*([right(row) for row in rows] for rows in (ours, rival)))
    if "shares" in ours or "shares" in rival:
        return mean_difference([right(ours)], [right(rival)])
    n = ours["n"]
    return difference("accuracy", [1] * n, _flags(ours["right"], n), _flags(rival["right"], n))


def said(lead: tuple[float, tuple[float, float]]) -> str:
    """What `ahead` found, for people."""
    gain, (low, high) = lead
    return f"{gain:+.1f} [{low:.1f}, {high:.1f}]"
