"""What the notebook runner is given: folders, names, parameters, profiles, shards, seeds; --dry-run, --list, --help."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trees import RUNNER, index, make_notebook, write

from zsaa.kit.runner import console, errors, folder, plan
from zsaa.kit.runner.done import find_done

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
        ("smoke: {notebooks: {first: {minute: 3}}}", "takes 'minutes', 'parameters', 'needs', 'wants' and 'alone'"),
        ("smoke: {notebooks: {first: {alone: 1}}}", "first: alone must be true or false, got 1"),
        ("smoke: {jobs: 0, notebooks: {first: }}", "smoke: jobs must be a whole number from 1 on, got 0"),
        ("smoke: {notebooks: {first: {needs: [tpu]}}}", "first: needs must list gpu, gpu:GIB"),
        ("smoke: {needs: gpu, notebooks: {first: }}", "first: needs must list gpu, gpu:GIB"),
        ("smoke: {notebooks: {first: {minutes: long}}}", "minutes must be a number"),
        ("smoke: {notebooks: {}}", "takes 'about', 'needs', 'jobs' and 'notebooks'"),
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


@pytest.mark.full
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
