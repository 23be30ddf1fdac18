"""Wall-clock time of a forward pass, the provenance that every result file carries, and writing such a file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

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


def hardware(device: torch.device | None = None) -> dict:
    """The device that computed (`device`, or by default the GPU if there is one), the CPU, its usable cores, and memory
    in GiB (None where the system does not say)."""
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        memory = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
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


def write_json(path: Path, content: dict) -> Path:
    """Write `content` to `path` in one piece: readers never see half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def alternate(
    runs: dict[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int = 1,
    seconds: float = math.inf,
    progress: str | None = None,
) -> dict[str, dict]:
    """Time several variants in turn, round after round, so that a slow spell of the machine hits all of them.

    repeats: timed rounds; fewer, but at least 3, if all rounds together would take longer than `seconds`.
    progress: the text of a progress bar; None shows none.

    Returns per variant {"latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": median of the first variant
    over this median}. Wall-clock milliseconds; on a GPU each run is synchronized.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    options = {"desc": progress, "disable": progress is None, "leave": False, "mininterval": 1.0}
    with tqdm(total=(warmup + repeats) * len(runs), **options) as bar:
        for round_ in range(warmup + repeats):
            if round_ >= warmup + 3 and time.perf_counter() - begun > seconds:
                break
            for name, run in runs.items():
                wait()
                started = time.perf_counter()
                run()
                wait()
                if round_ >= warmup:
                    times[name].append(1000 * (time.perf_counter() - started))
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
