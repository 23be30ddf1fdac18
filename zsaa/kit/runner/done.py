"""What is done already: content hashes and done-files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..files import is_stray
from .plan import Job, read_cells

CODE = ("zsaa", "kernels", "ablation")  # the folders of Python sources
LOCKS = ("requirements.lock", "assets.lock")
RESULTS = (".json", ".safetensors")  # the suffixes of committed results


def hash_files(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def sources(root: Path) -> list[Path]:
    """The Python files below `root` that Python could import, and so no copies, backups or checkpoints of them."""
    found = (path for folder in CODE for path in (root / folder).rglob("*.py") if path.is_file())
    found = (path for path in found if not is_stray(path, root))
    return [path for path in found if all(p.isidentifier() for p in path.relative_to(root).with_suffix("").parts)]


def results(root: Path) -> list[Path]:
    """The committed results, without what editors and systems leave among them."""
    found = (path for path in (root / "results").rglob("*") if path.suffix in RESULTS and path.is_file())
    return [path for path in found if not is_stray(path, root)]


def fingerprint(root: Path, job: Job) -> dict[str, str]:
    """Returns one hash for each thing that a notebook's result depends on; any change makes it run again.

    Of the notebook only cell types, tags and sources count: opening and saving it in Jupyter changes nothing. The
    output folder does not count either, so that it can be moved and merged.
    """

    def text(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

    return {
        "notebook": text(read_cells(job.path)),
        "zsaa": hash_files(root, sources(root)),
        "parameters": text({k: v for k, v in job.parameters.items() if k != "output_dir"}),
        "lock": hash_files(root, [root / name for name in LOCKS if (root / name).is_file()]),
        "results": hash_files(root, results(root)),
    }


def _read(path: Path) -> tuple[dict, str]:
    """The content of a JSON file, {} if there is none that is whole; and why it cannot be read, if that is so."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}, ""
    except OSError as error:
        return {}, f"{path} cannot be read: {error.strerror}"
    return (value, "") if isinstance(value, dict) else ({}, "")


def find_done(out: Path, job: Job, key: dict[str, str]) -> tuple[dict | None, str]:
    """Returns (the done-file's content, "") if `job` is done, else (None, why it has to run)."""
    record, unreadable = _read(out / "done" / f"{job.name}.json")
    if not record:
        partial = out / "executed" / f"{job.name}.partial.ipynb"
        return None, unreadable or ("did not finish last time" if partial.exists() else "not run yet")
    changed = [part for part in key if record.get("key", {}).get(part) != key[part]]
    if changed:
        return None, "changed since: " + ", ".join(changed)
    missing = [file for file in record.get("files", []) if not (out / file).exists()]
    if missing:
        return None, f"{missing[0]} is gone"
    return record, ""


def estimate(out: Path, job: Job, key: dict[str, str]) -> tuple[float | None, str]:
    """Returns (seconds, where from): the last complete run in `out`, else the value in profiles.yaml."""
    last, _ = _read(out / "timings" / f"{job.name}.json")
    if isinstance(last.get("seconds"), (int, float)):
        same = last.get("parameters") == key["parameters"]
        return float(last["seconds"]), "last run here" + ("" if same else ", with other parameters")
    return (None, "no estimate") if job.minutes is None else (60.0 * job.minutes, "profiles.yaml")
