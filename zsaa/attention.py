"""Causal attention that also reports how much attention each token receives (Eq. 1 and section 3.2).

Rows are laid out with real tokens first, in order, and padding after them, so "row j comes before row i" is the causal
mask, and padding can never be seen by a real query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.fast import attention as fast

# Query rows per block: bounds the memory of the soft-score (batch x heads x block x rows), and lets a causal block
# skip the keys that come after it. On a CPU small blocks stay in its cache, too: half the time at 512 rows.
BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
BLOCK_ROWS = {"cpu": 64}


def visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Bool mask [batch, 1, queries, keys]: keys at or before the query, real (position >= 0) and within `window`."""
    q, k = query_positions[:, None, :, None], key_positions[:, None, None, :]
    mask = (k >= 0) & (k <= q)
    if window is not None:
        mask &= q - k < window
    return mask


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding (half-split layout) of q and k [batch, heads, rows, dim]; cos, sin [batch, rows, dim].
    Both at once: on short rows the number of operations is what costs, on long ones the memory that they write."""
    both, sin, half = torch.cat([q, k], dim=1), sin.unsqueeze(1), q.shape[-1] // 2
    turned = both * cos.unsqueeze(1)
    turned[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(both[..., :half], sin[..., half:])
    return turned.split([q.shape[1], k.shape[1]], dim=1)


def _sdpa(q, k, v, mask, scale, dropout, causal=False):
    groups = q.shape[1] // k.shape[1]
    # SDPA has kernels for grouped heads in half precision without a mask, from Ampere on; otherwise it would answer
    # enable_gqa with its slow math path: repeat K and V there instead.
    half = q.dtype in (torch.float16, torch.bfloat16)
    grouped_kernel = not q.is_cuda or (half and torch.cuda.get_device_capability(q.device) >= (8, 0))
    gqa = groups > 1 and mask is None and grouped_kernel
    if groups > 1 and not gqa:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def _soft_score(q, k, scale, softcap, hidden):
    """softmax in float32 (float64 for float64 inputs) of q [batch, kv_heads, groups, rows, dim] over keys; `hidden`, of
    the last keys, is True where a query must not look."""
    logits = torch.matmul(q.flatten(2, 3) * scale, k.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if hidden is not None:
        logits[..., -hidden.shape[-1] :].masked_fill_(hidden, float("-inf"))
    return logits.softmax(dim=-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, dropout: float = 0.0
) -> Tensor:
    """Plain attention of new queries over a cache: q [batch, heads, rows, dim], k and v [batch, kv_heads, keys, dim],
    mask [batch, 1, rows, keys] or None for all visible. Returns [batch, heads, rows, dim]."""
    if softcap is None:
        return _sdpa(q, k, v, mask, scale, dropout)
    grouped = q.unflatten(1, (k.shape[1], -1))
    hidden = None if mask is None else ~mask[:, :, None]
    p = F.dropout(_soft_score(grouped, k, scale, softcap, hidden), dropout)
    return torch.matmul(p.to(v.dtype).flatten(2, 3), v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


@dataclass(frozen=True)
class Rows:
    """Which rows of a prefill are there, and which may see which.

    count: rows, where q, k and v have more, zeros that are not there (see `fast.attention.padded_rows`); None: as many
    as they have. real: bool [batch, rows], or None if all are; padding gives no votes. positions: int64 [batch, rows],
    needed only with a sliding `window` (in original positions).
    """

    count: int | None = None
    real: Tensor | None = None
    positions: Tensor | None = None
    window: int | None = None

    def of(self, q: Tensor) -> int:
        """How many rows of q [batch, heads, rows, dim] are there?"""
        return q.shape[2] if self.count is None else self.count

    def hidden(self, count: int, device: torch.device) -> Callable[[int, int], Tensor]:
        """What gives, for queries [start, end) of `count`, the mask that is True where they must not look, of the last
        keys before `end`."""
        if self.window is not None:
            index, positions = torch.arange(count, device=device), self.positions
            assert positions is not None, "a sliding window counts positions"

            def outside(start: int, end: int) -> Tensor:
                seen = visible(positions[:, start:end], positions[:, :end], self.window)[:, :, None]
                return ~seen & (index[start:end, None] != index[None, :end])  # a padding row sees itself

            return outside
        index = torch.arange(count, device=device)
        return lambda start, end: index[start:end, None] < index[None, start:end]


def attend_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    rows: Rows | None = None,
    score: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Causal self-attention and the attention that each row receives.

    q [batch, heads, rows, dim]; k, v [batch, kv_heads, rows, dim]. score: False where nobody asks for the sums: the
    output is the same, and they are None.

    Returns the output [batch, heads, rows, dim] and the sums [batch, rows] of the soft-score over all heads and real
    queries, in float32 (float64 for float64 inputs), without gradient: the selection is not differentiable.
    """
    rows = Rows() if rows is None else rows
    done = fast.attend_and_score(q, k, v, rows, scale=scale, softcap=softcap, dropout=dropout, score=score)
    if done is not None:
        return done
    q, k, v = (x[:, :, : rows.of(q)] for x in (q, k, v))
    # PyTorch's fused attention pays off where it has flash kernels or must keep the backward pass small; elsewhere the
    # soft-score is there anyway and gives the output at the price of one product.
    if softcap is None and (q.is_cuda or (torch.is_grad_enabled() and q.requires_grad)):
        output = _fused(q, k, v, rows, scale, dropout)
        return output, _by_blocks(q.detach(), k.detach(), None, rows, scale)[1] if score else None
    return _by_blocks(q, k, v, rows, scale, softcap, dropout, score)


def _fused(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, dropout: float) -> Tensor:
    mask = None
    if rows.window is not None:
        assert rows.positions is not None, "a sliding window counts positions"
        mask = visible(rows.positions, rows.positions, rows.window)
        # A padding row sees nothing: let it see itself, or its NaN would reach the gradients.
        mask |= torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    return _sdpa(q, k, v, mask, scale, dropout, causal=mask is None)


def _by_blocks(
    q: Tensor, k: Tensor, v: Tensor | None, rows: Rows, scale: float, softcap=None, dropout=0.0, score=True
) -> tuple[Any, Tensor | None]:
    """Output (None where no v is given) and sums by the soft-score itself, some queries at a time."""
    (batch, heads, n, _), grouped = q.shape, q.unflatten(1, (k.shape[1], -1))
    block = max(16, BLOCK_ELEMENTS.get(q.device.type, 1 << 26) // (batch * heads * n))
    block = min(block, BLOCK_ROWS.get(q.device.type, block))
    hidden = rows.hidden(n, q.device)
    sums, blocks = None, []
    for start in range(0, n, block):
        end = min(start + block, n)
        p = _soft_score(grouped[:, :, :, start:end], k[:, :, :end], scale, softcap, hidden(start, end))
        if score:
            votes = _votes(p, None if rows.real is None else rows.real[:, start:end])
            if start == 0 and end == n:
                sums = votes
            else:
                sums = votes.new_zeros(batch, n) if sums is None else sums
                sums[:, :end] += votes
        if v is not None:
            p = F.dropout(p, dropout) if dropout else p
            blocks.append(torch.matmul(p.to(v.dtype).flatten(2, 3), v[:, :, :end]).unflatten(2, p.shape[2:4]))
    if v is None:
        return None, sums
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)).flatten(1, 2), sums


@torch.no_grad()
def _votes(p: Tensor, real: Tensor | None) -> Tensor:
    """Sums [batch, keys] of a soft-score [batch, kv_heads, groups, queries, keys] over heads and real queries."""
    if real is None:
        return p.sum(dim=(1, 2, 3))
    return torch.matmul(real[:, None].to(p.dtype), p.sum(dim=(1, 2))).squeeze(1)  # padding does not vote
