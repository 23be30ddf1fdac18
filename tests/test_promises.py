"""docs/promises.md and docs/public_reports.md name tests that exist; and what `make test` leaves to `make test-all`."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from conftest import covering

import zsaa

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NAMED = re.compile(r"`(test_\w+)::(test_\w+)`")


@cache
def functions_of(file: str) -> dict[str, bool]:
    """Each test function of a file, and whether all of it is marked `full`."""
    tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
    marks = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"]
    every = any("pytest.mark.full" in ast.unparse(mark) for mark in marks)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {f.name: every or "pytest.mark.full" in map(ast.unparse, f.decorator_list) for f in found}


def rows_of(page: str) -> list[list[str]]:
    """The cells of each row of a page's tables, without the heads."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [cells for cells in rows if cells[0] not in ("promise", "source")]


PAGES = {"promises.md": 2, "public_reports.md": 4}  # with the number of columns, of which the last names tests
ROWS = [(page, cells) for page in PAGES for cells in rows_of(page)]


@pytest.mark.parametrize("page", PAGES)
def test_every_row_names_tests_that_exist(page):
    for cells in rows_of(page):
        assert len(cells) == PAGES[page], f"{page}: a row of {len(cells)} cells: {cells}"
        named = NAMED.findall(cells[-1])
        assert named, f"{page}: no test is named for: {cells[0]}"
        lost = [f"{file}::{name}" for file, name in named if name not in functions_of(file)]
        assert not lost, f"{page}, {cells[0]!r}: there is no {lost}; name the test that holds this now"


def test_make_test_holds_every_promise_but_those_in_italics():
    for promise, tests in rows_of("promises.md"):
        full = [functions_of(file)[name] for file, name in NAMED.findall(tests)]
        assert all(full) == promise.startswith("*"), f"all tests marked full, or only those in italics: {promise}"


def test_every_public_name_has_a_promise():
    text = " ".join(promise for promise, _ in rows_of("promises.md"))
    assert [name for name in zsaa.__all__ if f"`{name}`" not in text] == []


def test_the_page_of_public_reports_names_all_of_its_own_tests():
    named = {test for _, cells in ROWS for test in NAMED.findall(cells[-1])}
    own = {(path.stem, name) for path in TESTS.glob("test_public_reports*.py") for name in functions_of(path.stem)}
    assert own <= named, own - named


def test_what_the_readme_calls_is_what_ci_calls_and_nothing_runs_twice():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"(?m)^make test\b", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(re.findall(r"(?m)^step make test ", ci)) == len(re.findall(r"(?m)^step make test-rest ", ci)) == 1
    runs = dict(re.findall(r"(?m)^(test[a-z-]*):.*\n\t@\$\(PYTEST\) (.*)\$\(ARGS\)$", make))
    assert {name: options.strip() for name, options in runs.items()} == {
        "test": '-m "not full"',
        "test-rest": "-m full",
        "test-all": "",
    }


def test_a_product_is_thinned_to_each_value_of_each_parameter():
    cases = [frozenset(enumerate(case)) for case in [(f, p, s) for f in "abcdefg" for p in "lr" for s in "xyz"]]
    chosen = covering(cases)
    assert len(chosen) == 7 and frozenset().union(*(cases[i] for i in chosen)) == frozenset().union(*cases)
    assert covering(cases) == chosen
    alone = [frozenset([(0, value)]) for value in "abc"]
    assert covering(alone) == {0, 1, 2} and covering([]) == set()
