"""Which tokens go on: contribution scores and the selection made from them (paper, sections 3.2 and 3.3).

The soft-score P = softmax(QK^T / sqrt(d) + M) says how much each token contributes to each row of the attention output.
zsaa.attention sums P over all heads and all real queries; the functions here turn that column sum into a ranking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from zsaa.rule import PLAIN


def column_sum(sums: Tensor, lengths: Tensor) -> Tensor:
    """The paper's contribution: the total attention that a token receives."""
    return sums


def column_mean(sums: Tensor, lengths: Tensor) -> Tensor:
    """Column sum per query that can see the token: under a causal mask early tokens have more voters, so the plain sum
    favours the beginning of the text."""
    voters = lengths[:, None] - torch.arange(sums.shape[1], device=sums.device)
    return sums / voters.clamp(min=1)


_SEEDS: ContextVar[Sequence[int] | None] = ContextVar("seeds", default=None)


@contextmanager
def seeded(seeds: Sequence[int]) -> Iterator[None]:
    """Passes in this block take the draws of `random` from `seeds`, one 32-bit number per sample of the batch. A CUDA
    graph would repeat the draws that it was recorded with: switch graphs off (`zsaa.enable(model, graphs=False)`)."""
    token = _SEEDS.set(seeds)
    try:
        yield
    finally:
        _SEEDS.reset(token)


def random(sums: Tensor, lengths: Tensor) -> Tensor:
    """A draw that knows nothing of the text: the control that shows what choosing is worth at equal compute.

    A hash of the row's place among those that entered the layer, of how many entered, and of the sample's seed (see
    `seeded`; 0 outside of it). Every layer that drops something gets fewer rows than the last one that did, so each
    draws anew; and nothing else enters, so a sample's draws do not depend on its batch.
    """
    given = _SEEDS.get()
    seeds = torch.zeros_like(lengths) if given is None else lengths.new_tensor(given, dtype=torch.int64)
    x = _mix(_mix(seeds) + lengths)[:, None] + torch.arange(sums.shape[1], device=sums.device)
    return (_mix(x) >> 8).float()  # the 24 bits that a float32 holds exactly


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (C. Wellons' lowbias32), in int64."""
    x = x & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


FUNCTIONS = dict(zip(PLAIN, (column_sum, column_mean, random), strict=True))


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
