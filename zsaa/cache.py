"""A key/value cache whose layers hold different tokens: layer l caches what entered it, and shrinks as Eq. 2 says."""

from __future__ import annotations

import torch
from torch import Tensor

from zsaa.compat import check_transformers

try:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
except ImportError:  # so old that there is nothing to build on: say that
    check_transformers()
    raise


class PrunedLayer(DynamicLayer):
    """Keys and values [batch, kv_heads, rows, dim] of the tokens that entered one layer, with their original positions
    [batch, rows] (-1 for padding). Sliding windows are applied by position when attending, so nothing is evicted."""

    def __init__(self):
        super().__init__()
        self.positions: Tensor | None = None
        self.seen = 0  # tokens that the model was given, padding and dropped ones included
        self.removable = 0  # rows that crop can give back: those after the prefill, and the prompt's last
        self.all_real = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        raise RuntimeError(
            "this key/value cache was pruned by zsaa and can only be continued by a model on which zsaa is enabled. "
            "Call zsaa.enable(model) again, or start from an empty cache."
        )

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor, all_real: bool, seen: int):
        """Append rows; returns all keys and values. `seen` counts the tokens given to the model."""
        if self.positions is None:
            self.dtype, self.device = keys.dtype, keys.device
            self.keys, self.values, self.positions = keys, values, positions
            self.is_initialized, self.removable = True, 1
        else:
            self.keys = torch.cat([self.keys, keys], dim=-2)
            self.values = torch.cat([self.values, values], dim=-2)
            self.positions = torch.cat([self.positions, positions], dim=-1)
            self.removable += keys.shape[-2]
        self.all_real &= all_real
        self.seen += seen
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Give back the newest -tokens_to_remove tokens. The last token of the prompt may be among them, since every
        layer kept it: it can then be decoded again."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.15 hands over a tensor
        if tokens_to_remove == 0:
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
            self.positions = self.positions[:, :-rows]
        if prompt:
            newest = self.positions.max(dim=1, keepdim=True).values
            self.positions = self.positions.masked_fill(self.positions == newest, -1)

    def reset(self) -> None:
        super().reset()
        self.positions, self.seen, self.removable, self.all_real = None, 0, 0, True

    def _index(self, index: Tensor) -> None:
        self.keys, self.values = self.keys[index], self.values[index]
        self.positions = self.positions[index.to(self.positions.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._index(beam_idx.to(self.keys.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._index(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._index(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("a pruned cache cannot be offloaded. Use the default cache with zsaa.")


def is_pruned(cache) -> bool:
    return bool(getattr(cache, "layers", None)) and isinstance(cache.layers[0], PrunedLayer)


def is_empty(cache) -> bool:
    return cache is None or cache.get_seq_length() == 0


def pruned_cache(cache, num_layers: int) -> DynamicCache:
    """`cache` (or a new one, for None), empty, with its layers replaced by PrunedLayers."""
    cache = DynamicCache() if cache is None else cache
    plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
    if not plain or any(type(c) not in (DynamicLayer, DynamicSlidingWindowLayer, PrunedLayer) for c in cache.layers):
        raise NotImplementedError(
            f"zsaa prunes into transformers' DynamicCache only, got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}. Drop cache_implementation, or set "
            "alpha to 1 for this call."
        )
    cache.layers = [PrunedLayer() for _ in range(num_layers)]
    cache.layer_class_to_replicate = None
    return cache
