"""One budget for two dials: how much of it fewer tokens are to save, and how much fewer layers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from zsaa.budget.calibration import Calibration, calibrate
from zsaa.budget.saved import rule_of
from zsaa.budget.search import alpha_for_macs, check_budget
from zsaa.cost import histogram, total_macs
from zsaa.depth.stop import check_depth
from zsaa.dials.settings import DEFAULTS, current_settings
from zsaa.families import find_decoder
from zsaa.rule import Rule

HALF = 0.5  # of the logarithm of a reduction, what fewer layers give where nothing else is known


@dataclass(frozen=True)
class Split:
    """Where both dials are to stand. alpha, depth: their settings; mac_reduction: of the texts' multiply-accumulates,
    by both; accuracy: by the table that was given, between its rows (None without one); latency_ms: predicted, where
    that is the budget."""

    alpha: float
    depth: int
    mac_reduction: float
    accuracy: float | None = None
    latency_ms: float | None = None


def split_for(
    model_or_config: Any,
    n: int | Iterable[int],
    mac_reduction: float | None = None,
    *,
    latency_ms: float | None = None,
    batch: int = 1,
    table: Sequence[Mapping[str, Any]] | None = None,
    share: float | None = None,
    depths: Iterable[int] | None = None,
    tau: int | None = None,
    score: str | None = None,
    schedule: str | None = None,
) -> Split:
    """The alpha and the depth that keep to one budget, for inputs of `n` tokens (one length, or those of samples).

    mac_reduction, latency_ms, batch, tau, score, schedule: as in `alpha_for`; both budgets count from the whole model
        at alpha = 1. A latency calibrates every depth that is tried, which takes under a minute each for a small model.
    table: rows of measurements, each with "alpha", "depth" and "accuracy" (any number of which more is better): the
        depth whose accuracy at the budget is highest, interpolated over the logarithm of MACs between the rows of that
        depth, never beyond them. Of equals the deepest.
    share: without a table, the share of the reduction, as an exponent, that fewer layers give: 0 tokens alone, 1 layers
        alone, 0.5 (the default) the root of it each. Layers are whole, so tokens make up the rest.
    depths: those that may be chosen; by default those of the table, or the one that `share` says.

    TypeError: not exactly one budget; table and share; a latency without a model. ValueError names what cannot be
    reached.
    """
    if (mac_reduction is None) == (latency_ms is None):
        raise TypeError(
            f"give one budget, mac_reduction or latency_ms; got mac_reduction={mac_reduction}, latency_ms={latency_ms}."
        )
    if table is not None and share is not None:
        raise TypeError("give a table of measurements or a share, not both: a table says what the share is to be.")
    check_budget(*(("latency_ms", latency_ms) if mac_reduction is None else ("mac_reduction", mac_reduction)))
    share = HALF if share is None else share
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 (tokens alone) to 1 (layers alone), got {share}.")
    config, chosen = model_or_config, DEFAULTS
    if isinstance(model_or_config, nn.Module):
        decoder, _ = find_decoder(model_or_config)
        config, chosen = decoder.config, current_settings(decoder)
    elif latency_ms is not None:
        raise TypeError(f"latency_ms needs a model to time, not a {type(model_or_config).__name__}.")
    rule, counted = rule_of(chosen, tau=tau, score=score, schedule=schedule), histogram(n)
    layers = config.num_hidden_layers

    def timed(depth: int) -> Calibration:
        return calibrate(model_or_config, max(counted), batch, tau=tau, schedule=schedule, depth=depth)

    rows = None if table is None else _by_depth(table, config, counted, rule)
    if depths is None and rows is not None:
        depths = rows
    elif depths is None:
        depths = [_depth(layers, mac_reduction or timed(layers).stock_ms / latency_ms, share)]
    found, reasons = [], []
    for depth in sorted({check_depth(depth, layers) for depth in depths}, reverse=True):
        try:
            found.append(_at(depth, config, counted, rule, mac_reduction, latency_ms, timed, rows))
        except ValueError as error:
            reasons.append(f"depth {depth}: {error}")
    if not found:
        raise ValueError("no depth keeps to the budget. " + " ".join(reasons))
    return max(found, key=lambda split: (-math.inf if split.accuracy is None else split.accuracy, split.depth))


def _depth(layers: int, reduction: float, share: float) -> int:
    """How many layers run if they are to give this share of the reduction, at most."""
    return min(layers, max(1, math.ceil(layers / max(1.0, reduction) ** share - 1e-9)))


def _at(depth: int, config: Any, counted: Counter, rule: dict, mac_reduction, latency_ms, timed, rows) -> Split:
    """The split at one depth; ValueError if it cannot keep to the budget, or nothing was measured there."""
    if latency_ms is None:
        alpha, predicted = alpha_for_macs(config, counted, mac_reduction, rule, depth), None
    else:
        calibration = timed(depth)
        alpha = calibration.alpha_for(latency_ms)
        predicted = calibration.predict(alpha)
    reached = _reduction(config, counted, alpha, rule, depth)
    if rows is None:
        return Split(alpha, depth, reached, None, predicted)
    places, values = rows.get(depth, ([], []))
    at = math.log(reached)
    if not len(places) or not places[0] - 1e-2 <= at <= places[-1] + 1e-2:
        measured = "nothing" if not len(places) else f"{math.exp(places[0]):.2f}x to {math.exp(places[-1]):.2f}x"
        raise ValueError(f"the table holds {measured} of it, and the budget is {reached:.2f}x.")
    return Split(alpha, depth, reached, float(np.interp(at, places, values)), predicted)


def _reduction(config: Any, counted: Counter, alpha: float, rule: dict, depth: int) -> float:
    return total_macs(config, counted, 1.0) / total_macs(config, counted, alpha, Rule(**rule), depth)


def _by_depth(table: Sequence[Mapping[str, Any]], config: Any, counted: Counter, rule: dict) -> dict[int, tuple]:
    """The table's rows by depth: logarithms of MAC reductions, rising, and the accuracies there."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in table:
        if not isinstance(row, Mapping):
            raise TypeError(
                f"table holds a {type(row).__name__} ({row!r:.40}) where a row belongs: give a list of dicts with "
                'alpha, depth and accuracy (of a DataFrame, table.to_dict("records")).'
            )
        missing = [name for name in ("alpha", "depth", "accuracy") if row.get(name) is None]
        if missing:
            raise ValueError(f"each row of the table needs alpha, depth and accuracy; {dict(row)} has no {missing[0]}.")
        depth = check_depth(row["depth"], config.num_hidden_layers)
        at = math.log(_reduction(config, counted, row["alpha"], rule, depth))
        found.setdefault(depth, []).append((at, row["accuracy"]))
    if not found:
        raise ValueError("the table is empty: measure some settings of both dials, or leave it out and give a share.")
    return {depth: tuple(zip(*sorted(rows))) for depth, rows in found.items()}
