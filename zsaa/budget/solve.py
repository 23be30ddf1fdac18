"""From a budget to alpha: in multiply-accumulates, or in milliseconds on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from zsaa.budget.calibration import calibrate
from zsaa.budget.saved import rule_of
from zsaa.budget.search import alpha_for_macs, check_budget
from zsaa.cost import histogram
from zsaa.depth.stop import check_depth
from zsaa.dials.settings import DEFAULTS, current_settings
from zsaa.families import find_decoder


def alpha_for(
    model_or_config: Any,
    n: int | Iterable[int],
    mac_reduction: float | None = None,
    tau: int | None = None,
    *,
    latency_ms: float | None = None,
    batch: int = 1,
    score: str | None = None,
    schedule: str | None = None,
    depth: int | None = None,
) -> float:
    """The largest alpha (to 1e-5) that keeps to one budget, for inputs of `n` tokens.

    model_or_config: a supported model, with the dial on or not, or its config.
    n: one length in tokens, or the length of each sample.
    mac_reduction: times by which the multiply-accumulates, summed over the samples, must fall at least.
    tau, score, schedule: as in `zsaa.enable`; by default those of the model's dial, and the paper's for a config. A
        score matters for its own cost only, and not to latency_ms, which times the model's.
    depth: layers that run, of which the whole model's MACs are reduced; by default those of the model's dial, or all.
        `split_for` chooses alpha and depth.
    latency_ms: milliseconds that one prefill of `batch` texts of the longest length may take on this machine, by
        prediction from `calibrate`, which runs first if need be (under a minute for a small model). Needs a model.

    TypeError: not exactly one budget, or a config and latency_ms. ValueError names the reachable range of a budget.
    """
    if (mac_reduction is None) == (latency_ms is None):
        raise TypeError(
            f"give one budget, mac_reduction or latency_ms; got mac_reduction={mac_reduction}, latency_ms={latency_ms}."
        )
    counted = histogram(n)
    check_budget(*(("latency_ms", latency_ms) if mac_reduction is None else ("mac_reduction", mac_reduction)))
    if latency_ms is not None:
        if not isinstance(model_or_config, nn.Module):
            raise TypeError(
                f"latency_ms needs a model to time, not a {type(model_or_config).__name__}. Pass the model itself, or "
                "give mac_reduction, for which a config will do."
            )
        return calibrate(model_or_config, max(counted), batch, tau=tau, schedule=schedule, depth=depth).alpha_for(
            latency_ms
        )
    config, chosen = model_or_config, DEFAULTS
    if isinstance(model_or_config, nn.Module):
        decoder, _ = find_decoder(model_or_config)
        config, chosen = decoder.config, current_settings(decoder)
    depth = chosen["depth"] if depth is None else check_depth(depth, config.num_hidden_layers)
    rule = rule_of(chosen, tau=tau, score=score, schedule=schedule)
    return alpha_for_macs(config, counted, mac_reduction, rule, depth)
