"""How much layers change what passes through them: the angular distance of a block, the influence of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsaa.families import Family, find_decoder
from zsaa.measure.mode import evaluating


@dataclass(frozen=True)
class Similarity:
    """What was found on some texts.

    angular: float64 [layers + 1, layers + 1]; [l, m] is the angle between the states of a text's last token before
        layer l and before layer m (m = layers: after the last one), over pi, so 0 to 1; the mean over texts. NaN below
        the diagonal.
    influence: float64 [layers]; 1 less the mean cosine, over all tokens, between what a layer is given and what it
        gives (ShortGPT, Eq. 1).
    texts, tokens: how many stand behind them.
    """

    angular: Tensor
    influence: Tensor
    texts: int
    tokens: int

    @property
    def num_layers(self) -> int:
        return len(self.influence)

    def block(self, n: int, spare_last: bool = True) -> list[int]:
        """The n layers in a row whose removal turns a text's last state least: l, ..., l + n - 1 with the least
        angular[l, l + n]. spare_last: the last layer is not among them, as in both papers; the first never is, because
        a cache counts its tokens by the first layer. ValueError if no such block is left."""
        start = min(self.candidates(n, spare_last), key=lambda first: self.angular[first, first + n].item())
        return list(range(start, start + n))

    def candidates(self, n: int, spare_last: bool = True) -> range:
        """The layers with which a block of n may begin."""
        most = self.num_layers - 1 - spare_last
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
            spared = "the first and the last layer are" if spare_last else "the first layer is"
            raise ValueError(f"n = {n!r} layers of {self.num_layers}: choose 1 to {most} ({spared} spared).")
        return range(1, self.num_layers - n - spare_last + 1)

    def least_influential(self, n: int) -> list[int]:
        """The n layers of least influence, wherever they stand; the first layer is spared."""
        self.candidates(n, spare_last=False)
        order = sorted(range(1, self.num_layers), key=lambda layer: self.influence[layer].item())
        return sorted(order[:n])


@torch.inference_mode()
def similarity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Similarity:
    """Measure `model` on `batches`: dicts with input_ids and, where texts are padded, attention_mask [batch, tokens].

    The model is measured in eval mode. ValueError for a dial that is turned, as tokens that were dropped and layers
    that do not run have no states, and for no texts at all.
    """
    decoder, family = find_decoder(model)
    layers, dial = family.num_layers(decoder), getattr(decoder, "_zsaa", None)
    if dial is not None and dial.alpha != 1.0:
        raise ValueError(f"alpha is {dial.alpha}: dropped tokens have no state. Measure with zsaa.at(model, 1.0).")
    if dial is not None and (dial.depth or layers) < layers:
        raise ValueError(
            f"depth is {dial.depth}: layers above it have no states. Measure with zsaa.at(model, depth={layers})."
        )
    angles = torch.zeros(layers + 1, layers + 1, dtype=torch.float64)
    change, texts, tokens = torch.zeros(layers, dtype=torch.float64), 0, 0
    for batch in batches:
        ids = batch["input_ids"]
        real = batch.get("attention_mask", torch.ones_like(ids)).bool()
        positions = (real.long().cumsum(1) - 1).clamp(min=0)  # GPT-2 counts padding on the left, unless it is told
        with evaluating(model), _states(decoder, family, layers) as states:
            decoder(input_ids=ids, attention_mask=real.long(), position_ids=positions, use_cache=False)
        stack = torch.stack([state.double() for state in states])  # [layers + 1, batch, tokens, width]
        last = (real * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
        ends = nn.functional.normalize(stack[:, torch.arange(len(ids), device=ids.device), last], dim=-1)
        cosines = torch.einsum("lbw,mbw->lmb", ends, ends).clamp(-1, 1)
        angles += (cosines.arccos() / math.pi).sum(-1).cpu()
        alike = torch.cosine_similarity(stack[:-1], stack[1:], dim=-1)  # [layers, batch, tokens]
        change += (1 - alike)[:, real].sum(1).cpu()
        texts, tokens = texts + len(ids), tokens + int(real.sum())
    if not texts:
        raise ValueError("no batches were given: layers are compared on texts, 16 or more of them.")
    below = torch.ones(layers + 1, layers + 1, dtype=torch.bool).tril(-1)
    return Similarity((angles / texts).masked_fill(below, math.nan), change / tokens, texts, tokens)


@contextmanager
def _states(decoder: nn.Module, family: Family, layers: int) -> Iterator[list[Tensor]]:
    """The states before each layer, and after the last, of the pass that is made in the block."""
    states: list[Tensor] = []
    run = getattr(decoder, family.layers)[:layers]
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in run]
    hooks.append(run[-1].register_forward_hook(lambda _, args, out: states.append(out)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
