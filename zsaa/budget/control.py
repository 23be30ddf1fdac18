"""The control that a dial must beat: the same compute, spent on fewer input tokens in all layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zsaa.budget.search import check_budget
from zsaa.cost import histogram, macs, total_macs


def truncation_for(config: Any, lengths: int | Iterable[int], mac_reduction: float) -> int:
    """The largest k such that cutting every input to k tokens reduces the stock model's MACs by `mac_reduction`; 1
    where no cut does.

    config: a supported model's. lengths: tokens of an input, or of each. TypeError, ValueError: no number above 0.
    """
    check_budget("mac_reduction", mac_reduction)
    counted = histogram(lengths)
    stock = total_macs(config, counted, 1.0)
    low, high = 1, max(counted)  # k = low always reduces at least as much as k = high
    while low < high:
        middle = (low + high + 1) // 2
        cut = sum(times * macs(config, min(n, middle)) for n, times in counted.items())
        low, high = (middle, high) if stock / cut >= mac_reduction else (low, middle - 1)
    return low
