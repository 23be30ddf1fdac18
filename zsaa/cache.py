"""A key/value cache whose layers hold different tokens: layer l caches what entered it, and shrinks as Eq. 2 says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class PrunedLayer(DynamicLayer):
    """Keys and values [batch, kv_heads, rows, dim] of the tokens that entered one layer. Sliding windows are applied by
    position when attending, so nothing is evicted.

    columns: int64 [batch, rows], where each row stood in all that the model was given; -1 for a row without a token.
    given: bool [batch, width], the real columns of the prompt, where some of them never entered the layer; else None.
    A layer that holds no pruned rows (never filled, or reset) works as the DynamicLayer that it also is.
    """

    keys: Any
    values: Any

    def __init__(self):
        super().__init__()
        self.columns: Tensor | None = None
        self.given: Tensor | None = None
        self.seen = 0  # tokens that the model was given, padding and dropped ones included
        self.removable = 0  # rows that crop can give back: those after the prefill, and the prompt's last
        self.all_real = True

    @property
    def pruned(self) -> bool:
        return self.columns is not None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.pruned:
            return super().update(key_states, value_states, *args, **kwargs)
        raise RuntimeError(
            "this key/value cache was pruned by zsaa and can only be continued by a model on which zsaa is enabled. "
            "Call zsaa.enable(model) again, or start from an empty cache."
        )

    def extend(self, keys: Tensor, values: Tensor, columns: Tensor, all_real: bool, seen: int):
        """Append rows; returns all keys and values. `seen` counts the tokens given to the model."""
        if self.columns is None:
            self.dtype, self.device = keys.dtype, keys.device
            self.keys, self.values, self.columns = keys, values, columns
            self.is_initialized, self.removable = True, 1
        else:
            self.keys = torch.cat([self.keys, keys], dim=-2)
            self.values = torch.cat([self.values, values], dim=-2)
            self.columns = torch.cat([self.columns, columns], dim=-1)
            self.removable += keys.shape[-2]
        self.all_real &= all_real
        self.seen += seen
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen if self.pruned else super().get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the newest -tokens_to_remove tokens. The last token of the prompt may be among them, since every
        layer kept it: it can then be decoded again."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.15 hands over a tensor
        if tokens_to_remove == 0:
            return
        if self.columns is None:
            super().crop(tokens_to_remove)
            return
        if tokens_to_remove > 0 or -tokens_to_remove > self.removable:
            raise ValueError(
                f"crop({tokens_to_remove}): a pruned cache can only give back the prompt's last token and those added "
                f"after it, by a negative count (here -{self.removable} to -1); dropped prompt tokens are gone. "
                "Prefill again instead."
            )
        self.removable += tokens_to_remove
        self.seen += tokens_to_remove
        prompt = self.removable == 0 and not self.all_real  # where the prompt's last row is may differ by sample
        if rows := -tokens_to_remove - prompt:
            self.keys, self.values = self.keys[:, :, :-rows], self.values[:, :, :-rows]
            self.columns = self.columns[:, :-rows]
        if prompt:
            newest = self.columns.max(dim=1, keepdim=True).values
            self.columns = self.columns.masked_fill(self.columns == newest, -1)

    def reset(self) -> None:
        # As transformers does from 5.18 on. Before, it wrote zeros into the rows, which may be views of one tensor.
        self.keys = self.values = self.columns = self.given = None
        self.is_initialized, self.seen, self.removable, self.all_real = False, 0, 0, True

    def _index(self, index: Tensor) -> None:
        if self.get_seq_length() == 0:
            return
        for name in ("keys", "values", "columns", "given"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[index.to(held.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._index(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._index(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("a pruned cache cannot be offloaded. Use the default cache with zsaa.")


# Kinds of caches that can be pruned into, and what each of their layers becomes; zsaa/reuse/quantized.py adds another.
# Called with the cache and the model's type, as its configuration has it.
KINDS: dict[type, Callable[[Any, str], PrunedLayer]] = {DynamicCache: lambda cache, model: PrunedLayer()}


def is_pruned(cache) -> bool:
    """Does `cache` hold what a pruned pass left?"""
    return any(isinstance(layer, PrunedLayer) and layer.pruned for layer in getattr(cache, "layers", None) or ())


def is_empty(cache) -> bool:
    """Does it hold no tokens? What is no cache of transformers 5, such as a tuple, counts as empty."""
    return not hasattr(cache, "get_seq_length") or cache.get_seq_length() == 0


def check_cache(cache) -> None:
    """NotImplementedError for a cache (or None) that is none of KINDS, or not on one device."""
    if cache is None:
        return
    if isinstance(cache, tuple):
        raise TypeError(
            "past_key_values is a tuple, as transformers had it before version 5. Give a DynamicCache, or none."
        )
    plain = type(cache) in KINDS and not getattr(cache, "offloading", False)
    known = {DynamicLayer, DynamicSlidingWindowLayer} if type(cache) is DynamicCache else {*map(type, cache.layers)}
    if not plain or not all(isinstance(c, PrunedLayer) or type(c) in known for c in cache.layers):
        raise NotImplementedError(
            f"zsaa prunes into transformers' DynamicCache only, and quantized ones, got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}. Drop cache_implementation, or set "
            "alpha to 1 for this call."
        )


def pruned_cache(cache, num_layers: int, model: str = "") -> DynamicCache:
    """`cache` (or a new one, for None), empty, with its layers replaced by PrunedLayers. model: its type."""
    check_cache(cache)
    cache = DynamicCache() if cache is None else cache
    cache.layers = [KINDS[type(cache)](cache, model) for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache
