"""Handing out copies of tensors that a recording will write again, with as little work for the host as possible."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from zsaa.fast import dispatch

LIMIT = 64 << 20  # bytes that share memory: what is handed out is freed when all that it shares memory with is
ALIGNED = 64  # words of 8 bytes: as PyTorch aligns tensors of their own


def alike(a: Tensor, b: Tensor) -> bool:
    """Are a and b, of one shape, equal? NaN equals itself: a model that overflows is none of ours to find."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def unheld(x: Tensor) -> Tensor:
    """x's memory, in a tensor that does not hold it: whoever does decides how long it is there."""
    make = getattr(torch._C, "_construct_storage_from_data_pointer", None)
    if make is None:  # not public
        return x
    held = x.untyped_storage()
    bare = make(held.data_ptr(), x.device, held.nbytes())
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(bare, x.storage_offset(), x.shape, x.stride())


class Packing:
    """Copies of `tensors`, which stay where they are. Several share the memory of one new tensor, so that the host
    makes one instead of many; the first, a model's last states, often let go before the cache, has its own.

    With Triton one kernel per group copies all of it; without, PyTorch copies one by one.
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors, groups = tensors, [tensors[:1], *grouped(tensors[1:])]
        self.layouts = [layout(group) for group in groups]
        self.packs: list = []
        if dispatch.copies(tensors[0].device):
            try:
                self.packs = [_pack(*of) for of in zip(groups, self.layouts)]
                why = "" if not all(self.packs) or self._agrees() else "it copies something else"
            except Exception as error:  # a compiler's, most likely
                why = f"{type(error).__name__}: {error}"
            if why:
                warnings.warn(f"zsaa's copying kernel is not used: {why}. Please report it.", stacklevel=2)
            if why or not all(self.packs):
                self.packs = []

    def _agrees(self) -> bool:
        """Does the kernel copy what is there? Asked once per recording."""
        return all(alike(a, b) for a, b in zip(self.copies(), self.tensors, strict=True))

    def copies(self) -> list[Tensor]:
        copies = []
        for pack, (words, parts) in zip(self.packs or [None] * len(self.layouts), self.layouts):
            copies += views(pack() if pack else empty(words, self.tensors[0].device), parts)
        if not self.packs:
            torch._foreach_copy_(copies, self.tensors)
        return copies


def grouped(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that follow each other, as many as may share memory."""
    groups, held = [], LIMIT
    for x in tensors:
        if held + x.nbytes > LIMIT:
            groups.append([])
            held = 0
        groups[-1].append(x)
        held += x.nbytes
    return groups


def empty(words: int, device: torch.device) -> Tensor:
    """Memory for a group."""
    return torch.empty(words, dtype=torch.int64, device=device)


def views(flat: Tensor, parts: list[tuple]) -> list[Tensor]:
    """The tensors of a group in its memory, as `layout` has them."""
    of = {dtype: flat.view(dtype) for dtype in {part[0] for part in parts}}
    return [of[dtype].as_strided(size, stride, offset) for dtype, size, stride, offset in parts]


def places(layout: tuple[int, list[tuple]]) -> list[int]:
    """Where each tensor of a group begins, in words."""
    return [offset * dtype.itemsize // 8 for dtype, *_, offset in layout[1]]


def layout(group: list[Tensor]) -> tuple[int, list[tuple]]:
    """Words of 8 bytes that a group takes, and of each tensor dtype, size, strides and offset there: dense, in the
    order of its own strides."""
    words, parts = 0, []
    for x in group:
        strides, step = [0] * x.dim(), 1
        for i in sorted(range(x.dim()), key=lambda i: (-x.stride(i) or -(1 << 62), i), reverse=True):
            strides[i], step = step, step * x.shape[i]
        parts.append((x.dtype, tuple(x.shape), tuple(strides), words * 8 // x.element_size()))
        words += -(-x.nbytes // (8 * ALIGNED)) * ALIGNED
    return words, parts


def _pack(group: list[Tensor], layout: tuple[int, list[tuple]]):
    from zsaa.kernels.pack import Pack

    try:
        return Pack(group, places(layout), layout[0])
    except ValueError:
        return None
