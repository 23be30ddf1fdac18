"""A classifier that answers behind the first layer that is sure, and runs no further.

For models that were trained to answer behind every layer (`Recipe.named("depth")`); the depths are those of the depth
dial, and so are the numbers: behind depth d a text is told what `model(..., depth=d)` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsaa.families import find_decoder
from zsaa.finetune.exits import final_norm, shallowest
from zsaa.measure.checks import check_number
from zsaa.measure.mode import evaluating


@dataclass(frozen=True)
class Sure:
    """What was answered, and where. logits: float32 [batch, classes]; depths: int64 [batch], layers that each text went
    through; ran: layers that the batch went through, the most of these."""

    logits: Tensor
    depths: Tensor

    @property
    def ran(self) -> int:
        return int(self.depths.max())

    @property
    def mean_depth(self) -> float:
        return float(self.depths.double().mean())


class _Enough(Exception):
    """Everybody is sure: the layers above are not run."""


@torch.no_grad()
def until_sure(model: nn.Module, inputs: Mapping[str, Tensor], sure: float = 0.95, first: int | None = None) -> Sure:
    """Classify `inputs` (input_ids, and attention_mask where texts are padded, [batch, tokens]; what else the decoder
    takes goes to it), in eval mode. Each text is answered behind the first layer, from `first` on (default: a tenth of
    the layers), whose likeliest class has at least the probability `sure`, or behind the last one that runs (at the
    depth of the dial, if it is on). The pass ends when all are answered: one text at a time saves most.

    ValueError: sure out of (0, 1], first out of the layers that run, a dial whose alpha is below 1 (its rows are
    fewer), a head of one output. TypeError: a model without a classification head, alpha or depth among the inputs.
    """
    decoder, family = find_decoder(model)
    layers, head = _layers(decoder, family.num_layers(decoder), inputs), _head(model)
    check_number("sure", sure, "(0, 1]")
    first = min(shallowest(family.num_layers(decoder)), layers) if first is None else first
    if not 1 <= first <= layers:
        raise ValueError(f"first must be from 1 to {layers}, the layers that run, got {first}.")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    pad = decoder.config.pad_token_id  # by which transformers' heads tell where a text ends, whatever the mask
    read = mask != 0 if pad is None else ids != pad
    last = read.int().mul(torch.arange(1, ids.shape[1] + 1, device=ids.device)).argmax(1)
    rows, norm = torch.arange(len(ids), device=ids.device), final_norm(decoder)
    depths = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    logits = torch.zeros(len(ids), head.out_features, device=ids.device)

    def look(depth: int):
        def hook(_, args, out):
            state = out[0] if isinstance(out, tuple) else out
            said = head(norm(state[rows, last])).float()
            leaves = (depths == 0) & ((said.softmax(-1).amax(-1) >= sure) | (depth == layers))
            logits[leaves], depths[leaves] = said[leaves], depth
            if bool((depths > 0).all()):
                raise _Enough

        return hook

    run = getattr(decoder, family.layers)[:layers]
    hooks = [layer.register_forward_hook(look(at)) for at, layer in enumerate(run, 1) if at >= first]
    try:
        with evaluating(model):
            decoder(**{**inputs, "attention_mask": mask, "use_cache": False})
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return Sure(logits, depths)


def _layers(decoder: nn.Module, layers: int, inputs: Mapping[str, Tensor]) -> int:
    """How many of the `layers` run."""
    if named := [name for name in ("alpha", "depth") if name in inputs]:
        raise TypeError(f"{named[0]} is no input of until_sure: call it inside zsaa.at(model, {named[0]}=...).")
    dial = getattr(decoder, "_zsaa", None)
    if dial is None:
        return layers
    if dial.alpha != 1.0:
        raise ValueError(f"alpha is {dial.alpha}: until_sure is of whole texts. Use zsaa.at(model, 1.0).")
    return layers if dial.depth is None else min(dial.depth, layers)


def _head(model: nn.Module) -> nn.Module:
    head = getattr(model, "score", None)
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no classification head: load it with kind='sequence-classification'."
        )
    if head.out_features < 2:
        raise ValueError(
            f"this head gives {head.out_features} output, which is no probability: until_sure is of 2 classes or more."
        )
    return head
