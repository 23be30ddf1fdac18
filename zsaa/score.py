"""Which tokens go on: contribution scores and the selection made from them (paper, sections 3.2 and 3.3).

The soft-score P = softmax(QK^T / sqrt(d) + M) says how much each token contributes to each row of the attention output.
zsaa.attention sums P over all heads and all real queries; the functions here turn that column sum into a ranking.
"""

from __future__ import annotations

import torch
from torch import Tensor


def column_sum(sums: Tensor, lengths: Tensor) -> Tensor:
    """The paper's contribution: the total attention that a token receives."""
    return sums


def column_mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """Column sum per query that can see the token: under a causal mask early tokens have more voters, so the plain sum
    favours the beginning of the text."""
    voters = lengths[:, None] - torch.arange(sums.shape[1], device=sums.device)
    return sums / voters.clamp(min=1)


SCORES = {"column_sum": column_sum, "column_mean": column_mean}


def check_score(score: str) -> str:
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}. Available: {', '.join(SCORES)}.")
    return score


def select(scores: Tensor, lengths: Tensor, counts: Tensor, width: int, ragged: bool) -> tuple[Tensor, Tensor | None]:
    """Rows that go on, in their original order.

    scores [batch, rows]: real rows first, padding after them. lengths, counts [batch]: real rows now, and rows to keep
    (1 <= counts <= lengths); width = counts.max(); ragged = some sample has fewer real rows than `rows`, or keeps fewer
    than width. `scores` is overwritten. The last real row is always kept: it carries the prediction, and
    under a causal mask only itself attends to it. Ties go to the earlier row.

    Returns indices [batch, width] (int64, ascending) and, if `ragged`, a bool mask [batch, width] of the real ones
    (padding points at some existing row, so that it stays finite); else None.
    """
    n = scores.shape[1]
    if not ragged:
        scores[:, -1] = float("inf")
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
        return best.sort(dim=1).values, None
    last = lengths[:, None] - 1
    rows = torch.arange(n, device=scores.device)
    scores.masked_fill_(rows > last, float("-inf")).scatter_(1, last, float("inf"))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :width]
    # Ranks beyond a sample's own count become padding: a sentinel that sorts last.
    best = best.masked_fill(rows[:width] >= counts[:, None], n).sort(dim=1).values
    return best.clamp(max=n - 1), best < n
