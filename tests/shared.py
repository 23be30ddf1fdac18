"""Fixtures of all tests, for the processes that run some (tests/conftest.py)."""

import gc
import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():  # the kernels run in Triton's interpreter; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny

from zsaa.fast import dispatch

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

# Files that run the Triton kernels without a GPU, too: in its interpreter, which takes seconds where a GPU takes
# microseconds.
# Others go PyTorch's way there, as where no Triton is installed; on a GPU all take what "auto" takes.
OF_KERNELS = ("bench", "cpu_attention", "decode", "graphs", "kernels", "layer", "linear", "packing", "rows",
              "training_graphs")  # fmt: skip


def pytest_collection_finish():
    """What was imported stays: the collector need not go through it after every training (Trainer calls it)."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def backend(request):
    plain = not torch.cuda.is_available() and request.module.__name__.removeprefix("test_") not in OF_KERNELS
    with pytest.MonkeyPatch.context() as patch:
        if plain:
            patch.setattr(dispatch, "_chosen", "torch")
        yield


@pytest.fixture
def gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A repository of two tiny notebooks, and a home of its own."""
    import trees

    from zsaa.kit.runner import page

    monkeypatch.setattr(page, "COMMAND", trees.page_command(trees.PAGE))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return trees.Tree(tmp_path / "repo")
