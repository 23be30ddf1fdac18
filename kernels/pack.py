"""Copying many tensors, strided ones among them, into one, as a Triton kernel: one launch where PyTorch takes one each.

The tensors stay where they are from call to call, as the outputs of a recorded CUDA graph do, so their addresses are
in a table on the device. The same in plain PyTorch: Packing.copies, without it. `put` has the target's address there
instead, for what a recorded pass leaves elsewhere each time that it is replayed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from zsaa.kernels.attention import _on

WORD = 8  # bytes: tensors are copied as int64
BLOCK = 2048  # words per program


@triton.jit
def _pack_kernel(pieces, segments, target, BLOCK: tl.constexpr):
    piece = pieces + tl.program_id(0) * 2
    segment = segments + tl.load(piece) * 5
    source = tl.load(segment).to(tl.pointer_type(tl.int64))
    words, inner = tl.load(segment + 1).to(tl.int32), tl.load(segment + 2).to(tl.int32)
    stride, offset = tl.load(segment + 3), tl.load(segment + 4)
    index = tl.load(piece + 1).to(tl.int32) + tl.arange(0, BLOCK)
    mask = index < words
    x = tl.load(source + (index // inner).to(tl.int64) * stride + index % inner, mask=mask)
    tl.store(target + offset + index, x, mask=mask)


@triton.jit(do_not_specialize=["source", "words", "inner", "stride", "sample", "group", "offset"])
def _put_kernel(source, words, inner, stride, sample, addresses, group, offset, BLOCK: tl.constexpr):
    which = tl.program_id(1).to(tl.int64)
    x = source.to(tl.pointer_type(tl.int64)) + which * sample
    target = tl.load(addresses + group).to(tl.pointer_type(tl.int64)) + offset + which * words
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < words
    moved = tl.load(x + (index // inner).to(tl.int64) * stride + index % inner, mask=mask)
    tl.store(target + index, moved, mask=mask)


def _segments(x: Tensor) -> list[tuple[int, int, int, int]] | None:
    """(address, words, inner, stride) of parts of x that follow each other in the order of its strides: `words` words,
    `inner` at a time side by side, `stride` apart. None if they do not come in whole words."""
    # Sizes and strides from the outermost dimension in memory inwards, neighbours that are contiguous as one.
    dims: list[list[int]] = []
    for i in sorted(range(x.dim()), key=lambda i: (-x.stride(i) or -(1 << 62), i)):
        size, stride = x.shape[i], x.stride(i)
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = [dims[-1][0] * size, stride]
        else:
            dims.append([size, stride])
    if not dims or dims[-1][1] != 1:
        dims.append([1, 1])
    if len(dims) > 3:
        return None
    *outer, (inner, _) = dims
    outer = [[1, 0]] * (2 - len(outer)) + outer
    (samples, sample), (rows, row) = outer
    bytes_ = [n * x.element_size() for n in (inner, sample, row)]
    if any(n % WORD for n in (*bytes_, x.data_ptr())):
        return None
    inner, sample, row = (n // WORD for n in bytes_)
    return [(x.data_ptr() + i * sample * WORD, rows * inner, inner, row) for i in range(samples)]


def put(x: Tensor, addresses: Tensor, group: int, offset: int) -> None:
    """Copy x, dense in the order of its own strides, into the memory whose address is in addresses[group] (int64) once
    the kernel runs, from word `offset` on. Raises ValueError for tensors that do not come in whole words."""
    parts = _parts(x)
    (address, words, inner, stride), samples = parts[0], len(parts)
    sample = (parts[1][0] - address) // WORD if samples > 1 else 0
    with _on(addresses):
        grid = (triton.cdiv(words, BLOCK), samples)
        _put_kernel[grid](address, words, inner, stride, sample, addresses, group, offset, BLOCK=BLOCK, num_warps=4)


def _parts(x: Tensor) -> list[tuple[int, int, int, int]]:
    parts = _segments(x)
    if parts is None or parts[0][1] >= 1 << 31:
        raise ValueError(f"a tensor {tuple(x.shape)} with strides {x.stride()} of {x.dtype} cannot be packed.")
    return parts


class Pack:
    """A copy of `tensors`, which stay where they are, in one of `words` words of 8 bytes, each from its offset on,
    dense, in the order of its own strides. Raises ValueError for tensors that do not come in whole words."""

    def __init__(self, tensors: list[Tensor], offsets: list[int], words: int):
        device, table, self.words = tensors[0].device, [], words
        for x, offset in zip(tensors, offsets, strict=True):
            for address, size, inner, stride in _parts(x):
                table.append((address, size, inner, stride, offset))
                offset += size
        segments = torch.tensor(table)
        blocks = (segments[:, 1] + BLOCK - 1) // BLOCK
        which = torch.repeat_interleave(torch.arange(len(table)), blocks)
        start = (torch.arange(len(which)) - (blocks.cumsum(0) - blocks)[which]) * BLOCK
        self.segments, self.pieces = segments.to(device), torch.stack([which, start], dim=1).to(device)

    def __call__(self) -> Tensor:
        """A new tensor, int64 [words]. What lies between the copies is not written."""
        target = torch.empty(self.words, dtype=torch.int64, device=self.segments.device)
        with _on(target):
            _pack_kernel[(len(self.pieces),)](self.pieces, self.segments, target, BLOCK=BLOCK, num_warps=4)
        return target
