"""What all tests share, and which of them `make test` leaves to `make test-all`: those marked `full`."""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # the kernels run in Triton's interpreter; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))  # tests share tiny.py and reference.py

settings.register_profile("no-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no-deadline")

import tiny  # noqa: E402

from zsaa.fast import dispatch  # noqa: E402

# Files that run the Triton kernels without a GPU, too: in its interpreter, which takes seconds where a GPU takes
# microseconds.
# Others go PyTorch's way there, as where no Triton is installed; on a GPU all take what "auto" takes.
OF_KERNELS = ("bench", "cpu_attention", "decode", "graphs", "kernels", "layer", "linear", "packing", "rows",
              "training_graphs")  # fmt: skip


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


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """A test of several parameters, such as each family in each setting, is a product. Of products `make test` runs as
    many cases as name each value of each parameter once; the rest is marked `full`."""
    tests = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("full"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        chosen = covering([frozenset(enumerate(case.callspec._idlist)) for case in cases])
        for index, case in enumerate(cases):
            if index not in chosen:
                case.add_marker("full")


def covering(cases: list[frozenset]) -> set[int]:
    """Indices of few cases that hold every element of all cases, the least used elements first."""
    missing, used, chosen = frozenset().union(*cases), Counter(), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: (len(cases[i] & missing), -sum(used[e] for e in cases[i])))
        chosen.add(best)
        missing -= cases[best]
        used.update(cases[best])
    return chosen
