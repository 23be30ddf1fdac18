"""Wall-clock time of a forward pass, and the provenance that every result file carries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "zsaa")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> dict:
    """The device that computed, the CPU, its usable cores, and memory in GiB (None where the system does not say)."""
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_gib": memory,
    }


def provenance(**facts) -> dict:
    """Commit (ZSAA_COMMIT where there is no checkout), date (UTC), versions, hardware, and the given facts
    (seed, sample counts, seconds)."""
    commit = os.environ.get("ZSAA_COMMIT") or _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".")
    dirty = None if "ZSAA_COMMIT" in os.environ or changes is None else bool(changes)
    versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": hardware(),
        **facts,
    }


def alternate(runs: dict[str, Callable[[], object]], repeats: int = 5, warmup: int = 1) -> dict[str, dict]:
    """Time several variants in turn, round after round, so that a slow spell of the machine hits all of them.

    Returns per variant {"latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": median of the first variant
    over this median}. Wall-clock milliseconds; on a GPU each run is synchronized.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(warmup + repeats):
        for name, run in runs.items():
            wait()
            started = time.perf_counter()
            run()
            wait()
            if round_ >= warmup:
                times[name].append(1000 * (time.perf_counter() - started))
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
