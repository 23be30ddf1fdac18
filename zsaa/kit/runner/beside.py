"""Several notebooks at once, each in a process of its own: papermill's log, the environment that a kernel gets and the
signals that end one belong to a process. Forked, so that nothing is imported twice."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from .environment import cores
from .errors import Interrupted, NotebookError
from .plan import Job


def share(at_once: int) -> dict[str, str]:
    """Variables for a kernel that shares the cores with others: its part of them. What the user has set stays."""
    if at_once == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}


class Worker:
    """A process that runs `work` for one notebook. A terminal's Ctrl-C reaches the runner alone, which hands it on."""

    def __init__(self, job: Job, work: Callable[[], dict]):
        self.job = job
        self.answer, sender = multiprocessing.Pipe(duplex=False)
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=_work, args=(work, sender, os.getpid()), name=job.name)
        self.process.start()
        sender.close()

    def result(self) -> dict:
        """The done record; raises what `work` raised, and NotebookError where its process was killed."""
        try:
            kind, value = pickle.loads(self.answer.recv_bytes())
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise NotebookError(f"its process {how}; signal 9 mostly means that memory ran out") from None
        self.process.join()
        if kind == "raised":
            raise value
        return value

    def stop(self, signum: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signum)


def first_to_end(workers: list[Worker]) -> Worker:
    """Waits for one of the workers, which has a result then."""
    ended = wait([worker.answer for worker in workers])
    return next(worker for worker in workers if worker.answer in ended)


def stop_all(workers: list[Worker], signum: int, seconds: float = 30.0) -> None:
    """Ends the workers, each with its kernel, as the signal would end the runner."""
    for worker in workers:
        worker.stop(signum)
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.stop(signal.SIGKILL)  # nothing, to one that has ended
        worker.process.join()


def _work(work: Callable[[], dict], sender: Connection, runner: int) -> None:
    try:
        os.setsid()
        threading.Thread(target=_end_with, args=(runner,), daemon=True).start()
        answer = ("done", work())
    except (Exception, Interrupted) as error:
        answer = ("raised", error)
    try:
        message = pickle.dumps(answer)
        pickle.loads(message)
    except Exception:  # an error that cannot travel
        message = pickle.dumps(("raised", RuntimeError(repr(answer[1]))))
    with contextlib.suppress(BrokenPipeError):
        sender.send_bytes(message)


def _end_with(runner: int) -> None:
    """Ends this process soon after the runner, should that be killed; the kernel ends soon after this one."""
    while os.getppid() == runner:
        time.sleep(0.2)
    os._exit(128 + signal.SIGKILL)
