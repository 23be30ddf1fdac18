"""One new token over a key/value cache whose layers hold different numbers of rows, as Triton kernels.

Where a layer's rows lie, and how many they are, stands in a table on the device: the same launches, recorded as a CUDA
graph, serve any cache and any number of rows up to a bound. `append` turns queries and keys and writes the new row into
its slot; `attend` looks at the rows that are there, a fixed number of keys per program, and puts the parts together in
their order: its result depends on the rows alone, not on the bound. In plain PyTorch: zsaa.attention.rotate and attend,
over keys put together by torch.cat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zsaa.kernels.attention import _logits, _on, _rows

from zsaa.fast.slots import CHUNK

# One line of the table per layer, int64: the addresses of keys and values [batch, kv_heads, room, dim] and of columns
# int64 [batch, room], the rows there are without the new one, the room, and the new one's column.
FIELDS = 6


@triton.jit
def _turn(x, out, cosine, sine, dims, mask, ROTATE: tl.constexpr, HALF: tl.constexpr):
    """One row of one head, turned in float32 and rounded once, or as it is."""
    first, second = tl.load(x + dims, mask=mask), tl.load(x + HALF + dims, mask=mask)
    if ROTATE:
        a, b = first.to(tl.float32), second.to(tl.float32)
        c1, s1 = tl.load(cosine + dims, mask=mask).to(tl.float32), tl.load(sine + dims, mask=mask).to(tl.float32)
        c2 = tl.load(cosine + HALF + dims, mask=mask).to(tl.float32)
        s2 = tl.load(sine + HALF + dims, mask=mask).to(tl.float32)
        first, second = (a * c1 - b * s1).to(first.dtype), (b * c2 + a * s2).to(second.dtype)
    tl.store(out + dims, first, mask=mask)
    tl.store(out + HALF + dims, second, mask=mask)


@triton.jit(do_not_specialize=["layer", "q_sample", "k_sample", "v_sample", "t_sample"])
def _append_kernel(
    q, k, v, cosine, sine, table, out, layer, q_sample, q_head, k_sample, k_head, v_sample, v_head, t_sample,
    ROTATE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FIELDS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = table + layer * FIELDS
    rows, room = tl.load(line + 3), tl.load(line + 4)
    dims = tl.arange(0, BLOCK)
    mask = dims < HALF
    cosine += sample * t_sample
    sine += sample * t_sample
    if head < HEADS:
        _turn(q + sample * q_sample + head * q_head, out + (sample * HEADS + head) * 2 * HALF,
              cosine, sine, dims, mask, ROTATE, HALF)  # fmt: skip
    elif head < HEADS + KV_HEADS:
        slot = ((sample * KV_HEADS + head - HEADS) * room + rows) * 2 * HALF
        keys = tl.load(line).to(tl.pointer_type(out.dtype.element_ty))
        _turn(k + sample * k_sample + (head - HEADS) * k_head, keys + slot, cosine, sine, dims, mask, ROTATE, HALF)
    else:
        slot = ((sample * KV_HEADS + head - HEADS - KV_HEADS) * room + rows) * 2 * HALF
        values = tl.load(line + 1).to(tl.pointer_type(out.dtype.element_ty))
        source = v + sample * v_sample + (head - HEADS - KV_HEADS) * v_head
        _turn(source, values + slot, cosine, sine, dims, mask, False, HALF)
        columns = tl.load(line + 2).to(tl.pointer_type(tl.int64))
        tl.store(columns + sample * room + rows, tl.load(line + 5), mask=head == HEADS + KV_HEADS)


def append(q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor] | None, table: Tensor, layer: int) -> Tensor:
    """Write one new row of each sample into the slots that `table` names for `layer`.

    q [batch, heads, 1, dim]; k, v [batch, kv_heads, 1, dim]; tables: cosine and sine [1 or batch, 1, dim], or None
    where nothing is turned; table: int64 [layers, FIELDS]. Returns the turned queries [batch, heads, dim].
    """
    (batch, heads, _, dim), kv_heads = q.shape, k.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    cosine, sine = tables or (q, q)
    if tables is not None and (cosine.shape[-1] != dim or cosine.stride() != sine.stride() or cosine.stride(-1) != 1):
        raise ValueError(f"the rotary tables must be alike and contiguous, with {dim} columns as the heads have.")
    shared = tables is None or cosine.shape[0] == 1
    out = q.new_empty(batch, heads, dim)
    with _on(q):
        _append_kernel[(batch, heads + 2 * kv_heads)](
            q, k, v, cosine, sine, table, out, layer, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            0 if shared else cosine.stride(0), ROTATE=tables is not None, HEADS=heads, KV_HEADS=kv_heads,
            FIELDS=FIELDS, HALF=dim // 2, BLOCK=triton.next_power_of_2(dim // 2), num_warps=1,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["layer", "chunks", "window"])
def _attend_kernel(
    q, table, totals, norms, layer, chunks, scale, softcap, window,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, FIELDS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The heads that share one key head, over one chunk of the keys: maximum, norm and weighted sum of each."""
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    line = table + layer * FIELDS
    rows = tl.load(line + 3).to(tl.int32) + 1
    first = chunk * CHUNK
    if first < rows:
        room, now = tl.load(line + 4), tl.load(line + 5)
        keys = tl.load(line).to(tl.pointer_type(q.dtype.element_ty)) + pair * room * DIM
        values = tl.load(line + 1).to(tl.pointer_type(q.dtype.element_ty)) + pair * room * DIM
        columns = tl.load(line + 2).to(tl.pointer_type(tl.int64)) + pair // KV_HEADS * room
        groups, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
        mask = (groups < GROUPS)[:, None] & (dims < DIM)[None, :]
        query = tl.load(q + (pair * GROUPS + groups)[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        best = tl.full([BLOCK_G], float("-inf"), tl.float32)
        norm, total = tl.zeros([BLOCK_G], tl.float32), tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
        for start in range(first, tl.minimum(first + CHUNK, rows), BLOCK_K):
            index = start + tl.arange(0, BLOCK_K)
            column = tl.load(columns + index, mask=index < rows, other=-1)
            seen = column >= 0
            if WINDOW:
                seen = seen & (now - column < window)
            block = _rows(keys, DIM, start, rows, BLOCK_K, DIM, BLOCK_D)
            logits = _logits(tl.dot(query, tl.trans(block), input_precision="ieee"), scale, softcap, SOFTCAP)
            logits = tl.where(seen[None, :], logits, float("-inf"))
            higher = tl.maximum(best, tl.max(logits, axis=1))
            level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: exp2(-inf) = 0, not NaN
            p, shrink = tl.exp2(logits - level[:, None]), tl.exp2(best - level)
            block = _rows(values, DIM, start, rows, BLOCK_K, DIM, BLOCK_D)
            total = tl.dot(p.to(block.dtype), block, total * shrink[:, None], input_precision="ieee")
            best, norm = higher, norm * shrink + tl.sum(p, axis=1)
        part = pair * chunks + chunk
        tl.store(norms + part * 2 * GROUPS + groups, best, mask=groups < GROUPS)
        tl.store(norms + (part * 2 + 1) * GROUPS + groups, norm, mask=groups < GROUPS)
        tl.store(totals + (part * GROUPS + groups)[:, None] * DIM + dims[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["layer", "chunks"])
def _combine_kernel(
    table, totals, norms, out, layer, chunks, GROUPS: tl.constexpr, FIELDS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The chunks of one head put together, BLOCK_C at a time."""
    head = tl.program_id(0).to(tl.int64)
    pair, group = head // GROUPS, head % GROUPS
    rows = tl.load(table + layer * FIELDS + 3).to(tl.int32) + 1
    count = (rows + CHUNK - 1) // CHUNK
    dims = tl.arange(0, BLOCK_D)
    best, norm = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_C):
        index = start + tl.arange(0, BLOCK_C)
        there, part = index < count, pair * chunks + index
        bests = tl.load(norms + part * 2 * GROUPS + group, mask=there, other=float("-inf"))
        each = tl.load(norms + (part * 2 + 1) * GROUPS + group, mask=there, other=0.0)
        mask = there[:, None] & (dims < DIM)[None, :]
        sums = tl.load(totals + (part * GROUPS + group)[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(best, tl.max(bests, axis=0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weights = tl.exp2(best - level), tl.exp2(bests - level)
        total = total * shrink + tl.sum(sums * weights[:, None], axis=0)
        norm = norm * shrink + tl.sum(each * weights, axis=0)
        best = higher
    tl.store(out + head * DIM + dims, (total / norm).to(out.dtype.element_ty), mask=dims < DIM)


def attend(
    q: Tensor,
    kv_heads: int,
    table: Tensor,
    layer: int,
    chunks: int,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of turned queries [batch, heads, dim] over the rows of `layer` that `table` names, the new one of
    `append` included; rows whose column is -1 hold no token. chunks: the most chunks of CHUNK rows that there may be.
    window: in columns. Returns [batch, 1, heads x dim]."""
    batch, heads, dim = q.shape
    groups, wide = heads // kv_heads, triton.next_power_of_2(dim)
    totals = torch.empty(batch * kv_heads, chunks, groups, dim, dtype=torch.float32, device=q.device)
    norms = torch.empty(batch * kv_heads, chunks, 2, groups, dtype=torch.float32, device=q.device)
    out = q.new_empty(batch, 1, heads * dim)
    facts = {"GROUPS": groups, "FIELDS": FIELDS, "DIM": dim, "BLOCK_D": wide, "CHUNK": CHUNK}
    with _on(q):
        _attend_kernel[(batch * kv_heads, chunks)](
            q, table, totals, norms, layer, chunks, scale / softcap if softcap else scale, softcap or 0.0, window or 0,
            WINDOW=window is not None, SOFTCAP=softcap is not None, KV_HEADS=kv_heads,
            BLOCK_G=max(16, triton.next_power_of_2(groups)), BLOCK_K=min(CHUNK, 64 if dim <= 128 else 32),
            num_warps=4, **facts,
        )  # fmt: skip
        _combine_kernel[(batch * heads,)](
            table, totals, norms, out, layer, chunks, BLOCK_C=16, num_warps=1 if wide <= 64 else 4, **facts
        )
    return out
