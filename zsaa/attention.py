"""Causal attention that also reports how much attention each token receives (Eq. 1 and section 3.2).

Rows are laid out with real tokens first, in order, and padding after them, so "row j comes before row i" is the causal
mask, and padding can never be seen by a real query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.fast import dispatch

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
    Both at once: on short rows the number of operations is what costs."""
    both = torch.cat([q, k], dim=1)
    first, second = both.chunk(2, dim=-1)
    both = both * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)
    q, k = both.split([q.shape[1], k.shape[1]], dim=1)
    return q, k


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Plain attention of new queries over a cache: q [batch, heads, rows, dim], k and v [batch, kv_heads, keys, dim],
    mask [batch, 1, rows, keys] or None for all visible. Returns [batch, heads, rows, dim]."""
    if softcap is None:
        return _sdpa(q, k, v, mask, scale, dropout)
    grouped = q.unflatten(1, (k.shape[1], -1))
    hidden = None if mask is None else ~mask[:, :, None]
    p = F.dropout(_soft_score(grouped, k, scale, softcap, hidden), dropout)
    return torch.matmul(p.to(v.dtype).flatten(2, 3), v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


def _flash(q, k, v, scale, dropout=0.0):
    """Causal attention and its log-sum-exp. Pinned to one implementation: left to choose, PyTorch would take cuDNN on
    Hopper, which plans anew for every number of rows, and a sampled alpha brings new ones at every training step."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True, False, scale=scale)[:2]


# cuDNN's attention: about half of flash's time on Hopper, but tens of milliseconds of planning for every new shape.
CUDNN_LEAST_ROWS = 512
_without_cudnn: set[tuple] = set()  # what it refused


def _bucket(rows: int) -> int:
    """`rows` rounded up to a multiple of 128, or to the next of 32 steps per octave: few shapes, so few plans."""
    step = max(128, 1 << (rows - 1).bit_length() - 6)
    return -(-rows // step) * step


def _kind(q: Tensor, k: Tensor) -> tuple:
    return q.device, q.dtype, q.shape[3], q.shape[1] // k.shape[1]


def _takes_cudnn(q: Tensor, k: Tensor) -> bool:
    if not q.is_cuda or q.shape[2] < CUDNN_LEAST_ROWS or q.shape[3] > 128 or torch.is_grad_enabled():
        return False
    hopper = torch.cuda.get_device_capability(q.device) >= (9, 0)
    return hopper and torch.backends.cuda.cudnn_sdp_enabled() and _kind(q, k) not in _without_cudnn


def padded_rows(q: Tensor, k: Tensor) -> int:
    """How many rows attention would like of q [batch, heads, rows, dim], zeros after the real ones: more than there are
    where cuDNN is to be used."""
    return _bucket(q.shape[2]) if dispatch.kernels(q) is not None and _takes_cudnn(q, k) else q.shape[2]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, rows: int, scale: float) -> tuple[Tensor, Tensor] | None:
    """As `_flash`, without gradient; None if cuDNN refuses. Rows are causal, so zeros after the first `rows` decide
    nothing: they are cut off again."""
    # Heads lie beside each other in a row, as projections leave them: the output takes the layout of q.
    pad = (0, 0, 0, 0, 0, _bucket(rows) - q.shape[2])
    q, k, v = (F.pad(x.transpose(1, 2), pad).transpose(1, 2) if pad[-1] else x for x in (q, k, v))
    try:
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        output, lse, *_ = cudnn(q, k, v, None, True, 0.0, True, False, scale=scale)
    except torch.cuda.OutOfMemoryError:  # says nothing of the next call
        return None
    except RuntimeError:
        _without_cudnn.add(_kind(q, k))
        return None
    return output[:, :, :rows], lse.reshape(q.shape[:3])[:, :, :rows]


def _with_kernels(
    q: Tensor, k: Tensor, v: Tensor, *, rows, scale, softcap, dropout, real, positions, window, score
) -> tuple[Tensor, Tensor | None] | None:
    """`attend_and_score` on a GPU with Triton: attention that also gives its log-sum-exp, then one more pass for the
    sums, in memory linear in the rows. None where PyTorch must do it."""
    if q.is_cuda and torch.is_autocast_enabled("cuda"):  # as PyTorch's own attention does under autocast
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    kernels = dispatch.kernels(q)
    if kernels is None:
        return None
    lengths = None if real is None else real.sum(dim=1)
    settings = {"scale": scale, "softcap": softcap, "lengths": lengths, "positions": positions, "window": window}
    training = dropout or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    full = q, k, v
    q, k, v = (x[:, :, :rows] for x in full)
    if q.is_cuda and softcap is None and window is None:
        # PyTorch's own, because they have a backward pass or are faster. Padding comes last: no mask is needed.
        cudnn = _cudnn(*full, rows, scale) if not dropout and _takes_cudnn(q, k) else None
        output, lse = cudnn or _flash(q, k, v, scale, dropout)
    elif training:
        return None  # our own has no backward pass
    else:
        output, lse = kernels.attention(q, k, v, **settings)
    return output, kernels.column_sums(q.detach(), k.detach(), lse.detach(), **settings) if score else None


def attend_and_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    rows: int | None = None,
    real: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    future: Callable[[int], Tensor | None] | None = None,
    score: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Causal self-attention and the attention that each row receives.

    q [batch, heads, rows, dim]; k, v [batch, kv_heads, rows, dim]; all three may have more rows, zeros that are not
    there (see `padded_rows`), if `rows` is given. real: bool [batch, rows], or None if all rows are;
    padding gives no votes. positions: int64 [batch, rows], needed only with a sliding `window` (in original positions).
    future: gives bool [rows, rows], True above the diagonal, for a number of rows, if the caller shares one between
    layers. score: False where nobody asks for the sums: the output is the same, and they are None.

    Returns the output [batch, heads, rows, dim] and the sums [batch, rows] of the soft-score over all heads and real
    queries, in float32 (float64 for float64 inputs), without gradient: the selection is not differentiable.
    """
    rows = q.shape[2] if rows is None else rows
    settings = {"softcap": softcap, "dropout": dropout, "real": real, "positions": positions, "window": window}
    done = _with_kernels(q, k, v, rows=rows, scale=scale, score=score, **settings)
    if done is not None:
        return done
    q, k, v = (x[:, :, :rows] for x in (q, k, v))
    batch, heads = q.shape[:2]
    # PyTorch's fused attention pays off where it has flash kernels or must keep the backward pass small; elsewhere the
    # soft-score is there anyway and gives the output at the price of one product.
    fused = softcap is None and (q.is_cuda or (torch.is_grad_enabled() and q.requires_grad))
    output = None
    if fused:
        mask = visible(positions, positions, window) if window is not None else None
        if mask is not None:
            # A padding row sees nothing: let it see itself, or its NaN would reach the gradients.
            mask |= torch.eye(rows, dtype=torch.bool, device=q.device)
        output = _sdpa(q, k, v, mask, scale, dropout, causal=mask is None)
        if not score:
            return output, None
        q, k = q.detach(), k.detach()

    grouped = q.unflatten(1, (k.shape[1], -1))
    future = future(rows) if future is not None and window is None else None
    block = max(16, BLOCK_ELEMENTS.get(q.device.type, 1 << 26) // (batch * heads * rows))
    block = min(block, BLOCK_ROWS.get(q.device.type, block))
    index = torch.arange(rows, device=q.device) if future is None else None
    sums, blocks = None, []
    for start in range(0, rows, block):
        end = min(start + block, rows)
        if window is not None:
            hidden = ~visible(positions[:, start:end], positions[:, :end], window)[:, :, None]
            hidden &= index[start:end, None] != index[None, :end]
        elif future is not None:
            hidden = future[start:end, start:end]
        else:
            hidden = index[start:end, None] < index[None, start:end]
        p = _soft_score(grouped[:, :, :, start:end], k[:, :, :end], scale, softcap, hidden)
        if score:
            with torch.no_grad():
                if real is None:
                    votes = p.sum(dim=(1, 2, 3))
                else:  # padding does not vote
                    votes = torch.matmul(real[:, None, start:end].to(p.dtype), p.sum(dim=(1, 2))).squeeze(1)
                if end == rows and start == 0:
                    sums = votes
                else:
                    sums = votes.new_zeros(batch, rows) if sums is None else sums
                    sums[:, :end] += votes
        if not fused:
            p = F.dropout(p, dropout) if dropout else p
            blocks.append(torch.matmul(p.to(v.dtype).flatten(2, 3), v[:, :, :end]).unflatten(2, p.shape[2:4]))
    if not fused:
        output = (blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=3)).flatten(1, 2)
    return output, sums
