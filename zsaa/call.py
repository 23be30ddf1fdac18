"""One call of a decoder's forward, taken apart: what it reads, how it is to be pruned, what it passes on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from zsaa.cache import is_empty, is_pruned
from zsaa.families import Part

MASKS = ("exempt", "question")  # of a prompt's tokens, given with the call: see `zsaa.enable`
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # arguments with one column per token


class Call:
    """The arguments of one call, by name.

    named: those that the decoder's forward names; extra: the others, which it hands down; own: ours, alpha, depth and
    MASKS, where they came with the call. head: does a classifier ask, whose head reads one row of each sample? fresh:
    is the cache empty, or none? seen: tokens in a pruned cache, which the call continues; else 0.
    """

    def __init__(self, decoder: Part, signature: inspect.Signature, args: tuple, kwargs: dict):
        self.decoder = decoder
        self.named: dict[str, Any] = signature.bind_partial(decoder, *args, **kwargs).arguments
        self.named.pop("self")
        self.extra: dict[str, Any] = self.named.pop("kwargs", {})
        self.head = bool(self.extra.pop("zsaa_head", False))
        self.own = {name: self.extra.pop(name) for name in ("alpha", "depth", *MASKS) if name in self.extra}
        self.fresh = is_empty(self.cache)
        self.seen: int = 0 if self.fresh or not is_pruned(self.cache) else self.cache.get_seq_length()

    @property
    def cache(self) -> Any:
        return self.named.get("past_key_values")

    @property
    def masks(self) -> dict[str, Any]:
        return {name: self.own[name] for name in MASKS if self.own.get(name) is not None}

    @property
    def ids(self) -> Tensor | None:
        return self.named.get("input_ids")

    @property
    def reads(self) -> str:
        """The name of the argument that is read."""
        return "inputs_embeds" if self.ids is None else "input_ids"

    @property
    def known(self) -> bool:
        """Is it told what to read, and by one argument? If not, the stock decoder says what is wrong."""
        return (self.ids is None) != (self.named.get("inputs_embeds") is None)

    @property
    def tokens(self) -> Tensor:
        """What is read, one entry per token: [..., tokens]."""
        read = self.named[self.reads]
        return read if self.ids is not None else read[..., 0]

    @property
    def text(self) -> Tensor:
        """What is read: ids [batch, tokens] or embeddings [batch, tokens, size]."""
        return self.named[self.reads].flatten(0, self.tokens.dim() - 2)

    @property
    def shape(self) -> tuple[int, int]:
        """[batch, tokens]. GPT-2 takes several choices for each sample, [batch, choices, tokens], and sets them one
        below the other."""
        return self.tokens.shape[:-1].numel(), self.tokens.shape[-1]

    @property
    def attention_mask(self) -> Any:
        """As it was given, but for choices, which are set one below the other."""
        mask = self.named.get("attention_mask")
        choices = isinstance(mask, Tensor) and mask.dim() == 3 and self.tokens.dim() == 3
        return mask.flatten(0, 1) if mask is not None and choices else mask

    @property
    def real(self) -> Tensor | None:
        """Bool [batch, seen + tokens], which are no padding; None: all."""
        mask = self.attention_mask
        return None if mask is None else mask != 0

    @property
    def caches(self) -> bool:
        """Does the call leave a cache?"""
        decoder, wanted = self.decoder, self.named.get("use_cache")
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            return False
        return self.cache is not None or bool(decoder.config.use_cache if wanted is None else wanted)

    @property
    def states(self) -> bool:
        """Are all hidden states asked for?"""
        wanted = self.extra.get("output_hidden_states", self.named.get("output_hidden_states"))
        return bool(self.decoder.config.output_hidden_states if wanted is None else wanted is not False)

    def stock(self, step: object = None) -> tuple[tuple, dict] | None:
        """The arguments of a pass by the stock code, with this `Stop`, if it is to end early; None: as they came."""
        stops = {} if step is None else {"zsaa": step}
        return ((), {**self.named, **self.extra, **stops}) if self.own or self.head or stops else None

    def pruned(self, step: object) -> tuple[tuple, dict]:
        """The arguments of a pass with this `Prefill` or `Decode`."""
        # The stock decoder would now build a full-length mask. It returns a 4-D one as it is, and ours is never read.
        unread = torch.empty((1, 1, 1, 1), device=self.tokens.device)
        return (), {**self.named, **self.extra, "attention_mask": unread, "zsaa": step}

    def split(self, appended: int) -> tuple[dict, dict]:
        """What is read before the last `appended` columns, and in them; a mask is of all."""
        columns = [name for name in (self.reads, *PER_TOKEN) if self.named.get(name) is not None]
        before = {name: self.named[name][:, :-appended] for name in columns}
        return before, {name: self.named[name][:, -appended:] for name in columns if name != "attention_mask"}
