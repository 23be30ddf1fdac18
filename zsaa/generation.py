"""The model around a pruned decoder: what only it knows of a call.

A forward pass cannot see where the prompt ends: assisted decoding appends candidates to it in the very first pass, and
without a cache every pass holds the tokens generated so far. `generate` knows, and tells the decoder.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from zsaa.scope import opened
from zsaa.subclass import saving, subclass


class Prompt:
    """Where the prompt of a running `generate` ends. width: its tokens; None until the first pass shows them. ids: were
    they given as ids? chunk: tokens per pass, if it is prefilled in pieces."""

    def __init__(self, model: nn.Module, inputs: Tensor | None, options: dict[str, Any]):
        ids = options.get("input_ids") if inputs is None else inputs
        given = options.get("inputs_embeds") if options.get("inputs_embeds") is not None else ids
        self.ids = options.get("inputs_embeds") is None
        self.width: int | None = None if given is None else given.shape[1]
        config = options.get("generation_config") or model.generation_config
        self.chunk: int | None = options.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))

    def appended(self, width: int, embedded: bool) -> int:
        """How many of a pass's columns, on an empty cache, come after the prompt. embedded: is it given embeddings?
        Where ids were given, those hold virtual tokens, too (prompt tuning), and the first pass is the prompt."""
        if self.width is None or (self.ids and embedded):
            self.width, self.ids = width, False
        return max(0, width - self.width)


def find_owner(model: nn.Module, decoder: nn.Module) -> PreTrainedModel | None:
    """The model with a head inside `model` whose body is `decoder`, if there is one."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._modules.get(module.base_model_prefix) is decoder:
            return module
    return None


@functools.cache
def owner_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass of a model with a head over a pruned decoder."""

    @functools.wraps(model_class.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        with saving(self.base_model):
            return super(made, self).save_pretrained(*args, **kwargs)

    @functools.wraps(getattr(model_class, "generate", None) or save_pretrained)
    def generate(self, inputs=None, *args, alpha=None, **kwargs):
        dial = getattr(self.base_model, "_zsaa", None)
        if dial is None:
            kwargs = kwargs if alpha is None else {**kwargs, "alpha": alpha}  # stock says that it knows none
            return super(made, self).generate(inputs, *args, **kwargs)
        with nullcontext() if alpha is None else dial.at(alpha), opened(dial, prompt=Prompt(self, inputs, kwargs)):
            return super(made, self).generate(inputs, *args, **kwargs)

    members = {"save_pretrained": save_pretrained, "_zsaa_owner": True}
    if issubclass(model_class, GenerationMixin):
        members["generate"] = generate
    made = subclass(model_class, owner_class, (model_class,), members)
    return made
