"""Norms and activations between a layer's matrix products, as Triton kernels without gradient: one launch each where
transformers' modules take up to eight, and each number is read and rounded once.

`add_norm` adds a residual and applies RMSNorm or LayerNorm; `silu_mul` is SwiGLU's. Plain PyTorch's are in naive.py.
The stock models have no such kernels, so what they gain is not pruning's: `use_fused(False)` (zsaa.fast.dispatch) runs
without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zsaa.kernels.attention import _on

NORM_LIMIT = 16384  # numbers of a row that one program holds


@triton.jit
def _add_norm_kernel(
    x, other, weight, bias, total, out, eps, x_row, other_row,
    ADD: tl.constexpr, CENTRE: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    mask = dims < SIZE
    a = tl.load(x + row * x_row + dims, mask=mask, other=0.0).to(tl.float32)
    if ADD:  # rounded, as the sum is stored: the norm is that of what goes on
        a = (a + tl.load(other + row * other_row + dims, mask=mask, other=0.0).to(tl.float32)).to(
            total.dtype.element_ty
        )
        tl.store(total + row * SIZE + dims, a, mask=mask)
        a = a.to(tl.float32)
    if CENTRE:
        a = tl.where(mask, a - tl.sum(a, axis=0) / SIZE, 0.0)
    a = a * tl.rsqrt(tl.sum(a * a, axis=0) / SIZE + eps)
    a = a * tl.load(weight + dims, mask=mask, other=0.0).to(tl.float32)
    if CENTRE:
        a = a + tl.load(bias + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + dims, a.to(out.dtype.element_ty), mask=mask)


def add_norm(x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x + other (or x itself, for None), and its norm times `weight`: LayerNorm with a bias, RMSNorm without one.

    x, other [batch, n, size], a row contiguous and the rows equally far apart; weight and bias [size], of any dtype;
    size <= NORM_LIMIT. In float32, rounded once. Each row is one program's, whatever stands beside it.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    others = rows if other is None else other.reshape(-1, size)
    if size > NORM_LIMIT or rows.stride(-1) != 1 or others.stride(-1) != 1 or weight.stride(-1) != 1:
        raise ValueError(f"add_norm takes contiguous rows of up to {NORM_LIMIT} numbers, got {tuple(x.shape)}.")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if other is None else torch.empty_like(out)
    block = triton.next_power_of_2(size)
    with _on(x):
        _add_norm_kernel[(rows.shape[0],)](
            rows, others, weight, weight if bias is None else bias, total, out, eps, rows.stride(0), others.stride(0),
            ADD=other is not None, CENTRE=bias is not None, SIZE=size, BLOCK=block,
            num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return total, out


@triton.jit
def _silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    g = tl.load(gate + index, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + index, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=mask)


def silu_mul(gate: Tensor, up: Tensor, inplace: bool = False) -> Tensor:
    """silu(gate) * up, in float32 and rounded once; both contiguous and of one shape. inplace: in gate's memory."""
    if not (gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape):
        raise ValueError("gate and up must be contiguous and of one shape; call .contiguous() on them.")
    out, count, block = gate if inplace else torch.empty_like(gate), gate.numel(), 2048
    with _on(gate):
        _silu_mul_kernel[(triton.cdiv(count, block),)](gate, up, out, count, BLOCK=block, num_warps=4)
    return out
