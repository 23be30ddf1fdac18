"""Tables, figures and the index page, from made-up results; and the committed results' own provenance."""

import json
import re

import pytest

from zsaa import figures, paper, results, tables


def row(control, target, accuracy, alpha=None, **more):
    return {
        "control": control, "target": target, "alpha": alpha, "keep_tokens": None if alpha else 50,
        "mac_reduction": float(target), "correct": int(accuracy), "n": 100, "accuracy": accuracy,
        "ci95": [accuracy - 5, accuracy + 5], **more,
    }  # fmt: skip


@pytest.fixture
def result():
    hardware = {"device": "cpu", "cpu": "test", "cores": 2, "threads": 2, "memory_gib": 8}
    return {
        "name": "imdb-test",
        "kind": "curve",
        "model": {"name": "tiny"},
        "task": {"name": "imdb", "source": "made up", "substitute": True, "metric": "accuracy", "paper_column": "IMDB"},
        "recipe": {"method": "conventional", "tuning": "full"},
        "provenance": {
            "commit": "c0ffee", "dirty": False, "date": "2000-01-01T00:00:00", "hardware": hardware, "seed": 0,
            "versions": {"torch": "0", "transformers": "0", "python": "3"}, "seconds": 1.0, "eval_samples": 100,
        },
        "rows": [
            row("alpha", 1, 90.0, 1.0, speedup=1.0, latency_mac_reduction=1.0, latency_batch=2, latency_tokens=9),
            row("alpha", 2, 80.0, 0.95, speedup=1.6, latency_mac_reduction=2.1, latency_batch=2, latency_tokens=9),
            row("first", 2, 85.0),
            row("last", 2, 86.0),
        ],
    }  # fmt: skip


def test_the_papers_tables_against_its_text():
    """Spot checks typed in from the paper a second time."""
    assert paper.TABLE_1[11]["IMDB"] == 86.48 and paper.TABLE_1[5]["MRPC"] == 76.16 and paper.TABLE_1[2]["RTE"] == 64.26
    assert paper.TABLE_1[7]["SST-2"] is None and paper.TABLE_1[9]["QNLI"] == 69.63
    assert paper.TABLE_2[3] == {"WikiText-103": 48.59, "LAMBADA": 62.16, "PTB": 59.07, "1BW": 52.30}
    assert paper.TABLE_3["Gemma-2-2B-4bit"][3.5] == {"MMLU": 45.51, "GPU footprint": 1.71, "alpha": 0.96}
    assert paper.TABLE_4["Mistral"]["hidden size"] == 4096


def test_table_1_labels_substitutes_and_keeps_the_papers_numbers_apart(result):
    table = tables.table_1([result])
    assert list(table["status"]) == ["substitute: model and data"] * 2
    assert list(table[f"paper, {paper.TABLE_1_MODEL}"]) == [92.40, 92.34]
    assert list(table["ours"]) == [90.0, 80.0] and list(table["measured"]) == ["1.00x", "1.60x"]
    result["task"]["paper_column"] = None
    assert set(tables.table_1([result])[f"paper, {paper.TABLE_1_MODEL}"]) == {"no such column"}
    for r in result["rows"]:
        r.pop("speedup", None)
    assert set(tables.table_1([result])["measured"]) == {"not run"}


def test_the_wide_table_marks_what_is_out_of_reach(result):
    wide = tables.table_1_wide([result])
    ours = wide[(f"{results.label(result)} (substitute: model and data)", "accuracy [95% interval]")]
    assert ours["2x"] == "80.0 [75.0, 85.0]" and ours["11x"] == "out of reach"


def test_the_controls_table_has_a_column_per_curve(result):
    table = tables.controls_table([result])["imdb"]
    assert list(table.columns) == [
        "conventional (full), dial", "conventional (full), first tokens only", "conventional (full), last tokens only"
    ]  # fmt: skip
    assert list(table.loc["2x"]) == ["80.0 [75.0, 85.0]", "85.0 [80.0, 90.0]", "86.0 [81.0, 91.0]"]
    assert list(table.loc["1x"]) == ["90.0 [85.0, 95.0]", "-", "-"]


def test_tables_and_figures_are_files(result, tmp_path):
    tables.save_table(tables.table_1([result]), tmp_path / "tables/t", "A <title>")
    assert (tmp_path / "tables/t.md").read_text().count("|---") == 11
    figures.save_figure(figures.accuracy_figure([result], "title"), tmp_path / "figures/a")
    figures.save_figure(figures.speed_figure([result], "title"), tmp_path / "figures/b")
    kept = {0.9: [[0, 1, 2], [1, 2]], 0.5: [[1, 2], [2]]}
    figures.save_figure(figures.preservation_figure(kept, ["a", "b", "c"]), tmp_path / "figures/c")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        f"{n}.{s}" for n in "abc" for s in ("png", "svg")
    ]


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not a result file"):
        results.load_results(tmp_path)


def test_pack_and_unpack_are_inverse():
    kept = {0.9: [[0, 1, 2], [1, 2]], 0.5: [[2], []]}
    assert results.unpack(json.loads(json.dumps(results.pack(kept, ["a", "b", "c"])))) == (kept, ["a", "b", "c"])


COMMITTED = results.load_results()


@pytest.mark.parametrize("result", COMMITTED, ids=[r["name"] for r in COMMITTED])
def test_committed_results_carry_their_provenance(result):
    p = result["provenance"]
    assert re.fullmatch(r"[0-9a-f]{40}", p["commit"]) and not p["dirty"]
    assert p["versions"]["torch"] and p["hardware"]["device"] and p["seed"] is not None
    for r in result["rows"]:
        if "accuracy" in r:
            assert r["n"] == p["eval_samples"]
            assert r["accuracy"] == pytest.approx(100 * r["correct"] / r["n"], abs=0.006)
            assert f"{int(r['right'], 16):b}".count("1") == r["correct"]


def test_the_readme_quotes_the_committed_results():
    """Every accuracy in the README's IMDB table, with its interval, stands in the result files."""
    by_name = {r["name"]: r for r in COMMITTED}
    curves = [("imdb-alpha-sampled", "alpha")] + [("imdb-conventional", c) for c in ("alpha", "first", "last")]
    readme = (results.RESULTS.parent / "README.md").read_text()
    lines = re.findall(r"^\| (\d+)x \|(.*)\|$", readme, flags=re.MULTILINE)
    assert [int(target) for target, _ in lines] == list(paper.TABLE_1)
    for target, cells in lines:
        *ours, published = (cell.strip() for cell in cells.split("|"))
        assert published == f"{paper.TABLE_1[int(target)]['IMDB']:.1f}"
        for (name, control), cell in zip(curves, ours):
            row = {r["target"]: r for r in results.rows_of(by_name[name], control)}.get(int(target))
            assert cell == ("-" if row is None else "{:.1f} [{:.1f}, {:.1f}]".format(row["accuracy"], *row["ci95"]))


def test_the_figures_are_drawn_from_the_committed_results(tmp_path):
    drawn = {path.name for path in figures.draw_committed(tmp_path)}
    committed = {path.name for path in (results.RESULTS.parent / "figures").glob("*.png")}
    assert drawn == committed - {"slider.png"}, "the slider's picture is a screenshot"
