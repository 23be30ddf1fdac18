"""The report of a run and of the committed results, from made-up result files and Cells."""

import html.parser
import json
import re
import shutil

import pytest

from zsaa.kit import figures, paper, report, store, tables
from zsaa.kit.report import grid, sections, view
from zsaa.kit.report import write as pages
from zsaa.kit.report.provenance import once
from zsaa.kit.verdicts import Cell


def provenance(**facts):
    hardware = {"device": "cpu", "cpu": "Test CPU", "cores": 2, "threads": 2}
    return {"commit": "c0ffee1234567", "dirty": False, "date": "2000-01-01T00:00:00", "hardware": hardware, "seed": 0,
            "versions": {"torch": "9.9"}, "seconds": 90.0, "eval_samples": 1100, **facts}  # fmt: skip


CELLS = {
    "table_1_cells": [
        Cell("Table 1", "1x", "IMDB", 92.40, 92.0, (91.0, 93.0), 1100, "accuracy", "GPT-2 itself", "", "own"),
        Cell("Table 1", "1x", "IMDB", 92.40, 88.0, (87.0, 89.0), 900, "by <b>proxy", "a small one", "model", "small"),
        Cell("Table 1", "2x", "IMDB", 92.34, 80.0, (79.0, 81.0), 1100, "accuracy", "GPT-2 itself", "", "own"),
        Cell("Table 1", "1x", "RTE", 63.54),
    ],
    "table_4_cells": [Cell("Table 4", "GPT-2", "layers", 24, 12, protocol="counted", subject="gpt2", result="arch")],
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An output folder, and a repository of which nothing is committed but one result."""
    root, out = tmp_path / "repository", tmp_path / "out"
    for folder in (root / "results/sub", root / "docs", out / "results", out / "figures", out / "tables"):
        folder.mkdir(parents=True)
    old = {"name": "old", "kind": "test", "provenance": provenance(gpu_joules=5000.0, cpu_joules=None)}
    (root / "results/sub/old.json").write_text(json.dumps(old))
    monkeypatch.setattr(view, "ROOT", root)
    for name in ("table_1_cells", "table_2_cells", "table_3_cells", "table_4_cells"):
        mine = CELLS.get(name, [])
        none = [Cell(c.table, c.row, c.column, c.published) for c in mine]
        monkeypatch.setattr(tables, name, lambda found, mine=mine, none=none: mine if found else none, raising=False)
    return out


def write(out, name="own", **facts):
    content = {"name": name, "kind": "test", "provenance": provenance(**facts)}
    (out / f"results/{name}.json").write_text(json.dumps(content))


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order and that nothing is fetched; keeps the text and the links within."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links, self.ids = [], "", set(), set()
        self.feed(text)
        assert self.open == []
        assert {link[1:] for link in self.links if link.startswith("#")} <= self.ids

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert attributes.get("src", "data:").startswith("data:")
        self.ids.add(attributes.get("id"))
        if tag == "a":
            self.links.add(attributes["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def test_the_page_of_a_run(run):
    write(run, gpu_joules=1500.0, cpu_joules=None)
    tables.save_table(tables_frame(), run / "tables/01_mine", "A <title>")
    figure = simple_figure()
    figures.save_figure(figure, run / "figures/01_accuracy")
    (run / "figures/01_accuracy.txt").write_text("What is <drawn>")
    (run / "logs").mkdir()
    (run / "logs/01_table1.log").write_text("")
    statuses = [
        {"name": "01_table1", "status": "done", "message": "", "seconds": 125.0, "gpu_joules": 2500.0,
         "cpu_joules": 1000.0, "log": "logs/01_table1.log", "executed": None},
        {"name": "02_table2", "status": "failed", "message": "<boom>", "seconds": None, "log": None, "executed": None},
        {"name": "04_table3", "status": "lacking", "message": "needs gpu: none", "seconds": None},
    ]  # fmt: skip
    path = report.index(run, statuses)
    text = path.read_text()
    page = Page(text)
    said = " ".join(page.text.split())
    for expected in (
        "paper 92.40", "A 92.0 [91.0, 93.0] ✓ reproduced", "B 88.0 [87.0, 89.0] ≈ substitute",
        "A 80.0 [79.0, 81.0] ≠ differs", "– not run", "GPT-2 itself; accuracy; n = 1,100", "stands in for the",
        "by <b>proxy", "What is <drawn>", "A <title>", "<boom>", "2 min", "2.5 kJ GPU + 1.0 kJ CPU",
        "not run: something is missing", "sub/old", "5.0 kJ GPU", "1.5 kJ GPU", "c0ffee1234", "Test CPU, 2 threads",
    ):  # fmt: skip
        assert expected in said, expected
    assert "logs/01_table1.log" in page.links
    summary = re.search(r"Table 1</a></th>(.*?)<td class=\"share\"><div", text, re.DOTALL)[1]
    assert re.findall(r"<td>(\d+)</td>", summary) == [
        "1",
        "0",
        "1",
        "0",
        "1",
    ]  # a number has its strongest verdict only
    markdown = (run / "index.md").read_text()
    assert "| Table 1 | 1 | 0 | 1 | 0 | 1 |" in markdown
    assert "paper 92.40<br>A 92.0 [91.0, 93.0] ✓ reproduced<br>B 88.0" in markdown
    assert "![What is <drawn>](figures/01_accuracy.png)" in markdown
    assert report.index(run, statuses).read_text() == text
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_what_runs_on_one_meter_read_at_the_same_time_counts_once():
    """60 s at 10 W, and within them 30 s in which another run read 30 W; then 10 s at 5 W."""
    runs = [
        {"seconds": 60.0, "ended": 1060.0, "joules": 600.0},
        {"seconds": 30.0, "ended": 1050.0, "joules": 900.0},
        {"seconds": 10.0, "ended": 2000.0, "joules": 50.0},
        {"seconds": 5.0, "ended": 1020.0, "joules": None},
    ]
    assert once(runs, lambda run: run["joules"]) == pytest.approx(30 * 10 + 900 + 50)
    assert once(runs, lambda run: run["seconds"]) == pytest.approx(70)
    assert once(runs[3:], lambda run: run["joules"]) is None
    assert once([{"seconds": None, "ended": 0.0, "joules": 7.0}], lambda run: run["joules"]) == 7, "of no known length"


def tables_frame():
    import pandas as pd

    return pd.DataFrame({"a": ["<1>"]})


def simple_figure():
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(1, 1))
    axis.plot([0, 1], [0, 1])
    return figure


def test_what_a_run_finds_again_is_shown_once(run):
    write(run.parent / "repository", "own")
    assert "A 92.0 [91.0, 93.0]" in Page(report.index(run).read_text()).text
    write(run, "own")
    text = Page(report.index(run).read_text()).text
    assert "B 88.0" in text and "C 92.0" not in text


def test_nothing_measured_is_said_to_be_not_run(run):
    text = Page(report.index(run).read_text()).text
    assert "✓ reproduced" in text  # the legend
    assert "A 92.0" not in text
    assert "3 of the paper's numbers not run" in text


def test_a_result_with_several_protocols_has_a_letter_for_each():
    def cells(row, *protocols):
        return [
            ("here", Cell("Table 2", row, "PTB", 38.69, 40.0, (39.0, 41.0), 5, p, "m", "", "ppl")) for p in protocols
        ]

    found = grid.grid_of(
        cells("1x", "alpha 1.0, per token", "alpha 1.0, per word") + cells("2x", "alpha 0.9, per word")
    )
    assert [[line["run"] for line in row["places"][0]["lines"]] for row in found["rows"]] == [["A", "B"], ["B"]]
    assert [run["how"] for run in found["runs"]] == ["alpha 1.0, per token", "per word"]
    (row,) = grid.grid_of(cells("1x", "alpha 1.0"))["rows"]
    assert [line["run"] for line in row["places"][0]["lines"]] == ["A"]


def test_a_list_of_numbers_is_masked_as_one():
    assert grid._masked("prompts of 512 tokens 1.2x, 1024 tokens 1.3x, 9 tokens 2x; over all 1x, 2x") == (
        "prompts of … tokens …x, …; over all …x, …"
    )


def test_what_protocols_share_is_told_without_the_numbers_that_differ():
    found = [
        f"peak, sdpa at 1x, alpha {a} (as printed), {x}x fewer; 0 shots; over {x}x" for a, x in ((0.9, 2), (0.8, 3))
    ]
    assert grid._shared(found) == "peak, sdpa at 1x, alpha (as printed); 0 shots"
    assert grid._shared(["alpha 0.9 to 0.8 (solved)", "alpha 0.7 to 0.6 (solved)"]) == "alpha (solved)"
    assert grid._shared(found[:1] * 2) == found[0]


def test_lines_that_read_the_future_come_last():
    def cell(protocol):
        return "here", Cell("Table 2", "1x", "PTB", 38.69, 40.0, (39.0, 41.0), 5, protocol, "m", "", "ppl")

    protocols = ["carry-through; per token", "prefix; per word", "prefix; per token"]
    (row,) = grid.grid_of([cell(p) for p in protocols])["rows"]
    assert [line["protocol"] for line in row["places"][0]["lines"]] == protocols[::-1]
    assert [line["run"] for line in row["places"][0]["lines"]] == ["A", "B", "C"]


def test_a_damaged_result_is_named(run):
    (run / "results/cut.json").write_text("{")
    with pytest.raises(ValueError, match=r"cut\.json is not a result file"):
        report.index(run)


@pytest.mark.full
def test_on_a_telephone_the_papers_tables_need_no_scrolling_and_others_say_that_they_do():
    sync_api = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    with sync_api.sync_playwright() as play:
        page = play.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": 390, "height": 800}
        )
        page.goto((view.ROOT / "docs/report.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == 390, "the page itself does not scroll sideways"
        over = """(boxes) => boxes.filter((box) => box.checkVisibility()).map(
            (box) => [box.scrollWidth - box.clientWidth, getComputedStyle(box, "::before").content])"""
        papers = page.eval_on_selector_all(".scroll:has(.paper-table), .scroll:has(.verdicts)", over)
        assert len(papers) == 5 and max(width for width, _ in papers) <= 1
        others = page.eval_on_selector_all(".scroll:not(:has(.paper-table))", over)
        hidden = [says for width, says in others if width > 60]
        assert len(hidden) > 3 and all("scroll sideways" in says for says in hidden)
        names = page.eval_on_selector_all(
            "#table-1 td.place", "(c) => c.map((d) => getComputedStyle(d, '::before').content)"
        )
        assert set(paper.TABLE_1_COLUMNS) == {name.strip('"') for name in names}


def test_every_section_has_its_notebook_and_its_functions():
    notebooks = {path.stem for path in (store.RESULTS.parent / "notebooks").glob("*.ipynb")}
    for section in sections.SECTIONS:
        assert not section.cells or callable(getattr(tables, section.cells)), section.title
        assert section.notebook in notebooks, section.title
        for _, function, _ in section.more:
            assert callable(getattr(tables, function))


def test_the_committed_report_is_what_make_report_makes(tmp_path):
    """If this fails: make report, and look at it."""
    folder = store.RESULTS.parent / "docs"
    shown = view.gather(view.Sources({"committed": view.ROOT}, folder))
    for name in ("report.html", "report.md"):
        assert pages.render(name, shown) == (folder / name).read_text(encoding="utf-8"), f"{name} is not up to date"
    Page((folder / "report.html").read_text())
