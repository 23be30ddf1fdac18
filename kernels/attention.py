"""Causal attention with its log-sum-exp, and the attention that each key receives, as Triton kernels.

Flash attention never holds the soft-score P, so the sums over its columns need a second look. With the log-sum-exp L of
each query's logits S known, P = exp(S - L) can be made again block by block: `column_sums` does that, with half of the
forward pass's multiplications, without atomics (repeats are equal bit for bit) and in memory linear in the rows.
`attention` is the forward pass for what PyTorch's flash attention leaves out: a softcap, and a sliding window in
original positions. Plain PyTorch versions of both are in naive.py.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # the kernels work in powers of two: exp2 is one instruction


@triton.jit
def _logits(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scaled (and capped) logits, times log2(e). scale: the softmax scale, over the softcap if there is one."""
    if SOFTCAP:  # cap tanh(x) by way of one exponential, sound for any size of x
        return softcap * LOG2E * (1 - 2 / (1 + tl.exp2(products * (2 * LOG2E * scale))))
    return products * (scale * LOG2E)


@triton.jit
def _rows(matrix, stride, start, stop, SIZE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """SIZE rows of a matrix [rows, DIM] as a block [SIZE, BLOCK_D]; rows from `stop` on are zero."""
    rows, dims = tl.arange(0, SIZE), tl.arange(0, BLOCK_D)
    mask = (rows < stop - start)[:, None]
    if DIM != BLOCK_D:
        mask = mask & (dims < DIM)[None, :]
    return tl.load(matrix + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + dims, mask=mask, other=0.0)


@triton.jit
def _positions(positions, rows, stop, WINDOW: tl.constexpr):
    """Original positions of the rows, where a window asks for them; else the rows themselves will do."""
    if WINDOW:
        return tl.load(positions + rows, mask=rows < stop, other=0).to(tl.int32)
    return rows


@triton.jit
def _received(
    start, first, key_block, key_positions, q, lse, positions, q_row, stop, length, scale, softcap, window,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """What the keys of a block receive from the BLOCK_Q queries from `start` on: float32 [BLOCK_K]."""
    queries = start + tl.arange(0, BLOCK_Q)
    query_block = _rows(q, q_row, start, length, BLOCK_Q, DIM, BLOCK_D)
    norm = tl.load(lse + queries, mask=queries < length, other=float("inf")) * LOG2E  # inf: padding has no vote
    # Keys are the rows of the product, so that nearly all of the sum over queries stays within a thread.
    logits = _logits(tl.dot(key_block, tl.trans(query_block), input_precision="ieee"), scale, softcap, SOFTCAP)
    p = tl.exp2(logits - norm[None, :])
    if MASKED:
        seen = first + tl.arange(0, BLOCK_K)[:, None] <= queries[None, :]
        if WINDOW:
            query_positions = _positions(positions, queries, length, WINDOW)
            seen = seen & (query_positions[None, :] - key_positions[:, None] < window)
        p = tl.where(seen, p, 0.0)
    return tl.sum(p, axis=1)


@triton.jit(do_not_specialize=["p_sample", "heads", "groups", "window"])
def _column_sums_kernel(
    q, k, lse, out, lengths, positions,
    q_sample, q_head, q_row, k_sample, k_head, k_row, l_sample, l_head, p_sample,
    heads, groups, rows, scale, softcap, window,
    LENGTHS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """For one block of keys of one head: out[sample, head, keys] = sum over the real queries of exp(S - L)."""
    # Early keys are seen by more queries: they are launched first, and the short blocks fill up the end.
    pair, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_K
    sample, head = pair // heads, pair % heads
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head // groups * k_head
    lse += sample * l_sample + head * l_head
    positions += sample * p_sample
    length = rows
    if LENGTHS:
        length = tl.load(lengths + sample).to(tl.int32)
    keys = first + tl.arange(0, BLOCK_K)
    key_block = _rows(k, k_row, first, length, BLOCK_K, DIM, BLOCK_D)
    key_positions = _positions(positions, keys, length, WINDOW)
    stop = length
    if WINDOW:  # positions grow at least as fast as rows: `window` rows on, a key is out of sight
        stop = tl.minimum(length, first + BLOCK_K - 1 + window)
    sums = tl.zeros([BLOCK_K], tl.float32)
    beyond = first + (BLOCK_K + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    for start in range(first, tl.minimum(beyond, stop), BLOCK_Q):  # on the diagonal
        sums += _received(
            start, first, key_block, key_positions, q, lse, positions, q_row, stop, length, scale, softcap, window,
            True, WINDOW, SOFTCAP, DIM, BLOCK_D, BLOCK_K, BLOCK_Q)  # fmt: skip
    for start in range(beyond, stop, BLOCK_Q):
        sums += _received(
            start, first, key_block, key_positions, q, lse, positions, q_row, stop, length, scale, softcap, window,
            WINDOW, WINDOW, SOFTCAP, DIM, BLOCK_D, BLOCK_K, BLOCK_Q)  # fmt: skip
    tl.store(out + pair * rows + keys, tl.where(keys < length, sums, 0.0), mask=keys < rows)


@triton.jit
def _attended(
    start, queries, query_block, query_positions, k, v, positions, k_row, v_row, length, scale, softcap, window,
    best, norm, total,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over the keys from `start` on: running maximum, norm and weighted sum."""
    keys = start + tl.arange(0, BLOCK_K)
    key_block = _rows(k, k_row, start, length, BLOCK_K, DIM, BLOCK_D)
    logits = _logits(tl.dot(query_block, tl.trans(key_block), input_precision="ieee"), scale, softcap, SOFTCAP)
    if MASKED:
        seen = keys[None, :] <= queries[:, None]
        if WINDOW:
            key_positions = _positions(positions, keys, length, WINDOW)
            seen = seen & (query_positions[:, None] - key_positions[None, :] < window)
        logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(best, tl.max(logits, axis=1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf) = 0, not NaN
    p, shrink = tl.exp2(logits - level[:, None]), tl.exp2(best - level)
    value_block = _rows(v, v_row, start, length, BLOCK_K, DIM, BLOCK_D)
    total = tl.dot(p.to(value_block.dtype), value_block, total * shrink[:, None], input_precision="ieee")
    return higher, norm * shrink + tl.sum(p, axis=1), total


@triton.jit(do_not_specialize=["p_sample", "heads", "groups", "window"])
def _attention_kernel(
    q, k, v, out, lse, lengths, positions,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row, o_sample, o_head, o_row, p_sample,
    heads, groups, rows, scale, softcap, window,
    LENGTHS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one block of queries of one head. Padding gets zeros."""
    pair, block = tl.program_id(0).to(tl.int64), tl.num_programs(1) - 1 - tl.program_id(1)  # late queries see most
    sample, head, first = pair // heads, pair % heads, block * BLOCK_Q
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head // groups * k_head
    v += sample * v_sample + head // groups * v_head
    positions += sample * p_sample
    length = rows
    if LENGTHS:
        length = tl.load(lengths + sample).to(tl.int32)
    queries = first + tl.arange(0, BLOCK_Q)
    real = queries < length
    query_block = _rows(q, q_row, first, length, BLOCK_Q, DIM, BLOCK_D)
    query_positions = _positions(positions, queries, length, WINDOW)
    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    norm, total = tl.zeros([BLOCK_Q], tl.float32), tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    stop = tl.minimum(first + BLOCK_Q, length)
    diagonal = tl.minimum(first // BLOCK_K * BLOCK_K, stop)
    low = 0
    if WINDOW:  # as in _column_sums_kernel
        low = tl.maximum(0, first - window + 1) // BLOCK_K * BLOCK_K
    for start in range(low, diagonal, BLOCK_K):
        best, norm, total = _attended(
            start, queries, query_block, query_positions, k, v, positions, k_row, v_row, length, scale, softcap, window,
            best, norm, total, WINDOW, WINDOW, SOFTCAP, DIM, BLOCK_D, BLOCK_K)  # fmt: skip
    for start in range(diagonal, stop, BLOCK_K):
        best, norm, total = _attended(
            start, queries, query_block, query_positions, k, v, positions, k_row, v_row, length, scale, softcap, window,
            best, norm, total, True, WINDOW, SOFTCAP, DIM, BLOCK_D, BLOCK_K)  # fmt: skip
    norm = tl.where(real, norm, 1.0)
    total = tl.where(real[:, None], total / norm[:, None], 0.0)
    dims = tl.arange(0, BLOCK_D)
    place = out + sample * o_sample + head * o_head + queries.to(tl.int64)[:, None] * o_row + dims
    tl.store(place, total.to(out.dtype.element_ty), mask=(queries < rows)[:, None] & (dims < DIM)[None, :])
    natural = tl.where(real, (best + tl.log2(norm)) / LOG2E, 0.0)
    tl.store(lse + pair * rows + queries, natural, mask=queries < rows)


# (BLOCK_K, BLOCK_Q, warps, stages) of column_sums, and (BLOCK_Q, BLOCK_K, warps, stages) of attention, by head size
# up to. Fixed rather than tuned at run time, so that repeats and CUDA graphs run the same code.
SCORE_BLOCKS = {64: (64, 128, 4, 2), 128: (128, 128, 4, 2), 256: (64, 64, 4, 2)}  # best on an H100 at 8192 rows
ATTENTION_BLOCKS = {64: (128, 64, 4, 3), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)}
SMALL_BLOCKS = {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (64, 32, 4, 2)}  # both, in 99 KB of shared memory


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on(q: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _blocks(table: dict, q: Tensor, blocks: tuple | None) -> tuple:
    if blocks is not None:
        return blocks
    if q.is_cuda and _capability(q.device) in ((8, 6), (8, 9), (12, 0), (12, 1)):
        table = SMALL_BLOCKS
    return next(chosen for size, chosen in table.items() if q.shape[-1] <= size)


def _check(q: Tensor, k: Tensor, positions: Tensor | None, window: int | None) -> None:
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("the last dimension of q and k must be contiguous; call .contiguous() on them.")
    if q.shape[1] % k.shape[1] or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: same batch, rows and head size, and a multiple of "
            "k's heads, are needed."
        )
    if q.shape[-1] > 256:
        raise ValueError(f"head size {q.shape[-1]} is out of range: the kernels take up to 256.")
    if window is not None and (positions is None or positions.stride(-1) != 1):
        raise ValueError("a sliding window needs the rows' original positions, each sample's contiguous.")


def _apart(positions: Tensor | None) -> int:
    """How far the samples' positions are apart: 0 where they share them, as before the first drop."""
    return 0 if positions is None else positions.stride(0)


def _common(q: Tensor, k: Tensor, scale: float, softcap, lengths, positions, window) -> tuple[tuple, dict]:
    _, heads, rows, dim = q.shape
    numbers = (heads, heads // k.shape[1], rows, scale if softcap is None else scale / softcap, softcap or 0.0)
    flags = dict(
        LENGTHS=lengths is not None,
        WINDOW=window is not None,
        SOFTCAP=softcap is not None,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
    )
    return (*numbers, window or 0), flags


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    blocks: tuple[int, int, int, int] | None = None,
) -> Tensor:
    """Sums over the columns of the causal soft-score, over all heads and real queries: float32 [batch, rows].

    q [batch, heads, rows, dim], k [batch, kv_heads, rows, dim]: any strides, but the head size contiguous. lse: the
    natural log-sum-exp of each query's logits, float32 [batch, heads, rows], rows contiguous. lengths: int [batch], the
    real rows of each sample (they come first), or None for all; padding neither votes nor receives, whatever it holds.
    positions: int [batch, rows], ascending within each sample's real rows, needed with a sliding `window`; samples may
    share them (a batch stride of 0).
    """
    _check(q, k, positions, window)
    if lse.stride(-1) != 1:
        raise ValueError("the last dimension of lse must be contiguous; call .contiguous() on it.")
    batch, heads, rows, _ = q.shape
    block_k, block_q, warps, stages = _blocks(SCORE_BLOCKS, q, blocks)
    numbers, flags = _common(q, k, scale, softcap, lengths, positions, window)
    partial = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    with _on(q):
        _column_sums_kernel[(batch * heads, triton.cdiv(rows, block_k))](
            q, k, lse, partial, q if lengths is None else lengths, q if positions is None else positions,
            *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2], _apart(positions), *numbers, **flags,
            BLOCK_K=block_k, BLOCK_Q=block_q, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return partial.sum(dim=1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
    blocks: tuple[int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention without gradient: output [batch, heads, rows, dim], stored rows first ([batch, rows, heads,
    dim] is contiguous), and the natural log-sum-exp, float32 [batch, heads, rows]. Arguments as in `column_sums`;
    padding rows get zeros."""
    _check(q, k, positions, window)
    if v.stride(-1) != 1 or v.shape != k.shape:
        raise ValueError(f"v {tuple(v.shape)} must have k's shape {tuple(k.shape)}, and a contiguous last dimension.")
    batch, heads, rows, dim = q.shape
    block_q, block_k, warps, stages = _blocks(ATTENTION_BLOCKS, q, blocks)
    numbers, flags = _common(q, k, scale, softcap, lengths, positions, window)
    out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    with _on(q):
        _attention_kernel[(batch * heads, triton.cdiv(rows, block_q))](
            q, k, v, out, lse, q if lengths is None else lengths, q if positions is None else positions,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], _apart(positions), *numbers, **flags,
            BLOCK_Q=block_q, BLOCK_K=block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out, lse
