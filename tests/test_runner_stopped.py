"""The notebook runner when it, a kernel or the index page is stopped: signals, kills, closed terminals, full disks."""

import contextlib
import fcntl
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from trees import RUNNER, WRITE, driver, index, is_running, page_command, wait, write

from zsaa.kit.runner import errors, page, plan
from zsaa.kit.runner.done import fingerprint


@pytest.mark.full
def test_killed_kernel_is_not_done(tree, capfd):
    """The cell after the kill never ran, papermill says that it did, and the runner does not believe it."""
    tree.notebook("second", "print('before')", "import os; os.kill(os.getpid(), 9)", "pass", WRITE)
    assert tree.run() == errors.FAILED
    assert "the kernel was killed by signal 9 in cell 6 of 8" in capfd.readouterr().out
    assert tree.done("first")
    assert not tree.done("second")
    partial = nbformat.read(tree.out / "executed" / "second.partial.ipynb", 4)
    assert partial.cells[-1].metadata.papermill.status == "completed"  # papermill's word
    assert "before" in str(partial.cells[4].outputs)
    assert "FAILED: the kernel was killed" in tree.log("second")

    tree.notebook("second", WRITE)
    assert tree.run() == errors.OK
    assert (tree.runs("first"), tree.runs("second")) == (1, 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_signal_keeps_what_is_done_and_ends_the_kernel(tree, signum):
    """The kernel ignores SIGINT and has a child; both end with the runner, and the next run goes on."""
    mark = tree.root / "pids"
    tree.notebook(
        "second",
        "import os, signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"child = subprocess.Popen(['sleep', '300'])\nopen({str(mark)!r} + '.new', 'w').write("
        f"f'{{os.getpid()}} {{child.pid}}')\nos.rename({str(mark)!r} + '.new', {str(mark)!r})\n"
        "time.sleep(300)",
        WRITE,
    )
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(driver(tree), preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL), **pipes)
    wait(lambda: mark.exists() or process.poll() is not None, 60)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out
    assert "1 of 2 notebooks are done" in out
    assert "Traceback" not in out
    for pid in map(int, mark.read_text().split()):
        wait(lambda pid=pid: not is_running(pid), 10)
        assert not is_running(pid)
    assert tree.done("first")
    assert not tree.done("second")
    assert (tree.out / "executed" / "second.partial.ipynb").exists()
    assert index(tree)["second"]["status"] == "interrupted"
    assert "INTERRUPTED" in tree.log("second")
    if signum == signal.SIGINT:
        tree.notebook("second", WRITE)
        assert tree.run() == errors.OK
        assert (tree.runs("first"), tree.runs("second")) == (1, 1)


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(tree, signum):
    """nohup ignores SIGHUP, a script's background job SIGINT: the run goes on to its end."""
    mark = tree.root / "started"
    tree.notebook("first", f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(2)", WRITE)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(driver(tree), preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN), **pipes)
    wait(lambda: mark.exists() or process.poll() is not None, 60)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == errors.OK, out
    assert tree.done("second")


@pytest.mark.full
def test_a_run_whose_reader_has_gone_goes_on(tree):
    process = subprocess.Popen(driver(tree), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as in ./run_all.sh | head -0
    assert (process.stderr.read(), process.wait(timeout=120)) == ("", errors.OK)
    assert tree.done("second")


def test_index_page_that_fails(tree, capfd, monkeypatch):
    """Finished notebooks stay done, and the exit code says that something is missing."""
    for job in plan.plan(tree.root, "smoke", tree.out):
        record = {"key": fingerprint(tree.root, job), "files": [], "seconds": 1, "started": ""}
        write(tree.out / "done" / f"{job.name}.json", json.dumps(record))

    failures = {
        "import sys; print('warning', file=sys.stderr); sys.exit('ValueError: no template')": "ValueError: no template",
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "its process was killed by SIGSEGV",
    }
    for text, said in failures.items():
        monkeypatch.setattr(page, "COMMAND", page_command(text))
        assert tree.run() == errors.FAILED
        assert f"index page could not be written: {said}" in capfd.readouterr().out
    assert (tree.out / "done" / "first.json").exists()


def test_full_disk(tree, capfd, monkeypatch):
    """A disk that fills up while papermill writes gives exit code 4 and no done-file."""
    import papermill.iorw

    write_file = papermill.iorw.LocalHandler.write

    def full(self, text, path):
        if '"n": 3' in text or "n = 3" in text:
            raise OSError(28, "No space left on device")
        return write_file(self, text, path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    assert tree.run("--only", "first") == errors.FOLDER
    assert "No space left on device" in capfd.readouterr().out
    assert not tree.done("first")


def test_full_disk_in_a_cell(tree, capfd):
    """What a cell cannot write for want of room is no fault of the notebook's."""
    tree.notebook("first", "raise OSError(28, 'No space left on device', 'weights.bin')", WRITE)
    assert tree.run("--keep-going") == errors.FOLDER
    out = capfd.readouterr().out
    assert "No space left on device" in out and "make room and start again" in out
    assert not tree.done("first") and index(tree)["first"]["status"] == "failed"
    assert not (tree.out / "done" / "second.json").exists()


def test_full_disk_while_the_index_page_is_written(tmp_path, capfd, monkeypatch):
    """Its process says so in its exit code, and leaves no draft."""
    import types

    import zsaa.kit
    from zsaa.kit.files import write_text

    def index(output_dir, statuses):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            write_text(output_dir / "index.html", "x" * 5_000_000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "zsaa.kit.report", types.SimpleNamespace(index=index))
    monkeypatch.setattr(zsaa.kit, "report", sys.modules["zsaa.kit.report"], raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO("[]"))
    assert page.main(str(tmp_path)) == errors.FOLDER
    said = capfd.readouterr().err
    assert "OSError: [Errno 28] No space left on device" in said
    assert not list(tmp_path.iterdir())

    monkeypatch.setattr(page, "COMMAND", page_command(f"import sys; print({said!r}, file=sys.stderr); sys.exit(4)"))
    assert page.write(tmp_path, []) == (errors.FOLDER, said.strip())


# A notebook of four units, each of which is zsaa.measure.cached's, with a stand-in for torch so that it starts quickly.
# A unit's value is drawn at random: a unit that was done again would show. `busy` is held while a unit is computed, so
# that a kernel that outlives its runner and one of the next run would be seen to compute at once.
UNITS = """
import fcntl, os, pathlib, sys, time, types, uuid
cuda = types.SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, get_num_threads=lambda: 1, device=None)
sys.modules["zsaa"] = types.ModuleType("zsaa")
sys.modules["zsaa"].__path__ = [{zsaa!r}]
from zsaa.measure import once
import zsaa.measure as measure
once.code_hash = lambda: "code"
pathlib.Path(output_dir, "pid").write_text(str(os.getpid()))
"""
UNIT = """
def compute():
    with open(pathlib.Path(output_dir, "busy"), "w") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.25)
    return {{"value": uuid.uuid4().hex, "provenance": {{"seed": 0}}}}

for unit in range({first}, {first} + 2):
    measure.cached(pathlib.Path(output_dir, "results", f"{{NAME}}-{{unit}}.json"), {{"unit": unit, "n": n}}, compute)
"""


def finished(tree):
    """What counts as finished: each whole result file with its drawn value, each done-file with its start."""
    values = {}
    for path in [*(tree.out / "results").glob("*.json"), *(tree.out / "done").glob("*.json")]:
        content = json.loads(path.read_text())  # whole, or this raises
        values[path.name if "value" in content else f"done {path.stem}"] = content.get("value") or content["started"]
    return values


@pytest.mark.full
def test_killed_at_any_point_it_goes_on_without_redoing_or_losing_anything(tree):
    """The runner, the kernel, or both are killed at random moments, again and again, and the same command goes on."""
    draw = random.Random(7)
    head = UNITS.format(zsaa=str(RUNNER.parent))
    for name in ("first", "second"):
        tree.notebook(name, head, UNIT.format(first=0), UNIT.format(first=2))
    tree.profiles()

    def start():
        (tree.out / "pid").unlink(missing_ok=True)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(driver(tree), start_new_session=True, **pipes)

    before = {}
    tree.out.mkdir(parents=True)
    moments = [("both", 0.8), ("runner", None), ("kernel", None), ("both", None), ("runner", 1.6)]
    for victims, early in [*moments, ("kernel", None), ("both", None), ("runner", None)]:
        process = start()
        running, deadline = tree.out / "pid", time.monotonic() + (early or 60)
        while not running.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(draw.uniform(0.0, 0.2 if early else 0.8))
        kernel = int(running.read_text() or 0) if running.exists() else None
        with contextlib.suppress(ProcessLookupError):
            if victims != "runner" and kernel:
                os.killpg(kernel, signal.SIGKILL)
            if victims != "kernel" or not kernel:
                os.killpg(process.pid, signal.SIGKILL)
        out = process.communicate(timeout=60)[0]
        with open(tree.out / ".lock", "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            assert not kernel or not is_running(kernel), "the next run would start beside a living kernel"
        assert "BlockingIOError" not in out and "Traceback" not in out, out
        assert process.returncode in (-signal.SIGKILL, errors.FAILED, errors.OK), out
        after = finished(tree)
        assert before.items() <= after.items()
        before = after
    assert len(before) >= 3, "the kills came too early to show anything"

    process = start()
    out = process.communicate(timeout=120)[0]
    assert process.returncode == errors.OK, out
    after = finished(tree)
    assert before.items() <= after.items()
    units = {f"{name}-{unit}.json" for name in ("first", "second") for unit in range(4)}
    assert set(after) == {"done first", "done second", *units}
    record = json.loads((tree.out / "done" / "second.json").read_text())
    assert {f"results/second-{unit}.json" for unit in range(4)} <= set(record["files"])
    left = [p.name for p in tree.out.rglob("*") if p.name.startswith(".") and not p.name.startswith(".lock")]
    assert not left and not list(tree.out.rglob("*partial*"))
    process = start()
    process.communicate(timeout=120)
    assert finished(tree) == after
