"""What a prefill costs at each alpha: tokens, multiply-accumulates, cache; milliseconds where they were measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from numbers import Real

from torch import nn

from zsaa.budget import saved
from zsaa.budget.calibration import Calibration, timed_alphas
from zsaa.cost import kv_bytes, mac_reduction, macs
from zsaa.families import find_decoder
from zsaa.rule import RULE, check_alpha, kept_counts


def report(model: nn.Module, n: int, alphas: float | Iterable[float] | None = None, batch: int = 1):
    """What a prefill of `batch` texts of `n` tokens costs at each alpha, as a pandas DataFrame indexed by alpha,
    which prints whole.

    alphas: one setting or several; None lists those that `calibrate` times.

    At the depth of the model's dial: layers that do not run count as saved. Columns: "first layer", "median layer",
    "last layer" (tokens that such a layer passes on, per text); "kept" (share of token-layers); "GMACs" and "MAC
    reduction" (see `macs`); "KV bytes" (keys and values in the cache, in the model's dtype); "predicted ms" and
    "measured ms" of the prefill; "speed-up" (alpha = 1 over measured, else over predicted).
    Times come from a saved calibration. Without one, or where an alpha was not timed, they are NaN: nothing is measured
    here, `zsaa.calibrate(model, n, batch)` does. `table.attrs` says what the table is of, and on what machine, when and
    how steadily the times were measured; its "tokens_per_layer" maps alpha to the full lists.
    """
    import pandas as pd

    from zsaa.budget.table import Costs  # a DataFrame: pandas is not loaded before it is asked for

    decoder, _ = find_decoder(model)
    config, key = decoder.config, saved.key_of(model, n, batch)
    record = saved.read(saved.path_of(key), key)
    calibration = record and Calibration(config, **record)
    rule = {name: key[name] for name in RULE}
    if alphas is None:
        alphas = timed_alphas(config, key["n"], rule)
    alphas = map(check_alpha, [alphas] if isinstance(alphas, Real) else alphas)
    layers = config.num_hidden_layers
    tokens = {alpha: kept_counts(key["n"], alpha, layers, **rule)[: key["depth"]] for alpha in alphas}
    rows = [
        {**_work(config, key, alpha, counts, decoder.dtype.itemsize), **_time(calibration, alpha)}
        for alpha, counts in tokens.items()
    ]
    table = Costs(rows, index=pd.Index(tokens, name="alpha"))
    if calibration:
        timing = f"measured {record['provenance']['date']}, medians, scatter {calibration.scatter:.0%}"
    else:
        timing = f"not measured; zsaa.calibrate(model, {key['n']}, {key['batch']}) measures them"
    table.attrs = {
        **{name: key[name] for name in ("model", "n", "batch", *RULE, "depth", "dtype", "device")},
        "timing": timing,
        "provenance": record and record["provenance"],
        "tokens_per_layer": tokens,
    }
    return table


def _work(config, key: dict, alpha: float, counts: list[int], itemsize: int) -> dict:
    """What can be counted: tokens, multiply-accumulates, bytes of keys and values."""
    n, batch, rule = key["n"], key["batch"], {name: key[name] for name in (*RULE, "depth")}
    return {
        "first layer": counts[0],
        "median layer": statistics.median_low(counts),
        "last layer": counts[-1],
        "kept": round(sum(counts) / (n * config.num_hidden_layers), 3),
        "GMACs": round(batch * macs(config, n, alpha, **rule) / 1e9, 3),
        "MAC reduction": round(mac_reduction(config, n, alpha, **rule), 2),
        "KV bytes": kv_bytes(config, n, alpha, batch=batch, itemsize=itemsize, **rule),
    }


def _time(calibration: Calibration | None, alpha: float) -> dict:
    """Milliseconds by prediction and by measurement, and the speed-up; NaN where they are not known."""
    if calibration is None:
        return dict.fromkeys(("predicted ms", "measured ms", "speed-up"), math.nan)
    predicted = calibration.predict(alpha)
    taken = {row["alpha"]: row["latency_ms"] for row in calibration.rows}.get(alpha, math.nan)
    clock = predicted if math.isnan(taken) else taken
    return {
        "predicted ms": round(predicted, 2),
        "measured ms": round(taken, 2),
        "speed-up": round(calibration.stock_ms / clock, 2),
    }
