"""Result files that are computed once, and the energy of a block, with made-up counters."""

import json
import os
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from zsaa import measure
from zsaa.kit.energy import energy
from zsaa.measure import once, origin


def test_a_result_is_computed_once_per_settings_code_and_device(tmp_path, monkeypatch):
    path, calls = tmp_path / "results" / "a.json", []

    def compute():
        calls.append(1)
        return {"name": "a", "kind": "test", "rows": [{"n": len(calls), 3: (1, 2)}]}

    def get(**settings):
        return measure.cached(path, settings, compute)["rows"][0]

    assert get(seed=0, sizes=(1, 2)) == {"n": 1, "3": [1, 2]}  # as it is read back
    assert get(seed=0, sizes=[1, 2]) == {"n": 1, "3": [1, 2]}
    assert get(seed=1)["n"] == 2
    path.write_text(path.read_text()[:-20])  # cut off
    assert get(seed=1)["n"] == 3
    path.write_text("[]")
    assert get(seed=1)["n"] == 4
    monkeypatch.setattr(once, "code_hash", lambda: "other code")
    assert get(seed=1)["n"] == 5
    monkeypatch.setattr(once, "hardware", lambda *_: {"device": "another"})
    assert get(seed=1)["n"] == 6
    monkeypatch.setenv("ZSAA_NOT_BEFORE", str(path.stat().st_mtime + 1))
    assert get(seed=1)["n"] == 7
    monkeypatch.setenv("ZSAA_NOT_BEFORE", "0")
    assert get(seed=1)["n"] == 7
    stored = json.loads(path.read_text())
    assert stored["unit"]["settings"] == {"seed": 1} and stored["unit"]["device"] == "another"
    assert stored["provenance"]["seconds"] >= 0 and stored["provenance"]["versions"]["torch"]
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_computation_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    measure.cached(path, {"seed": 0}, lambda: {"rows": [], "provenance": {"seconds": 7.0, "seed": 0}})
    assert json.loads(path.read_text())["provenance"]["seconds"] == 7.0  # the caller's own count of its seconds
    before = path.read_text()
    with pytest.raises(ZeroDivisionError):
        measure.cached(path, {"seed": 1}, lambda: {"rows": [1 / 0]})
    with pytest.raises(ValueError, match="JSON"):
        measure.cached(path, {"seed": 1}, lambda: {"rows": [float("nan")]})
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def fake_nvml(counters, supported=True):
    """pynvml for devices with the given energy readings in millijoules, one list each, read one after the other."""

    class NVMLError(Exception):
        pass

    def reading(handle):
        if not supported:
            raise NVMLError("not supported")
        return counters[handle].pop(0)

    return types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(counters),
        nvmlDeviceGetHandleByIndex=lambda i: list(counters)[i],
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid.decode(),
        nvmlDeviceGetTotalEnergyConsumption=reading,
    )


@pytest.mark.parametrize(
    ("visible", "joules"), [(None, 3.5), ("0", 1.5), ("GPU-b", 2.0), ("1,0", 3.5), ("", None), ("GPU-c", None)]
)
def test_joules_of_the_gpus_that_the_process_may_use(monkeypatch, visible, joules):
    counters = {"GPU-a": [10_000, 11_500], "GPU-b": [500, 2_500]}
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(counters))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if visible == "GPU-c":
        monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetHandleByUUID", lambda uuid: 1 / 0)
    with energy() as spent:
        assert spent == {}
    assert spent["gpu_joules"] == joules
    assert spent["seconds"] >= 0


def test_a_gpu_without_the_counter_and_no_gpu_at_all(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (fake_nvml({"GPU-a": [1, 2]}, supported=False), None):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        with energy() as spent:
            pass
        assert spent["gpu_joules"] is None


def test_joules_of_the_processor_packages(tmp_path, monkeypatch):
    """Two packages, one of whose counters starts again at zero; parts of a package and the whole board do not count."""
    monkeypatch.setattr("zsaa.kit.energy.RAPL", tmp_path)

    def counter(name, domain, value):
        (tmp_path / domain).mkdir(exist_ok=True)
        for file, text in (("name", name), ("energy_uj", value), ("max_energy_range_uj", 9_999_999)):
            (tmp_path / domain / file).write_text(f"{text}\n")

    def counters(first, second):
        counter("package-0", "intel-rapl:0", first)
        counter("package-1", "intel-rapl:1", second)
        counter("core", "intel-rapl:0:0", first)
        counter("psys", "intel-rapl:2", first)

    counters(1_000_000, 9_000_000)
    with energy() as spent:
        counters(3_000_000, 500_000)
    assert spent["cpu_joules"] == 3.5
    (tmp_path / "intel-rapl:1/energy_uj").write_text("unreadable")
    with energy() as spent:
        pass
    assert spent["cpu_joules"] is None


def test_energy_is_known_even_if_the_block_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(KeyError), energy() as spent:
        raise KeyError
    assert spent["seconds"] >= 0


# ------------------------------------------------------------------------------------------- the commit


def git(folder, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"HOME": str(folder)}
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", folder, *who, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def commit_all(folder):
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "all")
    return git(folder, "rev-parse", "HEAD")


def package(folder, name="zsaa"):
    """The package's files in `folder`, as in a checkout."""
    for place in ("zsaa", "kernels"):
        (folder / place).mkdir(parents=True)
        (folder / place / "measure.py").write_text("")
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    return folder


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """(folder, commit) of a checkout that the package is taken to lie in; git has no settings of the user's."""
    for name in [k for k in os.environ if k.startswith("GIT_")] + ["ZSAA_COMMIT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    folder = package(tmp_path / "it's here")
    monkeypatch.setattr(origin, "PACKAGE", folder / "zsaa")
    return folder, commit_all(folder)


def quiet():
    """`measure.commit`, which says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return measure.commit()


@pytest.mark.parametrize("change", [None, "zsaa/measure.py", "kernels/measure.py", "README.md"])
def test_the_commit_and_whether_the_sources_differ_from_it(checkout, change):
    folder, head = checkout
    if change:
        (folder / change).write_text("changed")
    assert quiet() == {"commit": head, "dirty": change not in (None, "README.md")}
    assert measure.provenance()["commit"] == head


@pytest.mark.parametrize("where", ["inside", "below", "vendored", "empty .git", "nowhere"])
def test_a_repository_that_is_not_the_package_s_is_not_named(where, checkout, monkeypatch, tmp_path):
    """A project's own .venv, ignored or committed; a copy of the package in another project's root."""
    foreign = package(tmp_path / "project", name="theirs")
    here = {
        "inside": foreign / ".venv/lib/site-packages",
        "below": foreign / "mono/zsaa",
        "empty .git": foreign / "own",
    }
    folder = here.get(where, foreign)
    if where in here:
        package(folder)
    if where == "inside":
        (folder / "pyproject.toml").unlink()
        (foreign / ".gitignore").write_text(".venv")
    if where == "nowhere":
        shutil.rmtree(checkout[0] / ".git")
        folder = checkout[0]
    commit_all(foreign)
    if where == "empty .git":
        (folder / ".git").mkdir()
    monkeypatch.setattr(origin, "PACKAGE", folder / "zsaa")
    if where == "empty .git":
        with pytest.warns(UserWarning, match="no commit: the package's .git is no repository. Mend the checkout"):
            found = measure.commit()
    else:
        found = quiet()
    assert found.pop("commit_unknown") and found == {"commit": None, "dirty": None}


def test_git_s_own_variables_point_it_nowhere_else(checkout, monkeypatch, tmp_path):
    """A hook of another repository, or a shell in which somebody set them."""
    foreign = package(tmp_path / "project")
    (foreign / "zsaa/measure.py").write_text("other")
    commit_all(foreign)
    for name in ("GIT_DIR", "GIT_COMMON_DIR"):
        monkeypatch.setenv(name, str(foreign / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(foreign))
    monkeypatch.setenv("GIT_INDEX_FILE", str(foreign / ".git/index"))
    monkeypatch.setenv("GIT_OBJECT_DIRECTORY", str(foreign / ".git/objects"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout[0]))
    assert quiet() == {"commit": checkout[1], "dirty": False}


def test_a_refusal_of_git_s_is_said(checkout, monkeypatch):
    """Its own switch for tests stands for a checkout of another owner."""
    monkeypatch.setattr(origin, "KEPT_OF_GIT", (*origin.KEPT_OF_GIT, "GIT_TEST"))
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.warns(UserWarning, match=r"no commit: git refuses the checkout, whose owner is another") as caught:
        found = measure.provenance()
    assert found["commit"] is None and found["commit_unknown"] == "git refuses the checkout, whose owner is another"
    command = str(caught[0].message).split("Let it: ")[1].split(", or")[0]
    assert command.startswith("git config --global --add safe.directory '")
    settings = checkout[0].parent / "gitconfig"
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    assert subprocess.run(command, shell=True).returncode == 0 and settings.is_file()
    assert quiet()["commit"] == checkout[1], "the advice helps"


def test_no_git_and_no_commit_yet(checkout, monkeypatch, tmp_path):
    shutil.rmtree(checkout[0] / ".git")
    git(checkout[0], "init", "--quiet")
    with pytest.warns(UserWarning, match="no commit: git rev-parse failed. It says: "):
        assert measure.commit()["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="no commit: git cannot be run.*Install git, or set ZSAA_COMMIT"):
        found = measure.provenance()
    assert found["commit_unknown"] == "git cannot be run"
    monkeypatch.setenv("ZSAA_COMMIT", "c0ffee")
    assert quiet() == {"commit": "c0ffee", "dirty": None}
    monkeypatch.setattr(origin, "PACKAGE", Path(tmp_path / "site-packages/zsaa"))
    monkeypatch.setenv("ZSAA_COMMIT", "")
    assert quiet() == {
        "commit": None,
        "dirty": None,
        "commit_unknown": "the package was installed without its checkout",
    }


@pytest.mark.parametrize("given", ["", " ", ".", "{root}", "results", "results/more", "{root}/outputs/.."])
def test_results_are_not_written_among_the_committed_ones(checkout, monkeypatch, given):
    root = checkout[0]
    monkeypatch.chdir(root)
    (root / "results").mkdir()
    with pytest.raises(
        ValueError, match="output_dir is .*(names no folder|among the committed ones).*outputs/experiments"
    ):
        measure.output_folder(given.format(root=root))
    for own in ("outputs", root / "outputs/x", root.parent / "elsewhere", "other/results"):
        assert measure.output_folder(own) == Path(own)
    monkeypatch.setattr(origin, "PACKAGE", root.parent / "site-packages/zsaa")
    assert measure.output_folder(".") == Path("."), "elsewhere there are none"


def test_where_no_result_can_be_written_is_said_before_anything_is_measured(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "taken/results/result.json").mkdir(parents=True)
    for given, why in (
        ("file", "Not a directory"),
        ("file/deeper/still", "Not a directory"),
        ("taken", "Is a directory"),
    ):
        with pytest.raises(OSError, match=f"cannot be written: {why}. Name another place"):
            measure.output_folder(tmp_path / given)
    assert measure.output_folder(tmp_path / "new/folder") and not (tmp_path / "new").exists(), "asking leaves nothing"


def test_every_experiment_asks_for_a_folder_of_its_own(tmp_path, monkeypatch):
    from zsaa import experiment, mmlu, perplexity
    from zsaa.finetune import Recipe

    monkeypatch.chdir(origin.PACKAGE.parent)
    runs = [
        lambda out: experiment.run(Recipe(), output_dir=out),
        lambda out: experiment.run_adapter("imdb-lora-salience", output_dir=out),
        lambda out: experiment.latency(output_dir=out),
        lambda out: experiment.lengths(output_dir=out),
        lambda out: perplexity.run(output_dir=out),
        lambda out: mmlu.run(output_dir=out),
    ]
    for run in runs:
        for out in ("", ".", origin.PACKAGE.parent):
            with pytest.raises(ValueError, match="output_dir is"):
                run(out)
