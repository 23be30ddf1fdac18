"""What is kept, and for how long: the least recently used goes first, and bytes are what is counted."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What one prompt left, read by itself. hidden: [tokens, size], the decoder's output. layers: keys and values
    [kv_heads, rows, dim], and where each row stood in the prompt, int64 [rows], or None where the stock decoder read
    it. output: the class of the decoder's output."""

    hidden: Tensor
    layers: tuple[tuple[Tensor, Tensor, Tensor | None], ...]
    output: type

    @property
    def nbytes(self) -> int:
        tensors = (self.hidden, *(x for layer in self.layers for x in layer if x is not None))
        return sum(x.untyped_storage().nbytes() for x in tensors)


def own(x: Tensor) -> Tensor:
    """`x` in memory of its own, so that no larger tensor is held by a view of it, and nobody else writes into it."""
    return x.detach().clone(memory_format=torch.contiguous_format)


class Store:
    """At most so many bytes of `Kept`. counts: "hits", "misses", "evicted", "too_large" (never kept), "cleared"."""

    def __init__(self, most_bytes: int):
        if isinstance(most_bytes, bool) or not isinstance(most_bytes, int) or most_bytes < 0:
            raise ValueError(f"most_bytes must be a whole number of bytes, 0 or more, got {most_bytes!r}.")
        self.most_bytes, self.nbytes = most_bytes, 0
        self.counts: Counter = Counter()
        self._held: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Kept | None:
        with self._lock:
            found = self._held.get(key)
            self.counts["misses" if found is None else "hits"] += 1
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: Hashable, kept: Kept) -> None:
        with self._lock:
            if kept.nbytes > self.most_bytes:
                self.counts["too_large"] += 1
                return
            before = self._held.pop(key, None)
            self.nbytes += kept.nbytes - (0 if before is None else before.nbytes)
            self._held[key] = kept
            while self.nbytes > self.most_bytes:
                _, oldest = self._held.popitem(last=False)
                self.nbytes -= oldest.nbytes
                self.counts["evicted"] += 1

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            if self._held:
                self.counts["cleared"] += len(self._held)
            self._held.clear()
            self.nbytes = 0
