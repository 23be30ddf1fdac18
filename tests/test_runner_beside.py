"""The notebook runner with several notebooks at once: --jobs, and `jobs` and `alone` of profiles.yaml."""

import json
import os
import signal
import subprocess
from functools import partial

import pytest
from trees import WRITE, driver, index, is_running, wait, write

from zsaa.kit.runner import beside, environment, errors, plan

MEET = """
import os, pathlib, time
marks = pathlib.Path({marks!r})
(marks / NAME).write_text(f"{{os.getpid()}} {{os.environ.get('OMP_NUM_THREADS')}}")
deadline = time.monotonic() + 60
while not (marks / {other!r}).exists():
    assert time.monotonic() < deadline, "nobody came"
    time.sleep(0.05)
print("I am", NAME)
"""
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def three(tree):
    """Two notebooks of which each waits for the other, and one that is to run alone."""
    (tree.root / "marks").mkdir()
    for name, other in (("first", "second"), ("second", "first")):
        tree.notebook(name, MEET.format(marks=str(tree.root / "marks"), other=other), WRITE)
    tree.notebook("timed", f"import pathlib\nprint(*pathlib.Path({str(tree.root / 'marks')!r}).iterdir())", WRITE)
    write(
        tree.root / "notebooks" / "profiles.yaml",
        """
        smoke:
          jobs: 2
          notebooks:
            timed: {alone: true}
            first:
            second:
        """,
    )
    return tree


def run(tree, *arguments):
    made = {**os.environ}
    made.pop("OMP_NUM_THREADS", None)
    return subprocess.run(driver(tree, *arguments), **PIPES, env=made, timeout=240)


def test_two_run_at_once_and_one_alone(three):
    """Each has its own log and half of the cores, and the page has them in the profile's order."""
    ended = run(three, "--jobs", "2")
    assert ended.returncode == errors.OK, ended.stdout
    assert list(index(three)) == ["timed", "first", "second"]
    for name, other in (("first", "second"), ("second", "first")):
        assert three.done(name) and f"I am {name}" in three.log(name) and f"I am {other}" not in three.log(name)
        assert (three.root / "marks" / name).read_text().split()[1] == str(max(1, environment.cores() // 2))
        record = json.loads((three.out / "done" / f"{name}.json").read_text())
        assert record["cpu_seconds"] > 0 and f"results/{name}.json" in record["files"]
    assert ended.stdout.index("timed  starts") > ended.stdout.index("second  done")
    assert run(three).stdout.count("done before") == 3


@pytest.mark.full
def test_after_a_failure_those_that_run_end_and_no_more_begin(three):
    marks = str(three.root / "marks")
    three.notebook("first", MEET.format(marks=marks, other="second"), "raise ValueError('of the first')")
    ended = run(three, "--jobs", "2")
    assert ended.returncode == errors.FAILED, ended.stdout
    assert "first  FAILED: ValueError: of the first" in ended.stdout
    assert three.done("second") and not three.done("first") and not three.done("timed")
    assert [status["status"] for status in index(three).values()] == ["not run", "failed", "done"]


@pytest.mark.full
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_all_kernels_and_the_next_run_goes_on(three, signum):
    marks = three.root / "marks"
    for name, other in (("first", "second"), ("second", "first")):
        three.notebook(name, MEET.format(marks=str(marks), other=other), "time.sleep(300)")
    free = None if signum == signal.SIGKILL else lambda: signal.signal(signum, signal.SIG_DFL)
    process = subprocess.Popen(driver(three, "--jobs", "2"), preexec_fn=free, **PIPES)
    wait(lambda: len(list(marks.iterdir())) == 2 or process.poll() is not None, 60)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    for mark in marks.iterdir():
        pid = int(mark.read_text().split()[0])
        wait(lambda pid=pid: not is_running(pid), 10)
        assert not is_running(pid)
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum, out
        assert "0 of 3 notebooks are done" in out and "Traceback" not in out
        assert [status["status"] for status in index(three).values()] == ["not run", "interrupted", "interrupted"]
        assert "INTERRUPTED" in three.log("first") and "INTERRUPTED" in three.log("second")
    for name in ("first", "second"):
        three.notebook(name, WRITE)
    ended = run(three, "--jobs", "2")
    assert ended.returncode == errors.OK, ended.stdout


def test_what_a_process_raises_arrives_and_its_death_is_a_failure(tree):
    class Local(Exception):
        """Cannot be pickled."""

    def fails(error):
        raise error

    job = plan.plan(tree.root, "smoke", tree.out)[0]
    assert beside.Worker(job, lambda: {"seconds": 1}).result() == {"seconds": 1}
    for error in (errors.NotebookError("cell 3"), errors.DiskError("full"), OSError(28, "No space", "x")):
        with pytest.raises(type(error)) as caught:
            beside.Worker(job, partial(fails, error)).result()
        assert str(caught.value) == str(error)
    with pytest.raises(RuntimeError, match="Local"):
        beside.Worker(job, partial(fails, Local())).result()
    with pytest.raises(errors.NotebookError, match="process was killed by signal 9"):
        beside.Worker(job, lambda: os.kill(os.getpid(), signal.SIGKILL)).result()
