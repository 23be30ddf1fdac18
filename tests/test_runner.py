"""The notebook runner, on tiny notebooks: types, resume, failures, killed kernels, signals, bad input."""

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import types

import nbformat
import pytest

from zsaa import runner

PARAMETERS = "n = 1\nrate = 0.5\nnames = ['a']\nflag = False\nfree = None\noutput_dir = '.'"
WRITE = """
import json, pathlib
out = pathlib.Path(output_dir, "results")
out.mkdir(parents=True, exist_ok=True)
count = out / f"{NAME}.json"
runs = json.loads(count.read_text())["runs"] + 1 if count.exists() else 1
count.write_text(json.dumps({"runs": runs, "n": n, "rate": rate, "names": names, "flag": flag}))
"""


def make_notebook(path, *cells, parameters=PARAMETERS):
    """Writes a notebook whose cells follow a parameters cell; a cell that starts with # is markdown."""
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    new = [(nbformat.v4.new_markdown_cell if c.startswith("#") else nbformat.v4.new_code_cell)(c) for c in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {path.stem}"), first, *new])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


class Tree:
    """A repository in a temporary folder with the notebooks first and second, each counting its runs."""

    def __init__(self, root):
        self.root, self.out = root, root / "outputs" / "smoke"
        self.notebook("first")
        self.notebook("second")
        write(root / "zsaa" / "code.py", "x = 1\n")
        write(root / "requirements.lock", "torch==1\n")
        write(root / "results" / "old.json", "{}\n")
        self.profiles("{n: 3, rate: 2.0e-5, names: [b, c], flag: true}")

    def notebook(self, name, *cells):
        make_notebook(self.root / "notebooks" / f"{name}.ipynb", f"NAME = {name!r}", *(cells or [WRITE]))

    def profiles(self, first="{}"):
        write(
            self.root / "notebooks" / "profiles.yaml",
            f"""
            smoke:
              about: two notebooks
              notebooks:
                first:
                  minutes: 2
                  parameters: {first}
                second:
            other:
              notebooks: {{second: }}
            """,
        )

    def run(self, *arguments):
        return runner.main(["--root", str(self.root), *arguments])

    def runs(self, name):
        return json.loads((self.out / "results" / f"{name}.json").read_text())["runs"]

    def done(self, name):
        assert (self.out / "done" / f"{name}.json").exists() == (self.out / f"executed/{name}.ipynb").exists()
        return (self.out / "done" / f"{name}.json").exists()

    def log(self, name):
        return (self.out / "logs" / f"{name}.log").read_text()


def stub_reporting():
    """A stand-in for zsaa.kit.report that keeps what index() was called with in index.json."""

    def index(output_dir, statuses):
        page = output_dir / "index.json"
        page.write_text(json.dumps(statuses))
        return page

    return types.SimpleNamespace(index=index)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    import zsaa.kit

    reporting = stub_reporting()
    monkeypatch.setitem(sys.modules, "zsaa.kit.report", reporting)
    monkeypatch.setattr(zsaa.kit, "report", reporting, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return Tree(tmp_path / "repo")


def index(tree):
    return {status["name"]: status for status in json.loads((tree.out / "index.json").read_text())}


def test_typed_parameters_resume_and_force(tree, capfd):
    """One run gives typed values, a second runs nothing, --force runs what --only names, HOME stays clean."""
    assert tree.run() == runner.OK
    result = json.loads((tree.out / "results" / "first.json").read_text())
    assert result == {"runs": 1, "n": 3, "rate": 2e-5, "names": ["b", "c"], "flag": True}
    assert tree.done("first")
    assert tree.done("second")
    assert [s["status"] for s in index(tree).values()] == ["done", "done"]
    record = json.loads((tree.out / "done" / "first.json").read_text())
    assert record["files"] == ["executed/first.ipynb", "results/first.json"]
    assert record["seconds"] > 0
    out = capfd.readouterr().out
    assert "cell 3/5" in out  # markdown, parameters, what papermill injects, and the two cells
    assert "about 2:00 (profiles.yaml)" in out
    assert not list(tree.out.rglob("*partial*"))
    assert not [p for p in tree.out.rglob(".*") if not p.name.startswith(".lock")]  # no temporary file is left
    assert not list((tree.root.parent / "home").rglob("*"))

    started = time.monotonic()
    assert tree.run() == runner.OK
    assert time.monotonic() - started < 10
    assert (tree.runs("first"), tree.runs("second")) == (1, 1)
    assert "done before" in capfd.readouterr().out

    assert tree.run("--force", "--only", "first") == runner.OK
    assert (tree.runs("first"), tree.runs("second")) == (2, 1)
    assert [s["status"] for s in index(tree).values()] == ["done", "done"]
    assert "(last run here)" in capfd.readouterr().out


def test_every_input_is_part_of_the_key(tree):
    """Notebook cells, package, kernels, parameters, locks and committed results count; outputs do not."""
    (job, _) = runner.plan(tree.root, "smoke", tree.out)
    key = runner.fingerprint(tree.root, job)
    changes = {
        "zsaa": lambda: write(tree.root / "zsaa" / "code.py", "x = 2\n"),
        "kernels": lambda: write(tree.root / "kernels" / "new.py", ""),
        "lock": lambda: write(tree.root / "assets.lock", "llm==1\n"),
        "results": lambda: write(tree.root / "results" / "sub" / "new.json", "{}"),
        "parameters": lambda: tree.profiles("{n: 4}"),
        "notebook": lambda: tree.notebook("first", WRITE, "1 + 1"),
    }
    for name, change in changes.items():
        change()
        (job, _) = runner.plan(tree.root, "smoke", tree.out)
        new = runner.fingerprint(tree.root, job)
        changed = [part for part in key if key[part] != new[part]]
        assert changed == ["zsaa" if name == "kernels" else name]
        key = new

    notebook = nbformat.read(job.path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    notebook.cells[1].execution_count = 7
    notebook.metadata["kernelspec"] = {"name": "else", "display_name": "else", "language": "x"}
    nbformat.write(notebook, job.path)
    write(tree.root / "zsaa" / "__pycache__" / "code.py", "x = 3\n")
    assert runner.fingerprint(tree.root, job) == key


def test_done_file_needs_matching_key_and_all_files(tree):
    (job, _) = runner.plan(tree.root, "smoke", tree.out)
    key, product = runner.fingerprint(tree.root, job), tree.out / "figures" / "a.png"
    write(product, "")
    record = {"key": key, "files": ["figures/a.png"], "seconds": 1, "started": ""}
    done = tree.out / "done" / "first.json"

    assert runner.find_done(tree.out, job, key) == (None, "not run yet")
    write(done, json.dumps(record))
    assert runner.find_done(tree.out, job, key) == (record, "")
    assert runner.find_done(tree.out, job, {**key, "lock": "x"}) == (None, "changed since: lock")
    product.unlink()
    assert runner.find_done(tree.out, job, key) == (None, "figures/a.png is gone")
    write(done, json.dumps(record)[:20])  # cut off
    assert runner.find_done(tree.out, job, key)[0] is None
    write(done, "[]")
    assert runner.find_done(tree.out, job, key)[0] is None


def test_failing_cell(tree, capfd):
    """Log and partial notebook tell why; with --keep-going the rest runs; mended, only that one runs."""
    tree.notebook("first", "print('before')", "1 / 0", WRITE)
    assert tree.run() == runner.FAILED
    out = capfd.readouterr().out
    assert "ZeroDivisionError: division by zero (in cell 6 of 7)" in out
    assert "ZeroDivisionError" in tree.log("first")
    assert "before" in tree.log("first")
    assert "\x1b" not in tree.log("first")
    partial = nbformat.read(tree.out / "executed" / "first.partial.ipynb", 4)
    assert any("before" in str(cell.get("outputs")) for cell in partial.cells)
    assert not tree.done("first")
    assert not (tree.out / "done" / "second.json").exists()
    states = index(tree)
    assert (states["first"]["status"], states["second"]["status"]) == ("failed", "not run")
    assert states["first"]["executed"] == "executed/first.partial.ipynb"

    assert tree.run("--keep-going") == runner.FAILED
    assert tree.done("second")
    assert not tree.done("first")

    tree.notebook("first", WRITE)
    assert tree.run() == runner.OK
    assert tree.runs("second") == 1
    assert not list(tree.out.rglob("*partial*"))


def test_killed_kernel_is_not_done(tree, capfd):
    """The cell after the kill never ran, papermill says that it did, and the runner does not believe it."""
    tree.notebook("second", "print('before')", "import os; os.kill(os.getpid(), 9)", "pass", WRITE)
    assert tree.run() == runner.FAILED
    assert "the kernel was killed by signal 9 in cell 6 of 8" in capfd.readouterr().out
    assert tree.done("first")
    assert not tree.done("second")
    partial = nbformat.read(tree.out / "executed" / "second.partial.ipynb", 4)
    assert partial.cells[-1].metadata.papermill.status == "completed"  # papermill's word
    assert "before" in str(partial.cells[4].outputs)
    assert "FAILED: the kernel was killed" in tree.log("second")

    tree.notebook("second", WRITE)
    assert tree.run() == runner.OK
    assert (tree.runs("first"), tree.runs("second")) == (1, 1)


def test_cells_that_did_not_run(tree, capfd):
    """sys.exit(0) ends a notebook early without an error; that is not done either."""
    tree.notebook("first", "import sys; sys.exit(0)", WRITE)
    assert tree.run("--only", "first") == runner.FAILED
    assert "cell 6 of 6 did not run" in capfd.readouterr().out
    assert not tree.done("first")


DRIVER = """
import contextlib, sys, types, json, importlib.util
def index(output_dir, statuses):
    (output_dir / "index.json").write_text(json.dumps(statuses))
    return output_dir / "index.json"
zsaa, kit = types.ModuleType("zsaa"), types.ModuleType("zsaa.kit")
kit.report = types.SimpleNamespace(index=index)
@contextlib.contextmanager
def energy():
    spent = {{"seconds": 0.0}}
    yield spent
sys.modules |= {{"zsaa": zsaa, "zsaa.kit": kit, "zsaa.measure": types.SimpleNamespace(energy=energy)}}
spec = importlib.util.spec_from_file_location("runner", {path!r})
runner = importlib.util.module_from_spec(spec)
sys.modules["runner"] = runner
spec.loader.exec_module(runner)
sys.exit(runner.main(["--root", {root!r}]))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
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
    code = DRIVER.format(path=runner.__file__, root=str(tree.root))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out
    assert "1 of 2 notebooks are done" in out
    assert "Traceback" not in out
    for pid in map(int, mark.read_text().split()):
        deadline = time.monotonic() + 10
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_running(pid)
    assert tree.done("first")
    assert not tree.done("second")
    assert (tree.out / "executed" / "second.partial.ipynb").exists()
    assert index(tree)["second"]["status"] == "interrupted"
    assert "INTERRUPTED" in tree.log("second")
    if signum == signal.SIGINT:
        tree.notebook("second", WRITE)
        assert tree.run() == runner.OK
        assert (tree.runs("first"), tree.runs("second")) == (1, 1)


def is_running(pid):
    """True unless the process is gone or a zombie that nobody has waited for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_index_page_that_fails(tree, capfd, monkeypatch):
    """Finished notebooks stay done, and the exit code says that something is missing."""
    for job in runner.plan(tree.root, "smoke", tree.out):
        record = {"key": runner.fingerprint(tree.root, job), "files": [], "seconds": 1, "started": ""}
        write(tree.out / "done" / f"{job.name}.json", json.dumps(record))

    def broken(output_dir, statuses):
        raise ValueError("no template")

    monkeypatch.setattr(sys.modules["zsaa.kit.report"], "index", broken)
    assert tree.run() == runner.FAILED
    assert "index page could not be written: ValueError: no template" in capfd.readouterr().out
    assert (tree.out / "done" / "first.json").exists()


def test_write_atomically_keeps_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "a" / "file.json"
    runner.write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        runner.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.json"]


def test_full_disk(tree, capfd, monkeypatch):
    """A disk that fills up while papermill writes gives exit code 4 and no done-file."""
    import papermill.iorw

    write_file = papermill.iorw.LocalHandler.write

    def full(self, text, path):
        if '"n": 3' in text or "n = 3" in text:
            raise OSError(28, "No space left on device")
        return write_file(self, text, path)

    monkeypatch.setattr(papermill.iorw.LocalHandler, "write", full)
    assert tree.run("--only", "first") == runner.FOLDER
    assert "No space left on device" in capfd.readouterr().out
    assert not tree.done("first")


def test_folder_in_use_or_not_writable(tree, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(runner, "LOCK_SECONDS", 0.2)
    with runner._own_folder(tree.out):
        assert tree.run() == runner.FOLDER
    assert "another run is using" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert tree.run("--output-dir", str(tmp_path / "file" / "out")) == runner.FOLDER
    assert "cannot write to" in capfd.readouterr().err


def test_dry_run_and_list(tree, capfd):
    """Both print and write nothing."""
    assert tree.run("--dry-run") == runner.OK
    out = capfd.readouterr().out
    for text in (
        "first: to do (not run yet), about 2:00",
        "rate = 2e-05",
        "second: to do",
        "1 without an estimate",
    ):
        assert text in out
    assert tree.run("--dry-run", "--only", "second", "--output-dir", str(tree.root / "x")) == runner.OK
    assert "first: not selected" in capfd.readouterr().out
    assert tree.run("--list") == runner.OK
    out = capfd.readouterr().out
    for text in ("smoke: two notebooks", "first  (about 2 min)", "other:"):
        assert text in out
    assert not (tree.root / "outputs").exists()
    assert not (tree.root / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--profile", "big"], "unknown profile 'big'; the profiles are: smoke, other"),
        (["--only", "first,third"], "unknown notebook 'third'; profile 'smoke' has: first, second"),
        (["--only", ""], "unknown notebook ''"),
    ],
)
def test_unknown_names(tree, capfd, arguments, text):
    assert tree.run(*arguments) == runner.USAGE
    assert text in capfd.readouterr().err
    assert not tree.out.exists()


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (
            "{nn: 3}",
            "unknown parameter 'nn'; the notebook's parameters are: flag, free, n, names, output_dir",
        ),
        ("{rate: 2e-5}", "write 2.0e-5"),
        ("{n: 2.5}", "n = 2.5 is of type float, but its default 1 is of type int"),
        ("{n: true}", "n = True is of type bool"),
        ("{flag: 1}", "flag = 1 is of type int"),
        ("{names: b}", "names = 'b' is of type str"),
        ("[n]", "parameters must map names to values"),
        ("{n: 3", "is not valid YAML"),
    ],
)
def test_bad_parameters(tree, capfd, parameters, text):
    tree.profiles(parameters)
    assert tree.run("--dry-run") == runner.USAGE
    assert text in capfd.readouterr().err


def test_parameters_that_fit(tree):
    tree.profiles("{rate: 1, names: [], free: [1], n: null}")
    assert runner.plan(tree.root, "smoke", tree.out)[0].parameters["rate"] == 1


def test_bad_notebooks_and_profiles(tree, capfd):
    profiles = tree.root / "notebooks" / "profiles.yaml"
    for text, error in [
        ("smoke: {notebooks: {first: {minute: 3}}}", "takes 'minutes', 'parameters', 'needs' and 'wants'"),
        ("smoke: {notebooks: {first: {needs: [tpu]}}}", "first: needs must list gpu, gpu:GIB"),
        ("smoke: {needs: gpu, notebooks: {first: }}", "first: needs must list gpu, gpu:GIB"),
        ("smoke: {notebooks: {first: {minutes: long}}}", "minutes must be a number"),
        ("smoke: {notebooks: {}}", "takes 'about', 'needs' and 'notebooks'"),
        ("smoke: {notebooks: {gone: }}", "gone.ipynb is missing"),
        ("- smoke", "must map profile names"),
        ("", "must map profile names"),
    ]:
        profiles.write_text(text)
        assert tree.run() == runner.USAGE
        assert error in capfd.readouterr().err
    profiles.unlink()
    assert tree.run() == runner.USAGE
    tree.profiles()
    path = tree.root / "notebooks" / "first.ipynb"
    for text, error in [
        ("not json", "not a notebook"),
        ('{"cells": [3]}', "not a notebook"),
        ('{"cells": []}', "exactly one cell tagged 'parameters', found 0"),
    ]:
        path.write_text(text)
        assert tree.run() == runner.USAGE
        assert error in capfd.readouterr().err


def test_declared_parameters_are_papermills(tmp_path):
    """The runner's own reader, which needs nothing installed, agrees with inspect_notebook."""
    from papermill import inspect_notebook

    path = tmp_path / "a.ipynb"
    cell = "# comment\nn = 1  # int\nrate: float = 2e-5\nx = n * 2\nnames = [\n    'a',\n]\nnote = 'b'"
    make_notebook(path, "y = 3", parameters=cell)
    assert set(runner.declared_parameters(path)) == set(inspect_notebook(path))
    assert runner.declared_parameters(path)["rate"] == 2e-5


def test_help_needs_nothing_installed(tmp_path):
    """As ./run_all.sh calls it: the script by its path, without site-packages."""
    command = [sys.executable, "-I", "-S", runner.__file__]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "exit codes" in done.stdout
    assert "--keep-going" in done.stdout
    assert subprocess.run([*command, "--bogus"], capture_output=True).returncode == runner.USAGE


def test_clock():
    assert [runner.clock(s) for s in (None, 0, 59.7, 125, 3600)] == ["?", "0:00", "1:00", "2:05", "1:00:00"]


# A notebook of four units, each of which is zsaa.measure.cached's, with a stand-in for torch so that it starts quickly.
# A unit's value is drawn at random: a unit that was done again would show. `busy` is held while a unit is computed, so
# that a kernel that outlives its runner and one of the next run would be seen to compute at once.
UNITS = """
import fcntl, importlib.util, os, pathlib, sys, time, types, uuid
cuda = types.SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, get_num_threads=lambda: 1, device=None)
spec = importlib.util.spec_from_file_location("measure", {measure!r})
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)
measure.code_hash = lambda: "code"
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


def test_killed_at_any_point_it_goes_on_without_redoing_or_losing_anything(tree):
    """The runner, the kernel, or both are killed at random moments, again and again, and the same command goes on."""
    import zsaa.measure

    draw = random.Random(7)
    head = UNITS.format(measure=zsaa.measure.__file__)
    for name in ("first", "second"):
        tree.notebook(name, head, UNIT.format(first=0), UNIT.format(first=2))
    tree.profiles()
    command = [sys.executable, "-c", DRIVER.format(path=runner.__file__, root=str(tree.root))]

    def start():
        (tree.out / "pid").unlink(missing_ok=True)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen(command, start_new_session=True, **pipes)

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
        assert process.returncode in (-signal.SIGKILL, runner.FAILED, runner.OK), out
        after = finished(tree)
        assert before.items() <= after.items()
        before = after
    assert len(before) >= 3, "the kills came too early to show anything"

    process = start()
    out = process.communicate(timeout=120)[0]
    assert process.returncode == runner.OK, out
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


def test_shards_are_disjoint_the_same_everywhere_and_merge(tree, tmp_path, capfd):
    """Two machines with a folder each, then the folders merged; and two that share one folder."""
    profiles = tree.root / "notebooks" / "profiles.yaml"
    lines = "".join(f"    {name}: {{minutes: {minutes}}}\n" for name, minutes in zip("abcd", (1, 5, 3, 1)))
    profiles.write_text(f"smoke:\n  notebooks:\n{lines}")
    for name in "abcd":
        make_notebook(tree.root / "notebooks" / f"{name}.ipynb", f"NAME = {name!r}")
    jobs = runner.plan(tree.root, "smoke", tree.out)
    assert [runner.shard(jobs, part, 2) for part in (1, 2)] == [["b"], ["a", "c", "d"]]
    assert [runner.shard(jobs, part, 5) for part in (1, 5)] == [["b"], []]

    tree.profiles()
    for part in (1, 2):
        assert tree.run("--shard", f"{part}/2", "--output-dir", str(tmp_path / str(part))) == runner.OK
        states = json.loads((tmp_path / str(part) / "index.json").read_text())
        assert sorted(state["status"] for state in states) == ["done", "not run"]
        shutil.copytree(tmp_path / str(part), tmp_path / "merged", dirs_exist_ok=True)
    assert tree.run("--output-dir", str(tmp_path / "merged"), "--report") == runner.OK
    states = json.loads((tmp_path / "merged" / "index.json").read_text())
    assert [state["status"] for state in states] == ["done", "done"]
    capfd.readouterr()
    assert tree.run("--output-dir", str(tmp_path / "merged")) == runner.OK
    assert capfd.readouterr().out.count("done before") == 2

    with runner._own_folder(tree.out, ["second"]):  # the other machine is at work
        assert tree.run("--shard", "1/2") == runner.OK
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "LOCK_SECONDS", 0.2)
            assert tree.run("--shard", "2/2") == runner.FOLDER
            assert tree.run() == runner.FOLDER
    assert tree.run("--shard", "2/2") == runner.OK
    assert [state["status"] for state in index(tree).values()] == ["done", "done"]


def test_seeds_go_to_the_notebooks_that_take_several(tree, capfd):
    assert tree.run("--seeds", "0,1", "--dry-run") == runner.USAGE
    assert "no notebook of profile 'smoke' has a parameter 'seeds'" in capfd.readouterr().err
    make_notebook(tree.root / "notebooks" / "second.ipynb", parameters="seeds = [0]\noutput_dir = '.'")
    assert tree.run("--seeds", "2,0,2", "--dry-run") == runner.OK
    assert capfd.readouterr().out.count("seeds = [2, 0]") == 1
    for bad in ("", "a", "1,,2", "-1"):
        with pytest.raises(SystemExit):
            tree.run("--seeds", bad)
    assert tree.run("--resume", "--dry-run") == runner.OK


def test_dry_run_takes_times_from_earlier_runs(tree, capfd):
    tree.profiles()
    assert tree.run("--only", "first") == runner.OK
    timing = json.loads((tree.out / "timings" / "first.json").read_text())
    assert timing["seconds"] > 0
    (tree.out / "timings" / "first.json").write_text(json.dumps({**timing, "seconds": 600}))
    tree.profiles("{n: 5}")
    capfd.readouterr()
    assert tree.run("--dry-run") == runner.OK
    out = capfd.readouterr().out
    assert "first: to do (changed since: parameters), about 10:00 (last run here, with other parameters)" in out
    assert "left: about 10:00, and 1 without an estimate" in out
    assert "the whole profile: about 10:00" in out


def with_needs(tree, needs="[]", wants="[]"):
    write(
        tree.root / "notebooks" / "profiles.yaml",
        f"""
        smoke:
          notebooks:
            first: {{needs: {needs}, wants: {wants}}}
            second:
        """,
    )


def test_what_is_missing_is_said_at_the_start_and_the_rest_runs(tree, capfd, monkeypatch):
    monkeypatch.setattr(
        "zsaa.needs.missing", lambda needs: ({"model:a/b": "gated: accept its licence"}, True) if needs else ({}, None)
    )
    with_needs(tree, needs='["model:a/b"]')
    assert tree.run("--dry-run") == runner.OK
    assert "first: not run, for want of model:a/b" in capfd.readouterr().out
    assert tree.run() == runner.LACKING
    out = capfd.readouterr().out
    assert out.index("not here: model:a/b\n      gated: accept its licence") < out.index("second  starts")
    assert "not run without it: first" in out
    assert index(tree)["first"]["status"] == "lacking"
    assert "gated: accept its licence" in index(tree)["first"]["message"]
    assert not tree.done("first")
    assert tree.done("second")

    with_needs(tree, wants='["model:a/b"]')
    assert tree.run() == runner.OK
    assert "run without it, with cells 'not run': first" in capfd.readouterr().out
    assert index(tree)["first"]["message"] == "run without model:a/b: gated: accept its licence"


@pytest.mark.parametrize(
    ("wants", "reached", "given", "seen"),
    [("[]", None, None, "1"), ('["model:a/b"]', False, None, "1"), ('["model:a/b"]', True, None, None),
     ("[]", None, "0", "0")],
)  # fmt: skip
def test_notebooks_run_offline_unless_the_hub_is_wanted_and_answers(tree, monkeypatch, wants, reached, given, seen):
    monkeypatch.setattr("zsaa.needs.missing", lambda needs: ({}, reached))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if given:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    show = "import os\nprint('HUB', os.environ.get('HF_HUB_OFFLINE'), 'SINCE', os.environ.get('ZSAA_NOT_BEFORE'))"
    tree.notebook("first", show)
    with_needs(tree, wants=wants)
    assert tree.run("--only", "first") == runner.OK
    assert f"HUB {seen} SINCE None" in tree.log("first")
    if given:
        assert tree.run("--only", "first", "--force") == runner.OK
        assert f"HUB {seen} SINCE 1" in tree.log("first")  # seconds since 1970, which begin with a 1 until 2033
    assert os.environ.get("HF_HUB_OFFLINE") == given
