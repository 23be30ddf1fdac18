"""Running one notebook: its log, its executed copy and its done-file."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from ..energy import energy
from ..files import is_stray, write_text
from .console import Progress, clock
from .environment import environment
from .errors import Interrupted, NotebookError
from .kernel import Execution
from .plan import Job, read_cells

PRODUCTS = ("results", "figures", "tables")  # the subfolders of the output folder that notebooks write to


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[logging.Logger]:
    """Sends papermill's logger, and so what the cells print, to `path` and nowhere else."""

    class PlainText(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", super().format(record)).rstrip("\n")

    logger = logging.getLogger("papermill")
    path.write_text("")
    handler = logging.FileHandler(path, mode="a", encoding="utf-8")  # the kernel appends to it too
    handler.setFormatter(PlainText("%(asctime)s %(message)s", "%H:%M:%S"))
    state = logger.level, logger.propagate, logger.handlers
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield logger
    finally:
        level, logger.propagate, logger.handlers = state
        logger.setLevel(level)
        handler.close()


def _frames(error: BaseException | None) -> str:
    """Returns the traceback that helps: a cell's own if it raised, none for a killed kernel, else ours."""
    from nbclient.exceptions import DeadKernelError

    if error is None or isinstance(error, DeadKernelError):
        return ""
    return "\n".join(getattr(error, "traceback", None) or []) or "".join(traceback.format_exception(error))


@contextlib.contextmanager
def _cpu_seconds(spent: dict) -> Iterator[None]:
    """Adds "cpu_seconds": what the kernel and its children used of the processor, however busy the machine was."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    yield
    spent["cpu_seconds"] = round(used() - before, 1)


def _products(out: Path) -> dict[Path, tuple[int, int]]:
    """The files that notebooks wrote, with time and size: what differs afterwards was made. No comparison with a clock,
    as that of a network drive may be behind."""
    found = (path for folder in PRODUCTS for path in (out / folder).rglob("*") if not is_stray(path, out))
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in found if path.is_file()}


def _to_disk(paths: list[Path]) -> None:
    """Waits until the files, and their folders' entries for them, would survive a power cut."""
    for path in [*paths, *{path.parent for path in paths}]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def run_notebook(out: Path, job: Job, key: dict[str, str], locks: tuple[int, ...], more: dict[str, str]) -> dict:
    """Runs one notebook and returns its done record, already on disk. Raises NotebookError or Interrupted.

    more: environment variables for its kernel.
    Order matters: the done-file goes first and comes back last, so that it never stands beside other output.
    """
    executed = out / "executed" / f"{job.name}.ipynb"
    partial, log = executed.with_suffix(".partial.ipynb"), out / "logs" / f"{job.name}.log"
    done = out / "done" / f"{job.name}.json"
    for path in (executed, log, done, *(out / folder / "x" for folder in PRODUCTS)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in (done, executed, partial):
        path.unlink(missing_ok=True)

    cells = read_cells(job.path)
    progress = Progress(job.name, len(cells) + 1)  # papermill adds the cell that sets the parameters
    started, before = datetime.datetime.now(datetime.timezone.utc), _products(out)
    with _logging_to(log) as logger, environment(more):
        logger.info("%s, started %s, %s", job.name, started.isoformat(timespec="seconds"), sys.executable)
        logger.info("parameters: %s", json.dumps(job.parameters, default=str))
        try:
            with energy() as spent, _cpu_seconds(spent):
                Execution(job, partial, log, progress, locks).wait()
        except NotebookError as error:
            logger.error("FAILED: %s\n%s", error, _frames(error.__cause__))
            raise
        except Interrupted as error:
            logger.error("INTERRUPTED by %s", signal.Signals(error.signum).name)
            raise
        logger.info("done in %s", clock(spent["seconds"]))

    made = [path for path, state in _products(out).items() if before.get(path) != state]
    os.replace(partial, executed)
    _to_disk([executed, *made])
    record = {
        "name": job.name,
        "parameters": job.parameters,
        "started": started.isoformat(timespec="seconds"),
        **spent,  # seconds, cpu_seconds, gpu_joules, cpu_joules
        "files": [p.relative_to(out).as_posix() for p in (executed, *sorted(made))],
        "key": key,
    }
    timing = {"seconds": spent["seconds"], "cpu_seconds": spent["cpu_seconds"], "parameters": key["parameters"]}
    write_text(out / "timings" / f"{job.name}.json", json.dumps(timing) + "\n")
    write_text(done, json.dumps(record, indent=2, default=str) + "\n")
    return record


# --------------------------------------------------------------------------------
# Running a profile
