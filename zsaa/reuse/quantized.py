"""Pruned key/value caches in fewer bits, by transformers' own arithmetic:

    model.generate(ids, alpha=0.9, cache_implementation="quantized", cache_config={"backend": "hqq", "nbits": 4,
                   "axis_key": 1, "axis_value": 1})

Each layer holds other tokens, so each is quantized by itself, and each sample of it, too: batch-mates share no group
and no scale. A prompt is quantized once, but for its last token; what is written after it stays as it is, so that it
can be given back, and nothing is rounded twice. (Transformers' own layers, which alpha = 1 runs with, round all of it
again whenever 128 tokens have come.) Reordering for beams moves packed samples, and rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import HQQQuantizedLayer, QuantizedCache, QuantizedLayer

from zsaa import cache as pruned
from zsaa.cache import PrunedLayer

PACKS = 8


@dataclass(frozen=True)
class Packed:
    """The rows of one sample in one layer. pair: quantized keys and values, as transformers' layer gives them."""

    rows: int
    pair: tuple[Any, ...]


class QuantizedPrunedLayer(PrunedLayer):
    """keys, values: of the prompt's last token and of what came after it, in full. packed: per sample, quantized keys
    and values of the prompt's other rows; columns: of the packed rows, then of those in full. like: a layer of
    transformers, whose arithmetic it is."""

    def __init__(self, like: QuantizedLayer):
        super().__init__()
        self.like = like
        self.packed: list[Packed | None] = []
        self.rows = 0  # packed rows of the longest sample

    def extend(self, keys: Tensor, values: Tensor, columns: Tensor, all_real: bool, seen: int):
        begins = self.columns is None
        super().extend(keys, values, columns, all_real, seen)
        if begins:
            self._pack()
        keys, values = (torch.cat([x, y], dim=-2) for x, y in zip(self._unpacked(), (self.keys, self.values)))
        return keys, values

    def _pack(self) -> None:
        """The rows of the prompt, but for the last of each sample, which go behind."""
        keys, values, columns = self.keys, self.values, self.columns
        counts = (columns >= 0).sum(dim=1).tolist()
        self.rows = max(counts) - 1
        self.like.keys = keys  # it asks these for device and precision
        self.packed = [self._packed_sample(keys[b], values[b], n - 1) for b, n in enumerate(counts)]
        last = torch.tensor(counts, device=columns.device) - 1
        behind = columns.gather(1, last[:, None])
        front = columns[:, : self.rows].clone()
        front[torch.arange(self.rows, device=columns.device) >= last[:, None]] = -1
        self.columns = torch.cat([front, behind], dim=1)
        samples = torch.arange(len(counts), device=columns.device)
        self.keys, self.values = (x[samples, :, last].unsqueeze(2).contiguous() for x in (keys, values))

    def _packed_sample(self, keys: Tensor, values: Tensor, rows: int) -> Packed | None:
        """Of one sample's first rows [kv_heads, rows, dim]."""
        if rows == 0:
            return None
        like, group = self.like, self.like.q_group_size
        if keys[:, :rows].numel() % group:
            raise ValueError(
                f"q_group_size is {group}, and a prompt of {rows} tokens in a layer has {keys[:, :rows].numel()} "
                f"numbers: it must divide the head size, {keys.shape[-1]}."
            )
        # Rows of zeros at the end: hqq packs groups by twos and more, and fails where one is left over.
        padded = (F.pad(x[None, :, :rows], (0, 0, 0, -rows % PACKS)) for x in (keys, values))
        axes = like.axis_key, like.axis_value
        return Packed(rows, tuple(like._quantize(x.contiguous(), axis=axis) for x, axis in zip(padded, axes)))

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the packed rows [batch, kv_heads, rows, dim]; zeros where a sample has fewer."""
        batch, heads, _, dim = self.keys.shape
        found = self.keys.new_zeros(2, batch, heads, self.rows, dim)
        for b, held in enumerate(self.packed):
            for kind, x in enumerate(held.pair if held else ()):
                found[kind, b, :, : held.rows] = self.like._dequantize(x)[0, :, : held.rows]
        return found[0], found[1]

    def _index(self, index: Tensor) -> None:
        if self.get_seq_length():
            self.packed = [self.packed[i] for i in index.tolist()]
        super()._index(index)

    def reset(self) -> None:
        super().reset()
        self.packed, self.rows = [], 0

    @property
    def nbytes(self) -> int:
        """Of the keys and values that are held, scales included."""
        tensors = [self.keys, self.values]
        for packed in (x for held in self.packed if held for x in held.pair):
            data, about = packed if isinstance(packed, tuple) else (packed, {})
            tensors += [data, *(about[name] for name in ("scale", "zero") if name in about)]
        return sum(x.numel() * x.element_size() for x in tensors)


def layer_of(cache: QuantizedCache, model: str) -> PrunedLayer:
    """What a layer of this cache becomes, in a model of this type. NotImplementedError for what cannot be pruned into,
    or breaks the model."""
    like = cache.layers[0]
    if isinstance(like, QuantizedPrunedLayer):
        like = like.like
    if not isinstance(like, QuantizedLayer):
        raise NotImplementedError(
            f"zsaa prunes into quantized caches of the backends hqq and quanto, got {type(like).__name__}. Choose one "
            "of these in cache_config, or set alpha to 1 for this call."
        )
    if model == "qwen2" and isinstance(like, HQQQuantizedLayer) and like.nbits <= 4 and like.axis_key == 1:
        raise NotImplementedError(
            f"Qwen 2's keys do not bear {like.nbits} bits in groups of one token: its perplexity rises by a third "
            "(results/serving/bits.json). Set axis_key to 0 in cache_config, or nbits to 8."
        )
    return QuantizedPrunedLayer(like)


pruned.KINDS[QuantizedCache] = layer_of
