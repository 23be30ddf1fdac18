"""Answers from lower layers, and what they learn: the labels, and what the last layer says.

Behind every layer the state of a text's last token can go through the final norm and the head, which is what the depth
dial does (zsaa/depth/stop.py). One pass holds the answers of all depths, so that to teach them costs little more than
to teach one: the losses of exits, as in LayerSkip (arXiv 2404.16710), with the last layer as the teacher of the others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa.families import Part, find_decoder


def shallowest(layers: int) -> int:
    """The least depth that is taught: a tenth of the layers."""
    return max(1, round(layers / 10))


def drawn(count: int, layers: int, draw: random.Random) -> list[int]:
    """`count` depths below all, one from each of so many equal parts of the range; or all, if there are not more."""
    there = list(range(shallowest(layers), layers))
    if count >= len(there):
        return there
    edges = [round(i * len(there) / count) for i in range(count + 1)]
    return [draw.choice(there[low:high]) for low, high in pairwise(edges)]


def final_norm(decoder: Part) -> nn.Module:
    """What the last layer's states go through before the head."""
    return decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm


def answers(model: nn.Module, head: nn.Module, states: Sequence[Tensor], mask: Tensor, depths: Sequence[int]) -> Tensor:
    """float32 [depths, batch, classes]: what a classifier's `head` says behind each of these depths. states: those that
    enter each layer, [batch, tokens, size]; mask: [batch, tokens], 0 where a token is padding."""
    last = (mask != 0).int().mul(torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
    rows = torch.arange(len(mask), device=mask.device)
    found = torch.stack([states[depth][rows, last] for depth in depths])
    return head(final_norm(find_decoder(model)[0])(found)).float()


def loss(said: Tensor, wanted: Tensor, teacher: Tensor, distill: float) -> Tensor:
    """Of answers [depths, batch, classes], in the mean: by the labels [batch], and, for the share `distill` of it, the
    divergence from the teacher's verdict [batch, classes]."""
    depths = len(said)
    hard = F.cross_entropy(said.flatten(0, 1), wanted.repeat(depths))
    if not distill:
        return hard
    soft = F.kl_div(said.log_softmax(-1).flatten(0, 1), teacher.repeat(depths, 1), reduction="batchmean")
    return (1 - distill) * hard + distill * soft
