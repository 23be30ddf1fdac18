"""Pages that people read: links that lead somewhere, a README that stays short, notebooks that can be overlooked."""

import ast
import importlib
import re
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "results/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"(?<!\\)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
NUMBER = re.compile(r"(?<![\w-])\d+(?:[.,]\d+)*")


def prose(text):
    """Markdown without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text):
    """Of the headings, as GitHub and the site make them."""
    heads = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken(text, folder):
    """The links of a page in `folder` that lead to no file of the repository, or to no heading of it."""
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (folder / path).resolve() if path else None
        if target and not (target.exists() and target.is_relative_to(ROOT)):
            yield link
        elif anchor:
            page = target.read_text(encoding="utf-8") if target else text
            if anchor not in anchors(page):
                yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_of_a_page_leads_somewhere(page):
    assert not list(broken(page.read_text(encoding="utf-8"), page.parent))


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    text = "[a](docs/none.md) [b](#none) [c](README.md) [d](#here) `[e](none)` [f](https://x.y/z)\n\n# Here\n"
    assert list(broken(text, ROOT)) == ["docs/none.md", "#none"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_defines_no_function(path):
    cells = nbformat.read(path, 4).cells
    assert len(cells) < 15
    for cell in cells:
        if cell.cell_type == "code":
            kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
            assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}
        else:
            assert not list(broken(cell.source, path.parent))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_finds_what_is_not_installed_with_the_package(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
    where = text.find("from ablation")
    assert where < 0 or "sys.path.append(str(" in text[:where]


def test_all_notebooks_fetch_zsaa_in_the_same_way():
    """The set-up installs an editable package whose finder a running kernel does not know yet: without `addsitedir` it
    would find zsaa in no place, or, with the clone on sys.path, zsaa without zsaa.kernels."""
    first = {next(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code") for path in NOTEBOOKS}
    assert len(first) == 1 and "site.addsitedir(" in first.pop()


def test_the_quickstart_has_at_most_53_lines_of_code():
    """Behind the cell that fetches zsaa where it is missing, which is no part of what it shows."""
    _, *cells = [c for c in nbformat.read(ROOT / "notebooks/00_quickstart.ipynb", 4).cells if c.cell_type == "code"]
    lines = [line.strip() for c in cells for line in c.source.splitlines()]
    assert len([line for line in lines if line and not line.startswith("#")]) <= 53


def test_the_readme_has_at_most_700_words_and_30_numbers():
    """Numbers are those of its prose, "Table 3" among them; link targets and code are not counted, words are all."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    assert len(NUMBER.findall(LINK.sub("]", prose(text)))) <= 30


def test_every_page_of_findings_says_what_it_claims_and_how_sure_that_is():
    index = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs/findings").glob("*.md")):
        said = re.sub(r"(?<!\n)\n(?!\n)", " ", page.read_text(encoding="utf-8"))  # a paragraph a line
        assert re.match(
            r"# .+\?( \(Table \d\))?\n\n\*\*Claim\.\*\* .+\n\n\*\*Caveat\.\*\* .+\n\n\*\*Files\.\*\* ", said
        )
        assert f"(findings/{page.name})" in index


@pytest.fixture
def pages(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("site_pages")
    monkeypatch.setattr(module, "PAGES", tmp_path)
    return module


def test_a_page_of_the_site_takes_along_what_it_links_to(pages, tmp_path):
    text = "[a](../LICENSE) [b](../results/) [c](decisions.md#x) [d](https://x.y) [e](../notebooks/05_table4.ipynb)"
    said = pages.carried(text, Path("docs"))
    assert (tmp_path / "LICENSE").is_file()
    folder = f"[b]({pages.SOURCE}/results)"
    assert said == f"[a](../LICENSE) {folder} [c](decisions.md#x) [d](https://x.y) [e](../notebooks/05_table4.md)"


def test_what_a_page_of_the_site_would_fetch_is_found(pages, tmp_path):
    fetching = '<script src="https://a.b/c.js"></script><link href="https://a.b" rel="stylesheet">'
    (tmp_path / "a.html").write_text(fetching + '<img src=https://a.b/c.png><a href="https://a.b">link</a>')
    (tmp_path / "b.html").write_text('<script src="../x.js"></script><img src="data:image/png;base64,x">')
    assert len(pages.fetched(tmp_path)) == 3


def test_a_notebook_that_was_not_run_says_so_on_its_page(pages, tmp_path):
    pytest.importorskip("nbconvert")
    place = pages.notebook_page(ROOT / "notebooks/05_table4.ipynb", [tmp_path / "no run"])
    text = (tmp_path / place).read_text(encoding="utf-8")
    assert "Not run for this site" in text and "colab-badge" not in text and "[Open in Colab](https://colab" in text
