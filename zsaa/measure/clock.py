"""Wall-clock time of several variants, measured in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def alternate(
    runs: dict[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int | None = None,
    seconds: float = math.inf,
    progress: str | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[str, dict]:
    """Time several variants in turn, round after round, so that a slow spell of the machine hits all of them.

    warmup: rounds before that; by default 1, and 2 on a GPU, where a shape's second run records a CUDA graph.
    repeats: timed rounds; fewer, but at least 3, if all rounds together would take longer than `seconds`.
    progress: the text of a progress bar; None shows none.
    clock: what says the seconds, such as time.process_time; None for the wall's.

    Returns per variant {"latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": median of the first variant
    over this median}. Milliseconds of the clock; on a GPU each run is synchronized.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    warmup = warmup if warmup is not None else 2 if torch.cuda.is_available() else 1
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    options = {"desc": progress, "disable": progress is None, "leave": False, "mininterval": 1.0}
    with tqdm(total=(warmup + repeats) * len(runs), **options) as bar:
        for round_ in range(warmup + repeats):
            if round_ >= warmup + 3 and time.perf_counter() - begun > seconds:
                break
            for name, run in runs.items():
                wait()
                started = clock()
                run()
                wait()
                if round_ >= warmup:
                    times[name].append(1000 * (clock() - started))
                bar.update()
    medians = {name: statistics.median(values) for name, values in times.items()}
    first = medians[next(iter(runs))]
    return {
        name: {
            "latency_ms": round(medians[name], 3),
            "latency_ms_quartiles": [round(q, 3) for q in _quartiles(values)],
            "speedup": round(first / medians[name], 3),
        }
        for name, values in times.items()
    }


def _quartiles(values: list[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    q = statistics.quantiles(values, n=4, method="inclusive")
    return [q[0], q[2]]
