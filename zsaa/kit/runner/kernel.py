"""One notebook on its way through papermill, in a kernel of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from .console import Progress
from .errors import FULL, DiskError, NotebookError, is_full
from .plan import Job


def _verbatim(path: Path) -> str:
    """A path for papermill, which takes braces in it for parameters."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _this_python() -> type:
    """A kernel manager for this interpreter, whichever kernels the user has registered under the name python3."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self):
            argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            argv.append("--log-level=ERROR")  # it warns of plain text on the loopback interface
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    return ThisPython


class Execution:
    """One notebook on its way through papermill, in a thread of its own.

    The thread is there for the signals: in the main thread, nbclient takes over SIGINT and SIGTERM and turns
    them into a dead kernel. So the main thread keeps them, and stops the kernel itself.
    """

    def __init__(self, job: Job, output: Path, log: Path, progress: Progress, locks: tuple[int, ...]):
        self.job, self.output, self.log, self.progress, self.locks = job, output, log, progress, locks
        self.notebook = self.error = self.client = None
        self.cancelled = False
        # Not Thread.join: a join that a signal handler interrupts by raising takes the thread for ended
        self.finished = threading.Event()

    def _run(self) -> None:
        import papermill
        from papermill.clientwrap import PapermillNotebookClient
        from papermill.engines import NBClientEngine, papermill_engines
        from papermill.log import logger

        execution = self

        class Engine(NBClientEngine):
            @classmethod
            def execute_managed_notebook(cls, manager, kernel_name, **_):
                note_start = manager.cell_start

                def cell_start(cell, cell_index=None, **kwargs):
                    if execution.cancelled:
                        raise NotebookError("interrupted")
                    execution.progress.start_cell(cell_index, cell.source, cell.cell_type == "code")
                    return note_start(cell, cell_index, **kwargs)

                manager.cell_start = cell_start
                execution.client = PapermillNotebookClient(
                    manager,
                    kernel_name=kernel_name,
                    kernel_manager_class=_this_python(),
                    resources={"metadata": {"path": str(execution.job.path.parent)}},  # as when opened in Jupyter
                    startup_timeout=300,  # a cold disk and two busy cores take their time
                    timeout=None,
                    log=logger,
                    log_output=True,
                )
                with open(execution.log, "a") as raw:  # what does not come as a message: crashes, C libraries
                    # The kernel holds the folder's locks, too: where the runner alone is killed, the kernel lives
                    # on for a second, and the next run must not start before that.
                    execution.client.execute(stdout=raw, stderr=raw, pass_fds=execution.locks)

        try:
            papermill_engines.register("zsaa", Engine)
            self.notebook = papermill.execute_notebook(
                _verbatim(self.job.path),
                _verbatim(self.output),
                parameters=self.job.parameters,
                engine_name="zsaa",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                log_output=True,
            )
        except BaseException as error:
            self.error = error
        finally:
            self.finished.set()

    def kernel(self):
        """Returns the kernel's Popen object, or None where no kernel runs."""
        return getattr(getattr(getattr(self.client, "km", None), "provisioner", None), "process", None)

    def wait(self) -> None:
        """Blocks until the thread ends; raises what went wrong as NotebookError, or what interrupted it."""
        process = None
        try:
            threading.Thread(target=self._run, name=self.job.name, daemon=True).start()
            while not self.finished.wait(0.1):
                process = self.kernel() or process
                self.progress.tick()
        except BaseException:
            self.kill()
            raise
        finally:
            self.progress.close()
        if is_full(self.error):
            raise self.error
        if self.error is not None:
            text = self._explain(process)
            if any(os.strerror(code) in text for code in FULL):  # what a cell wrote to may be another disk
                raise DiskError(f"{text}; make room and start again") from self.error
            raise NotebookError(text) from self.error
        # papermill's word is not enough: a reply number is what shows that a cell ran
        silent = [
            number
            for number, cell in enumerate(self.notebook.cells, 1)
            if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None
        ]
        if silent:
            raise NotebookError(f"cell {silent[0]} of {len(self.notebook.cells)} did not run")

    def kill(self) -> None:
        """Ends the kernel and all processes that it started; waits for papermill to write what there is."""
        self.cancelled = True
        deadline = time.monotonic() + 20
        while not self.finished.is_set() and time.monotonic() < deadline:
            process = self.kernel()  # asked again and again: it may be just starting
            if process is not None and process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)  # the kernel leads a session of its own
            self.finished.wait(0.2)

    def _explain(self, process) -> str:
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        error, where = self.error, f"in cell {self.progress.cell} of {self.progress.cells}"
        if isinstance(error, DeadKernelError):
            code = process.poll() if process is not None else None
            how = f"was killed by signal {-code}" if code and code < 0 else "died"
            return f"the kernel {how} {where}; signal 9 mostly means that the machine ran out of memory"
        if isinstance(error, PapermillExecutionError):
            text = f"{error.ename}: {error.evalue}"
        else:
            text = f"{type(error).__name__}: {error}"
        return f"{text.strip()} ({where})"
