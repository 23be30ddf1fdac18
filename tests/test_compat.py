"""The supported range of transformers: what it is, and what is said outside of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from packaging.requirements import Requirement
from packaging.version import Version

import zsaa
from zsaa import compat, models

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers").specifier


@pytest.mark.parametrize(
    "version", ["4.57.6", "5.0.0", "5.14.1", "5.15.0", "5.15.1", "5.16.0.dev0", "5.23.0", "5.99.9", "6.0.0", "6.0.0rc1"]
)
def test_the_check_agrees_with_the_declared_range(version, monkeypatch):
    monkeypatch.setattr("transformers.__version__", version)
    if declared().contains(Version(version).base_version):
        compat.check_transformers()
    else:
        with pytest.raises(ImportError) as caught:
            compat.check_transformers()
        assert f"transformers {version} is installed" in str(caught.value)
        assert "pip install 'transformers>=5.15,<6'" in str(caught.value)


@pytest.mark.parametrize("start", ["enable", "load_model"])
def test_both_doors_check(start, monkeypatch, tmp_path):
    model = tiny.make("llama")
    monkeypatch.setattr("transformers.__version__", "6.0.0")
    with pytest.raises(ImportError, match=r"zsaa works with transformers>=5\.15,<6, but transformers 6\.0\.0"):
        zsaa.enable(model) if start == "enable" else models.load_model(str(tmp_path))
    assert not model.model._forward_pre_hooks


@pytest.mark.full
def test_an_ancient_transformers_is_named_on_import(tmp_path):
    """Versions so old that they lack the classes that zsaa builds on cannot get as far as `enable`."""
    fake = tmp_path / "transformers"
    fake.mkdir()
    (fake / "__init__.py").write_text("__version__ = '4.41.0'\n")
    (fake / "cache_utils.py").write_text("class DynamicCache: pass\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import zsaa"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: zsaa works with transformers>=5.15,<6")
