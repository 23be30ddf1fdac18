"""The index page of an output folder, made by a process of its own: a run that was interrupted while it imported
something may not import it again (a second import of half of torch ends in a segmentation fault), and the runner stays
small and quick to start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from .errors import FAILED, FOLDER, OK, is_full
from .plan import Job

COMMAND = [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", "zsaa.kit.runner.page"]


def status(out: Path, job: Job, state: str, message: str = "", record: dict | None = None) -> dict:
    """One entry of the list that zsaa.kit.report.index gets; log and executed are relative to `out`, or None."""
    log = f"logs/{job.name}.log"
    executed = f"executed/{job.name}.ipynb" if state == "done" else f"executed/{job.name}.partial.ipynb"
    return {
        "name": job.name,
        "status": state,  # "done", "failed", "interrupted", "not run", or "lacking": something that it needs
        "message": message,
        "parameters": job.parameters,
        "started": record["started"] if record else None,
        **{key: (record or {}).get(key) for key in ("seconds", "gpu_joules", "cpu_joules")},
        "minutes": job.minutes,
        "log": log if (out / log).exists() else None,
        "executed": executed if (out / executed).exists() else None,
    }


def write(out: Path, statuses: list[dict]) -> tuple[int, str]:
    """Writes the index page; returns an exit code, and the page's path or what went wrong."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # In a session of its own, as a Ctrl-C that is meant for the runner would reach it too.
    child = subprocess.Popen([*COMMAND, str(out)], **pipes, encoding="utf-8", errors="replace", start_new_session=True)
    try:
        made, said = child.communicate(json.dumps(statuses, default=str))
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode == OK:
        return OK, made.strip()
    if child.returncode < 0:
        return FAILED, f"its process was killed by {signal.Signals(-child.returncode).name}"
    code = FOLDER if child.returncode == FOLDER else FAILED
    return code, (said.strip().splitlines() or [f"exit code {child.returncode}"])[-1]


def main(out: str) -> int:
    """The process: statuses come in as JSON, the page's path goes out."""
    try:
        from zsaa.kit import report

        print(report.index(Path(out), json.load(sys.stdin)))
    except Exception as error:
        text = " ".join(str(error).split())
        print(f"{type(error).__name__}: {text}", file=sys.stderr)
        return FOLDER if is_full(error) else FAILED
    return OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
