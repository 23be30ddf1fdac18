"""Choosing the rows that go on, and moving them, as Triton kernels: one launch each where PyTorch takes a dozen.

`choose` picks the best-scored rows of each sample without sorting: the least score that still goes on is found bit by
bit. `move` copies what they need into the next stage, and what the others leave with to where it stays. `rotate`
applies the rotary embedding and lays rows out for attention. The same in plain PyTorch: zsaa.score.select,
Prefill.take, zsaa.attention.rotate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zsaa.kernels.attention import _on

CHOOSE_LIMIT = 32768  # rows of a sample that one program holds


@triton.jit(do_not_specialize=["n", "width"])
def _choose_kernel(scores, lengths, counts, rows, kept, places, passed, r_sample, n, width, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    length, count = tl.load(lengths + sample).to(tl.int32), tl.load(counts + sample).to(tl.int32)
    x = tl.load(scores + sample * n + index, mask=index < length, other=float("-inf"))
    x = tl.where(index == length - 1, float("inf"), tl.where(x == 0, 0.0, x))  # the last goes on; -0 equals 0
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # as ordered as x, NaN on top
    bound = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= count, 0, -2147483648)
    for step in range(31):
        higher = bound | (tl.full([], 1, tl.int32) << (30 - step))
        bound = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= count, higher, bound)
    above, tied = key > bound, key == bound
    room = count - tl.sum(above.to(tl.int32), axis=0)
    keep = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))  # ties go to the earlier row
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(places + sample * n + index, tl.where(keep, place, -1), mask=index < n)
    rows += sample * r_sample
    tl.store(kept + sample * width + place, index.to(tl.int64), mask=keep)
    tl.store(passed + sample * width + place, tl.load(rows + index, mask=keep, other=0), mask=keep)
    padding = (index >= count) & (index < width)
    tl.store(kept + sample * width + index, (index * 0 + n - 1).to(tl.int64), mask=padding)
    tl.store(passed + sample * width + index, tl.load(rows + n - 1 + index * 0, mask=padding, other=0), mask=padding)


def choose(scores: Tensor, lengths: Tensor, counts: Tensor, width: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that go on, as zsaa.score.select chooses them, bit for bit.

    scores: float32 [batch, n], n <= CHOOSE_LIMIT, contiguous; lengths, counts: int64 [batch], as there. rows: int64
    [batch, n], carried along. Returns the indices [batch, width], ascending; the place of each row among them, int32
    [batch, n], -1 for those that are dropped; and `rows` at the indices.
    """
    batch, n = scores.shape
    if n > CHOOSE_LIMIT:
        raise ValueError(f"{n} rows are out of range: choose takes up to {CHOOSE_LIMIT}.")
    kept, passed = (torch.empty(batch, width, dtype=torch.int64, device=scores.device) for _ in range(2))
    places = torch.empty(batch, n, dtype=torch.int32, device=scores.device)
    block = max(128, triton.next_power_of_2(n))
    with _on(scores):
        _choose_kernel[(batch,)](
            scores, lengths, counts, rows, kept, places, passed, rows.stride(0), n, width,
            BLOCK=block, num_warps=max(4, min(32, block // 256)),
        )  # fmt: skip
    return kept, places, passed


@triton.jit
def _copy(source, target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(0, SIZE, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        tl.store(target + dims, tl.load(source + dims, mask=dims < SIZE), mask=dims < SIZE)


@triton.jit
def _fill(target, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(0, SIZE, BLOCK):
        dims = start + tl.arange(0, BLOCK)
        tl.store(target + dims, tl.zeros([BLOCK], target.dtype.element_ty), mask=dims < SIZE)


@triton.jit(do_not_specialize=["r_sample", "n", "width", "final_rows"])
def _move_kernel(
    hidden, output, kept, places, lengths, rows, next_hidden, next_output, final,
    h_sample, h_row, o_sample, o_row, r_sample, n, width, final_rows,
    CARRY: tl.constexpr, HIDDEN: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    hidden += sample * h_sample
    if row < width:
        index = tl.load(kept + sample * width + row)
        _copy(hidden + index * h_row, next_hidden + (sample * width + row) * HIDDEN, HIDDEN, BLOCK)
        _copy(output + sample * o_sample + index * o_row, next_output + (sample * width + row) * OUTPUT, OUTPUT, BLOCK)
    if CARRY:
        dropped = (tl.load(places + sample * n + row) < 0) & (row < tl.load(lengths + sample))
        if dropped:
            original = tl.load(rows + sample * r_sample + row)
            _copy(hidden + row * h_row, final + (sample * final_rows + original) * HIDDEN, HIDDEN, BLOCK)


@triton.jit(do_not_specialize=["n", "width", "r_sample", "final_rows"])
def _move_back_kernel(
    next_hidden, next_output, places, hidden, output, final, lengths, rows, r_sample, n, width, final_rows,
    CARRY: tl.constexpr, HIDDEN: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.load(places + sample * n + row).to(tl.int64)
    hidden += (sample * n + row) * HIDDEN
    output += (sample * n + row) * OUTPUT
    if place >= 0:
        _copy(next_hidden + (sample * width + place) * HIDDEN, hidden, HIDDEN, BLOCK)
        _copy(next_output + (sample * width + place) * OUTPUT, output, OUTPUT, BLOCK)
    else:
        _fill(output, OUTPUT, BLOCK)
        if CARRY:
            if row < tl.load(lengths + sample):
                original = tl.load(rows + sample * r_sample + row)
                _copy(final + (sample * final_rows + original) * HIDDEN, hidden, HIDDEN, BLOCK)
            else:
                _fill(hidden, HIDDEN, BLOCK)
        else:
            _fill(hidden, HIDDEN, BLOCK)


def _block(*sizes: int) -> dict:
    block = min(4096, max(64, triton.next_power_of_2(max(sizes))))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 512))}


def _move(hidden, output, kept, places, lengths, rows, final):
    (batch, n, size), width, out_size = hidden.shape, kept.shape[1], output.shape[2]
    next_hidden, next_output = hidden.new_empty(batch, width, size), output.new_empty(batch, width, out_size)
    carry = final is not None
    with _on(hidden):
        _move_kernel[(n if carry else width, batch)](
            hidden, output, kept, places, lengths, rows, next_hidden, next_output, final if carry else hidden,
            *hidden.stride()[:2], *output.stride()[:2], rows.stride(0), n, width, final.shape[1] if carry else 0,
            CARRY=carry, HIDDEN=size, OUTPUT=out_size, **_block(size, out_size),
        )  # fmt: skip
    return next_hidden, next_output


class _Move(torch.autograd.Function):
    """Passes `final` along too, if there is one: each layer writes rows of its own, so its gradient stays as it is."""

    @staticmethod
    def forward(ctx, hidden, output, kept, places, lengths, rows, final):
        ctx.save_for_backward(places, lengths, rows)
        ctx.sizes = kept.shape[1], hidden.shape[2], output.shape[2]
        if final is None:
            return _move(hidden, output, kept, places, lengths, rows, None)
        ctx.mark_dirty(final)
        return *_move(hidden, output, kept, places, lengths, rows, final), final

    @staticmethod
    def backward(ctx, next_hidden, next_output, final=None):
        (places, lengths, rows), (width, size, out_size), carry = ctx.saved_tensors, ctx.sizes, final is not None
        batch, n = places.shape
        next_hidden, next_output = next_hidden.contiguous(), next_output.contiguous()
        hidden, output = next_hidden.new_empty(batch, n, size), next_output.new_empty(batch, n, out_size)
        final = final.contiguous() if carry else None
        with _on(places):
            _move_back_kernel[(n, batch)](
                next_hidden, next_output, places, hidden, output, final if carry else hidden, lengths, rows,
                rows.stride(0), n, width, final.shape[1] if carry else 0,
                CARRY=carry, HIDDEN=size, OUTPUT=out_size, **_block(size, out_size),
            )  # fmt: skip
        return hidden, output, None, None, None, None, final


def move(
    hidden: Tensor,
    output: Tensor,
    kept: Tensor,
    places: Tensor,
    lengths: Tensor,
    rows: Tensor,
    final: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [batch, n, size] and output [batch, n, out_size] at `kept` [batch, width]: two new tensors.

    kept, places and rows as of `choose`; lengths: int64 [batch], the real rows among n. final: contiguous [batch, N,
    size] of hidden's type, where a dropped row of `hidden` is written at its original row; it comes back as the third,
    and that is what has the gradient. Rows of hidden and output must be contiguous. Differentiable; padding rows of the
    result, copies of some row, hand no gradient back.
    """
    if hidden.stride(-1) != 1 or output.stride(-1) != 1:
        raise ValueError("the last dimension of hidden and output must be contiguous; call .contiguous() on them.")
    if torch.is_grad_enabled() and (hidden.requires_grad or output.requires_grad):
        passed = _Move.apply(hidden, output, kept, places, lengths, rows, final)
        return passed if final is not None else (*passed, None)
    return *_move(hidden, output, kept, places, lengths, rows, final), final


@triton.jit
def _turned(x, out, cosine, sine, x_head, heads, mask, dims, HALF: tl.constexpr, DIM: tl.constexpr, BACK: tl.constexpr):
    """One row of all heads, turned (or turned back): x [heads, DIM] with heads x_head apart, out the same, packed."""
    at, seen = x + heads[:, None] * x_head + dims[None, :], dims < HALF
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    c1 = tl.load(cosine + dims, mask=seen, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cosine + HALF + dims, mask=seen, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sine + dims, mask=seen, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sine + HALF + dims, mask=seen, other=0.0).to(tl.float32)[None, :]
    if BACK:  # the transpose of what follows
        s1, s2 = -s2, -s1
    place = out + heads[:, None] * DIM + dims[None, :]
    tl.store(place, (first * c1 - second * s1).to(out.dtype.element_ty), mask=mask)
    tl.store(place + HALF, (second * c2 + first * s2).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["r_sample", "n", "padded"])
def _rotate_kernel(
    q, k, v, cosine, sine, rows, q_out, k_out, v_out,
    q_sample, q_head, q_row, k_sample, k_head, k_row, v_sample, v_head, v_row, t_sample, t_row, r_sample, n, padded,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr, BACK: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = DIM // 2
    dims, heads, kv_heads = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_KV)
    q_out += (sample * padded + row) * HEADS * DIM
    k_out += (sample * padded + row) * KV_HEADS * DIM
    v_out += (sample * padded + row) * KV_HEADS * DIM
    mask = (heads < HEADS)[:, None] & (dims < HALF)[None, :]
    kv_mask = (kv_heads < KV_HEADS)[:, None] & (dims < HALF)[None, :]
    kv_place = kv_heads[:, None] * DIM + dims[None, :]
    if row < n:
        original = tl.load(rows + sample * r_sample + row)
        cosine += sample * t_sample + original * t_row
        sine += sample * t_sample + original * t_row
        q += sample * q_sample + row * q_row
        k += sample * k_sample + row * k_row
        _turned(q, q_out, cosine, sine, q_head, heads, mask, dims, HALF, DIM, BACK)
        _turned(k, k_out, cosine, sine, k_head, kv_heads, kv_mask, dims, HALF, DIM, BACK)
        if VALUES:
            values = v + sample * v_sample + row * v_row + kv_heads[:, None] * v_head + dims[None, :]
            tl.store(v_out + kv_place, tl.load(values, mask=kv_mask), mask=kv_mask)
            tl.store(v_out + kv_place + HALF, tl.load(values + HALF, mask=kv_mask), mask=kv_mask)
    else:  # zeros, as NaN would spread from the values even where nothing looks
        place = heads[:, None] * DIM + dims[None, :]
        nothing = tl.zeros([BLOCK_H, BLOCK_D], q_out.dtype.element_ty)
        tl.store(q_out + place, nothing, mask=mask)
        tl.store(q_out + place + HALF, nothing, mask=mask)
        nothing = tl.zeros([BLOCK_KV, BLOCK_D], q_out.dtype.element_ty)
        tl.store(k_out + kv_place, nothing, mask=kv_mask)
        tl.store(k_out + kv_place + HALF, nothing, mask=kv_mask)
        tl.store(v_out + kv_place, nothing, mask=kv_mask)
        tl.store(v_out + kv_place + HALF, nothing, mask=kv_mask)


def _rotate(q, k, v, cosine, sine, rows, padded, back=False):
    batch, heads, n, dim = q.shape
    kv_heads, values = k.shape[1], v is not None
    outputs = [q.new_empty(batch, padded, h, dim) for h in (heads, kv_heads, *([kv_heads] * values))]
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2)
    strides = (*q.stride()[:3], *k.stride()[:3], *(v if values else k).stride()[:3])
    with _on(q):
        _rotate_kernel[(padded, batch)](
            q, k, v if values else k, cosine, sine, rows, *outputs[:2], outputs[-1], *strides,
            cosine.stride(0) if cosine.shape[0] > 1 else 0, cosine.stride(1), rows.stride(0), n, padded,
            HEADS=heads, KV_HEADS=kv_heads, DIM=dim,
            BLOCK_H=block_h, BLOCK_KV=triton.next_power_of_2(kv_heads), BLOCK_D=block_d, BACK=back, VALUES=values,
            num_warps=max(1, min(8, block_h * block_d // 256)),
        )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in outputs)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cosine, sine, rows):
        ctx.save_for_backward(cosine, sine, rows)
        return _rotate(q, k, None, cosine, sine, rows, q.shape[2])

    @staticmethod
    def backward(ctx, q, k):
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        return *_rotate(q, k, None, *ctx.saved_tensors, q.shape[2], back=True), None, None, None


def rotate(
    q: Tensor, k: Tensor, v: Tensor, cosine: Tensor, sine: Tensor, rows: Tensor, padded: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary position embedding of q and k, in float32 and rounded once.

    q [batch, heads, n, dim]; k, v [batch, kv_heads, n, dim]; cosine, sine [1 or batch, N, dim], halves side by side;
    rows: int64 [batch, n], where each row stands in them. Returns q, k, v with `padded` >= n rows, zeros after the
    first n, stored rows first ([batch, rows, heads, dim] is contiguous); v itself if there is nothing to pad.
    Differentiable with respect to q and k where padded is n.
    """
    batch, heads, n, dim = q.shape
    if any(x.stride(-1) != 1 for x in (q, k, v, cosine, sine)) or cosine.stride() != sine.stride():
        raise ValueError("the last dimension of all inputs must be contiguous, and the two tables alike.")
    if cosine.shape[-1] != dim:
        raise ValueError(f"the tables have {cosine.shape[-1]} columns, the heads {dim}: they must be equal.")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        if padded != n:
            raise ValueError(f"rows are padded (to {padded}, from {n}) without gradient only.")
        return *_Rotate.apply(q, k, cosine, sine, rows), v
    if padded == n:
        return *_rotate(q, k, None, cosine, sine, rows, padded), v
    return _rotate(q, k, v, cosine, sine, rows, padded)
