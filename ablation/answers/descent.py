"""The one loop by which adapters are trained: AdamW on clipped gradients, at a rate that rises first and comes down."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn


def rounds(things: Sequence, size: int, rng: random.Random) -> Iterator[list]:
    """`size` things after another without end: in an order that is drawn anew when fewer than that are left of it."""
    order: list = []
    while True:
        if len(order) < size:
            order = rng.sample(things, len(things))
        part, order = order[:size], order[size:]
        yield part


def descend(
    trained: Sequence[nn.Parameter] | Sequence[dict],
    steps: int,
    gradients: Callable[[int], float],
    rate: float,
    warm: float = 20,
    until: float = float("inf"),
    log: Callable | None = None,
    every: int = 50,
) -> int:
    """Make `steps` steps, or fewer if `until` (seconds since 1970) comes first; returns how many.

    trained: weights, or AdamW's groups of them, each with a rate of its own ("lr"); gradients(step) leaves the
    gradients of a step, and returns its loss. The rate rises over the first `warm` steps and comes down to a fiftieth
    by the last one, or by `until`, whichever is nearer. log gets the running mean of losses at each `every`th step.
    """
    opt = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.98))
    weights, most = [p for group in opt.param_groups for p in group["params"]], [g["lr"] for g in opt.param_groups]
    mean, began = None, time.time()
    for step in range(steps):
        gone = max(step / steps, (time.time() - began) / max(1.0, until - began))
        if gone >= 1:
            return step
        for group, highest in zip(opt.param_groups, most):
            group["lr"] = highest * min(1, (step + 1) / warm) * max(0.02, 1 - gone)
        opt.zero_grad(set_to_none=True)
        loss = gradients(step)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        opt.step()
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        if log is not None and (step % every == 0 or step == steps - 1):
            log(step=step + 1, of=steps, loss=round(mean, 4), seconds=round(time.time() - began))
    return steps
