"""What the controller is told before the first request: what a request costs at each rung, and how low alpha may go."""

from __future__ import annotations

import itertools
import math
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

import zsaa
from zsaa.budget import Calibration
from zsaa.serve.controller import Rung
from zsaa.serve.engine import Classifier, Completer, Engine, Wish

RUNGS = 6  # settings from alpha = 1 to the floor


def ladder_by_time(calibration: Calibration, floor: float, beside_ms: float = 0.0) -> tuple[Rung, ...]:
    """Rungs whose times fall evenly, factor by factor, as measured on this machine; of one request of a batch.
    beside_ms: what each request costs beside its prefill, whatever alpha is (decoding)."""
    batch = calibration.key["batch"]
    least = calibration.predict(floor)
    times = np.geomspace(calibration.stock_ms, min(least, calibration.stock_ms), RUNGS).tolist()[1:-1]
    alphas = [calibration.alpha_for(ms) for ms in times if ms >= least]
    return _rungs(floor, alphas, lambda alpha: calibration.predict(alpha) / batch + beside_ms)


def ladder_by_macs(
    model_or_config: Any, n: int, stock_ms: float, floor: float, beside_ms: float = 0.0, **rule: Any
) -> tuple[Rung, ...]:
    """Rungs whose multiply-accumulates fall evenly, factor by factor, for requests of `n` tokens; where nothing was
    timed: `stock_ms` is what one costs at alpha = 1, and time is taken for proportional. rule: tau, score,
    schedule."""
    reductions = np.geomspace(1, zsaa.mac_reduction(model_or_config, n, floor, **rule), RUNGS).tolist()[1:-1]
    alphas = [zsaa.alpha_for(model_or_config, n, reduction, **rule) for reduction in reductions if reduction > 1]
    return _rungs(
        floor, alphas, lambda alpha: stock_ms / zsaa.mac_reduction(model_or_config, n, alpha, **rule) + beside_ms
    )


def _rungs(floor: float, alphas: Sequence[float], ms_at: Callable[[float], float]) -> tuple[Rung, ...]:
    chosen = sorted({1.0, floor, *(alpha for alpha in alphas if floor < alpha < 1)}, reverse=True)
    least, rungs = math.inf, []
    for alpha in chosen:
        least = min(least, ms_at(alpha))  # where noise says that more pruning takes longer, it is no cheaper at least
        rungs.append(Rung(alpha, least))
    return tuple(rungs)


def floor_of(result: dict, loss: float) -> float:
    """The smallest alpha that a measured curve allows: there, and at every alpha measured above it, the metric is at
    most `loss` points below alpha = 1. Only what was measured counts: nothing is read between the rows.

    result: a result file with rows of control "alpha" (for example results/accuracy/imdb-lora-salience.json); it holds
    for its own task and model. ValueError: no such rows, or a loss below 0.
    """
    if not 0 <= loss <= 100:
        raise ValueError(f"loss must be points of the metric in [0, 100], got {loss}.")
    curve = curve_of(result)
    allowed, best = 1.0, curve[0][1]
    for alpha, value in curve:
        if best - value > loss + 1e-9:
            break
        allowed = alpha
    return allowed


def curve_of(result: dict) -> list[tuple[float, float]]:
    """(alpha, metric in percent) of a result file, from alpha = 1 downwards."""
    rows = [row for row in result.get("rows", ()) if row.get("control") == "alpha" and row.get("alpha")]
    curve = sorted(((row["alpha"], row.get("f1", row.get("accuracy"))) for row in rows), reverse=True)
    if not curve or curve[0][0] != 1 or any(value is None for _, value in curve):
        raise ValueError(
            f"{result.get('name', 'this result')!r} is no accuracy curve: it needs rows of control 'alpha', one of "
            "them at alpha = 1. Name another result file, or give the floor itself."
        )
    return curve


def calibrated(model: nn.Module, n: int, batch: int, seconds: float) -> Calibration:
    """`zsaa.calibrate`, in silence: found again on a machine that has timed this model before. On a CPU of one text,
    where a batch takes as long as its texts one after another; elsewhere of a batch."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return zsaa.calibrate(model, n, 1 if on_cpu else batch, seconds=seconds, progress=False)


def prefill_ms(engine: Engine, n: int, batch: int = 1, alpha: float = 1.0) -> float:
    """Milliseconds of one prefill of `batch` texts of `n` tokens, the faster of two."""
    return _faster(lambda: _prefill(engine, [n] * batch, alpha))


def _prefill(engine: Engine, lengths: Sequence[int], alpha: float) -> None:
    alphas = [alpha] * len(lengths)
    if isinstance(engine, Classifier):
        engine.run([[1] * n for n in lengths], alphas)
    else:
        engine.run([Wish((1,) * n, 1) for n in lengths], alphas)


def warm(engine: Engine, rungs: Sequence[Rung], batch: int) -> None:
    """Runs each rung with batches of 1, 2, 4, ... and `batch`, of the longest texts and of others that are padded and
    of odd lengths, so that nothing is left that a GPU compiles at its first use: in a rush, that would stop the queue
    for seconds. Nothing on a CPU."""
    if engine.device.type == "cpu":
        return
    most = engine.max_tokens - (not isinstance(engine, Classifier))
    sizes = sorted({min(1 << k, batch) for k in range(batch.bit_length() + 1)})
    for rung, size, shorter in itertools.product(rungs, sizes, (0, most // 10 | 1)):
        _prefill(engine, [most - shorter * (1 + k % 2) for k in range(size)], rung.alpha)


def batch_ms(engine: Engine, n: int, batch: int) -> float:
    """Milliseconds that a batch costs whatever is in it: what one text takes beyond its share of a full batch. None on
    a CPU, where a batch takes as long as its texts one after another."""
    if engine.device.type == "cpu" or batch == 1:
        return 0.0
    alone, full = prefill_ms(engine, n), prefill_ms(engine, n, batch)
    return max(0.0, (batch * alone - full) / (batch - 1))


def decode_ms(engine: Completer, n: int, batch: int, tokens: int = 4) -> float:
    """Milliseconds of one more token of each of `batch` texts of `n`, which alpha does not change to speak of."""

    def of(written: int) -> float:
        return _faster(lambda: engine.run([Wish((1,) * n, written)] * batch, [1.0] * batch))

    return max(0.0, of(1 + tokens) - of(1)) / tokens


def _faster(run: Callable[[], object]) -> float:
    return 1000 * min(timeit.repeat(run, number=1, repeat=2))
