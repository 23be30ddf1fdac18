"""The house: packaging, lock files, notebooks in git, profiles, and the set-up script's error messages."""

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import zsaa
from zsaa.kit.runner import errors, folder, plan

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def direct_requirements():
    """The requirements that the lock covers: the package's own and those of its extras dev and docs."""
    extras = PROJECT["optional-dependencies"]
    return [Requirement(r) for r in PROJECT["dependencies"] + extras["dev"] + extras["docs"]]


@each_notebook
def test_notebook_is_committed_without_traces_of_a_run(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert "papermill" not in notebook.metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None


@each_notebook
def test_notebook_can_be_run_by_the_runner_and_opened_in_colab(path):
    assert "output_dir" in plan.declared_parameters(path)
    cells = plan.read_cells(path)
    badge = cells[0]["source"]
    assert "colab" in badge
    assert badge.count(f"notebooks/{path.name}") >= 1


def test_a_kernel_without_zsaa_gets_it_from_the_clone_around_it_or_a_fetched_one(tmp_path, monkeypatch):
    """For the kernel that runs the notebook, Colab's or one's own; and again after a failure."""
    first = plan.read_cells(NOTEBOOKS[0])[1]["source"]
    bin, said = tmp_path / "bin", tmp_path / "said"
    bin.mkdir()
    (bin / "git").write_text(f'#!/bin/sh\necho "git $1" >> {said}\n[ -n "$FAILS" ] || mkdir -p zsaa-kit/tools\n')
    (bin / "git").chmod(0o755)
    made = f'echo "$ZSAA_PYTHON in $(basename "$PWD")" >> {said}\n'
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("site.addsitedir", lambda folder: None)
    (tmp_path / "clone/notebooks").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "clone/notebooks")

    def ran():
        said.write_text("")
        with contextlib.suppress(subprocess.CalledProcessError):
            exec(first, {})
        return said.read_text().splitlines()

    assert ran() == ["git clone"], "fetched, and it lacks a set-up"
    Path("zsaa-kit/tools/setup.sh").write_text(made)
    assert ran() == [f"{sys.executable} in zsaa-kit"], "not fetched twice"
    shutil.rmtree("zsaa-kit")
    monkeypatch.setenv("FAILS", "1")
    assert ran() == ["git clone"], "and nothing is set up behind a failure"
    Path("../tools").mkdir()
    Path("../tools/setup.sh").write_text(made)
    assert ran() == [f"{sys.executable} in clone"]


def test_no_run_may_write_to_the_clones_own_folders():
    """They are listed by name, as a clone without git has them too."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git, or no checkout")
    tracked = {name.partition("/")[0] for name in listed.stdout.split("\0") if "/" in name}
    assert {name for name in tracked if not name.startswith(".")} == set(folder.OURS)


def test_profiles_name_every_notebook_with_parameters_that_fit(tmp_path):
    profiles = plan.load_profiles(ROOT)
    assert set(profiles) == {"smoke", "quick", "full", "paper", "ci"}
    for name in profiles:
        plan.plan(ROOT, name, tmp_path)
    for name in set(profiles) - {"paper"}:  # what the paper has no table or figure of, paper may leave out
        assert sorted(profiles[name]["notebooks"]) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", [("linux", "x86_64"), ("darwin", "arm64")], ids=str)
def test_lock_pins_each_direct_requirement_once_and_in_range(python, system):
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": system[0],
        "platform_machine": system[1],
        "implementation_name": "cpython",
    }
    pins = {}
    for line in LOCK.splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(environment):
                assert pin.name not in pins
                pins[pin.name] = Version(str(pin.specifier).removeprefix("=="))
    for requirement in direct_requirements():
        assert pins[requirement.name] in requirement.specifier


def test_locks_hold_exact_versions_and_no_places():
    for text in (LOCK, (ROOT / "assets.lock").read_text()):
        pins = [line.split(" ;")[0].split("#")[0].strip() for line in text.splitlines() if line[:1] not in "#"]
        assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9][0-9a-z.]*", pin) for pin in pins if pin)
        assert "://" not in text
    assert "nvidia" not in LOCK.replace("NVIDIA", "")


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == zsaa.__version__ == citation["version"]
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_conda_environment_installs_the_lock_and_the_package():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-r requirements.lock", "-e ."]


def imports_of(source):
    """Top-level names that Python source imports; notebook magics are left out."""
    source = "\n".join("pass" if line.lstrip()[:1] in ("%", "!") else line for line in source.splitlines())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


class Styled(ast.NodeTransformer):
    """Calls frames that are styled, whatever they are, `frame`, and counts them."""

    found = 0

    def visit_Attribute(self, node):
        if node.attr != "style":
            return self.generic_visit(node)
        self.found += 1
        return ast.Attribute(ast.Name("frame", ast.Load()), "style", ast.Load())


@each_notebook
def test_tables_show_a_text_as_text(path):
    """Styled tables take a text for HTML unless they are told otherwise: a model could write a script there."""
    import pandas as pd

    frame = pd.DataFrame({"MAC reduction": [1.0], "alpha": [1.0], "text": ["<img src=x onerror=alert(1)>"]})
    sources = [c["source"] for c in plan.read_cells(path) if c["type"] == "code" and ".style" in c["source"]]
    for source in sources:
        tree = ast.parse(source)
        names = {t.id: n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets
                 if isinstance(t, ast.Name) and isinstance(n.value, ast.Dict)}  # fmt: skip
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "display"]
        styled = Styled()
        for shown in [styled.visit(ast.Expression(n.args[0])) for n in calls if ".style" in ast.unparse(n)]:
            used = {n.id for n in ast.walk(shown) if isinstance(n, ast.Name)} & set(names)
            given = {"frame": frame, **{name: ast.literal_eval(names[name]) for name in used}}
            html = eval(compile(ast.fix_missing_locations(shown), path.name, "eval"), given).to_html()
            assert "<img" not in html and "&lt;img" in html
        assert styled.found == source.count(".style"), "a table that this test does not see"


def test_every_third_party_import_is_declared():
    """Extras count, and so do the packaged assets; the names of the tests' own modules are ours."""
    declared = {r.name for r in direct_requirements()}
    for extra in PROJECT["optional-dependencies"].values():
        declared |= {Requirement(r).name for r in extra}
    declared |= {line.split("==")[0] for line in (ROOT / "assets.lock").read_text().splitlines()}
    modules = {name.replace("-", "_").lower() for name in declared} | {
        "yaml",
        "IPython",
        "google",
        "tomli",
        "pynvml",
        "sklearn",
    }
    ours = {"zsaa", "ablation"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    files = [path for folder in ("zsaa", "kernels", "ablation", "tests") for path in (ROOT / folder).rglob("*.py")]
    sources = [(path.name, path.read_text()) for path in files]
    for path in NOTEBOOKS:
        cells = [c["source"] for c in plan.read_cells(path) if c["type"] == "code"]
        sources += [(path.name, cell) for cell in cells if not cell.startswith("%%")]
    known = set(sys.stdlib_module_names) | modules | ours
    assert not [f"{name} imports {m}" for name, source in sources for m in imports_of(source) if m not in known]


def test_the_wheel_holds_every_package():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [p.parent.relative_to(ROOT).as_posix() for p in (ROOT / "zsaa").rglob("__init__.py")]
    assert sorted(listed) == sorted([name.replace("/", ".") for name in found] + ["zsaa.kernels"])


def test_the_wheel_holds_what_is_no_code():
    """Recipes, templates, scripts and styles: a package is looked through as deep as its data lie."""
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    others = [p for p in (ROOT / "zsaa").rglob("*.*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert {path.suffix for path in others} >= {".yaml", ".js"}
    for path in others:
        package = next(folder for folder in path.parents if (folder / "__init__.py").is_file())
        patterns = shipped.get(package.relative_to(ROOT).as_posix().replace("/", "."), [])
        assert any(path in package.glob(pattern) for pattern in patterns), f"{path} is in no wheel: see package-data"


@pytest.mark.full
def test_wheel_builds_and_imports(tmp_path):
    """Built without a network from a copy (setuptools leaves build/ behind) and imported from elsewhere."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("zsaa", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    built = subprocess.run([*pip, "wheel", *options, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("zsaa-*.whl")
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import zsaa, zsaa.kernels.naive as n; print(n.__file__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert str(wheel) in done.stdout, done.stderr


SCRIPTS = ["run_all.sh", "tools/setup.sh", "tools/lock.sh", "tools/compat.sh", ".ci/run"]
SCRIPTS += [f"examples/{path.name}" for path in sorted((ROOT / "examples").glob("*.sh"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_bash(script):
    assert os.access(ROOT / script, os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def shell(*command, path=None, cwd=None, **environment):
    """Runs a script with a bare environment; `path` replaces PATH."""
    base = {"PATH": os.environ["PATH"] if path is None else path, "HOME": os.environ.get("HOME", "/")}
    pipes = dict(capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return subprocess.run(command, env={**base, **environment}, cwd=cwd, **pipes)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_finds_its_clone_through_a_link_and_whatever_cdpath_says(tmp_path, script):
    """Its lines up to the one that looks for the clone, called by a relative path and by a link."""
    clone = tmp_path / "a clone"
    head, line, _ = re.split(r"(?m)^(.*BASH_SOURCE.*)$", (ROOT / script).read_text(), maxsplit=1)
    path = clone / script
    path.parent.mkdir(parents=True)
    path.write_text(f'{head}{line}\necho "${{root:-$(pwd)}}"\n')
    path.chmod(0o755)
    (tmp_path / "link").symlink_to(path)
    calls = [(clone, script), (clone, f"./{script}"), (path.parent, path.name), (tmp_path, "./link"), (tmp_path, path)]
    for cwd, call in calls:
        done = shell("bash", call, cwd=cwd, CDPATH=f"{clone}:{path.parent}:.:{tmp_path}")
        assert Path(done.stdout.removesuffix("\n")).resolve() == clone.resolve(), (call, done)


def test_run_all_works_through_a_link_and_whatever_cdpath_says(tmp_path):
    (tmp_path / "link").symlink_to(ROOT / "run_all.sh")
    for cwd, call in ((tmp_path, "./link"), (ROOT, "./run_all.sh"), (ROOT / "tools", "../run_all.sh")):
        done = shell("bash", call, "--list", cwd=cwd, CDPATH=f"{ROOT}:{ROOT.parent}", ZSAA_PYTHON=sys.executable)
        assert done.returncode == 0 and done.stdout.startswith("smoke"), done


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_works_on_no_folder_but_its_own(tmp_path):
    """`make -f ../clone/Makefile distclean` would remove .venv and outputs of wherever one is."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "Makefile").symlink_to(ROOT / "Makefile")
    for arguments in (["-f", str(ROOT / "Makefile")], []):
        done = shell("make", *arguments, "distclean", cwd=tmp_path)
        assert done.returncode == 2 and f"make -C {ROOT}" in done.stderr
    assert (tmp_path / "outputs").is_dir()
    assert "this list" in shell("make", "-C", str(ROOT), "help").stdout


def bin_folder(tmp_path, **fakes):
    """A folder for PATH with wrappers of the few tools that the scripts need, and the given fakes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tools = ("bash", "env", "dirname", "readlink", "awk", "df", "cat", "tail", "tee", "grep", "sed", "mv", "rm")
    for name, text in {**{tool: f'exec {shutil.which(tool)} "$@"' for tool in tools}, **fakes}.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def test_run_all_help_and_list_set_up_nothing():
    before = set(os.listdir(ROOT))
    for option, text in (("--help", "exit codes"), ("--list", "smoke")):
        done = shell(ROOT / "run_all.sh", option, ZSAA_PYTHON=sys.executable)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout
    assert set(os.listdir(ROOT)) == before


@pytest.mark.parametrize(
    ("fakes", "text"),
    [
        ({}, "python3 was not found"),
        ({"python3": "[ $1 = -V ] && echo Python 3.8.1"}, "newer is needed, python3 is Python 3.8.1"),
    ],
)
def test_setup_without_or_with_an_old_python(tmp_path, fakes, text):
    done = shell(ROOT / "run_all.sh", path=bin_folder(tmp_path, **fakes))
    assert done.returncode == errors.SETUP
    assert text in done.stderr


def test_setup_with_a_named_python_that_is_missing():
    done = shell(ROOT / "run_all.sh", ZSAA_PYTHON="/no/such/python")
    assert done.returncode == errors.SETUP
    assert "ZSAA_PYTHON=/no/such/python was not found" in done.stderr


@pytest.fixture
def copy(tmp_path):
    """What the set-up script needs of the repository, in a folder of its own."""
    folder = tmp_path / "a clone"  # the space is meant
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "setup.sh", folder / "tools")
    for name in ("pyproject.toml", "requirements.lock", "assets.lock"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_setup_with_a_full_disk(copy, tmp_path):
    fakes = {
        "df": "echo head; echo dev 9000000 8000000 1000000 89% /",
        "python3": f'exec {sys.executable} "$@"',
    }
    done = shell(copy / "tools" / "setup.sh", path=bin_folder(tmp_path, **fakes))
    assert done.returncode == errors.SETUP
    assert "0 GB are free" in done.stderr
    assert not (copy / ".venv").exists()


@pytest.mark.full
def test_setup_without_a_network_leaves_no_stamp(copy):
    """The index is a closed port of this machine, so that nothing leaves it."""
    done = shell(
        copy / "tools" / "setup.sh",
        PIP_CONFIG_FILE="/dev/null",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="1",
    )
    assert done.returncode == errors.SETUP, done.stderr
    assert "cannot reach its package index" in done.stderr
    assert done.stdout == ""
    assert not (copy / ".venv" / ".zsaa-ready").exists()


def test_setup_trusts_its_stamp_until_an_input_changes(copy, tmp_path):
    """A fake Python stands for the environment: it logs pip calls, and passes the rest on to the real one."""
    calls, prefix = tmp_path / "calls", tmp_path / "prefix"
    prefix.mkdir()
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/bin/sh
case "$*" in
"-I -m pip "*) echo "$*" >>{calls} ;;
*sys.prefix*) echo {prefix} ;;
*"import papermill"*) ;;
*) exec {sys.executable} "$@" ;;
esac
"""
    )
    fake.chmod(0o755)

    def setup():
        calls.write_text("")
        done = shell(copy / "tools" / "setup.sh", ZSAA_PYTHON=str(fake))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(fake)
        return calls.read_text()

    first = setup()
    assert "--no-deps -r assets.lock" in first
    assert "-e .[dev]" in first
    assert setup() == ""
    with open(copy / "assets.lock", "a") as file:
        file.write("# changed\n")
    assert setup() == first
    (prefix / ".zsaa-ready").write_text("half")
    assert setup() == first


@pytest.mark.parametrize("works", [True, False])
def test_uv_installs_with_pips_settings_and_pip_where_it_fails(copy, tmp_path, works):
    """Fakes stand for uv and for the Python of .venv: both log how they are called to install."""
    calls, folder = tmp_path / "calls", copy / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").write_text(
        f"""#!/bin/sh
case "$*" in
"-I -m pip config list") printf '%s\\n' ":env:.index-url='https://mine.example/simple'" \\
    "global.index-url='https://other.example/simple'" \\
    "global.extra-index-url='\\\\nhttps://a.example\\\\nhttps://b.example'" ;;
"-I -m pip install"*) echo "pip $*" >>{calls} ;;
"-I -m pip "* | *"import papermill"*) ;;
*) exec {sys.executable} "$@" ;;
esac
"""
    )
    (folder / "uv").write_text(
        f"""#!/bin/sh
echo "uv $UV_DEFAULT_INDEX ($UV_INDEX) $*" >>{calls}
exit {0 if works else 1}
"""
    )
    for path in folder.iterdir():
        path.chmod(0o755)
    tools = bin_folder(tmp_path, python3=f'exec {sys.executable} "$@"')  # and no nvidia-smi
    done = shell(copy / "tools" / "setup.sh", "--add", "more>=1", path=tools)
    assert done.returncode == 0 and done.stdout.strip() == str(folder / "python"), done
    told = calls.read_text().splitlines()
    asked = [f"-r {folder.parent}/lock.txt", "--no-deps -e .", "--no-deps -r assets.lock", "more>=1"]
    by_uv, by_pip = ([line for line in told if line.startswith(name)] for name in ("uv", "pip"))
    assert [line.endswith(what) for line, what in zip(by_uv, asked, strict=True)] == [True] * 4
    assert all("uv https://mine.example/simple (https://a.example https://b.example) pip" in line for line in by_uv)
    assert [line.endswith(what) for line, what in zip(by_pip, [] if works else asked, strict=True)] == [True] * len(
        by_pip
    )
    assert ("uv==" in (folder.parent / "lock.txt").read_text()) is False


def test_what_is_installed_for_one_user_only_does_not_count(copy, tmp_path):
    """The runner is started with -I, which does not see it: the set-up must not be content with it, and says so."""
    user = tmp_path / "user"
    user_site = user / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in ("papermill", "torch", "transformers", "yaml", "zsaa"):
        (user_site / name).mkdir(parents=True)
        (user_site / name / "__init__.py").write_text("")
    bare, prefix = tmp_path / "bare", tmp_path / "prefix"
    prefix.mkdir()
    bare.write_text(  # a Python whose prefix holds nothing, and whose pip says that all is there
        f"""#!/bin/sh
case "$*" in
*"-m pip "*) ;;
*sys.prefix*) echo {prefix} ;;
"-I "*) shift; exec {sys.executable} -I -S "$@" ;;
*) PYTHONUSERBASE={user} PYTHONPATH={user_site} exec {sys.executable} -S "$@" ;;
esac
"""
    )
    bare.chmod(0o755)
    done = shell(copy / "tools" / "setup.sh", ZSAA_PYTHON=str(bare))
    assert done.returncode == errors.SETUP, done
    assert "-I cannot import what was installed" in done.stderr and "ZSAA_PYTHON" in done.stderr
    assert not (prefix / ".zsaa-ready").exists()


def test_setup_where_pip_may_not_write(copy, tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*"-m pip "*) echo "ERROR: Could not install packages: [Errno 13] Permission denied: '/usr/lib'"; exit 1 ;;
*) exec {sys.executable} "$@" ;;
esac
"""
    )
    python.chmod(0o755)
    done = shell(copy / "tools" / "setup.sh", ZSAA_PYTHON="../python", cwd=copy)  # relative, as the caller sees it
    assert done.returncode == errors.SETUP
    assert "pip cannot install into" in done.stderr and "python3 -m venv" in done.stderr


def test_setup_in_a_clone_that_cannot_be_written_to(copy):
    (copy / ".setup.log").mkdir()  # as root, who may run this, may write to any folder
    done = shell(copy / "tools" / "setup.sh", ZSAA_PYTHON=sys.executable)
    assert done.returncode == errors.SETUP
    assert f"cannot write to {copy}" in done.stderr and "clone to another place" in done.stderr
