"""Results that are measured once: found again as long as settings, code, versions and device are the same."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

from zsaa.kit.energy import energy
from zsaa.kit.files import check_writable, is_stray, write_text
from zsaa.measure import origin
from zsaa.measure.origin import hardware, provenance, version


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
            "equal",
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
    out, committed = Path(given).expanduser(), (origin.PACKAGE.parent / "results").resolve()
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
    check_writable(results / "result.json")
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
    versions = {package: version(package) for package in ("torch", "transformers")}
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
