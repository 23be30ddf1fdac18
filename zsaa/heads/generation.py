"""Language models: where the prompt of a running `generate` ends.

A forward pass cannot see where the prompt ends: assisted decoding appends candidates to it in the very first pass, and
without a cache every pass holds the tokens generated so far. `generate` knows, and tells the decoder.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from zsaa.cache import is_pruned
from zsaa.call import Call
from zsaa.guards import check_early_exit
from zsaa.heads import texts
from zsaa.heads.row_mixing import refuse_row_mixing
from zsaa.scope import opened
from zsaa.subclass import saving, subclass


class Prompt:
    """The texts that a running `generate` has begun: its prompt, and those that the model is asked about meanwhile,
    such as the negative prompt of guidance. All are ids [rows, tokens] or embeddings [rows, tokens, size], as the
    decoder gets them; the first is the prompt.

    chunk: tokens per pass, if the prompt is prefilled in pieces. assistant: does it draft for another model? masks: of
    the prompt's tokens, as the call gave them, by name.
    """

    def __init__(self, model: nn.Module, inputs: Tensor | None, options: dict[str, Any], masks: dict[str, Tensor]):
        self.masks = masks
        embeds = options.get("inputs_embeds")
        first = (options.get("input_ids") if inputs is None else inputs) if embeds is None else embeds
        self.texts: list[Tensor] = [] if first is None else [first]
        config = options.get("generation_config") or model.generation_config
        self.chunk: int | None = options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        self.assistant = bool(getattr(config, "is_assistant", False))

    def trim(self, cache: Any) -> None:
        """Take from an assistant's cache what is not of its text: before 5.18, transformers takes one token too few for
        each candidate that was refused."""
        if self.assistant and self.texts and is_pruned(cache):
            extra = cache.get_seq_length() - self.texts[0].shape[1] + 1  # the last token is read again
            if extra > 0:
                cache.crop(-extra)

    def appended(self, read: Tensor, cached: bool) -> int:
        """How many columns of a pass on an empty cache come after the text that it begins with; one that begins with
        none that is known is a text of its own. cached: does the pass leave a cache? Then a text is read once, and only
        the prompt can have something appended: candidates of assisted decoding."""
        texts = self.texts[:1] if cached else self.texts
        known = [text.shape[1] for text in texts if begins(read, text)]
        if known:
            return read.shape[1] - max(known)
        self.texts.append(read)
        return 0

    def is_piece(self, read: Tensor) -> bool:
        """Is a pass a first piece of the prompt?"""
        width = read.shape[1]
        pieces = bool(self.chunk and self.texts) and width < self.texts[0].shape[1]
        return pieces and begins(read, self.texts[0][:, :width])

    def masks_of(self, read: Tensor) -> dict[str, Tensor]:
        """The masks for a pass over the prompt, or over its first piece; none for another text."""
        if not self.masks or not self.texts:
            return self.masks
        if self.is_piece(read):
            return {name: mask[:, : read.shape[1]] for name, mask in self.masks.items()}
        # Virtual tokens turn ids into embeddings: that the masks do not fit those is said, too.
        other = read.dim() == self.texts[0].dim() and not begins(read, self.texts[0])
        return {} if other else self.masks

    def check(self, call: Call) -> None:
        """Look at a pass, and mend its mask: ValueError if it reads the whole prompt once more than the cache holds,
        RuntimeError for a decoder that keeps no cache from one step to the next."""
        if call.decoder.training and getattr(call.decoder, "gradient_checkpointing", False):
            raise RuntimeError(
                "generate needs a key/value cache, and gradient checkpointing keeps none while the model trains: each "
                "token would be written knowing the last one alone. Call model.eval() first, or disable checkpointing."
            )
        mask = call.attention_mask
        if self.assistant and isinstance(mask, Tensor) and mask.dim() == 2:
            # An assistant's mask is inferred from the pad token, but where that follows a text it is one of its tokens.
            call.named["attention_mask"] = (mask != 0).long().cummax(dim=1).values
        if self.texts and 0 < call.seen < self.texts[0].shape[1] and begins(call.text, self.texts[0]):
            raise ValueError(
                f"this call reads the whole prompt again after a cache that holds its first {call.seen} tokens, as "
                "assisted decoding in transformers does. Let it start from an empty cache, or decode without "
                "candidates."
            )


def begins(read: Tensor, text: Tensor) -> bool:
    """Does each row of `read` begin with its text? `generate` repeats texts in place, for beams."""
    times, rest = divmod(read.shape[0], text.shape[0])
    if rest or not times or read.dim() != text.dim() or read.shape[1] < text.shape[1]:
        return False
    first = read[:, : text.shape[1]]
    text = text.to(first.device).repeat_interleave(times, dim=0)
    return first.dtype == text.dtype and torch.equal(first, text)


def find_owner(model: nn.Module, decoder: nn.Module) -> PreTrainedModel | None:
    """The model with a head inside `model` whose body is `decoder`, if there is one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._modules.get(module.base_model_prefix) is decoder:
            return module
    return None


@functools.cache
def owner_class(model_class: Any) -> type[PreTrainedModel]:
    """A subclass of a model with a head over a pruned decoder."""

    @functools.wraps(model_class.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        with saving(self.base_model):
            return super(made, self).save_pretrained(*args, **kwargs)

    @functools.wraps(getattr(model_class, "generate", None) or save_pretrained)
    def generate(self, inputs=None, *args, alpha=None, depth=None, **kwargs):
        dial = getattr(self.base_model, "_zsaa", None)
        if dial is None:
            given = {"alpha": alpha, "depth": depth}  # stock says that it knows none
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return super(made, self).generate(inputs, *args, **kwargs)
        refuse_row_mixing(self)
        configs = (*args, kwargs.get("generation_config"), self.generation_config)
        for config in configs:
            if named := [name for name in ("alpha", "depth") if getattr(config, name, None) is not None]:
                raise TypeError(
                    f"{named[0]}={getattr(config, named[0])!r} stands in a generation_config, where nothing reads it. "
                    f"Give it with the call: generate(..., {named[0]}=...)."
                )
        early = (kwargs.get("assistant_early_exit"), *(getattr(c, "assistant_early_exit", None) for c in configs))
        check_early_exit(next((given for given in early if given is not None), None), dial.layers)
        masks = texts.masks_of(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        prompt = Prompt(self, inputs, kwargs, masks)
        prompt.trim(kwargs.get("past_key_values"))
        config = self.base_model.config
        layers = config.num_hidden_layers
        try:
            with dial.at(alpha, depth), opened(dial, prompt=prompt):
                return super(made, self).generate(inputs, *args, **kwargs)
        finally:
            config.num_hidden_layers = layers  # an early exit that fails leaves its own

    members = {"save_pretrained": save_pretrained, "_zsaa_owner": True}
    if issubclass(model_class, GenerationMixin):
        members["generate"] = generate
    made: Any = subclass(model_class, owner_class, (model_class,), members)
    return made
