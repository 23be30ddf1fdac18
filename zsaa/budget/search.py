"""The largest alpha that keeps to a budget, found by bisection; and which budgets there are in multiply-accumulates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from numbers import Real
from typing import Any

from zsaa.cost import total_macs
from zsaa.rule import Rule

LEAST = 1e-5  # the smallest alpha that is tried


def largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest alpha in [low, high], to 1e-5, that `fits`; `low` must."""
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def alpha_for_macs(config: Any, counted: Counter, mac_reduction: float, rule: dict, depth: int | None = None) -> float:
    """The largest alpha that divides by `mac_reduction` the multiply-accumulates of texts whose lengths are `counted`,
    under `rule` {"tau", "score", "schedule"}, where the first `depth` layers run; ValueError names the range that can
    be reached."""
    if mac_reduction == 1:
        return 1.0
    stock = total_macs(config, counted, 1.0)
    most = stock / total_macs(config, counted, LEAST, Rule(**rule), depth)
    if depth is not None and 1 <= mac_reduction <= stock / total_macs(config, counted, 1.0, depth=depth) + 1e-9:
        return 1.0
    if not 1 <= mac_reduction <= most:
        raise ValueError(
            f"a MAC reduction of {mac_reduction} is out of reach: with these lengths and tau={rule['tau']} it ranges "
            f"from 1 to {most:.2f}. Use longer inputs, a smaller tau or a smaller reduction."
        )
    return largest(
        lambda alpha: stock / total_macs(config, counted, alpha, Rule(**rule), depth) >= mac_reduction, LEAST, 1.0
    )


def check_budget(name: str, value: Any) -> None:
    """TypeError unless `value` is a number, ValueError unless it is above 0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number > 0, got {value!r} ({type(value).__name__}).")
    if not value > 0:
        raise ValueError(f"{name} must be > 0, got {value}.")
