"""The notebook runner, on tiny notebooks: types, resume, failures, killed kernels, signals, bad input."""

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest

from zsaa.kit.runner import command, console, errors, folder, page, plan
from zsaa.kit.runner.done import find_done, fingerprint

RUNNER = Path(command.__file__).parents[2] / "runner.py"

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
        return command.main(["--root", str(self.root), *arguments])

    def runs(self, name):
        return json.loads((self.out / "results" / f"{name}.json").read_text())["runs"]

    def done(self, name):
        assert (self.out / "done" / f"{name}.json").exists() == (self.out / f"executed/{name}.ipynb").exists()
        return (self.out / "done" / f"{name}.json").exists()

    def log(self, name):
        return (self.out / "logs" / f"{name}.log").read_text()


# A stand-in for the process that writes the index page; it keeps what zsaa.kit.report.index would get in index.json.
PAGE = """
import os, sys
path = os.path.join(sys.argv[1], "index.json")
with open(path, "w") as file:
    file.write(sys.stdin.read())
print(path)
"""


def page_command(text):
    return [sys.executable, "-I", "-S", "-c", text]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "COMMAND", page_command(PAGE))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return Tree(tmp_path / "repo")


def index(tree):
    return {status["name"]: status for status in json.loads((tree.out / "index.json").read_text())}


def test_typed_parameters_resume_and_force(tree, capfd):
    """One run gives typed values, a second runs nothing, --force runs what --only names, HOME stays clean."""
    assert tree.run() == errors.OK
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
    assert tree.run() == errors.OK
    assert time.monotonic() - started < 10
    assert (tree.runs("first"), tree.runs("second")) == (1, 1)
    assert "done before" in capfd.readouterr().out

    assert tree.run("--force", "--only", "first") == errors.OK
    assert (tree.runs("first"), tree.runs("second")) == (2, 1)
    assert [s["status"] for s in index(tree).values()] == ["done", "done"]
    assert "(last run here)" in capfd.readouterr().out


def test_a_run_says_what_it_used_and_drew(tree, capfd):
    """CPU time of the kernel and its children, which a busy machine does not change; pictures as they are made."""
    loop = "n = 4_000_000\nwhile n: n -= 1"
    burn = f"import subprocess, sys\n{loop}\nsubprocess.run([sys.executable, '-c', {loop!r}])"
    draw = "out = pathlib.Path(output_dir, 'figures')\nout.mkdir(exist_ok=True)\n(out / 'a.png').write_text('')"
    tree.notebook("first", burn, WRITE, draw)
    assert tree.run() == errors.OK
    used = {n: json.loads((tree.out / "timings" / f"{n}.json").read_text())["cpu_seconds"] for n in ("first", "second")}
    assert used["first"] > used["second"] > 0
    out = capfd.readouterr().out
    assert out.index("of CPU time") < out.index(f"{tree.out}/figures/a.png") < out.index("second  starts")


def test_braces_in_paths_are_no_parameters_of_papermills(tree, tmp_path):
    braces = Tree(tmp_path / "{n} {0} {}" / "repo")
    assert braces.run() == errors.OK
    assert braces.done("second")
    assert tree.run("--output-dir", str(tmp_path / "{out}"), "--only", "first") == errors.OK
    assert (tmp_path / "{out}" / "executed" / "first.ipynb").exists()


def test_what_a_notebook_made_is_known_where_the_drives_clock_is_behind(tree):
    """And what it did not touch is not called its own."""
    write(tree.out / "results" / "earlier.json", "{}")
    os.utime(tree.out / "results" / "earlier.json", (2**32, 2**32))  # from the future
    tree.notebook("first", WRITE, "import os\nos.utime(count, (1e9, 1e9))")
    (tree.out / "executed").mkdir()
    assert tree.run("--only", "first") == errors.OK
    record = json.loads((tree.out / "done" / "first.json").read_text())
    assert record["files"] == ["executed/first.ipynb", "results/first.json"]


def test_every_input_is_part_of_the_key(tree):
    """Notebook cells, package, kernels, parameters, locks and committed results count; outputs do not."""
    (job, _) = plan.plan(tree.root, "smoke", tree.out)
    key = fingerprint(tree.root, job)
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
        (job, _) = plan.plan(tree.root, "smoke", tree.out)
        new = fingerprint(tree.root, job)
        changed = [part for part in key if key[part] != new[part]]
        assert changed == ["zsaa" if name == "kernels" else name]
        key = new

    notebook = nbformat.read(job.path, 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="x")]
    notebook.cells[1].execution_count = 7
    notebook.metadata["kernelspec"] = {"name": "else", "display_name": "else", "language": "x"}
    nbformat.write(notebook, job.path)
    left = (
        "__pycache__/code.py .ipynb_checkpoints/code-checkpoint.py .code.py.swp code.py~ #code.py# ._code.py .DS_Store"
    )
    for stray in [*left.split(), "code (copy).py", "code.bak.py", "notes.txt"]:
        write(tree.root / "zsaa" / stray, "x = 3\n")
    (tree.root / "kernels" / ".#new.py").symlink_to("somebody@somewhere.1")  # how Emacs marks a file that it edits
    for stray in (
        ".DS_Store",
        ".ipynb_checkpoints/old-checkpoint.json",
        ".old.json.swp",
        "old.json~",
        "sub/._old.json",
    ):
        write(tree.root / "results" / stray, "x")
    for stray in ("poetry.lock", ".~lock.assets.lock#", "results/README.md"):
        write(tree.root / stray, "x")
    assert fingerprint(tree.root, job) == key


def test_done_file_needs_matching_key_and_all_files(tree):
    (job, _) = plan.plan(tree.root, "smoke", tree.out)
    key, product = fingerprint(tree.root, job), tree.out / "figures" / "a.png"
    write(product, "")
    record = {"key": key, "files": ["figures/a.png"], "seconds": 1, "started": ""}
    done = tree.out / "done" / "first.json"

    assert find_done(tree.out, job, key) == (None, "not run yet")
    write(done, json.dumps(record))
    assert find_done(tree.out, job, key) == (record, "")
    assert find_done(tree.out, job, {**key, "lock": "x"}) == (None, "changed since: lock")
    product.unlink()
    assert find_done(tree.out, job, key) == (None, "figures/a.png is gone")
    write(done, json.dumps(record)[:20])  # cut off
    assert find_done(tree.out, job, key)[0] is None
    write(done, "[]")
    assert find_done(tree.out, job, key)[0] is None


def test_failing_cell(tree, capfd):
    """Log and partial notebook tell why; with --keep-going the rest runs; mended, only that one runs."""
    tree.notebook("first", "print('before')", "1 / 0", WRITE)
    assert tree.run() == errors.FAILED
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

    assert tree.run("--keep-going") == errors.FAILED
    assert tree.done("second")
    assert not tree.done("first")

    tree.notebook("first", WRITE)
    assert tree.run() == errors.OK
    assert tree.runs("second") == 1
    assert not list(tree.out.rglob("*partial*"))


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


def test_cells_that_did_not_run(tree, capfd):
    """sys.exit(0) ends a notebook early without an error; that is not done either."""
    tree.notebook("first", "import sys; sys.exit(0)", WRITE)
    assert tree.run("--only", "first") == errors.FAILED
    assert "cell 6 of 6 did not run" in capfd.readouterr().out
    assert not tree.done("first")


# ./run_all.sh as a process: the runner by its path, with the stand-in for the index page. torch is not to be imported
# there: a run that is stopped while it imports would import the broken rest again.
DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("runner", {path!r})
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
command = runner.load_kit()
sys.modules["zsaa_kit.runner.page"].COMMAND = {page!r}
code = command.main(["--root", {root!r}])
assert not {{"torch", "zsaa"}} & set(sys.modules)
sys.exit(code)
"""


def driver(tree):
    code = DRIVER.format(path=str(RUNNER), page=page_command(PAGE), root=str(tree.root))
    return [sys.executable, "-I", "-c", code]


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
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(driver(tree), preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL), **pipes)
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
        assert tree.run() == errors.OK
        assert (tree.runs("first"), tree.runs("second")) == (1, 1)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(tree, signum):
    """nohup ignores SIGHUP, a script's background job SIGINT: the run goes on to its end."""
    mark = tree.root / "started"
    tree.notebook("first", f"import time\nopen({str(mark)!r}, 'w').close()\ntime.sleep(2)", WRITE)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(driver(tree), preexec_fn=lambda: signal.signal(signum, signal.SIG_IGN), **pipes)
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signum)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == errors.OK, out
    assert tree.done("second")


def test_a_run_whose_reader_has_gone_goes_on(tree):
    process = subprocess.Popen(driver(tree), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as in ./run_all.sh | head -0
    assert (process.stderr.read(), process.wait(timeout=120)) == ("", errors.OK)
    assert tree.done("second")


def test_a_kernel_sees_none_of_the_users_start_up_files_and_settings(tree, tmp_path, monkeypatch):
    """Start-up files of Python and IPython, search paths, configurations of Jupyter and Matplotlib, user packages."""
    for file in ("startup.py", ".ipython/profile_default/startup/a.py", "path/a_module.py"):
        write(tmp_path / "home" / file, "started = True\n")
    write(tmp_path / "home/.ipython/profile_default/ipython_kernel_config.py", "raise SystemExit('configured')\n")
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "home" / "startup.py"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "home" / "path"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "home" / ".ipython"))
    for name in ("PYTHONOPTIMIZE", "PYTHONWARNINGS", "JUPYTER_CONFIG_PATH", "JUPYTER_PREFER_ENV_PATH", "MPLBACKEND"):
        monkeypatch.setenv(name, {"PYTHONOPTIMIZE": "1", "PYTHONWARNINGS": "error"}.get(name, "agg"))
    show = (
        "import importlib.util, os\n"
        "print('SEEN', 'started' in globals(), importlib.util.find_spec('a_module'), __debug__,\n"
        "      sorted(n for n in os.environ if n.startswith(('PYTHON', 'JUPYTER_CONFIG_P', 'JUPYTER_PREFER'))),\n"
        "      os.environ.get('MPLBACKEND') == 'agg')"
    )
    tree.notebook("first", show, WRITE)
    before = dict(os.environ)
    assert tree.run("--only", "first") == errors.OK
    user = ["PYTHONNOUSERSITE"] if sys.flags.no_user_site else []
    assert f"SEEN False None True {user} False" in tree.log("first")
    assert dict(os.environ) == before


def is_running(pid):
    """True unless the process is gone or a zombie that nobody has waited for."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


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


REFUSED = {
    "": "names no folder",
    "s3://bucket/runs": "is an address",
    " ": "names no folder",
    ".": "is no run's own",
    "..": "which holds",
    "/": "which holds",
    "~": "is no run's own",
    "results": "a folder of the clone itself",
    "results/new": "a folder of the clone itself",
    "./figures/../zsaa": "a folder of the clone itself",
    "link": "a folder of the clone itself",
    ".git": "which is hidden",
    "requirements.lock": "a file",
    "own": "which holds other files (notes.txt)",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_folder_that_is_no_runs_own_is_refused(tree, capfd, monkeypatch, given):
    """From within the clone; nothing is written, and the message names value, allowed range and remedy."""
    monkeypatch.chdir(tree.root)
    write(tree.root / "own" / "notes.txt", "mine")
    (tree.root / "link").symlink_to("results")
    before = sorted(tree.root.parent.rglob("*"))
    for more in ([], ["--dry-run"], ["--report"]):
        assert tree.run("--output-dir", given, *more) == errors.FOLDER
        said = capfd.readouterr().err
        assert f"--output-dir {given!r} " in said and REFUSED[given] in said
        assert "a new or an empty folder, or one that an earlier run made" in said and "leave the option out" in said
    assert sorted(tree.root.parent.rglob("*")) == before


def test_folders_that_may_be_used(tree, monkeypatch):
    monkeypatch.chdir(tree.root)
    write(tree.root / "empty" / ".DS_Store", "")
    write(tree.root / "earlier" / "done" / "first.json", "{}")
    write(tree.root / "earlier" / "notes.txt", "mine")
    allowed = {
        "new": "new",
        "empty": "empty",
        "earlier": "earlier",
        "outputs/a/b": "outputs/a/b",
        "~/new": "../home/new",
    }
    for given, folder_ in allowed.items():
        assert folder.output_folder(tree.root, given, "smoke") == (tree.root / folder_).resolve()
    assert folder.output_folder(tree.root, None, "smoke") == tree.out


def test_another_accounts_done_file_is_not_called_missing(tree, monkeypatch):
    (job, _) = plan.plan(tree.root, "smoke", tree.out)
    write(tree.out / "done" / "first.json", "{}")

    def refused(*_, **__):  # root, who may run this, may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refused)
    assert "first.json cannot be read: Permission denied" in find_done(tree.out, job, {})[1]


def test_done_files_can_be_read_by_whom_the_umask_allows(tree):
    old = os.umask(0o022)
    try:
        assert tree.run("--only", "first") == errors.OK
    finally:
        os.umask(old)
    for path in [*(tree.out / "done").iterdir(), *(tree.out / "timings").iterdir()]:
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_not_called_another_run(tree, capfd, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.own_folder(tree.out, ["first"]) as locks:
        assert len(locks) == 2
    out = capfd.readouterr().out
    assert out.count(f"has no locks ({os.strerror(code)})") == 1 and "start one at a time" in out


def test_folder_in_use_or_not_writable(tree, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(folder, "LOCK_SECONDS", 0.2)
    with folder.own_folder(tree.out):
        assert tree.run() == errors.FOLDER
    assert "another run is using" in capfd.readouterr().err
    (tmp_path / "file").write_text("")
    assert tree.run("--output-dir", str(tmp_path / "file" / "out")) == errors.FOLDER
    assert "cannot write to" in capfd.readouterr().err


def test_dry_run_and_list(tree, capfd):
    """Both print and write nothing."""
    assert tree.run("--dry-run") == errors.OK
    out = capfd.readouterr().out
    for text in (
        "first: to do (not run yet), about 2:00",
        "rate = 2e-05",
        "second: to do",
        "1 without an estimate",
    ):
        assert text in out
    assert tree.run("--dry-run", "--only", "second", "--output-dir", str(tree.root / "x")) == errors.OK
    assert "first: not selected" in capfd.readouterr().out
    assert tree.run("--list") == errors.OK
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
    assert tree.run(*arguments) == errors.USAGE
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
    assert tree.run("--dry-run") == errors.USAGE
    assert text in capfd.readouterr().err


def test_parameters_that_fit(tree):
    tree.profiles("{rate: 1, names: [], free: [1], n: null}")
    assert plan.plan(tree.root, "smoke", tree.out)[0].parameters["rate"] == 1


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
        assert tree.run() == errors.USAGE
        assert error in capfd.readouterr().err
    profiles.unlink()
    assert tree.run() == errors.USAGE
    tree.profiles()
    path = tree.root / "notebooks" / "first.ipynb"
    for text, error in [
        ("not json", "not a notebook"),
        ('{"cells": [3]}', "not a notebook"),
        ('{"cells": []}', "exactly one cell tagged 'parameters', found 0"),
    ]:
        path.write_text(text)
        assert tree.run() == errors.USAGE
        assert error in capfd.readouterr().err


def test_declared_parameters_are_papermills(tmp_path):
    """The runner's own reader, which needs nothing installed, agrees with inspect_notebook."""
    from papermill import inspect_notebook

    path = tmp_path / "a.ipynb"
    cell = "# comment\nn = 1  # int\nrate: float = 2e-5\nx = n * 2\nnames = [\n    'a',\n]\nnote = 'b'"
    make_notebook(path, "y = 3", parameters=cell)
    assert set(plan.declared_parameters(path)) == set(inspect_notebook(path))
    assert plan.declared_parameters(path)["rate"] == 2e-5


def test_help_needs_nothing_installed(tmp_path):
    """As ./run_all.sh calls it: the script by its path, without site-packages."""
    call = [sys.executable, "-I", "-S", str(RUNNER)]
    done = subprocess.run([*call, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "exit codes" in done.stdout
    assert "--keep-going" in done.stdout
    assert subprocess.run([*call, "--bogus"], capture_output=True).returncode == errors.USAGE


def test_clock():
    assert [console.clock(s) for s in (None, 0, 59.7, 125, 3600)] == ["?", "0:00", "1:00", "2:05", "1:00:00"]


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


def test_shards_are_disjoint_the_same_everywhere_and_merge(tree, tmp_path, capfd):
    """Two machines with a folder each, then the folders merged; and two that share one folder."""
    profiles = tree.root / "notebooks" / "profiles.yaml"
    lines = "".join(f"    {name}: {{minutes: {minutes}}}\n" for name, minutes in zip("abcd", (1, 5, 3, 1)))
    profiles.write_text(f"smoke:\n  notebooks:\n{lines}")
    for name in "abcd":
        make_notebook(tree.root / "notebooks" / f"{name}.ipynb", f"NAME = {name!r}")
    jobs = plan.plan(tree.root, "smoke", tree.out)
    assert [plan.shard(jobs, part, 2) for part in (1, 2)] == [["b"], ["a", "c", "d"]]
    assert [plan.shard(jobs, part, 5) for part in (1, 5)] == [["b"], []]

    tree.profiles()
    for part in (1, 2):
        assert tree.run("--shard", f"{part}/2", "--output-dir", str(tmp_path / str(part))) == errors.OK
        states = json.loads((tmp_path / str(part) / "index.json").read_text())
        assert sorted(state["status"] for state in states) == ["done", "not run"]
        shutil.copytree(tmp_path / str(part), tmp_path / "merged", dirs_exist_ok=True)
    assert tree.run("--output-dir", str(tmp_path / "merged"), "--report") == errors.OK
    states = json.loads((tmp_path / "merged" / "index.json").read_text())
    assert [state["status"] for state in states] == ["done", "done"]
    capfd.readouterr()
    assert tree.run("--output-dir", str(tmp_path / "merged")) == errors.OK
    assert capfd.readouterr().out.count("done before") == 2

    with folder.own_folder(tree.out, ["second"]):  # the other machine is at work
        assert tree.run("--shard", "1/2") == errors.OK
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder, "LOCK_SECONDS", 0.2)
            assert tree.run("--shard", "2/2") == errors.FOLDER
            assert tree.run() == errors.FOLDER
    assert tree.run("--shard", "2/2") == errors.OK
    assert [state["status"] for state in index(tree).values()] == ["done", "done"]


def test_seeds_go_to_the_notebooks_that_take_several(tree, capfd):
    assert tree.run("--seeds", "0,1", "--dry-run") == errors.USAGE
    assert "no notebook of profile 'smoke' has a parameter 'seeds'" in capfd.readouterr().err
    make_notebook(tree.root / "notebooks" / "second.ipynb", parameters="seeds = [0]\noutput_dir = '.'")
    assert tree.run("--seeds", "2,0,2", "--dry-run") == errors.OK
    assert capfd.readouterr().out.count("seeds = [2, 0]") == 1
    for bad in ("", "a", "1,,2", "-1"):
        with pytest.raises(SystemExit):
            tree.run("--seeds", bad)
    assert tree.run("--resume", "--dry-run") == errors.OK


def test_dry_run_takes_times_from_earlier_runs(tree, capfd):
    tree.profiles()
    assert tree.run("--only", "first") == errors.OK
    timing = json.loads((tree.out / "timings" / "first.json").read_text())
    assert timing["seconds"] > 0
    (tree.out / "timings" / "first.json").write_text(json.dumps({**timing, "seconds": 600}))
    tree.profiles("{n: 5}")
    capfd.readouterr()
    assert tree.run("--dry-run") == errors.OK
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
        "zsaa.kit.needs.missing",
        lambda needs: ({"model:a/b": "gated: accept its licence"}, True) if needs else ({}, None),
    )
    with_needs(tree, needs='["model:a/b"]')
    assert tree.run("--dry-run") == errors.OK
    assert "first: not run, for want of model:a/b" in capfd.readouterr().out
    assert tree.run() == errors.LACKING
    out = capfd.readouterr().out
    assert out.index("not here: model:a/b\n      gated: accept its licence") < out.index("second  starts")
    assert "not run without it: first" in out
    assert index(tree)["first"]["status"] == "lacking"
    assert "gated: accept its licence" in index(tree)["first"]["message"]
    assert not tree.done("first")
    assert tree.done("second")

    with_needs(tree, wants='["model:a/b"]')
    assert tree.run() == errors.OK
    assert "run without it, with cells 'not run': first" in capfd.readouterr().out
    assert index(tree)["first"]["message"] == "run without model:a/b: gated: accept its licence"


@pytest.mark.parametrize(
    ("wants", "reached", "given", "seen"),
    [("[]", None, None, "1"), ('["model:a/b"]', False, None, "1"), ('["model:a/b"]', True, None, None),
     ("[]", None, "0", "0")],
)  # fmt: skip
def test_notebooks_run_offline_unless_the_hub_is_wanted_and_answers(tree, monkeypatch, wants, reached, given, seen):
    monkeypatch.setattr("zsaa.kit.needs.missing", lambda needs: ({}, reached))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if given:
        monkeypatch.setenv("HF_HUB_OFFLINE", given)
    show = "import os\nprint('HUB', os.environ.get('HF_HUB_OFFLINE'), 'SINCE', os.environ.get('ZSAA_NOT_BEFORE'))"
    tree.notebook("first", show)
    with_needs(tree, wants=wants)
    assert tree.run("--only", "first") == errors.OK
    assert f"HUB {seen} SINCE None" in tree.log("first")
    if given:
        assert tree.run("--only", "first", "--force") == errors.OK
        assert f"HUB {seen} SINCE 1" in tree.log("first")  # seconds since 1970, which begin with a 1 until 2033
    assert os.environ.get("HF_HUB_OFFLINE") == given
