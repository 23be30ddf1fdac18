"""Where the layers of a recorded prefill leave a large cache: in memory that is new for every replay.

A cache that stayed in a recording's own memory until its end would be there twice once it is copied out, and what a
layer works in would have to fit between what those before it left. So each layer's keys, values and columns go out as
soon as they are there, by a kernel that reads the address from a table on the device. Small caches are copied at the
end, by fewer kernels (zsaa.fast.packing).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from zsaa.cache import PrunedLayer
from zsaa.fast import dispatch, packing


class Leaving(PrunedLayer):
    """One that holds nothing: what it is given goes out."""

    def __init__(self, outlet: Outlet):
        super().__init__()
        self.outlet = outlet

    def extend(self, keys: Tensor, values: Tensor, columns: Tensor, all_real: bool, seen: int):
        for x in (keys, values, columns):
            self.outlet.put(x)
        return keys, values


class Outlet:
    """For a cache of these keys, values and columns, layer after layer."""

    def __init__(self, tensors: list[Tensor]):
        groups = packing.grouped(tensors)
        self.layouts = [packing.layout(group) for group in groups]
        self.places = [(i, word) for i, of in enumerate(self.layouts) for word in packing.places(of)]
        self.table = torch.zeros(len(groups), dtype=torch.int64, device=tensors[0].device)
        self.taken = 0

    def layers(self, count: int) -> list[PrunedLayer]:
        """Of the cache of one pass, whose layers follow each other."""
        self.taken = 0
        return [Leaving(self) for _ in range(count)]

    def open(self) -> list[Tensor]:
        """New memory, in which the next pass leaves what it returns here."""
        flats = [packing.empty(words, self.table.device) for words, _ in self.layouts]
        self.table.copy_(torch.tensor([flat.data_ptr() for flat in flats]), non_blocking=True)
        return [x for flat, (_, parts) in zip(flats, self.layouts) for x in packing.views(flat, parts)]

    def put(self, x: Tensor) -> None:
        from zsaa.kernels.pack import put

        put(x, self.table, *self.places[self.taken])
        self.taken += 1


def outlet_for(tensors: list[Tensor]) -> Outlet | None:
    """For a cache like this one; None where it is small, or no kernel copies it."""
    if not tensors or sum(x.nbytes for x in tensors) <= packing.LIMIT or not dispatch.copies(tensors[0].device):
        return None
    try:
        outlet = Outlet(tensors)
        left = outlet.open()
        for x in tensors:
            outlet.put(x)
        if all(packing.alike(a, b) for a, b in zip(left, tensors, strict=True)):
            return outlet
        why = "it copies something else"
    except ValueError:  # not in whole words
        return None
    except Exception as error:  # a compiler's, most likely
        why = f"{type(error).__name__}: {error}"
    warnings.warn(f"zsaa's copying kernel is not used: {why}. Please report it.", stacklevel=2)
    return None
