"""A model without some of its layers: a smaller stock model, which saves and loads as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from zsaa.families import find_decoder
from zsaa.guards import refuse_foreign

ORIGIN = "zsaa_layers"  # a field of the configuration: which layers of the original model these are


def remove_layers(model: nn.Module, layers: Iterable[int]) -> nn.Module:
    """Take `layers` (numbers from 0, of the model as it is now) out of the decoder of `model`, in place; returns it.

    What is left is what its class makes of a configuration with fewer layers: it trains, quantizes, saves and loads by
    stock transformers, and `zsaa.enable` works on it. The configuration is the model's own afterwards, even if others
    shared it, and names the layers that are left (`origin_of`). Heads, embeddings and tied weights stay as they are.

    ValueError for a layer that is not there, for the first (a cache counts its tokens there), and for none.
    RuntimeError if the dial is on, for PEFT adapters (their saved weights name layers by number), and for layers that
    are dispatched, wrapped or sharded: these come after. NotImplementedError for layers in the midst of a GPT-2 that
    scales attention by a layer's number, which a file would change.
    """
    decoder, family = find_decoder(model)
    there = getattr(decoder, family.layers)
    gone = _checked(layers, len(there))
    if getattr(decoder, "_zsaa", None) is not None:
        raise RuntimeError("the dial is on: call zsaa.disable(model), remove layers, and zsaa.enable(model) again.")
    if hasattr(model, "peft_config") or any(hasattr(module, "base_layer") for module in there.modules()):
        raise RuntimeError(
            "the model carries PEFT adapters, whose files name layers by number. Merge them (merge_and_unload), or "
            "remove layers before get_peft_model."
        )
    refuse_foreign(there, "Remove layers before the model is spread over devices.", "Remove layers before they are.")
    kept = [number for number in range(len(there)) if number not in gone]
    if getattr(decoder.config, "scale_attn_by_inverse_layer_idx", False) and kept != list(range(len(kept))):
        raise NotImplementedError(
            "layers of this model scale their attention by their number (config.scale_attn_by_inverse_layer_idx), and "
            "would load again with another. Remove the last layers alone."
        )
    origin = origin_of(model)
    setattr(decoder, family.layers, nn.ModuleList(there[number] for number in kept))
    for number, layer in enumerate(getattr(decoder, family.layers)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    _configure(model, decoder, kept, [origin[number] for number in kept])
    return model


def origin_of(model: nn.Module) -> list[int]:
    """Which layers of the original model those of `model` are, from 0."""
    decoder, family = find_decoder(model)
    return list(getattr(decoder.config, ORIGIN, None) or range(len(getattr(decoder, family.layers))))


def _checked(layers: Iterable[int], count: int) -> set[int]:
    gone = list(layers)
    wrong = [n for n in gone if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n < count]
    if wrong or not gone or len({*gone}) < len(gone):
        what = f"layer {wrong[0]!r}" if wrong else f"layers {gone}"
        raise ValueError(
            f"{what} of {count} cannot be removed: give different whole numbers from 1 to {count - 1}. Layer 0 stays, "
            "because a key/value cache counts its tokens there."
        )
    return {*gone}


def _configure(model: nn.Module, decoder: nn.Module, kept: list[int], origin: list[int]) -> None:
    """Give the model a configuration of its own, for the layers that are left."""
    old = decoder.config
    new = copy.deepcopy(old)
    types = getattr(new, "layer_types", None)
    new.num_hidden_layers = len(kept)
    if types:
        new.layer_types = [types[number] for number in kept]
    setattr(new, ORIGIN, origin)
    if type(getattr(new, "zsaa", None)) is dict:  # from a file, and its depths are of all layers
        new.zsaa = {**new.zsaa, "depth": None, "depth_range": None}
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
