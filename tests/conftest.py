"""What all tests share, and which of them `make test` leaves to `make test-all`: those marked `full`."""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tests share shared.py, tiny.py and reference.py


def pytest_configure(config):
    """What only hands tests on to other processes (`-n 2`) imports neither torch nor transformers."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("shared")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """A test of several parameters, such as each family in each setting, is a product. Of products `make test` runs as
    many cases as name each value of each parameter once; the rest is marked `full`. The file that waits longest comes
    first, so that another process has the other files meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_serve_cluster.py")
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
