"""Texts that leave when the model is sure of them: behind few layers, of few tokens, or else once more with more.

A text goes through one or two passes. In a pass at an alpha it leaves behind the first depth that is sure enough of its
answer; who is still there behind the deepest that the pass tries begins anew, at a larger alpha, and the costs of both
passes are counted. One pass at alpha = 1 is an exit by confidence; passes that only the last layer answers are tokens
by confidence; the rest turns both dials. Which way is best at a budget is searched on the validation part (`solve`);
the test part says what that choice is worth (`judged`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ablation.variants import layer_macs
from zsaa.evaluation.accuracy import tally

SURE = tuple(round(1 / (1 + math.exp(-x / 4)), 5) for x in range(1, 36))  # confidences at which a text leaves, to .9998
BUDGETS = (2.0, 3.0, 5.0, 7.0)
AGAIN = 3.0  # the most that tokens are reduced by in a second pass
TRIED = (1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0)  # of the layers: the deepest that a pass tries


@dataclass(frozen=True)
class Pass:
    """What a model said of all texts at one alpha. said: float32 [depths, samples, classes]; costs: float64 [depths,
    samples], multiply-accumulates up to each depth; depths: rising, the last is all layers."""

    said: Tensor
    costs: Tensor
    depths: tuple[int, ...]

    def left(self, wanted: Tensor, first: int, deepest: int, sure: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each confidence in `sure` and each text [sure, samples]: does it leave between depths `first` and
        `deepest`, was the answer right where it did (or else at `deepest`), and the cost up to there."""
        low, high = self.depths.index(first), self.depths.index(deepest) + 1
        confidence, answers = self.said[low:high].softmax(-1).max(-1)
        enough = confidence[None] >= torch.tensor(sure)[:, None, None]
        leaves = enough.any(1)
        at = torch.where(leaves, enough.int().argmax(1), high - low - 1)
        pick = at[:, None]
        right = (answers == wanted).expand(len(sure), -1, -1).gather(1, pick)[:, 0]
        costs = self.costs[low:high].expand(len(sure), -1, -1).gather(1, pick)[:, 0]
        return leaves, right, costs


def solve(passes: dict[float, Pass], wanted: Tensor, whole: float, budgets: Sequence[float] = BUDGETS) -> list[dict]:
    """Of each kind of way and each budget in MACs the one that is most accurate on these texts: rows for `judged`.
    passes: by the reduction that fewer tokens give, 1 for all; whole: MACs of all texts in the whole model."""
    found = []
    for kind, ways in kinds(passes, wanted).items():
        for budget in budgets:
            spare = [way for way in ways if whole / way[1] >= budget]
            if spare:
                accuracy, cost, stages = max(spare, key=lambda way: (way[0], -way[1]))
                found.append({"control": kind, "target": budget, "stages": stages})
    return found


def kinds(passes: dict[float, Pass], wanted: Tensor) -> dict[str, list[tuple[float, float, list]]]:
    """(right answers, MACs, stages) of every way, by what it turns. A stage is [token reduction, first depth that may
    answer, deepest, confidence]; nobody stays behind the deepest of the last."""
    depths = next(iter(passes.values())).depths
    first, layers = depths[0], depths[-1]
    tried = sorted({max(first, round(layers * share)) for share in TRIED})
    every = [(first, deepest) for deepest in tried]
    outcome = {
        (tokens, a, b): tuple(x.double() for x in one.left(wanted, a, b, SURE))
        for tokens, one in passes.items()
        for a, b in {*every, (layers, layers)}
    }

    def once(tokens: float, places) -> list[tuple]:
        ways = []
        for a, b in places:
            _, right, costs = outcome[tokens, a, b]
            rows = zip(right.sum(1).tolist(), costs.sum(1).tolist(), SURE)
            ways += [(n, cost, [[tokens, a, b, sure]]) for n, cost, sure in rows]
        return ways

    found = {"layers-sure": once(1.0, every)}
    if len(passes) == 1:
        return found
    found["both-fixed"] = [
        (float((one.said[at].argmax(-1) == wanted).sum()), float(one.costs[at].sum()), [[tokens, depth, depth, 1.0]])
        for tokens, one in passes.items()
        for at, depth in enumerate(depths)
    ]
    for kind, places in (("tokens-sure", [(layers, layers)]), ("both-sure", every)):
        found[kind] = [way for tokens in passes for way in once(tokens, places)]
        pairs = [
            (t, m, p, q) for t in passes for m in passes if m < min(t, AGAIN + 1e-9) for p in places for q in places
        ]
        for tokens, more, one, two in pairs:
            leaves, right, costs = outcome[(tokens, *one)]
            _, then, paid = outcome[(more, *two)]
            total = (leaves * right).sum(1)[:, None] + (1 - leaves) @ then.T
            spent = costs.sum(1)[:, None] + (1 - leaves) @ paid.T
            found[kind] += _frontier(total, spent, [tokens, *one], [more, *two])
    return found


def _frontier(total: Tensor, spent: Tensor, one: list, two: list) -> list[tuple]:
    """Of the ways of two passes [sure, sure] those that no cheaper one is as right as."""
    order = torch.argsort(spent.flatten(), stable=True)
    values, best, kept = total.flatten()[order].numpy(), -1.0, []
    for at, value in zip(order.tolist(), values):
        if value > best:
            best = float(value)
            i, j = divmod(at, total.shape[1])
            kept.append((best, float(spent.flatten()[at]), [[*one, SURE[i]], [*two, SURE[j]]]))
    return kept


def judged(row: dict, passes: dict[float, Pass], wanted: Tensor, whole: float) -> dict:
    """The row of `solve` with what it comes to on these texts: the tally, the MAC reduction that was reached, and the
    share of texts that began again."""
    there, right = torch.ones(len(wanted), dtype=torch.bool), torch.zeros(len(wanted), dtype=torch.bool)
    spent, more = torch.zeros(len(wanted), dtype=torch.float64), {}
    for number, (tokens, first, deepest, sure) in enumerate(row["stages"]):
        leaves, answered, paid = (x[0] for x in passes[tokens].left(wanted, first, deepest, [sure]))
        spent += torch.where(there, paid, 0.0)
        if last := number == len(row["stages"]) - 1:
            leaves = torch.ones_like(leaves)
        right = torch.where(there & leaves, answered, right)
        there = there & ~leaves
        more |= {} if last else {"again": round(float(there.double().mean()), 4)}
    return {**row, "mac_reduction": whole / float(spent.sum()), **more, **tally(right.int().tolist())}


def costs_of(config, lengths: Sequence[int], alpha: float, variant, depths: Sequence[int]) -> Tensor:
    """float64 [depths, samples]: multiply-accumulates of each text up to each depth."""
    sums = {n: np.cumsum(layer_macs(config, n, alpha, variant), dtype=np.float64) for n in Counter(lengths)}
    return torch.from_numpy(np.stack([sums[n][[d - 1 for d in depths]] for n in lengths], 1))


def save(path, passes: dict[float, Pass], wanted: Tensor) -> None:
    """The margins of two classes, so that ways can be searched again without the model."""
    said = {f"said-{tokens:g}": (p.said[..., 1] - p.said[..., 0]).half().numpy() for tokens, p in passes.items()}
    costs = {f"costs-{tokens:g}": p.costs.float().numpy() for tokens, p in passes.items()}
    depths = next(iter(passes.values())).depths
    np.savez_compressed(path, depths=np.array(depths), wanted=wanted.numpy(), **said, **costs)
