"""A schedule that is learned while the model is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ablation.variants import weights


class Bend:
    """A schedule that is learned: the layers' weights are those given times the exponential of a line and a parabola
    over depth. Each pruned pass tries a neighbour of the present bend; every ROUND passes a linear regression of the
    log divergence from the alpha = 1 pass on what was tried, on the MAC reduction (and its square) and on time says
    which way to go."""

    SPREAD, ROUND, LONGEST = 0.4, 100, 0.2

    def __init__(self, given: Sequence[float], seed: int):
        depth = torch.linspace(-1, 1, len(given), dtype=torch.float64)
        self.given = torch.tensor(given, dtype=torch.float64)
        self.basis = torch.stack([depth, depth.square() - depth.square().mean()])
        self.at, self.tried = torch.zeros(2, dtype=torch.float64), []
        self.draw = torch.Generator().manual_seed(seed)

    def weights(self, bend: Tensor | None = None) -> tuple[float, ...]:
        found = self.given * ((self.at if bend is None else bend) @ self.basis).exp()
        return tuple(weights(found.tolist(), len(found)))

    def neighbour(self) -> Tensor:
        return self.at + self.SPREAD * torch.randn(2, generator=self.draw, dtype=torch.float64)

    def learn(self, bend: Tensor, mac_reduction: float, divergence: float) -> None:
        size = math.log(mac_reduction)
        self.tried.append([1.0, size, size * size, len(self.tried), *bend.tolist(), math.log(max(divergence, 1e-6))])
        if len(self.tried) % self.ROUND == 0:
            table = torch.tensor(self.tried[-2 * self.ROUND :], dtype=torch.float64)
            slope = torch.linalg.lstsq(table[:, :-1], table[:, -1:], driver="gelsd").solution[4:6, 0]
            self.at = self.at - slope * min(1.0, self.LONGEST / slope.norm().item())
