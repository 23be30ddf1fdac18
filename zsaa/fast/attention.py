"""Attention that also gives what the sums need, by kernels: cuDNN's, flash attention or this package's own in Triton.

The same as zsaa.attention, which asks here first, in memory linear in the rows. On a CPU it is PyTorch's own products
and softmax, but in one piece of memory that all blocks write.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.fast import dispatch

if TYPE_CHECKING:
    from zsaa.attention import Rows


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


def attend_and_score(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, scale: float, softcap: float | None, dropout: float, score: bool
) -> tuple[Tensor, Tensor | None] | None:
    """`zsaa.attention.attend_and_score` on a GPU with Triton: attention that also gives its log-sum-exp, then one more
    pass for the sums. None where zsaa.attention must do it."""
    if softcap is None and not dropout and _fits_one_piece(q, k, v):
        return _in_one_piece(q, k, v, rows, scale, score)
    if q.is_cuda and torch.is_autocast_enabled("cuda"):  # as PyTorch's own attention does under autocast
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    kernels = dispatch.kernels(q)
    if kernels is None:
        return None
    lengths = None if rows.real is None else rows.real.sum(dim=1)
    settings = {
        "scale": scale,
        "softcap": softcap,
        "lengths": lengths,
        "positions": rows.positions,
        "window": rows.window,
    }
    training = dropout or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    count, full = rows.of(q), (q, k, v)
    q, k, v = (x[:, :, :count] for x in full)
    if q.is_cuda and softcap is None and rows.window is None:
        # PyTorch's own, because they have a backward pass or are faster. Padding comes last: no mask is needed.
        cudnn = _cudnn(*full, count, scale) if not dropout and _takes_cudnn(q, k) else None
        output, lse = cudnn or _flash(q, k, v, scale, dropout)
    elif training:
        return None  # our own has no backward pass
    else:
        output, lse = kernels.attention(q, k, v, **settings)
    return output, kernels.column_sums(q.detach(), k.detach(), lse.detach(), **settings) if score else None


ONE_PIECE = 1 << 20  # numbers of a block of the soft-score: what a core's cache holds, or nearly
LONG = 1024  # rows from which `_over_own` is faster
FEW = 1 << 19  # as ONE_PIECE, of `_over_own`
FAR = 1e30  # exponents of one row may come to so much, in float32


def _fits_one_piece(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """On a CPU, in float32 or in bfloat16, which is computed in float32 like it, where nothing needs a gradient or
    watches: a block's memory is written again by the next."""
    if torch.compiler.is_compiling():  # asked first: what else is asked here would break the graph in every layer
        return False
    if torch._C._len_torch_dispatch_stack():  # counters of operations do not know PyTorch's attention on a CPU
        return False
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plain = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype and q.dtype in (torch.float32, torch.bfloat16)
    return plain and not gradients and dispatch.chosen() == "auto"


def _in_one_piece(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, score: bool) -> tuple[Tensor, Any]:
    """Output and sums from the soft-score, some queries at a time: logits, their softmax and its sums in one place."""
    count, dtype = rows.of(q), q.dtype
    q, k, v = (x[:, :, :count] for x in (q, k, v))
    (batch, heads, _, dim), kv_heads = q.shape, k.shape[1]
    if not score and rows.window is None:
        gqa = heads > kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa), None
    q, k, v = (x.float() for x in (q, k, v))
    if rows.window is None and count >= LONG and (done := _over_own(q, k, v, rows, scale)) is not None:
        return done[0].to(dtype), done[1] if score else None
    block = min(64, max(32, ONE_PIECE // (batch * heads * count)))
    hidden = None if rows.window is None else rows.hidden(count, q.device)
    q, keys, values = q.unflatten(1, (kv_heads, -1)), k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)
    piece, outputs = q.new_empty(batch * heads * min(block, count) * count), []
    sums = q.new_zeros(batch, count) if score else None
    for start in range(0, count, block):
        end = min(start + block, count)
        some = q[:, :, :, start:end].reshape(batch * kv_heads, -1, dim)
        p = piece[: some.shape[0] * some.shape[1] * end].view(*some.shape[:2], end)
        torch.baddbmm(p, some, keys[:, :, :end], beta=0, alpha=scale, out=p)
        by_head = p.view(batch, kv_heads, -1, end - start, end)
        if hidden is None:
            by_head[..., start:].add_(_above(end - start))
        else:
            by_head.masked_fill_(hidden(start, end), float("-inf"))
        torch.softmax(p, dim=-1, out=p)
        if sums is not None:
            sums[:, :end] += _sums(by_head, None if rows.real is None else rows.real[:, start:end])
        outputs.append(torch.bmm(p, values[:, :end]).view(batch, heads, end - start, dim))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)).to(dtype), sums


@functools.lru_cache(maxsize=256)
def _above(rows: int) -> Tensor:
    """[rows, rows], minus infinity above the diagonal and else 0: added seven times as fast as a mask is applied."""
    with torch.inference_mode(False):
        return torch.full((rows, rows), float("-inf"), device="cpu", dtype=torch.float32).triu_(1)


def _over_own(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> tuple[Tensor, Tensor] | None:
    """As `_in_one_piece`, of many rows without a window, without a search for the largest logit of each: exponents are
    of logits over the row's own, taken off by the product, and divided by their sum after it. None where that leaves
    float32."""
    (batch, heads, count, dim), kv_heads = q.shape, k.shape[1]
    q = (q * scale).unflatten(1, (kv_heads, -1))
    q = torch.cat([q, -(q * k[:, :, None]).sum(dim=-1, keepdim=True)], dim=-1)
    # As the products read them. A column of ones beside the values would give the totals, and take longer than a sum.
    keys = torch.cat([k, k.new_ones(*k.shape[:3], 1)], dim=-1).flatten(0, 1).transpose(1, 2).contiguous()
    values, totals, outputs = v.contiguous().flatten(0, 1), q.new_empty(batch, heads, count), []
    sums = q.new_zeros(batch * kv_heads, 1, count)
    block = min(64, max(16, FEW // (batch * heads * count)))
    piece = q.new_empty(batch * heads * block * count)
    for start in range(0, count, block):
        end = min(start + block, count)
        some = q[:, :, :, start:end].reshape(batch * kv_heads, -1, dim + 1)
        p = piece[: some.shape[0] * some.shape[1] * end].view(*some.shape[:2], end)
        by_head = torch.bmm(some, keys[:, :, :end], out=p).exp_().view(batch, heads, end - start, end)
        by_head[..., start:].tril_()  # not before: exponents of -inf take ten times as long
        total = torch.sum(by_head, dim=-1)
        totals[:, :, start:end] = total
        votes = total.reciprocal_()
        votes = votes if rows.real is None else votes * rows.real[:, None, start:end]
        outputs.append(torch.bmm(p, values[:, :end]).view(batch, heads, end - start, dim))
        sums[:, :, :end].baddbmm_(votes.view(batch * kv_heads, 1, -1), p)  # each core has its own part of p at hand
    if not totals.max() < FAR:  # NaN is none either
        return None
    return torch.cat(outputs, dim=2).div_(totals.unsqueeze(-1)), sums.view(batch, kv_heads, count).sum(dim=1)


def _sums(p: Tensor, real: Tensor | None) -> Tensor:
    """Of a soft-score [batch, kv_heads, groups, queries, keys] over heads and real queries."""
    if real is None:
        return p.flatten(1, 3).sum(dim=1)
    return torch.matmul(real[:, None].to(p.dtype), p.flatten(1, 2).sum(dim=1)).squeeze(1)
