"""Exact prompts, prefilled once.

    with zsaa.Prompts(model, most_bytes=1 << 28) as prompts:
        model.generate(ids, alpha=0.9)             # read
        model.generate(ids, alpha=0.9)             # not read again: the same bits
        prompts.generate(longer, prefix=n, alpha=0.9)  # its first n tokens, pruned by themselves, are read once

What may be reused. By Eq. 2 later tokens vote on earlier ones, and all are counted: what a pruned prefill keeps of a
prompt's beginning depends on its end. So below alpha = 1 a prompt is reused as a whole, or not at all. A beginning that
is to be shared must be pruned by itself: its tokens alone vote, its length alone counts, its last token stays, and what
follows goes through all layers, unpruned. That is another result than to prune the whole, so it has to be asked for
(`generate(prefix=)`); of that result reuse changes no bit.

A prompt is keyed by its tokens, its alpha, the rule (tau, score, schedule), the tokens that are exempt and that ask,
adapters, and how numbers are computed (precision, device, kind of attention, threads); a weight that changed empties
the store. Rows of a batch are read one by one and put together, so that neither batch-mates nor padding nor beams
decide what is found: in a batch a prompt has the bits that it has alone. A single prompt is read just as without a
store.

Risk. Who can time an answer can tell whether somebody else sent the same prompt: share a store among those only who may
know that. Weights written through `.data` are not noticed; call `clear`.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from zsaa.cache import PrunedLayer
from zsaa.call import Call
from zsaa.families import find_decoder
from zsaa.guards import check_mask, foreign_hooks
from zsaa.passes import Prefill
from zsaa.reuse import identity
from zsaa.reuse.store import Kept, Store, own
from zsaa.rule import check_alphas
from zsaa.scope import innermost, opened
from zsaa.subclass import recast, restore, subclass

MARK = "_zsaa_reuse"
READ = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
}  # arguments that rows can do with
BESIDE = {"zsaa", "return_dict", "logits_to_keep"}


class Prompts:
    """A store of prompts of one model, used by the calls of this thread or task while its block is open.

    model: one with the dial on. most_bytes: of all that is kept; the least recently used goes first. Calls that cannot
    be reused are made as without it, and counted as "passed": gradients, training, traces, hidden states or attention
    asked for, embeddings in place of tokens, padding on the right, own positions, score "random", fewer layers,
    quantized caches, hooks of one's own on modules, alpha = 1 beside others in a batch.
    """

    def __init__(self, model: nn.Module, most_bytes: int = 1 << 28):
        self.model = model
        self.decoder, _ = find_decoder(model)
        if getattr(self.decoder, "_zsaa", None) is None:
            raise RuntimeError("the dial is not enabled on this model. Call zsaa.enable(model) first.")
        self.store = Store(most_bytes)
        self._weights: tuple | None = None
        self._stack: list[ExitStack] = []

    @property
    def counts(self) -> Counter:
        """Of prompts: hits, misses, evicted, too_large, cleared; of calls: passed. A copy."""
        return Counter(self.store.counts)

    def clear(self) -> None:
        """Forget all prompts."""
        self.store.clear()

    def __enter__(self) -> Prompts:
        stack = ExitStack()
        stack.enter_context(opened(self.decoder._zsaa, reuse=self))
        held = getattr(self.decoder, "_zsaa_reusing", 0)
        if not held:
            recast(self.decoder, remembering)
        object.__setattr__(self.decoder, "_zsaa_reusing", held + 1)
        self._stack.append(stack)
        return self

    def __exit__(self, *problem) -> None:
        self._stack.pop().close()
        held = self.decoder._zsaa_reusing - 1
        object.__setattr__(self.decoder, "_zsaa_reusing", held)
        # The dial may have been taken off inside: that took our class, and left the dial's.
        if not held and (getattr(self.decoder, "_zsaa", None) is None or MARK in vars(type(self.decoder))):
            restore(self.decoder)

    def generate(
        self, input_ids: Tensor, prefix: int, alpha: Any = None, attention_mask: Tensor | None = None, **options
    ):
        """`model.generate` of a prompt [batch, tokens] whose first `prefix` columns are pruned by themselves and read
        once; the rest goes through all layers. Padding stands on the left, or between prefix and rest (a 0 in
        attention_mask), so that one prefix may have rests of several lengths.

        alpha, exempt, question: of the prefix. ValueError for a prefix that leaves nothing to read, and for a question
        behind it: a prefix that is shared cannot know what will be asked.
        """
        width = input_ids.shape[1]
        if isinstance(prefix, bool) or not isinstance(prefix, int) or not 0 < prefix < width:
            raise ValueError(
                f"prefix must be a whole number of columns in [1, {width - 1}], got {prefix!r}: something must follow."
            )
        if options.get("past_key_values") is not None:
            raise ValueError("past_key_values is given, but the cache is the prefix's. Leave it out.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        masks = {name: options.pop(name) for name in ("exempt", "question") if options.get(name) is not None}
        for name, given in masks.items():
            if check_mask(name, given).shape[1] == width and bool(given[:, prefix:].any()):
                raise ValueError(
                    f"{name} names tokens behind the prefix of {prefix} columns: it is pruned by itself, whatever "
                    "follows, and what follows is not pruned. Give a mask of the prefix, or generate without prefix."
                )
            masks[name] = given[:, :prefix]
        alpha = check_alphas(self.decoder._zsaa.alpha if alpha is None else alpha)
        with torch.no_grad(), self:
            read = {"input_ids": input_ids[:, :prefix], "attention_mask": mask[:, :prefix]}
            read["position_ids"] = (read["attention_mask"].cumsum(1) - 1).clamp(min=0)
            cache = self.decoder(**read, use_cache=True, alpha=alpha, **masks).past_key_values
        config = options.get("generation_config") or self.model.generation_config
        copies = [options.get(name, getattr(config, name, None)) or 1 for name in ("num_beams", "num_return_sequences")]
        if max(copies) > 1:
            cache.batch_repeat_interleave(max(copies))
        with self:
            return self.model.generate(input_ids, attention_mask=mask, past_key_values=cache, alpha=1.0, **options)

    def answer(self, stock: Callable, args: tuple, kwargs: dict) -> Any:
        """The decoder's output for a call that its hook has prepared: put together of what is kept, if it can be."""
        dial = self.decoder._zsaa
        call = Call(self.decoder, dial.signature, args, kwargs)
        rows = self._rows(call)
        if rows is None:
            self.store.counts["passed"] += call.fresh or isinstance(kwargs.get("zsaa"), Prefill)
            return stock(*args, **kwargs)
        now = identity.weights(self.decoder)
        if now != self._weights:
            self.clear()
            self._weights = now
        about = astuple(dial.rule), identity.adapters(self.decoder), identity.arithmetic(self.decoder)
        keys = [(row.digest, row.alpha, about) for row in rows]
        found = {key: self.store.get(key) for key in dict.fromkeys(keys)}
        missing = {key: row for key, row in zip(keys, rows) if found[key] is None}
        if len(rows) == 1 and missing and len(rows[0].ids) == call.shape[1]:  # just as without a store
            output = stock(*args, **kwargs)
            self.store.put(keys[0], _kept(output))
            return output
        for key, row in missing.items():
            with opened(dial, reuse=None, prompt=None):
                found[key] = _kept(self._read(row))
            self.store.put(key, found[key])
        return _together([found[key] for key in keys], call, kwargs.get("zsaa"))

    def _rows(self, call: Call) -> list[Row] | None:
        """The prompts of a call; None if it is no prefill of plain tokens."""
        step, decoder = call.extra.get("zsaa"), self.decoder
        given = {name for name, value in call.named.items() if value is not None} | set(call.extra)
        plain = call.ids is not None and call.caches and given <= READ | BESIDE and not call.states
        quiet = not (torch.is_grad_enabled() or decoder.training or torch.compiler.is_compiling())
        whole = call.extra.get("return_dict", True) and decoder.config.return_dict
        if not (plain and quiet and whole) or bool(decoder.config.output_attentions):
            return None
        if any(map(foreign_hooks, decoder.modules())):
            return None
        if isinstance(step, Prefill):
            request = step.request
            whole = request.carry and request.depth == request.num_layers
            whole &= all(type(layer) is PrunedLayer for layer in call.cache.layers)
            if step.trace is not None or not whole or request.rule.score == "random" or 1.0 in request.alphas:
                return None
            real, alphas, masks = (
                step.given.real,
                request.alphas,
                {"exempt": step.given.exempt, "question": step.given.part},
            )
        elif step is None and call.fresh and (call.cache is None or type(call.cache) is DynamicCache):
            real, alphas, masks = call.real, (1.0,) * call.shape[0], {}
        else:
            return None
        ids = call.ids.reshape(call.shape)
        real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        first, place = real.int().argmax(dim=1).tolist(), (real.long().cumsum(1) - 1).clamp(min=0)
        positions = call.named.get("position_ids")
        natural = positions is None or bool(((positions == place) | ~real).all())
        natural &= not (positions is None and max(first) > 0)  # those that count padding, too
        right = all(bool(real[b, start:].all()) for b, start in enumerate(first))
        if not (real.shape == ids.shape and natural and right):
            return None
        own_masks = [{k: m[b, start:] for k, m in masks.items() if m is not None} for b, start in enumerate(first)]
        return [Row(ids[b, start:], alphas[b], own_masks[b]) for b, start in enumerate(first)]

    def _read(self, row: Row) -> Any:
        """The decoder's output for one prompt, by itself."""
        ids = row.ids[None]
        masks = {name: mask[None] for name, mask in row.masks.items()}
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        return self.decoder(**read, use_cache=True, alpha=row.alpha, **masks)


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt: ids and masks [tokens]."""

    ids: Tensor
    alpha: float
    masks: dict[str, Tensor]

    @property
    def digest(self) -> bytes:
        made = hashlib.sha256()
        for name, x in (("ids", self.ids), *sorted(self.masks.items())):
            made.update(f"{name}:{x.dtype}:{len(x)}:".encode())
            made.update(x.cpu().contiguous().numpy().tobytes())
        return made.digest()


def _kept(output: Any) -> Kept:
    """Of a pass over one prompt without padding."""
    layers = []
    for layer in output.past_key_values.layers:
        columns = getattr(layer, "columns", None)
        layers.append((own(layer.keys[0]), own(layer.values[0]), None if columns is None else own(columns[0])))
    return Kept(own(output.last_hidden_state[0]), tuple(layers), type(output))


def _together(rows: list[Kept], call: Call, step: Any) -> Any:
    """The output for a batch of prompts, the cache included; where no token is there are zeros, which nobody reads."""
    width, cache = call.shape[1], call.cache
    cache = DynamicCache(config=call.decoder.config) if cache is None else cache
    if not cache.layers:
        cache.layers = [cache.layer_class_to_replicate() for _ in rows[0].layers]
    hidden = _stacked([row.hidden[None] for row in rows], width, left=True)[:, 0]
    for number, layer in enumerate(cache.layers):
        keys, values, columns = zip(*(row.layers[number] for row in rows))
        if step is None:
            layer.update(*(_stacked(x, width, left=True) for x in (keys, values)))
            continue
        most = max(len(c) for c in columns)
        at = torch.full((len(rows), most), -1, dtype=torch.long, device=hidden.device)
        for b, (row, c) in enumerate(zip(rows, columns)):
            at[b, : len(c)] = c + width - len(row.hidden)
        real = min(len(c) for c in columns) == most
        layer.extend(*(_stacked(x, most, left=False) for x in (keys, values)), at, real, width)
    return rows[0].output(last_hidden_state=hidden, past_key_values=cache)


def _stacked(tensors: Any, rows: int, left: bool) -> Tensor:
    """Tensors [heads, n, dim] as one [batch, heads, rows, dim], zeros on the left or on the right of each."""
    heads, _, dim = tensors[0].shape
    made = tensors[0].new_zeros(len(tensors), heads, rows, dim)
    for b, x in enumerate(tensors):
        n = x.shape[1]
        made[b, :, rows - n if left else 0 : rows if left else n] = x
    return made


@functools.cache
def remembering(decoder_class: Any) -> type[nn.Module]:
    """A subclass of an enabled decoder that asks the store of an open block first."""

    @functools.wraps(decoder_class.forward)
    def forward(self, *args, **kwargs):
        stock, dial = super(made, self).forward, getattr(self, "_zsaa", None)
        block = None if dial is None else innermost(dial, "reuse")
        prompts = None if block is None else block.values["reuse"]
        return stock(*args, **kwargs) if prompts is None else prompts.answer(stock, args, kwargs)

    made = subclass(decoder_class, remembering, (decoder_class,), {"forward": forward, MARK: True})
    return made
