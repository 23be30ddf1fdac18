"""Keys and values of upper layers, foretold from the states at which a passage stands still.

A layer's own projections expect what enters it. What stood still before it is other, and a linear map from there to the
keys and values that the whole model computes is found in closed form, on training prompts, as the whole model reads
them and shortened by the dial; training goes on from it. It costs as much as the projections in whose place it stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ablation.answers.reader import Batch, norm, read
from ablation.answers.teach import mixed
from ablation.answers.train import Dial

RIDGE = 1e-3  # of the mean square of the states
SHORTENED = (1.0, 3.0)  # reductions of the prompts


@torch.no_grad()
def attach(lm, dial: Dial, batches: Iterable[Batch], still: int) -> list[float]:
    """Give each layer from `still` on its `guess`, a linear layer from states to keys and values before they are turned
    by their places. Returns by layer the share of these keys' and values' variance that it foretells."""
    layers, sums = lm.model.layers[still:], {}
    for b in batches:
        for reduction in SHORTENED:
            passed: list = []
            with mixed(b.ids.device.type):
                read(lm, b, passed=passed, **dial.how(b, reduction))
            stood = passed[still]
            mine = stood.real & (stood.place < b.region[:, None])
            for number, layer in enumerate(layers):
                with mixed(b.ids.device.type):
                    y = norm(layer.input_layernorm, passed[still + number].x[mine])
                    wanted = torch.cat([layer.self_attn.k_proj(y), layer.self_attn.v_proj(y)], -1)
                given = nn.functional.pad(norm(layer.input_layernorm, stood.x[mine]).double(), (0, 1), value=1.0)
                add(sums.setdefault(number, []), given, wanted.double())
    return [fitted(layer, *sums[number]) for number, layer in enumerate(layers)]


def add(sums: list[Tensor], given: Tensor, wanted: Tensor) -> None:
    found = [given.T @ given, given.T @ wanted, (wanted**2).sum(0), wanted.sum(0)]
    sums[:] = [x + y for x, y in zip(sums, found)] if sums else found


def fitted(layer, square: Tensor, cross: Tensor, squares: Tensor, total: Tensor) -> float:
    """Least squares with a little ridge, as layer.self_attn.guess; the share of variance that it explains."""
    ridge = RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
    by = torch.linalg.solve(square + ridge, cross)
    weight = layer.self_attn.k_proj.weight
    layer.self_attn.guess = nn.Linear(len(by) - 1, by.shape[1]).to(weight).requires_grad_(False)
    layer.self_attn.guess.weight.copy_(by[:-1].T)
    layer.self_attn.guess.bias.copy_(by[-1])
    left = squares - 2 * (by * cross).sum(0) + (by * (square @ by)).sum(0)
    count = square[-1, -1]
    return float(1 - left.sum() / (squares - total**2 / count).sum())


def shares(found: Sequence[float]) -> list[float]:
    return [round(100 * share, 1) for share in found]
