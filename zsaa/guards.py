"""What the pruned path would silently get wrong is refused here, by name."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from zsaa.cache import check_cache
from zsaa.call import Call
from zsaa.depth.stop import check_filled
from zsaa.families import Family
from zsaa.layer import MARK
from zsaa.rule import RULE


def check_call(call: Call) -> None:
    """TypeError, ValueError, NotImplementedError or RuntimeError for a call of a decoder that cannot be pruned."""
    decoder = call.decoder
    if given := [name for name in RULE if call.extra.get(name) is not None]:
        raise TypeError(
            f"{given[0]}={call.extra[given[0]]!r} came with a call, which takes alpha, depth, exempt and question "
            f"alone. Set it for the model: zsaa.enable(model, {given[0]}=...)."
        )
    check_cache(call.cache)
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace would write one text's token counts into the graph. Use torch.compile, torch.export for "
            "each length and alpha, or set alpha to 1."
        )
    if 0 in call.shape:
        raise ValueError(
            f"the input has no {'samples' if call.shape[0] == 0 else 'tokens'}: its shape is {tuple(call.shape)}. Give "
            "at least one sample, and each at least one token."
        )
    attention = getattr(decoder.config, "_attn_implementation", None) or "eager"
    if attention not in ("eager", "sdpa", "flex_attention") and "flash" not in attention:
        raise ValueError(
            f"attn_implementation={attention!r} computes attention in a way of its own, and pruned layers compute "
            'softmax attention: use "sdpa", "eager", "flex_attention" or a flash attention, or set alpha to 1 for this '
            "call."
        )
    _check_attention_mask(call)
    if packed := _packed(call):
        raise ValueError(
            f"zsaa cannot prune packed sequences ({', '.join(packed)}): scores would mix separate texts. "
            "Give each text its own row and pad, or set alpha to 1 for this call."
        )
    asked = (call.extra.get("output_attentions"), call.named.get("output_attentions"), decoder.config.output_attentions)
    if any(asked):
        raise ValueError(
            "output_attentions=True is not available with alpha < 1: pruned layers have no full attention matrix. "
            "Use zsaa.trace(model) to see what was kept, or set alpha to 1 for this call."
        )
    checkpoint = getattr(decoder, "_gradient_checkpointing_func", None)
    if decoder.training and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "zsaa needs non-reentrant gradient checkpointing. Call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )


def _check_attention_mask(call: Call) -> None:
    mask, (batch, tokens) = call.attention_mask, call.shape
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"{mask.dim()}-D" if isinstance(mask, Tensor) else type(mask).__name__
        remedy = "Pass the tokenizer's mask"
        if isinstance(mask, dict):  # one for each kind of layer, as Gemma 3's model of texts and images makes them
            remedy = "If a model around the decoder made it, load the language model alone (Gemma3ForCausalLM)"
        raise ValueError(
            f"zsaa needs a 2-D attention_mask [batch, tokens] (1 = real, 0 = padding) or none, got a {kind} one: a "
            f"custom mask does not say which rows are real. {remedy}, or set alpha to 1 for this call."
        )
    if tuple(mask.shape) != (batch, call.seen + tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, but the input is {(batch, tokens)} after {call.seen} "
            f"cached tokens: it must have shape {(batch, call.seen + tokens)}."
        )


def _packed(call: Call) -> list[str]:
    """What says that several texts lie in one row."""
    packed = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if call.extra.get(name) is not None]
    positions, tokens = call.named.get("position_ids"), call.shape[1]
    if packed or positions is None or tokens == 1:
        return packed
    positions = torch.atleast_2d(positions).flatten(0, -2)
    steps = positions[:, 1:] - positions[:, :-1]
    if (real := call.real) is not None:
        new = real[:, -tokens:]
        steps = steps.masked_fill(~(new[:, 1:] & new[:, :-1]), 1)
    return ["position_ids that restart or fall back"] if bool((steps <= 0).any()) else []


def is_wrapped(layer: nn.Module) -> bool:
    """Has FSDP or activation checkpointing put a class of its own in place of the layer's, or around it?"""
    return any(cls.__module__.startswith("torch.distributed.") for cls in type(layer).__mro__)


def check_layers(decoder: nn.Module, family: Family, num_layers: int, prunes: bool = True) -> str | None:
    """RuntimeError if a pass that prunes, or only ends early, would not do what was made of the layers since `enable`.
    Returns what is to be said, once, of hooks that it calls with fewer rows than the input has."""
    said = None
    for number, layer in enumerate(getattr(decoder, family.layers)[:num_layers]):
        attention, kind = getattr(layer, family.attention), type(layer)
        # FSDP and activation checkpointing put wrappers of torch's in place of layers.
        known = getattr(kind, MARK, False) or is_wrapped(layer)
        place = getattr(attention, "layer_idx", number)  # what took an attention's place may have none
        if not known or place != number:
            raise RuntimeError(
                f"layer {number} of the decoder is not the one that it was when zsaa was enabled (a {kind.__name__} "
                f"with layer_idx {place}): layers were replaced or put in another order. Number their "
                "attention's layer_idx from 0 on, and call zsaa.enable(model) again."
            )
        if not prunes:
            continue
        # Under accelerate's hooks, which move weights that an attention has none of, its forward is the old one.
        set_here = vars(attention)
        forward = set_here.get("_old_forward") or set_here.get("forward") or type(attention).forward
        own = not (getattr(forward, "__module__", None) or "").startswith("transformers.")
        if own or foreign_hooks(attention):
            raise RuntimeError(
                f"the attention of layer {number} has {'a forward' if own else 'a hook'} of another library or of your "
                "own, which a pruned pass does not call. Take it off, or set alpha to 1 for this call."
            )
        if said is None and foreign_hooks(layer):
            said = (
                f"a hook on layer {number} of the decoder sees the rows that are alive there, real tokens first, and "
                "not the input's columns. zsaa.trace(model) tells which they are; output_hidden_states=True gives all."
            )
    return said


OWN_HOOKS = ("zsaa.", "torch.", "transformers.utils.output_capturing")  # FSDP's; and those that record states


def foreign_hooks(module: nn.Module) -> bool:
    """Has the module hooks of another library, or of the user's own?"""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    modules = (getattr(hook, "__module__", None) or "" for hook in hooks)
    return any(not name.startswith(OWN_HOOKS) for name in modules)


def refuse_foreign(layers: nn.ModuleList, dispatched: str, wrapped: str) -> None:
    """RuntimeError, with this remedy, if layers have a forward that is not their class's; with that, if FSDP or
    activation checkpointing have put classes of their own in their place."""
    if any("forward" in vars(layer) for layer in layers):
        raise RuntimeError(
            "another library has replaced the forward of single layers (accelerate does when it spreads a model over "
            f"devices). {dispatched}"
        )
    other = next((type(layer).__name__ for layer in layers if is_wrapped(layer)), None)
    if other:
        raise RuntimeError(f"the decoder's layers are wrapped or sharded ({other}). {wrapped}")


def check_continued(cache, depth: int) -> None:
    """ValueError for a pruned cache that a pass through `depth` layers cannot continue."""
    seen = [layer.get_seq_length() for layer in cache.layers]
    check_filled(len(seen), depth)
    if len(set(seen)) > 1:
        raise ValueError(
            "this key/value cache is incomplete: an earlier call that was to fill it failed, or ran fewer layers "
            f"({sorted(set(seen))} tokens in its layers). Start from an empty cache."
        )


def check_early_exit(layers: Any, most: int) -> None:
    """ValueError for an assistant_early_exit that is no depth of a model of `most` layers; None: there is none."""
    whole = isinstance(layers, Integral) and not isinstance(layers, bool)
    if layers is not None and not (whole and 1 <= layers <= most):
        raise ValueError(
            f"assistant_early_exit must be a whole number from 1 to {most}, the layers of this model, got {layers!r}: "
            "so many of the first ones draft."
        )


def check_last(real: Tensor) -> None:
    """ValueError if a sample of a prompt that `generate` was given ends in padding. real: bool [batch], does it not?"""
    if not bool(real.all()):
        sample = real.tolist().index(False)
        raise ValueError(
            f"sample {sample} of the prompt ends in padding, and its answer would follow from that: pad on the left "
            "(tokenizer.padding_side = 'left'), or set alpha to 1 for this call."
        )


def check_lengths(mask: Tensor | None, shape: tuple[int, int], prompt: int | None) -> tuple[int, ...]:
    """Real tokens of each sample; ValueError if one has none. prompt: tokens of the whole prompt, where this pass may
    hold its first piece only."""
    batch, width = shape
    lengths = (width,) * batch if mask is None else tuple(mask.sum(dim=1).tolist())
    if prompt is not None and width < prompt and min(lengths) < width:
        raise ValueError(
            f"prefill_chunk_size cuts this prompt of {prompt} columns after {width}, of which the padded samples use "
            f"{list(lengths)}: how far a sample is pruned would depend on its batch. Leave prefill_chunk_size out, "
            "give the samples one by one, or set alpha to 1 for this call."
        )
    if min(lengths) == 0:
        raise ValueError(
            f"sample {lengths.index(0)} of the batch has no real token: its attention_mask is all 0. Give each sample "
            "at least one."
        )
    return lengths


def check_mask(name: str, mask: object, shape: tuple[int, int] | None = None) -> Tensor:
    """`mask`, of some of a call's tokens, if it is a bool tensor [batch, tokens] (of this shape); a question's may tell
    its parts by whole numbers. Else TypeError or ValueError."""
    whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(mask, Tensor) or mask.dtype not in (whole if name == "question" else whole[:1]):
        kind = f"a tensor of {mask.dtype}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise TypeError(
            f"{name} must be a bool tensor [batch, tokens], one entry for each column of the input, got {kind}."
        )
    if mask.dim() != 2 or (shape is not None and tuple(mask.shape) != tuple(shape)):
        wanted = "[batch, tokens]" if shape is None else f"{tuple(shape)}"
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}, and the input of this pass {wanted}: give one entry for each "
            "column of the input, padding included (virtual tokens of prompt tuning count as columns)."
        )
    return mask


def check_exempt(exempt: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
    """`exempt` without padding, and how many tokens of each sample are never dropped: its own, and the last. mask: bool
    [batch, tokens], which are real, or None. ValueError for a sample of which it names padding only."""
    real = torch.ones_like(exempt) if mask is None else mask
    mine = exempt & real
    last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(dim=1, keepdim=True)
    wrong = exempt.any(dim=1) & ~mine.any(dim=1)
    counts, wrong = torch.stack([mine.scatter(1, last, True).sum(dim=1), wrong.long()]).tolist()
    if any(wrong):
        raise ValueError(
            f"exempt names padding only in sample {wrong.index(1)}: its columns are those of the input as it is given, "
            "so pad it on the same side."
        )
    return mine, tuple(counts)
