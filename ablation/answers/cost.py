"""Multiply-accumulates of a prefill whose tokens leave at a few layers, and how many may stay for a given reduction.

Attention is counted as queries times keys on both sides, as everywhere in this repository; a scorer's cost counts. From
layer `still` on all but the last `asking` tokens may stand still: keys and values are computed of them, and no more.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

Schedule = tuple[tuple[int, float], ...]  # (layer, exponent): before that layer, share ** exponent of the prompt stays

SCHEDULES: dict[str, Schedule] = {
    "once": ((0, 1.0),),
    "once2": ((2, 1.0),),
    "rising": ((0, 1.0), (12, 1.25), (18, 1.6), (24, 2.4)),
    "leave": ((0, 1.0), (24, 2.0)),
    "rising2": ((2, 1.0), (12, 1.25), (18, 1.6), (24, 2.4)),
}


def shape_of(config) -> tuple[int, ...]:
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    return (config.hidden_size, heads, config.num_key_value_heads, size, config.intermediate_size,
            config.num_hidden_layers)  # fmt: skip


def macs(shape: tuple[int, ...], n: int, schedule: Schedule = (), kept: Sequence[int] = (), still: int | None = None,
         asking: int = 0) -> int:  # fmt: skip
    """Of n prompt tokens, of which kept[s] go on from the schedule's step s, all before layer `still`."""
    d, heads, kv, size, inner, layers = shape
    token, pair = d * size * (2 * heads + 2 * kv) + 3 * d * inner, 2 * heads * size
    at, left = [0, *(layer for layer, _ in schedule), layers], [n, *kept]
    whole = sum((b - a) * (m * token + m * m * pair) for a, b, m in zip(at, at[1:], left))
    spared = token - 2 * d * kv * size + left[-1] * pair
    return whole - (layers - (layers if still is None else still)) * (left[-1] - asking) * spared


def counts(n: int, exempt: int, share: float, schedule: Schedule) -> list[int]:
    return [min(n, max(exempt, int(n * share**e + 1e-6))) for _, e in schedule]


@functools.lru_cache(None)
def solve(shape, n: int, exempt: int, reduction: float, schedule: Schedule, scorer: int = 0, still: int | None = None,
          asking: int = 0) -> tuple[int, ...]:  # fmt: skip
    """Tokens kept at each step so that all MACs, the scorer's too, fall by the reduction; the least possible where
    that cannot be reached."""
    budget = macs(shape, n) / reduction - scorer
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = macs(shape, n, schedule, counts(n, exempt, middle, schedule), still, asking) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return tuple(counts(n, exempt, low, schedule))


@functools.lru_cache(None)
def whole(shape, n: int, reduction: float) -> int:
    """How long a prompt may be that is read whole at the MACs of n tokens over the reduction."""
    low, high = 1, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if macs(shape, middle) <= macs(shape, n) / reduction else (low, middle - 1)
    return low
