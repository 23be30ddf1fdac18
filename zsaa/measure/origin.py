"""Where a number comes from: the commit, versions and hardware that every result file names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import warnings
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "zsaa")


@cache
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


PACKAGE = Path(__file__).resolve().parent.parent
# Of git's variables, those that say how it is set up; the others say which repository it should look at.
KEPT_OF_GIT = ("GIT_CONFIG", "GIT_EXEC_PATH")


class _NoCommit(Exception):
    """No commit can be named. The first argument is why, for a result file, and so without a path; the second, where
    something should be done about it, is what to tell the user."""


def _git(*arguments: str) -> str:
    """What git says of the checkout around the package."""
    root = PACKAGE.parent
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith(KEPT_OF_GIT)}
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**kept, "LC_ALL": "C"})
    except OSError as error:
        raise _NoCommit("git cannot be run", f"{error}. Install git, or set ZSAA_COMMIT to the commit.") from error
    if done.returncode == 0:
        return done.stdout.strip()
    if "dubious ownership" in done.stderr:
        trust = f"git config --global --add safe.directory {shlex.quote(str(root))}"
        raise _NoCommit("git refuses the checkout, whose owner is another", f"Let it: {trust}, or set ZSAA_COMMIT.")
    said = (done.stderr.strip().splitlines() or [""])[-1]
    raise _NoCommit(f"git {arguments[0]} failed", f"It says: {said} Mend the checkout {root}, or set ZSAA_COMMIT.")


def _checkout() -> tuple[str, bool]:
    """Commit of the checkout that the package lies in, and whether its sources differ from it. A repository around the
    package that is not its own, as that of a project with its .venv inside, does not count."""
    root = PACKAGE.parent
    try:
        project = (root / "pyproject.toml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        project = ""
    if not (root / ".git").exists() or not re.search(r'^name = "zsaa"$', project, re.MULTILINE):
        raise _NoCommit("the package was installed without its checkout")
    if not os.path.samefile(_git("rev-parse", "--show-toplevel"), root):
        raise _NoCommit("the package's .git is no repository", f"Mend the checkout {root}, or set ZSAA_COMMIT.")
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "--", PACKAGE.name, "kernels"))


def commit() -> dict:
    """What provenance says of the source: its "commit" (ZSAA_COMMIT, where that is set), whether it is "dirty", changed
    since; and, where there is no commit to name, "commit_unknown": why. Warns where something can be done about it."""
    if told := os.environ.get("ZSAA_COMMIT"):
        return {"commit": told, "dirty": None}
    try:
        found, dirty = _checkout()
        return {"commit": found, "dirty": dirty}
    except _NoCommit as error:
        reason, *advice = error.args
        if advice:
            warnings.warn(f"results name no commit: {reason}. {advice[0]}", stacklevel=3)
        return {"commit": None, "dirty": None, "commit_unknown": reason}


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


def provenance(device: torch.device | None = None, **facts) -> dict:
    """Commit (see `commit`), date (UTC), versions, hardware (see `hardware`; `device`: what computed, if not the GPU
    that is there), and the given facts (seed, sample counts, seconds)."""
    versions = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return {
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": hardware(device),
        **facts,
    }
