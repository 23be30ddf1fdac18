"""The environment of the kernels: what of the user's own settings they see, and how they share the processor."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Settings of the user's that would change what a notebook does: start-up files, search paths, configurations, the way
# in which figures are drawn. The runner itself is started with -I and heeds no PYTHON variable either.
FOREIGN = ("PYTHON", "IPYTHON", "JUPYTER_", "MPLBACKEND", "MATPLOTLIBRC")


# How OpenMP's threads wait for each other. By default they spin for milliseconds, and where other programs want the
# cores, too, they spin while the thread that they wait for is not even running. GNU's library (PyTorch's on Linux) is
# told to spin for microseconds, which bridges the gap between two operations; others wait without spinning. What both
# cost: tools/busy.py, results/speed/cpu/busy.json.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> dict[str, str]:
    """Variables for OpenMP: how its threads wait, and how many there are where a control group (a container's limit, a
    cluster's) gives less than the cores that the process sees. What the user has set stays."""
    chosen = {} if {*WAITING, "KMP_BLOCKTIME"} & set(os.environ) else dict(WAITING)
    quota = cpu_quota()
    if quota < cores() and "OMP_NUM_THREADS" not in os.environ:
        chosen["OMP_NUM_THREADS"] = str(max(1, math.floor(quota)))
    return chosen


def cpu_quota(own: Path = Path("/proc/self/cgroup"), tree: Path = Path("/sys/fs/cgroup")) -> float:
    """The cores' worth of time that this process's control groups grant it; infinite where they set no limit."""
    granted = math.inf
    with contextlib.suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = tree / "cpu" if controllers else tree  # version 1 has a tree for each controller
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    granted = min(granted, _quota_of(folder))
    return granted


def _quota_of(folder: Path) -> float:
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
            return quota / period if quota > 0 else math.inf
    return math.inf


def variables(folder: str, more: dict[str, str]) -> dict[str, str | None]:
    """What differs for a kernel from the runner's environment; None: not set there. `folder` takes the kernel's
    connection file, history and configuration, which so stay out of the user's home."""
    foreign = {name: None for name in os.environ if name.startswith(FOREIGN)}
    own = {f"JUPYTER_{name}_DIR": f"{folder}/{name.lower()}" for name in ("RUNTIME", "CONFIG", "DATA")}
    own["IPYTHONDIR"] = f"{folder}/ipython"
    own["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR", str(Path(sys.prefix) / "var" / "matplotlib"))
    own["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each log begins with a warning
    if sys.flags.no_user_site:  # kernels see the packages that the runner sees
        own["PYTHONNOUSERSITE"] = "1"
    return {**foreign, **own, **threads(), **more}


@contextlib.contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    """os.environ as a kernel gets it, and `more`."""
    with tempfile.TemporaryDirectory(prefix="zsaa-jupyter-", ignore_cleanup_errors=True) as folder:
        new = variables(folder, more)
        old = {name: os.environ.get(name) for name in new}
        _set(new)
        try:
            yield
        finally:
            _set(old)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
