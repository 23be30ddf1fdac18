"""The one thread in which the slider's model runs: newest wanted first, and nothing waits for what nobody wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from zsaa.slider.engine import Interrupted

ORDER = ("show", "stream", "save", "fill")  # what is looked at now goes before what may be looked at later
PATIENCE = 0.5  # seconds that a pass may take before a newer setting cuts it short


class Worker:
    """Runs jobs, one at a time, in a daemon thread of its own.

    A job is an iterator, and a step of it at most one pass of the model: between two steps the worker turns to the most
    urgent job there is. A job submitted under a name takes the place of the one that had it. Within a step the model
    asks `overtaken`, and a step that raises Interrupted is dropped: a job that must not be lost catches it and tries
    again. Any other exception ends the job and goes to `failed(name, error)`.
    """

    def __init__(self, failed: Callable[[str, BaseException], None]):
        self._failed = failed
        self._jobs: dict[str, Iterator] = {}
        self._change = threading.Condition()
        self._running: tuple[str, Iterator] | None = None
        self._since = 0.0
        self._closed = False
        self.thread = threading.Thread(target=self._run, name="zsaa-slider", daemon=True)
        self.thread.start()

    def submit(self, name: str, job: Iterator) -> None:
        """Ask for `job`; newest wins. Any thread may call it."""
        with self._change:
            if self._closed:
                raise RuntimeError("this slider is closed. Open a new one with zsaa.slider(model, tokenizer, text).")
            self._jobs[name] = job
            self._change.notify_all()

    def drop(self, *names: str) -> None:
        with self._change:
            for name in names:
                self._jobs.pop(name, None)
            self._change.notify_all()

    def busy(self, *names: str) -> bool:
        with self._change:
            return any(name in self._jobs for name in names or ORDER)

    def wait(self, *names: str, timeout: float | None = None) -> bool:
        """Block until no job of these names (default: of any) is left; False after `timeout` seconds."""
        with self._change:
            return self._change.wait_for(
                lambda: self._closed or not any(name in self._jobs for name in names or ORDER), timeout
            )

    def overtaken(self) -> bool:
        """Is the running step of no use any more? Asked by the model before every layer, so without the lock."""
        name, job = self._running
        if self._closed or name not in self._jobs:
            return True
        if self._jobs.get(name) is not job:
            return name != "show" or time.monotonic() - self._since > PATIENCE
        return any(other in self._jobs for other in ORDER[: ORDER.index(name)])

    def close(self, timeout: float = 10.0) -> None:
        """Stop at the next layer and end the thread."""
        with self._change:
            self._closed = True
            self._jobs.clear()
            self._change.notify_all()
        if threading.current_thread() is not self.thread:
            self.thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or self._jobs)
                if self._closed:
                    return
                name = min(self._jobs, key=ORDER.index)
                job = self._jobs[name]
                self._running = (name, job)
                self._since = time.monotonic()
            over, error = False, None
            try:
                next(job)
            except (StopIteration, Interrupted):
                over = True
            except Exception as raised:
                over, error = True, raised
            with self._change:
                wanted = self._jobs.get(name) is job
                if over and wanted:
                    del self._jobs[name]
                self._change.notify_all()
            if error is not None and wanted:
                self._failed(name, error)
