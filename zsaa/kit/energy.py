"""Time and energy of a block, from the counters of GPUs and processors."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def energy() -> Iterator[dict]:
    """Time and energy of a block. Yields a dict that is filled at the block's end:

    seconds: wall clock.
    gpu_joules: all NVIDIA GPUs that this process may use (CUDA_VISIBLE_DEVICES), from NVML's counter, which the driver
        advances some ten times a second: blocks should last seconds. None without a GPU, NVML, or the package
        nvidia-ml-py (`pip install zsaa[gpu]`), and on slices of a GPU (MIG).
    cpu_joules: all processor packages, from RAPL; None where the system does not let one read it, as most do not.

    Both count what the device used, whoever used it: other processes at the same time are in it.
    """
    torch = sys.modules.get("torch")  # where it was never imported, it has nothing to wait for
    wait = torch.cuda.synchronize if torch and torch.cuda.is_initialized() else (lambda: None)
    gpu, cpu = _gpu_counter(), _CpuCounter()
    wait()
    started, before = time.perf_counter(), gpu()
    spent: dict = {}
    try:
        yield spent
        wait()
    finally:
        after = gpu()
        spent["seconds"] = round(time.perf_counter() - started, 1)
        spent["gpu_joules"] = None if before is None or after is None else round(after - before, 1)
        spent["cpu_joules"] = cpu.stop()


def _gpu_counter() -> Callable[[], float | None]:
    """A function that returns the joules that this process's GPUs have used since the driver was loaded, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = range(pynvml.nvmlDeviceGetCount()) if chosen is None else [n.strip() for n in chosen.split(",") if n]
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(n))
            if str(n).isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(n.encode())
            for n in names
        ]
    except Exception:  # no package, no driver, a device that NVML does not know: pynvml has an exception for each
        return lambda: None

    def read():
        try:
            return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000 if handles else None
        except pynvml.NVMLError:  # older than Volta, or a MIG slice
            return None

    return read


RAPL = Path("/sys/class/powercap")


class _CpuCounter:
    """Joules of all processor packages from its making to `stop`; a thread reads along, as the counters start again
    at zero after about an hour."""

    def __init__(self, every: float = 20.0):
        self.total, self.last = 0, {}
        self.packages = [d for d in sorted(RAPL.glob("intel-rapl:*")) if d.name.count(":") == 1]
        self.ended, self.thread = threading.Event(), None
        try:
            self.packages = [d for d in self.packages if (d / "name").read_text().startswith("package")]
            self.ranges = {d: int((d / "max_energy_range_uj").read_text()) for d in self.packages}
            self._read()
        except (OSError, ValueError):  # readable by root only
            self.packages = []
        if self.packages:
            self.thread = threading.Thread(target=self._follow, args=(every,), daemon=True)
            self.thread.start()

    def _read(self):
        for package in self.packages:
            now = int((package / "energy_uj").read_text())
            self.total += (now - self.last.get(package, now)) % (self.ranges[package] + 1)
            self.last[package] = now

    def _follow(self, every):
        while not self.ended.wait(every):
            self._read()

    def stop(self) -> float | None:
        if not self.packages:
            return None
        self.ended.set()
        self.thread.join()
        self._read()
        return round(self.total / 1e6, 1)
