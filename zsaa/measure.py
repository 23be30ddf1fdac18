"""Wall-clock time and energy, the provenance that every result file carries, and writing such a file once."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from zsaa.kit.energy import energy
from zsaa.kit.files import is_stray, write_text

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "zsaa")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


PACKAGE = Path(__file__).resolve().parent
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
    versions = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    return {
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "hardware": hardware(device),
        **facts,
    }


def hash_of(content) -> str:
    """SHA-256 (hex) of what survives JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, content: dict) -> Path:
    """Write `content` to `path` in one piece: readers never see half a file, not even after a power cut."""
    return write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


SHOWS_ONLY = (  # without a number: files, and folders
    "runner.py",
    *(
        f"kit/{name}.py"
        for name in (
            "catalogue",
            "claims",
            "energy",
            "files",
            "labels",
            "needs",
            "paper",
            "points",
            "store",
            "verdicts",
        )
    ),
    *(f"kit/{name}/" for name in ("figures", "report", "runner", "tables")),
)


def _sources() -> dict[str, Path]:
    """The sources that can change a number, by their path in the package (kernels lie elsewhere in a checkout)."""
    found = {}
    for package, prefix in (("zsaa", ""), ("zsaa.kernels", "kernels/")):
        for folder in map(Path, importlib.util.find_spec(package).submodule_search_locations):
            files = [path for path in folder.rglob("*.py") if not is_stray(path, folder)]
            found |= {prefix + path.relative_to(folder).as_posix(): path for path in files}
    return {name: found[name] for name in sorted(found) if not name.startswith(SHOWS_ONLY)}


@functools.cache
def code_hash() -> str:
    """SHA-256 of the sources that can change a number: the package and its kernels, without what only shows numbers.

    Asked once per process, so that it says what was imported, not what was edited meanwhile.
    """
    digest = hashlib.sha256()
    for name, path in _sources().items():
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def output_folder(given: str | Path) -> Path:
    """`given`, whose results/ will be written to, unless that is no folder or holds the results of the checkout."""
    out, committed = Path(given).expanduser(), (PACKAGE.parent / "results").resolve()
    if not str(given).strip():
        raise ValueError(
            f"output_dir is {str(given)!r}, which names no folder. Name one, outputs/experiments for example."
        )
    results = (out / "results").resolve()
    if committed.is_dir() and committed in (results, *results.parents):
        raise ValueError(
            f"output_dir is {str(given)!r}: results would be written among the committed ones, in {committed}. Name "
            "another folder, outputs/experiments for example."
        )
    return out


def cached(path: str | Path, settings: dict, compute: Callable[[], dict]) -> dict:
    """The result file at `path`, computed only if it is not there yet: a run that was killed goes on from here.

        result = cached(output_dir / "results/ppl-ptb.json", {"alphas": alphas, "seed": seed}, lambda: measure_ppl(...))

    path: a result file; one file is one unit of work, found again or done again as a whole.
    settings: all that decides the result besides the code: model, data, seeds, sizes. Must survive JSON.
    compute: returns the file's content, a dict that survives JSON. Its time and energy are added to the content's
        "provenance" (made here if there is none) under "seconds" (unless given), "gpu_joules" and "cpu_joules".

    A stored result counts only if settings, code (`code_hash`), the versions of torch and transformers, and the device
    are the same (it records them under "unit"), and if it is not older than ZSAA_NOT_BEFORE (seconds since 1970), which
    the runner's --force sets. What `compute` raises passes through, and the file stays as it was. Returns the content
    as it is read back, so that a stored and a new result are alike (keys are strings, tuples lists).
    """
    path = Path(path)
    versions = {package: _version(package) for package in ("torch", "transformers")}
    unit = {"settings": settings, "code": code_hash(), "versions": versions, "device": hardware()["device"]}
    unit = json.loads(json.dumps(unit, allow_nan=False))
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["unit"] == unit and path.stat().st_mtime >= float(os.environ.get("ZSAA_NOT_BEFORE", 0)):
            os.utime(path)  # now it belongs to this run, too
            return stored
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, cut off, or of another kind: done again
    with energy() as spent:
        content = compute()
    facts = content.get("provenance") or provenance()
    write_json(path, {**content, "provenance": {**spent, **facts}, "unit": unit})
    return json.loads(path.read_text(encoding="utf-8"))


def alternate(
    runs: dict[str, Callable[[], object]],
    repeats: int = 5,
    warmup: int | None = None,
    seconds: float = math.inf,
    progress: str | None = None,
) -> dict[str, dict]:
    """Time several variants in turn, round after round, so that a slow spell of the machine hits all of them.

    warmup: rounds before that; by default 1, and 2 on a GPU, where a shape's second run records a CUDA graph.
    repeats: timed rounds; fewer, but at least 3, if all rounds together would take longer than `seconds`.
    progress: the text of a progress bar; None shows none.

    Returns per variant {"latency_ms": median, "latency_ms_quartiles": [q1, q3], "speedup": median of the first variant
    over this median}. Wall-clock milliseconds; on a GPU each run is synchronized.
    """
    wait = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    warmup = warmup if warmup is not None else 2 if torch.cuda.is_available() else 1
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
