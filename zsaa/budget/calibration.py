"""How long a prefill takes on this machine: timed at a handful of settings, predicted between them, saved.

A calibration is one prefill of random tokens (time does not depend on what the text says), timed at a few settings in
turn. Between these the time is interpolated over multiply-accumulates, of which it is nearly a straight line; over
alpha, whose effect compounds from layer to layer, it is far from one.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from zsaa.budget import saved
from zsaa.budget.search import LEAST, alpha_for_macs, check_budget, largest
from zsaa.cost import mac_reduction, macs
from zsaa.dial import disable, enable
from zsaa.families import find_decoder, only_last_logits
from zsaa.fast.graphs import Graphs
from zsaa.measure import alternate, hash_of, provenance, write_json
from zsaa.measure.mode import evaluating
from zsaa.rule import RULE, Rule, check_alpha, powers
from zsaa.scope import opened

NEAR = 0.999  # the largest alpha below 1 that is timed: the pruned code path, with hardly anything pruned
POINTS = 8  # pruned settings that are timed
REPEATS = 15  # timed rounds, where there is time for them
NOISY = 0.25  # scatter of the readings above which a calibration warns


@dataclass(frozen=True)
class Calibration:
    """How long one prefill takes on one machine at several settings; made by `calibrate`.

    key: what was timed and on what: n, batch, tau, score, schedule, model, device, versions, ...
    rows: per setting {"alpha", "latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": over stock}; the
        stock model (alpha = 1) first, then falling alpha.
    provenance: commit, date, versions, hardware of the measurement.
    """

    config: Any = field(repr=False)
    key: dict = field(repr=False)
    rows: list[dict]
    provenance: dict = field(repr=False)

    @property
    def stock_ms(self) -> float:
        """Milliseconds of the stock model, alpha = 1."""
        return self.rows[0]["latency_ms"]

    @property
    def scatter(self) -> float:
        """How far the readings lie apart: the widest interquartile range, as a share of its median."""
        return max(
            (row["latency_ms_quartiles"][1] - row["latency_ms_quartiles"][0]) / row["latency_ms"] for row in self.rows
        )

    def predict(self, alpha: float) -> float:
        """Milliseconds at `alpha`, rising with it below 1. At 1 the stock code runs, which may be faster or slower."""
        if check_alpha(alpha) == 1:
            return self.stock_ms
        n, rule = self.key["n"], {**{name: self.key[name] for name in RULE}, "depth": self.key.get("depth")}
        rows = self.rows[:0:-1]
        cost = [macs(self.config, n, row["alpha"], **rule) for row in rows]
        # More work cannot truly take less time; where noise says so, the slower reading counts.
        times = np.maximum.accumulate([row["latency_ms"] for row in rows])
        return float(np.interp(macs(self.config, n, alpha, **rule), cost, times))

    def alpha_for(self, latency_ms: float) -> float:
        """The largest alpha, to 1e-5, with a predicted time of at most `latency_ms`; ValueError names what is
        reachable. Half of all runs take longer than predicted: the times are medians."""
        check_budget("latency_ms", latency_ms)
        if latency_ms >= self.stock_ms:
            return 1.0
        low = self.rows[-1]["alpha"]
        if self.predict(low) > latency_ms:
            least = min(self.stock_ms, self.predict(low))
            raise ValueError(
                f"{latency_ms} ms is out of reach for a prefill of {self.key['batch']} x {self.key['n']} tokens: here "
                f"it takes {self.stock_ms:.4g} ms in the stock model (alpha = 1) and {self.predict(low):.4g} ms at the "
                f"smallest alpha of effect, {low:.4g}. Allow {least:.4g} ms or more, or use fewer tokens."
            )
        if self.predict(NEAR) <= latency_ms:
            return NEAR
        return largest(lambda alpha: self.predict(alpha) <= latency_ms, low, NEAR)


def calibrate(
    model: nn.Module,
    n: int,
    batch: int = 1,
    *,
    tau: int | None = None,
    schedule: str | None = None,
    depth: int | None = None,
    seconds: float = 30.0,
    refresh: bool = False,
    progress: bool = True,
) -> Calibration:
    """Time one prefill of `batch` texts of `n` tokens on `model`'s device: stock, and at a handful of alphas in turn.

    A prefill is what `generate` does with a prompt: fill the key/value cache, logits of the last token only; in eval
    mode, without gradients, in the autocast that is on. The model comes out as it went in; if the dial was off, it is
    on for the measurement only. Readings that scatter widely bring a warning.

    tau, schedule: as in `alpha_for`. depth: the layers that run at every setting, alpha = 1 too; by default those of
    the model's dial. seconds: the timed rounds (15) are cut to this, but never below 3. The result is saved in the
    cache folder (ZSAA_CACHE, see `zsaa.models.cache_dir`) and read from there next time, unless `refresh`, if hardware,
    threads, versions, zsaa's code, the model's shape, dtype, device and the arguments are the same.

    ValueError: n or batch is no whole number of at least 1, or n is longer than the model's positions.
    """
    decoder, _ = find_decoder(model)
    config, key = decoder.config, saved.key_of(model, n, batch, tau=tau, schedule=schedule, depth=depth)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and key["n"] > limit:
        raise ValueError(f"n must be at most {limit}, this model's number of positions, got {key['n']}.")
    path = saved.path_of(key)
    record = None if refresh else saved.read(path, key)
    if record is None:
        record = {"key": key, "rows": _timed(model, key, seconds, progress)}
        record["provenance"] = provenance(hardware=key["hardware"])
        try:
            write_json(path, {**record, "sha256": hash_of(record)})
        except OSError as error:
            warnings.warn(f"the calibration could not be saved in {path.parent} ({error}).", stacklevel=2)
        if (scatter := Calibration(config, **record).scatter) > NOISY:
            warnings.warn(
                f"the readings scatter by {scatter:.0%} (interquartile range over median), and predictions may be as "
                "far off: is the machine busy? zsaa.calibrate(..., refresh=True) measures again.",
                stacklevel=2,
            )
    return Calibration(config, **record)


def _timed(model: nn.Module, key: dict, seconds: float, progress: bool) -> list[dict]:
    """The rows of a calibration: the stock model first, then falling alpha."""
    n, rule = key["n"], {name: key[name] for name in RULE}
    alphas = timed_alphas(find_decoder(model)[0].config, n, rule)
    with _measuring(model, rule) as dial:
        prefill = _prefill(model, n, key["batch"])

        def at(alpha: float) -> Callable[[], None]:
            def run() -> None:
                with opened(dial, alpha=alpha, depth=key["depth"]):  # not by `at`, which would warn of untrained alphas
                    prefill()

            return run

        text = f"timing {n} tokens" if progress else None
        timed = alternate({str(a): at(a) for a in alphas}, REPEATS, warmup=2, seconds=seconds, progress=text)
    return [{"alpha": alpha, **timed[str(alpha)]} for alpha in alphas]


def timed_alphas(config: Any, n: int, rule: dict) -> list[float]:
    """The settings to time, from 1 downwards: evenly spread over the factors by which MACs can fall, down to one
    at which each layer is left with tau tokens, or those that the score never drops: the largest of two digits, which
    can be read and typed."""
    first = powers(config.num_hidden_layers, rule["schedule"])[0]  # no layer keeps a larger share
    least = max(rule["tau"], Rule(**rule).exempt(n))
    low = min(max(LEAST, _two_digits((least / n) ** (1 / first))), NEAR)
    targets = np.geomspace(1, max(1, mac_reduction(config, n, low, **rule)), POINTS)[1:-1]
    solved = {round(alpha_for_macs(config, Counter([n]), target, rule), 3) for target in targets.tolist()}
    return [1.0, *sorted({NEAR, low, *(a for a in solved if low < a < NEAR)}, reverse=True)]


def _two_digits(alpha: float) -> float:
    """Rounded down to two significant digits."""
    decimals = 1 - math.floor(math.log10(alpha))
    return round(math.floor(alpha * 10**decimals) / 10**decimals, decimals)


def _prefill(model: nn.Module, n: int, batch: int) -> Callable[[], None]:
    decoder, _ = find_decoder(model)
    device = next(decoder.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (batch, n), generator=generator).to(device)
    last = only_last_logits(model)

    def run() -> None:
        model(input_ids=ids, use_cache=True, **last)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return run


@contextmanager
def _measuring(model: nn.Module, rule: dict) -> Iterator[Any]:
    """The model's dial, on and untraced; eval mode, no gradients. Everything is put back, after exceptions too."""
    decoder, _ = find_decoder(model)
    was_on, saved = getattr(decoder, "_zsaa", None) is not None, getattr(decoder.config, "zsaa", None)
    if not was_on:
        enable(model, alpha=1.0)
    dial = decoder._zsaa
    before = dial.rule, dial.graphs
    try:
        # Recordings of the measurement's own: they are freed with it, and the model's stay as they are.
        dial.rule = replace(dial.rule, tau=rule["tau"], schedule=rule["schedule"])
        dial.graphs = Graphs(dial.graphs.mode)
        with (
            evaluating(model),
            opened(dial, trace=None),
            torch.no_grad(),
        ):  # not inference_mode: tensors that a model keeps from it could never be trained with
            yield dial
    finally:
        dial.rule, dial.graphs = before
        if not was_on:
            disable(model)
            if saved is not None:
                decoder.config.zsaa = saved
