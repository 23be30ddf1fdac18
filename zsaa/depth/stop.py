"""The depth dial: a pass that ends behind the first layers, and goes from there to the final norm and the head.

At depth d a model is what `remove_layers(model, range(d, layers))` leaves of it, bit for bit; nothing is copied, and
the next call may run all layers again. Tokens and depth go together: a pass at alpha ends behind layer d with the
tokens that this layer passes on. The paper that the dial is of turns tokens alone; see zsaa/depth/__init__.py.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache


class Stop:
    """Travels down the decoder in a pass of the stock code that ends behind `depth` layers. partial: are hidden states
    asked for, of which those of the other layers are to be left out?"""

    stock = True  # others prune, or go on where something was pruned

    def __init__(self, depth: int, partial: bool):
        self.depth, self.partial = depth, partial

    def complete(self, output: Any) -> Any:
        return output


def check_depth(depth: Any, layers: int) -> int:
    """`depth` as an int, if it is a whole number from 1 to `layers`; else TypeError or ValueError."""
    if isinstance(depth, Tensor) and depth.dim() == 0 and not depth.is_floating_point():
        depth = depth.item()
    if isinstance(depth, bool) or not isinstance(depth, Integral):
        raise TypeError(
            f"depth must be a whole number of layers, got {depth!r} ({type(depth).__name__}). A pass has one depth, "
            "for all requests of its batch."
        )
    depth = int(depth)
    if not 1 <= depth <= layers:
        raise ValueError(
            f"depth must be from 1 to {layers}, the layers of this model, got {depth}: the first `depth` layers run, "
            f"and {layers} are all."
        )
    return depth


def check_filled(filled: int, depth: int) -> None:
    """ValueError for a key/value cache that `filled` layers left, and a pass through `depth` of them."""
    if filled != depth:
        raise ValueError(
            f"this key/value cache was filled by {filled} layers, and the model now runs {depth}: it cannot be "
            "continued. Start from an empty cache, or set depth (config.num_hidden_layers) back."
        )


def _nothing_to_crop(tokens: int) -> None:
    """Of a cache's layer that holds nothing: transformers' own way fails there if the layer's window slides."""


def check_stock_cache(cache: Any, depth: int, layers: int) -> None:
    """What a pass of the stock code through `depth` of the `layers` cannot continue or fill: ValueError for a
    DynamicCache of another depth; NotImplementedError for other caches, unless all layers run."""
    if type(cache) is DynamicCache and not getattr(cache, "offloading", False):
        filled = sum(layer.get_seq_length() > 0 for layer in cache.layers)
        if filled:
            check_filled(filled, depth)
        for layer in cache.layers[depth:]:
            layer.crop = _nothing_to_crop
    elif cache is not None and depth < layers:
        kind = f"{type(cache).__name__}{' with offloading' if type(cache) is DynamicCache else ''}"
        raise NotImplementedError(
            f"a pass through {depth} of {layers} layers fills transformers' DynamicCache only, got {kind}. Drop "
            "cache_implementation, or run all layers."
        )


def check_room(cache: Any, layers: int, model: str) -> None:
    """NotImplementedError for a cache of fewer layers than the `layers` that a decoder runs whatever its configuration
    says, as an early exit of transformers makes one: the stock code fails there without a word."""
    made = len(cache.layers) if type(cache) is DynamicCache and cache.layer_class_to_replicate is None else layers
    if made < layers:
        raise NotImplementedError(
            f"this key/value cache was made for {made} layers, and {model} runs all its {layers}, whatever "
            "config.num_hidden_layers says: at alpha = 1 assistant_early_exit cannot draft with it, with or without a "
            "dial. Leave it out, set alpha below 1, or draft by assistant_model=."
        )


def untrained(depth: int, trained: tuple[float, float] | None) -> str:
    """What a dial says of a depth that its model was not trained for."""
    known = "only as a whole" if trained is None else f"at depths from {trained[0]} to {trained[1]}"
    return (
        f"depth = {depth}: this model was trained {known}, and what its head makes of other layers' states is likely "
        "nonsense. zsaa.finetune trains for depths (Recipe.named('depth'))."
    )
