"""Running a profile: what is done is skipped, what cannot run is named, the rest runs, and the index page tells all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import beside, page
from .console import clock, say
from .done import estimate, find_done, fingerprint
from .errors import FAILED, FOLDER, LACKING, OK, DiskError, Interrupted, NotebookError
from .notebook import run_notebook
from .plan import Job

AGAIN = "  Start the same command again: what is done is not repeated."


def look_for_needs(jobs: list[Job]) -> tuple[dict[str, str], bool]:
    """Returns (what of all that the jobs need or want is not here, with reasons; whether the hub is out of reach).

    A profile that names nothing of the hub counts as out of its reach: it must run without a network.
    """
    needs = [need for job in jobs for need in (*job.needs, *job.wants)]
    if not needs:
        return {}, True
    from ..needs import missing

    found, reached = missing(needs)
    return found, not reached


def say_missing(jobs: list[Job], missing: dict[str, str]) -> None:
    """What is not here, how to get it, and what becomes of the notebooks without it."""
    for need, reason in missing.items():
        say(f"  not here: {need}\n      {reason}")
        for kind, effect in (("needs", "not run without it"), ("wants", "run without it, with cells 'not run'")):
            if names := [job.name for job in jobs if need in getattr(job, kind)]:
                say(f"      {effect}: {', '.join(names)}")


def lacks(job: Job, missing: dict[str, str]) -> str:
    return "; ".join(f"needs {need}: {missing[need]}" for need in job.needs if need in missing)


class Run:
    """One run of a profile's selected jobs, `at_once` of them at a time, in the folder whose locks it holds."""

    def __init__(
        self,
        root: Path,
        out: Path,
        jobs: list[Job],
        selected: list[str],
        force: bool,
        keep_going: bool,
        locks: tuple,
        at_once: int = 1,
    ):
        self.root, self.out, self.jobs, self.selected = root, out, jobs, selected
        self.force, self.keep_going, self.locks, self.at_once = force, keep_going, locks, at_once
        self.code = OK
        self.statuses = {job.name: page.status(out, job, "not run", "not selected") for job in jobs}

    def go(self) -> int:
        """Runs what is to be run, writes the index page, and returns the exit code."""
        try:
            self._run_all(self._waiting())
        except Interrupted as error:
            self.code = 128 + error.signum
            done = sum(status["status"] == "done" for status in self.statuses.values())
            name = signal.Signals(error.signum).name
            say(f"\n  Interrupted by {name}: {done} of {len(self.jobs)} notebooks are done.\n{AGAIN}")
            say("  Writing the index page (a second Ctrl-C skips it)")
        except OSError as error:
            self.code = FOLDER
            where = f"{error.strerror or error}: {error.filename or self.out}"
            say(f"  Cannot go on: {where}. Make room, or name another --output-dir.\n{AGAIN}")
        self._write_page()
        return self.code

    def _waiting(self) -> list[tuple[Job, str]]:
        """The selected jobs that are not done, each with why it has to run."""
        waiting = []
        for job in self.jobs:
            if job.name in self.selected:
                record, why = find_done(self.out, job, fingerprint(self.root, job))
                if self.force or not record:
                    waiting.append((job, why or "forced"))
                else:
                    say(f"  {job.name}  done before, in {clock(record['seconds'])} (--force runs it again)")
                self.statuses[job.name] = page.status(self.out, job, "done" if record else "not run", why, record)
        return waiting

    def _run_all(self, waiting: list[tuple[Job, str]]) -> None:
        jobs = [job for job, _ in waiting]
        missing, offline = look_for_needs(jobs)
        say_missing(jobs, missing)
        more = {"ZSAA_NOT_BEFORE": str(time.time())} if self.force else {}  # see zsaa.measure.cached
        if offline and "HF_HUB_OFFLINE" not in os.environ:  # else libraries would ask the hub again and again
            more["HF_HUB_OFFLINE"] = "1"
        ready = []
        for job, why in waiting:
            if lacking := lacks(job, missing):
                self.code = self.code or LACKING
                self.statuses[job.name] = page.status(self.out, job, "lacking", lacking)
                continue
            without = [f"run without {need}: {missing[need]}" for need in job.wants if need in missing]
            ready.append((job, why, "; ".join(without)))
        together = [task for task in ready if self.at_once > 1 and not task[0].alone]
        if self._run_together(together, {**more, **beside.share(self.at_once)}):
            for job, why, without in (task for task in ready if task not in together):
                if not self._note(job, without, self._begin(job, why, more)):
                    break

    def _run_together(self, tasks: list[tuple[Job, str, str]], more: dict[str, str]) -> bool:
        """Runs these notebooks, several at a time; returns whether the next ones may run. After a failure those that
        run go on to their end."""
        waiting, running, may_go_on = list(tasks), {}, True
        if tasks:
            import papermill  # noqa: F401  once, for all workers
        try:
            while running or (waiting and may_go_on):
                while waiting and may_go_on and len(running) < self.at_once:
                    job, why, without = waiting.pop(0)
                    running[beside.Worker(job, self._begin(job, why, more))] = without
                worker = beside.first_to_end(list(running))
                without = running.pop(worker)
                may_go_on = self._note(worker.job, without, worker.result) and may_go_on
        except BaseException as error:
            beside.stop_all(list(running), getattr(error, "signum", signal.SIGTERM))
            for worker in running:
                self._note_stop(worker.job, error)
            raise
        return may_go_on

    def _begin(self, job: Job, why: str, more: dict[str, str]) -> Callable[[], dict]:
        """Says that the notebook starts; returns what runs it."""
        key = fingerprint(self.root, job)
        seconds, source = estimate(self.out, job, key)
        say(f"  {job.name}  starts ({why}); takes about {clock(seconds)} ({source})")
        return partial(run_notebook, self.out, job, key, self.locks, more)

    def _note(self, job: Job, without: str, result: Callable[[], dict]) -> bool:
        """Notes how a notebook went, whose done record `result` returns; returns whether the next one may run."""
        try:
            record = result()
        except NotebookError as error:
            full = isinstance(error, DiskError)
            self.code = FOLDER if full else FAILED
            self.statuses[job.name] = status = page.status(self.out, job, "failed", str(error))
            say(f"  {job.name}  FAILED: {error}\n  log: {self.out}/{status['log']}")
            if status["executed"]:
                say(f"  executed as far as it came: {self.out}/{status['executed']}")
            say(AGAIN)
            return self.keep_going and not full
        except BaseException as error:
            self._note_stop(job, error)
            raise
        self.statuses[job.name] = page.status(self.out, job, "done", without, record)
        say(f"  {job.name}  done in {clock(record['seconds'])} ({clock(record['cpu_seconds'])} of CPU time)")
        for file in record["files"]:
            if file.startswith("figures/") and file.endswith(".png"):
                say(f"      {self.out}/{file}")
        return True

    def _note_stop(self, job: Job, error: BaseException) -> None:
        stopped = isinstance(error, Interrupted)
        detail = f"by {signal.Signals(error.signum).name}" if stopped else repr(error)
        self.statuses[job.name] = page.status(self.out, job, "interrupted" if stopped else "failed", detail)

    def _write_page(self) -> None:
        try:
            for job in self.jobs:  # another shard may have done some of them meanwhile
                if job.name not in self.selected:
                    record, why = find_done(self.out, job, fingerprint(self.root, job))
                    why = f"not selected; {why}" if why else ""
                    self.statuses[job.name] = page.status(self.out, job, "done" if record else "not run", why, record)
            code, said = page.write(self.out, list(self.statuses.values()))
        except Interrupted as error:
            self.code = 128 + error.signum
            say("  Interrupted before the index page was written.")
            return
        except OSError as error:
            code, said = FOLDER, str(error)
        if code == OK:
            say(f"  report: {said}")
            return
        self.code = self.code or code
        say(f"  The index page could not be written: {said}")
