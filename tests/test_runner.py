"""The notebook runner, on tiny notebooks: types, resume, failing cells, what a kernel sees, what is missing."""

import json
import os
import sys
import time

import nbformat
import pytest
from trees import WRITE, Tree, index, write

from zsaa.kit.runner import errors, plan
from zsaa.kit.runner.done import find_done, fingerprint


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


@pytest.mark.full
def test_a_run_says_what_it_used_and_drew(tree, capfd):
    """CPU time of the kernel and its children, which a busy machine does not change; pictures as they are made."""
    loop = "n = 1_500_000\nwhile n: n -= 1"
    burn = f"import subprocess, sys\n{loop}\nsubprocess.run([sys.executable, '-c', {loop!r}])"
    draw = "out = pathlib.Path(output_dir, 'figures')\nout.mkdir(exist_ok=True)\n(out / 'a.png').write_text('')"
    tree.notebook("first", burn, WRITE, draw)
    assert tree.run() == errors.OK
    used = {n: json.loads((tree.out / "timings" / f"{n}.json").read_text())["cpu_seconds"] for n in ("first", "second")}
    assert used["first"] > used["second"] > 0
    out = capfd.readouterr().out
    assert out.index("of CPU time") < out.index(f"{tree.out}/figures/a.png") < out.index("second  starts")


@pytest.mark.full
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


def test_cells_that_did_not_run(tree, capfd):
    """sys.exit(0) ends a notebook early without an error; that is not done either."""
    tree.notebook("first", "import sys; sys.exit(0)", WRITE)
    assert tree.run("--only", "first") == errors.FAILED
    assert "cell 6 of 6 did not run" in capfd.readouterr().out
    assert not tree.done("first")


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
    [("[]", None, None, "1"), ('["model:a/b"]', True, None, None),
     pytest.param('["model:a/b"]', False, None, "1", marks=pytest.mark.full),
     pytest.param("[]", None, "0", "0", marks=pytest.mark.full)],
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
