"""Runs the notebooks of a profile, one after the other, with papermill. This is what `./run_all.sh` starts.

`notebooks/profiles.yaml` says which notebooks a profile runs, and with which parameters:

    smoke:
      about: one line for --list
      needs: [gpu]                    # what zsaa.needs knows; here for all notebooks, or below for one
      notebooks:
        00_quickstart:
          minutes: 3                  # measured; shown until this machine has a measurement of its own
          needs: ["model:openai-community/gpt2"]  # without it the notebook is not run
          wants: ["package:bitsandbytes"]         # without it parts of the notebook say "not run"
          parameters: {max_length: 256}

Everything generated goes to one folder, outputs/<profile>/ unless --output-dir names another:

    executed/NAME.ipynb           the executed notebook; exists only if the whole notebook ran
    executed/NAME.partial.ipynb   the same while it runs, and after a failure or interruption: to be read
    logs/NAME.log                 what the cells printed, with times and tracebacks
    done/NAME.json                written last: parameters, seconds, joules, files made, hashes of what made it
    timings/NAME.json             seconds of its last complete run, for --dry-run
    results/ figures/ tables/     written by the notebooks themselves, which get this folder as `output_dir`
    index.html                    written by zsaa.kit.report at the end of each run, after failures too

A notebook counts as done while its done-file matches the present notebook, zsaa source, parameters, lock
files and committed results, and all files that it made are still there. papermill's own output is never
asked: after a killed kernel it calls every cell completed. So a run that was stopped by anything, a power cut
included, goes on with the first notebook that is not done; and inside a notebook, each result file that was
written with zsaa.measure.cached is found again instead of measured again.

--shard k/n runs one of n disjoint parts. Shards may share an output folder (a network drive) at the same time, or
write to folders of their own: these are merged by copying them into one, and the report of the merged folder
(--report) shows all. No path is part of what makes a notebook done.

Only the standard library is imported at the top, so that --help, --list and --dry-run answer without an
installed package (--list and --dry-run need PyYAML); papermill is imported when a notebook is about to run.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

OK, FAILED, USAGE, SETUP, FOLDER, LACKING = 0, 1, 2, 3, 4, 5
EXIT_CODES = """exit codes:
  0    every selected notebook is done
  1    a notebook failed (an error in a cell, or its kernel was killed), or the index page did
  2    bad usage: unknown profile, notebook, option or parameter, or a damaged profiles.yaml or notebook
  3    the set-up failed (no network, no or too old Python, no room on the disk, a package missing)
  4    the output folder cannot be used: in use by another run, not writable, or full
  5    nothing failed, but a notebook was not run: what it needs is not here (the run says what, and how to get it)
  130  interrupted by Ctrl-C (143: by SIGTERM, 129: by SIGHUP); the same command goes on where it stopped
"""
PRODUCTS = ("results", "figures", "tables")  # the subfolders of the output folder that notebooks write to


class UsageError(Exception):
    """The command, profiles.yaml or a notebook's parameters are wrong; exit code 2."""


class FolderError(Exception):
    """The output folder cannot be used; exit code 4."""


class NotebookError(Exception):
    """A notebook did not run to its end; exit code 1."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


# --------------------------------------------------------------------------------
# What is to be run: profiles.yaml and the notebooks' parameter cells


@dataclasses.dataclass(frozen=True)
class Job:
    """One notebook of a profile, checked: the file exists and takes all of `parameters`."""

    name: str
    path: Path
    parameters: dict
    minutes: float | None  # estimate from profiles.yaml
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


def load_profiles(root: Path) -> dict:
    """Returns profiles.yaml as {profile: {"about", "needs", "notebooks": {name: {"minutes", "parameters", "needs",
    "wants"}}}}; all but "notebooks" may be missing."""
    path = root / "notebooks" / "profiles.yaml"
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("PyYAML is missing; run ./run_all.sh, which installs it") from None
    try:
        profiles = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing; the runner needs a clone, not a wheel") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(profiles, dict) or not profiles:
        raise UsageError(f"{path} must map profile names to their notebooks")
    for profile, entry in profiles.items():
        if not isinstance(entry, dict) or set(entry) - {"about", "needs", "notebooks"} or not entry.get("notebooks"):
            raise UsageError(f"{path}: profile {profile!r} takes 'about', 'needs' and 'notebooks', nothing else")
        for name, settings in entry["notebooks"].items():
            settings = entry["notebooks"][name] = {} if settings is None else settings
            if not isinstance(settings, dict) or set(settings) - {"minutes", "parameters", "needs", "wants"}:
                raise UsageError(
                    f"{path}: {profile}/{name} takes 'minutes', 'parameters', 'needs' and 'wants', nothing else"
                )
            minutes, parameters = settings.get("minutes"), settings.get("parameters")
            if minutes is not None and not isinstance(minutes, (int, float)):
                raise UsageError(f"{path}: {profile}/{name}: minutes must be a number, got {minutes!r}")
            if parameters is not None and not isinstance(parameters, dict):
                raise UsageError(f"{path}: {profile}/{name}: parameters must map names to values")
            for key, value in (("needs", entry.get("needs")), *settings.items()):
                if key in ("needs", "wants") and not _are_needs(value):
                    raise UsageError(f"{path}: {profile}/{name}: {key} must list {NEEDS}, got {value!r}")
    return profiles


NEEDS = "gpu, gpu:GIB, package:NAME, model:ID or dataset:ID"


def _are_needs(value: object) -> bool:
    pattern = re.compile(r"gpu(:\d+)?|(package|model|dataset):[\w./-]+")
    return value is None or (
        isinstance(value, list) and all(isinstance(item, str) and pattern.fullmatch(item) for item in value)
    )


def read_cells(path: Path) -> list[dict]:
    """Returns the cells of a notebook as {"type", "tags", "source"}: all that decides what it computes."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return [
            {
                "type": cell["cell_type"],
                "tags": cell.get("metadata", {}).get("tags", []),
                "source": "".join(cell["source"]),
            }
            for cell in cells
        ]
    except FileNotFoundError:
        raise UsageError(f"notebook {path} is missing, but profiles.yaml names it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a notebook (nbformat 4): {error!r}") from None


UNKNOWN_DEFAULT = object()


def declared_parameters(path: Path) -> dict:
    """Returns {name: default} of the cell tagged "parameters"; UNKNOWN_DEFAULT where it is not a literal.

    Finds the same names as papermill's inspect_notebook (a test compares them), but needs nothing installed.
    """
    tagged = [cell for cell in read_cells(path) if "parameters" in cell["tags"]]
    if len(tagged) != 1:
        raise UsageError(f"{path.name} must have exactly one cell tagged 'parameters', found {len(tagged)}")
    found = {}
    for node in ast.parse(tagged[0]["source"]).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name) and getattr(node, "value", None) is not None:
                try:
                    found[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    found[target.id] = UNKNOWN_DEFAULT
    return found


def check_parameters(name: str, given: dict, declared: dict) -> None:
    """Raises UsageError unless every given parameter is declared and fits the type of its default."""
    known = ", ".join(sorted(declared)) or "none"
    for key, value in given.items():
        if key not in declared:
            raise UsageError(f"{name}: unknown parameter {key!r}; the notebook's parameters are: {known}")
        default = declared[key]
        if default is None or default is UNKNOWN_DEFAULT or value is None:
            continue
        wanted = {float: (int, float), tuple: (list, tuple)}.get(type(default), type(default))
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            hint = "; YAML reads 2e-5 as text, write 2.0e-5" if isinstance(value, str) else ""
            raise UsageError(
                f"{name}: parameter {key} = {value!r} is of type {type(value).__name__}, "
                f"but its default {default!r} is of type {type(default).__name__}{hint}"
            )


def plan(root: Path, profile: str, output_dir: Path, seeds: list[int] | None = None) -> list[Job]:
    """Returns the checked jobs of `profile` in the order of profiles.yaml.

    seeds: given to every notebook that declares a parameter of that name; an error if none does.
    """
    profiles = load_profiles(root)
    if profile not in profiles:
        raise UsageError(f"unknown profile {profile!r}; the profiles are: {', '.join(profiles)}")
    jobs = []
    for name, settings in profiles[profile]["notebooks"].items():
        path = root / "notebooks" / f"{name}.ipynb"
        declared = declared_parameters(path)
        given = {**(settings.get("parameters") or {}), "output_dir": str(output_dir)}
        if seeds is not None and "seeds" in declared:
            given["seeds"] = seeds
        check_parameters(name, given, declared)
        needs = tuple(dict.fromkeys([*(profiles[profile].get("needs") or ()), *(settings.get("needs") or ())]))
        jobs.append(Job(name, path, given, settings.get("minutes"), needs, tuple(settings.get("wants") or ())))
    if seeds is not None and not any("seeds" in job.parameters for job in jobs):
        raise UsageError(f"--seeds: no notebook of profile {profile!r} has a parameter 'seeds'; leave the option out")
    return jobs


def shard(jobs: list[Job], part: int, parts: int) -> list[str]:
    """Returns the names of part `part` (from 1) of `parts`: disjoint, together all, the same on every machine.

    The longest notebooks are dealt out first, each to the part with the least to do; times are those of
    profiles.yaml, as a machine's own would give every machine another split.
    """
    loads, of = [0.0] * parts, {}
    for job in sorted(jobs, key=lambda job: -(job.minutes or 1.0)):
        of[job.name] = least = loads.index(min(loads))
        loads[least] += job.minutes or 1.0
    return [job.name for job in jobs if of[job.name] == part - 1]


# --------------------------------------------------------------------------------
# What is done already: content hashes and done-files


def _hash_files(root: Path, files: Iterator[Path] | list[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def fingerprint(root: Path, job: Job) -> dict[str, str]:
    """Returns one hash for each thing that a notebook's result depends on; any change makes it run again.

    Of the notebook only cell types, tags and sources count: opening and saving it in Jupyter changes nothing. The
    output folder does not count either, so that it can be moved and merged.
    """

    def files(folder: str, pattern: str) -> list[Path]:
        return [p for p in (root / folder).rglob(pattern) if p.is_file() and "__pycache__" not in p.parts]

    def text(value: object) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()

    return {
        "notebook": text(read_cells(job.path)),
        "zsaa": _hash_files(root, files("zsaa", "*.py") + files("kernels", "*.py") + files("ablation", "*.py")),
        "parameters": text({k: v for k, v in job.parameters.items() if k != "output_dir"}),
        "lock": _hash_files(root, list(root.glob("*.lock"))),
        "results": _hash_files(root, files("results", "*")),
    }


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds either the old or the whole new content, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed just here
        left.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else {}
    except (OSError, ValueError):
        return {}


def find_done(out: Path, job: Job, key: dict[str, str]) -> tuple[dict | None, str]:
    """Returns (the done-file's content, "") if `job` is done, else (None, why it has to run)."""
    record = _read_json(out / "done" / f"{job.name}.json")
    if not record:
        partial = out / "executed" / f"{job.name}.partial.ipynb"
        return None, "did not finish last time" if partial.exists() else "not run yet"
    changed = [part for part in key if record.get("key", {}).get(part) != key[part]]
    if changed:
        return None, "changed since: " + ", ".join(changed)
    missing = [file for file in record.get("files", []) if not (out / file).exists()]
    if missing:
        return None, f"{missing[0]} is gone"
    return record, ""


def estimate(out: Path, job: Job, key: dict[str, str]) -> tuple[float | None, str]:
    """Returns (seconds, where from): the last complete run in `out`, else the value in profiles.yaml."""
    last = _read_json(out / "timings" / f"{job.name}.json")
    if isinstance(last.get("seconds"), (int, float)):
        same = last.get("parameters") == key["parameters"]
        return float(last["seconds"]), "last run here" + ("" if same else ", with other parameters")
    return (None, "no estimate") if job.minutes is None else (60.0 * job.minutes, "profiles.yaml")


# --------------------------------------------------------------------------------
# Running one notebook


def clock(seconds: float | None) -> str:
    """Formats seconds as m:ss or h:mm:ss; "?" for None."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Progress:
    """One line per notebook that keeps changing on a terminal; elsewhere a line per cell and minute."""

    def __init__(self, name: str, cells: int):
        self.name, self.cells, self.cell, self.heading = name, cells, 0, ""
        self.start = self.said = time.monotonic()
        self.live = sys.stdout.isatty()

    def start_cell(self, index: int, source: str, is_code: bool) -> None:
        if not is_code:
            heading = re.search(r"^#+\s*(.+)$", source, re.MULTILINE)
            self.heading = heading.group(1).strip() if heading else self.heading
        self.cell = index + 1
        if is_code or self.live:
            self.say()

    def say(self) -> None:
        self.said = time.monotonic()
        text = f"  {self.name}  cell {self.cell}/{self.cells}  {clock(self.said - self.start)}  {self.heading}"
        print(f"\r\033[K{text[:100]}" if self.live else text.rstrip(), end="" if self.live else "\n", flush=True)

    def tick(self) -> None:
        if time.monotonic() - self.said >= (1 if self.live else 60):
            self.say()

    def close(self) -> None:
        if self.live:
            print("\r\033[K", end="", flush=True)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Sets `more`, and keeps the kernel's connection file, history and font cache out of the user's home,
    and the user's PYTHONPATH out of the kernel."""
    with tempfile.TemporaryDirectory(prefix="zsaa-jupyter-", ignore_cleanup_errors=True) as folder:
        new = {"JUPYTER_RUNTIME_DIR": f"{folder}/runtime", "IPYTHONDIR": f"{folder}/ipython"}
        new["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR", str(Path(sys.prefix) / "var" / "matplotlib"))
        new["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each log begins with a warning
        new["PYTHONPATH"] = ""  # kernels see what this interpreter sees, and no other zsaa or torch
        new |= more
        old = {name: os.environ.get(name) for name in new}
        os.environ.update(new)
        try:
            yield
        finally:
            for name, value in old.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


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
        from jupyter_client.kernelspec import KernelSpec
        from jupyter_client.manager import AsyncKernelManager
        from papermill.clientwrap import PapermillNotebookClient
        from papermill.engines import NBClientEngine, papermill_engines
        from papermill.log import logger

        execution = self

        class ThisPython(AsyncKernelManager):
            """Always this interpreter, whichever kernels the user has registered under the name python3."""

            @property
            def kernel_spec(self):
                argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                argv.append("--log-level=ERROR")  # it warns of plain text on the loopback interface
                return KernelSpec(argv=argv, display_name="Python 3", language="python")

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
                    kernel_manager_class=ThisPython,
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
                self.job.path,
                self.output,
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
        if isinstance(self.error, OSError) and self.error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise self.error
        if self.error is not None:
            raise NotebookError(self._explain(process)) from self.error
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
        full = "; the disk is full, make room and start again" if "No space left" in text else ""
        return f"{text.strip()} ({where}){full}"


def _frames(error: BaseException | None) -> str:
    """Returns the traceback that helps: a cell's own if it raised, none for a killed kernel, else ours."""
    from nbclient.exceptions import DeadKernelError

    if error is None or isinstance(error, DeadKernelError):
        return ""
    return "\n".join(getattr(error, "traceback", None) or []) or "".join(traceback.format_exception(error))


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
    from zsaa.measure import energy

    executed = out / "executed" / f"{job.name}.ipynb"
    partial, log = executed.with_suffix(".partial.ipynb"), out / "logs" / f"{job.name}.log"
    done = out / "done" / f"{job.name}.json"
    for path in (executed, log, done, *(out / folder / "x" for folder in PRODUCTS)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in (done, executed, partial):
        path.unlink(missing_ok=True)

    cells = read_cells(job.path)
    progress = Progress(job.name, len(cells) + 1)  # papermill adds the cell that sets the parameters
    started, start = datetime.datetime.now(datetime.timezone.utc), time.time_ns()
    with _logging_to(log) as logger, _environment(more):
        logger.info("%s, started %s, %s", job.name, started.isoformat(timespec="seconds"), sys.executable)
        logger.info("parameters: %s", json.dumps(job.parameters, default=str))
        try:
            with energy() as spent:
                Execution(job, partial, log, progress, locks).wait()
        except NotebookError as error:
            logger.error("FAILED: %s\n%s", error, _frames(error.__cause__))
            raise
        except Interrupted as error:
            logger.error("INTERRUPTED by %s", signal.Signals(error.signum).name)
            raise
        logger.info("done in %s", clock(spent["seconds"]))

    made = [p for folder in PRODUCTS for p in (out / folder).rglob("*") if p.is_file()]
    made = [p for p in made if not p.name.startswith(".") and p.stat().st_mtime_ns >= start]
    os.replace(partial, executed)
    _to_disk([executed, *made])
    record = {
        "name": job.name,
        "parameters": job.parameters,
        "started": started.isoformat(timespec="seconds"),
        **spent,  # seconds, gpu_joules, cpu_joules
        "files": [p.relative_to(out).as_posix() for p in (executed, *sorted(made))],
        "key": key,
    }
    timing = {"seconds": spent["seconds"], "parameters": key["parameters"]}
    write_atomically(out / "timings" / f"{job.name}.json", json.dumps(timing) + "\n")
    write_atomically(done, json.dumps(record, indent=2, default=str) + "\n")
    return record


# --------------------------------------------------------------------------------
# Running a profile


LOCK_SECONDS = 5.0  # how long the kernel of a killed run may take to notice


@contextlib.contextmanager
def _own_folder(out: Path, notebooks: list[str] | None = None) -> Iterator[tuple[int, ...]]:
    """Makes sure that `out` can be written and that no other run is writing there; yields the locks' descriptors.

    notebooks: of a shard. Shards share the folder, and each has its notebooks for itself.
    """
    wanted = [(".lock", fcntl.LOCK_EX if notebooks is None else fcntl.LOCK_SH)]
    wanted += [(f".lock-{name}", fcntl.LOCK_EX) for name in notebooks or ()]
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            locks = [(stack.enter_context(open(out / name, "a+")), kind) for name, kind in wanted]
        except OSError as error:
            raise FolderError(f"cannot write to {out}: {error.strerror}; name another with --output-dir") from None
        deadline = time.monotonic() + LOCK_SECONDS
        for lock, kind in locks:  # freed by the system, after kill -9 too
            while True:
                try:
                    fcntl.flock(lock, kind | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise FolderError(f"another run is using {out}; wait, or name another --output-dir") from None
                    time.sleep(0.1)
        yield tuple(lock.fileno() for lock, _ in locks)


def _status(out: Path, job: Job, status: str, message: str = "", record: dict | None = None) -> dict:
    """One entry of the list that zsaa.kit.report.index gets; log and executed are relative to `out`, or None."""
    log = f"logs/{job.name}.log"
    executed = f"executed/{job.name}.ipynb" if status == "done" else f"executed/{job.name}.partial.ipynb"
    return {
        "name": job.name,
        "status": status,  # "done", "failed", "interrupted", "not run", or "lacking": something that it needs
        "message": message,
        "parameters": job.parameters,
        "started": record["started"] if record else None,
        **{key: (record or {}).get(key) for key in ("seconds", "gpu_joules", "cpu_joules")},
        "minutes": job.minutes,
        "log": log if (out / log).exists() else None,
        "executed": executed if (out / executed).exists() else None,
    }


def look_for_needs(jobs: list[Job]) -> tuple[dict[str, str], bool]:
    """Returns (what of all that the jobs need or want is not here, with reasons; whether the hub is out of reach).

    A profile that names nothing of the hub counts as out of its reach: it must run without a network.
    """
    needs = [need for job in jobs for need in (*job.needs, *job.wants)]
    if not needs:
        return {}, True
    from zsaa.needs import missing

    found, reached = missing(needs)
    return found, not reached


def print_missing(jobs: list[Job], missing: dict[str, str]) -> None:
    """What is not here, how to get it, and what becomes of the notebooks without it."""
    for need, reason in missing.items():
        print(f"  not here: {need}\n      {reason}")
        for kind, effect in (("needs", "not run without it"), ("wants", "run without it, with cells 'not run'")):
            if names := [job.name for job in jobs if need in getattr(job, kind)]:
                print(f"      {effect}: {', '.join(names)}", flush=True)


def _lacks(job: Job, missing: dict[str, str]) -> str:
    return "; ".join(f"needs {need}: {missing[need]}" for need in job.needs if need in missing)


def run_profile(
    root: Path, out: Path, jobs: list[Job], selected: list[str], force: bool, keep_going: bool, locks: tuple[int, ...]
) -> int:
    """Runs the selected jobs that are not done, writes the index page, and returns the exit code."""
    code, again = OK, "  Start the same command again: what is done is not repeated."
    statuses, waiting = {job.name: _status(out, job, "not run", "not selected") for job in jobs}, []
    try:
        for job in jobs:
            if job.name in selected:
                record, why = find_done(out, job, fingerprint(root, job))
                if force or not record:
                    waiting.append((job, why or "forced"))
                else:
                    print(f"  {job.name}  done before, in {clock(record['seconds'])} (--force runs it again)")
                statuses[job.name] = _status(out, job, "done" if record else "not run", why, record)
        missing, offline = look_for_needs([job for job, _ in waiting])
        print_missing([job for job, _ in waiting], missing)
        more = {"ZSAA_NOT_BEFORE": str(time.time())} if force else {}  # see zsaa.measure.cached
        if offline and "HF_HUB_OFFLINE" not in os.environ:  # else libraries would ask the hub again and again
            more["HF_HUB_OFFLINE"] = "1"
        for job, why in waiting:
            if lacks := _lacks(job, missing):
                code = code or LACKING
                statuses[job.name] = _status(out, job, "lacking", lacks)
                continue
            key = fingerprint(root, job)
            seconds, source = estimate(out, job, key)
            print(f"  {job.name}  starts ({why}); takes about {clock(seconds)} ({source})", flush=True)
            try:
                record = run_notebook(out, job, key, locks, more)
            except NotebookError as error:
                code = FAILED
                statuses[job.name] = status = _status(out, job, "failed", str(error))
                print(f"  {job.name}  FAILED: {error}\n  log: {out}/{status['log']}")
                if status["executed"]:
                    print(f"  executed as far as it came: {out}/{status['executed']}")
                print(again, flush=True)
                if not keep_going:
                    break
            except BaseException as error:
                stopped = isinstance(error, Interrupted)
                detail = f"by {signal.Signals(error.signum).name}" if stopped else repr(error)
                statuses[job.name] = _status(out, job, "interrupted" if stopped else "failed", detail)
                raise
            else:
                without = [f"run without {need}: {missing[need]}" for need in job.wants if need in missing]
                statuses[job.name] = _status(out, job, "done", "; ".join(without), record)
                print(f"  {job.name}  done in {clock(record['seconds'])}", flush=True)
    except Interrupted as error:
        code = 128 + error.signum
        done = sum(status["status"] == "done" for status in statuses.values())
        name = signal.Signals(error.signum).name
        print(f"\n  Interrupted by {name}: {done} of {len(jobs)} notebooks are done.\n{again}")
        print("  Writing the index page (a second Ctrl-C skips it)", flush=True)
    except OSError as error:
        code = FOLDER
        print(f"  Cannot write to {out}: {error.strerror or error}. Make room or name another --output-dir.")
        print(again, flush=True)

    try:
        for job in jobs:  # another shard may have done some of them meanwhile
            if job.name not in selected:
                record, why = find_done(out, job, fingerprint(root, job))
                why = f"not selected; {why}" if why else ""
                statuses[job.name] = _status(out, job, "done" if record else "not run", why, record)
        from zsaa.kit import report

        page = report.index(out, list(statuses.values()))
        print(f"  report: {page}", flush=True)
    except Interrupted as error:
        code = 128 + error.signum
        print("  Interrupted before the index page was written.", flush=True)
    except Exception as error:
        print(f"  The index page could not be written: {type(error).__name__}: {error}", flush=True)
        code = code or FAILED
    return code


def print_plan(root: Path, profile: str, out: Path, jobs: list[Job], selected: list[str], force: bool) -> None:
    """What --dry-run shows: each notebook, its parameters, whether it is done, the time that is left and in all."""
    print(f"profile {profile}, output folder {out}")
    chosen = [job for job in jobs if job.name in selected]
    try:
        missing, _ = look_for_needs(chosen)
        print_missing(chosen, missing)
    except ModuleNotFoundError:
        missing = {}
        print("  what the notebooks need is not looked for before the set-up (make setup)")
    left, whole, unknown = 0.0, 0.0, 0
    for job in jobs:
        key = fingerprint(root, job)
        record, why = find_done(out, job, key)
        seconds, source = estimate(out, job, key)
        if job.name not in selected:
            state = "not selected"
        elif record and not force:
            state, seconds = f"done {record['started']}, in {clock(record['seconds'])}", record["seconds"]
        elif _lacks(job, missing):
            state = f"not run, for want of {' and '.join(need for need in job.needs if need in missing)}"
        else:
            left, unknown = left + (seconds or 0.0), unknown + (seconds is None)
            state = f"to do ({why or 'forced'}), about {clock(seconds)} ({source})"
        whole += seconds or 0.0
        print(f"\n{job.name}: {state}")
        for name, value in job.parameters.items():
            print(f"    {name} = {value!r}")
    print(f"\nleft: about {clock(left)}" + (f", and {unknown} without an estimate" if unknown else ""))
    print(f"the whole profile: about {clock(whole)}, set-up not included")


def _part(text: str) -> tuple[int, int]:
    """(k, n) of "k/n", for argparse."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not k/n with 1 <= k <= n, such as 2/3")
    return int(found[1]), int(found[2])


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 0 on, such as 0,1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="./run_all.sh",
        description="Runs the notebooks of a profile and writes tables, figures and an index page. "
        "Notebooks that are done and unchanged are not run again.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--profile", default="smoke", help="which profile of notebooks/profiles.yaml to run (default: smoke)")
    add("--only", metavar="NAME[,NAME]", help="run only these notebooks of the profile")
    add("--shard", metavar="K/N", type=_part, help="run only the k-th of n disjoint parts, as on one of n machines")
    add("--seeds", metavar="0,1,2", type=_seeds, help="give these seeds to every notebook that takes several")
    add("--output-dir", metavar="DIR", type=Path, help="write here instead of outputs/<profile>")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where an earlier run stopped (as is done anyway)")
    again.add_argument("--force", action="store_true", help="run again what is done already")
    add("--keep-going", action="store_true", help="after a failure go on with the next notebook")
    add("--list", action="store_true", help="list profiles and notebooks, and stop")
    add("--dry-run", action="store_true", help="show what would run, with parameters and times, and stop")
    add("--report", action="store_true", help="run nothing: write the report of what the output folder holds")
    add("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)  # another tree to run; for the tests
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code (see EXIT_CODES)."""
    options = parse(arguments)
    interrupted = False

    def on_signal(signum, frame):
        nonlocal interrupted
        if interrupted:  # the second one: the user will not wait
            os._exit(128 + signum)
        interrupted = True
        raise Interrupted(signum)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    old: dict[int, Callable | int | None] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            old = {signum: signal.signal(signum, on_signal) for signum in signals}
        root = options.root.resolve()
        if options.list:
            for profile, entry in load_profiles(root).items():
                needs = f" (needs {', '.join(entry['needs'])})" if entry.get("needs") else ""
                print(f"{profile}: {entry.get('about', '')}{needs}")
                for name, settings in entry["notebooks"].items():
                    minutes = settings.get("minutes")
                    print(f"    {name}" + (f"  (about {minutes:g} min)" if minutes else ""))
            return OK
        out = (options.output_dir or root / "outputs" / options.profile).resolve()
        jobs = plan(root, options.profile, out, options.seeds)
        names = [job.name for job in jobs]
        selected = options.only.split(",") if options.only is not None else names
        for name in selected:
            if name not in names:
                raise UsageError(f"unknown notebook {name!r}; profile {options.profile!r} has: {', '.join(names)}")
        if options.shard:
            selected = shard([job for job in jobs if job.name in selected], *options.shard)
        if options.report:
            selected = []
        if options.dry_run:
            print_plan(root, options.profile, out, jobs, selected, options.force)
            return OK
        import papermill  # noqa: F401  asked for here, so that a missing package is a set-up failure

        with _own_folder(out, selected if options.shard or options.report else None) as locks:
            part = f", shard {options.shard[0]} of {options.shard[1]}" if options.shard else ""
            print(f"profile {options.profile}{part}: {len(selected)} notebook(s), output folder {out}", flush=True)
            return run_profile(root, out, jobs, selected, options.force, options.keep_going, locks)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return FOLDER
    except ModuleNotFoundError as error:
        print(f"error: {error}. Run the set-up: make setup", file=sys.stderr)
        return SETUP
    except Interrupted as error:
        print("interrupted before anything ran", file=sys.stderr)
        return 128 + error.signum
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


if __name__ == "__main__":
    sys.exit(main())
