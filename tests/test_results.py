"""Tables, figures and the index page, from made-up results; and the committed results' own provenance."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import show
from zsaa.kit import figures, labels, paper, points, store, tables
from zsaa.kit.verdicts import counts


def row(control, target, accuracy, alpha=None, **more):
    return {
        "control": control, "target": target, "alpha": alpha, "keep_tokens": None if alpha else 50,
        "mac_reduction": float(target), "n": 100, "accuracy": accuracy,
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


def test_table_1_has_the_papers_shape_and_says_what_was_not_run(result):
    result["recipe"]["method"] = "alpha-sampled"
    table = tables.table_1([result])
    assert list(table.index) == ["1x", "2x", "3x", "5x", "7x", "9x", "11x"]
    assert list(dict.fromkeys(table.columns.get_level_values(0))) == list(paper.TABLE_1_COLUMNS)
    heading = "tiny, alpha-sampled (full), n 100, seed 0; substitute: model and data"
    assert list(table["IMDB"].columns) == [f"paper, {paper.TABLE_1_MODEL}: accuracy", heading]
    assert table["IMDB"].loc["2x", heading] == "80.0 [75.0, 85.0], alpha 0.950, 2.00x, substitute"
    assert table["IMDB"].loc["11x", heading].startswith("not run")
    assert list(table["MRPC"].columns) == [f"paper, {paper.TABLE_1_MODEL}: F1", "ours"]
    assert set(table["MRPC"]["ours"]) == {"not run"} and table["MRPC"].iloc[-1, 0] == "-"
    extra = {**result, "task": {**result["task"], "name": "rotten_tomatoes", "paper_column": None}}
    added = tables.table_1([result, extra])["Rotten Tomatoes (not in the paper)"]
    assert added.iloc[0, 0].endswith("no such column")


def test_table_1_cells_follow_the_method_alone(result):
    published = sum(v is not None for row in paper.TABLE_1.values() for v in row.values())
    cells = tables.table_1_cells([result])
    assert len(cells) == published and {c.verdict for c in cells} == {"not run"}, (
        "conventional fine-tuning is no method"
    )
    result["recipe"]["method"] = "alpha-sampled"
    cells = tables.table_1_cells([result])
    assert counts(cells) == {"reproduced": 0, "consistent": 0, "differs": 0, "substitute": 2, "not run": published - 2}
    cell = next(c for c in cells if (c.row, c.column) == ("2x", "IMDB"))
    assert (cell.published, cell.ours, cell.interval, cell.n) == (92.34, 80.0, (75.0, 85.0), 100)
    assert "alpha 0.9500, 2.00x fewer MACs, 1.60x by the clock (batch 2 of 9 tokens)" in cell.protocol
    assert "held-out samples; one seed" in cell.protocol and cell.result == "imdb-test"
    long = tables.cells_table(cells)
    assert len(long) == len(cells) and set(long["verdict"]) == {"substitute", "not run"}


def the_papers_own(result, **recipe):
    """`result` as a run of the paper's model, data and settings would be."""
    own = {**result, "model": {"name": "openai-community/gpt2", "kind": "hub"}}
    own["task"] = {**result["task"], "substitute": False}
    return {**own, "recipe": {**paper.TABLE_1_RECIPE, "seed": 0, **recipe}}


def test_only_the_papers_model_data_and_training_can_reproduce_it(result):
    own = the_papers_own(result)
    elsewhere = {**own, "task": {**own["task"], "training_substitute": "reviews"}}
    assert labels.stand_ins(elsewhere) == "training"
    assert labels.stand_ins(own) == "" and labels.status(own) == "the paper's model, data and settings"
    verdicts = {c.row: c.verdict for c in tables.table_1_cells([own]) if c.column == "IMDB"}
    assert verdicts == {"1x": "reproduced", "2x": "differs"} | dict.fromkeys(["3x", "5x", "7x", "9x", "11x"], "not run")
    assert labels.stand_ins({**own, "model": {"name": "gpt2", "kind": "local"}}) == "model", "a folder may be anything"
    others = {"epochs": 1.5, "max_steps": 10, "alpha_range": [0.5, 1.0], "tau": 1, "schedule": "rising"}
    for setting, other in others.items():
        assert labels.stand_ins(the_papers_own(result, **{setting: other})) == "training"
    assert labels.stand_ins({**result, "recipe": {"method": "conventional"}}) == "model, data and training"


def test_seeds_become_one_run_with_an_interval_that_says_what_it_covers(result):
    seeds = []
    for seed, accuracy in enumerate((78.0, 80.0, 82.0)):
        rows = [row("alpha", 2, accuracy, 0.95, right="f", seed_of_its_own=seed)]
        seeds.append({**the_papers_own(result, seed=seed), "name": f"s{seed}", "rows": rows})
    (merged,) = store.over_seeds(seeds)
    assert merged["seeds"] == [0, 1, 2] and merged["name"] == "s0, s1, s2"
    (mean,) = merged["rows"]
    assert mean["accuracy"] == 80.0 and mean["covers"] == "held-out samples and 3 seeds" and mean["n"] == 100
    assert mean["ci95"] == [round(80 - (4.969**2 + 25) ** 0.5, 2), round(80 + (4.969**2 + 25) ** 0.5, 2)]
    assert "correct" not in mean and "seed_of_its_own" not in mean and mean["alpha"] == 0.95
    cell = next(c for c in tables.table_1_cells(seeds) if c.ours is not None)
    assert "held-out samples and 3 seeds" in cell.protocol
    assert "3 seeds" in tables.table_1(seeds)["IMDB"].columns[1]
    assert len(store.over_seeds([*seeds, the_papers_own(result, tau=1)])) == 2, "other settings are another run"
    older = {k: v for k, v in seeds[1]["recipe"].items() if k != "schedule"}
    assert len(store.over_seeds([seeds[0], {**seeds[1], "recipe": older}])) == 1, "Eq. 2, whether named or not"
    filed = {**seeds[1], "recipe": {**seeds[1]["recipe"], "file": {"name": "mine.yaml"}}}
    assert len(store.over_seeds([seeds[0], filed])) == 1, "the same fields, from whatever file they were read"
    assert len(store.over_seeds([*seeds, the_papers_own(result, schedule="rising")])) == 2
    assert len(store.over_seeds([seeds[0], seeds[0]])) == 1, "one file found twice is one seed"


def test_the_controls_table_has_a_column_per_curve(result):
    table = tables.controls_table([result])["imdb"]
    names = ("dial", "first tokens only", "last tokens only")
    assert list(table.columns) == [f"conventional (full), {name}, n 100" for name in names]
    assert list(table.loc["2x"]) == ["80.0 [75.0, 85.0]", "85.0 [80.0, 90.0]", "86.0 [81.0, 91.0]"]
    assert list(table.loc["1x"]) == ["90.0 [85.0, 95.0]", "-", "-"]


def test_a_cut_that_missed_its_target_says_what_it_reached(result):
    """Short texts: between four tokens and five there is nothing."""
    for r in result["rows"]:
        r["right"] = "f" * 25
    result["rows"].append({**row("last", 5, 66.0), "mac_reduction": 6.13, "right": "f" * 25})
    result["rows"].append({**row("alpha", 5, 70.0, 0.9), "right": "f" * 25})
    table = tables.controls_table([result])["imdb"]
    assert table["conventional (full), last tokens only, n 100"]["5x"] == "66.0 [61.0, 71.0] at 6.1x"
    assert table["conventional (full), dial, n 100"]["5x"] == "70.0 [65.0, 75.0]"
    result["task"]["fingerprint"], method = "f", {**result["recipe"], "method": "alpha-sampled"}
    differences = tables.differences_table([{**result, "name": "dial", "recipe": method}, result]).set_index("against")
    for line in differences.filter(like="tokens only", axis=0)["5x"]:
        assert line in ("-", "+0.0 [+0.0, +0.0]"), "a mixture has the dial's MACs"
    alone = {**result, "rows": [r for r in result["rows"] if r["control"] == "alpha" or r["target"] == 5]}
    alone["rows"] = [r if r["control"] == "alpha" else {**r, "mac_reduction": 4.8} for r in alone["rows"]]
    differences = tables.differences_table([{**result, "name": "dial", "recipe": method}, alone]).set_index("against")
    assert differences.loc["imdb-test, last tokens only", "5x"].endswith("] at 4.8x"), "and what has more says so"


def test_a_dial_that_goes_further_brings_its_own_cut_inputs(result, tmp_path):
    """Where the conventional model's end: hollow, and none before."""
    further = {**result, "name": "z", "recipe": {"method": "zsaa+", "tuning": "full", "tau": 2}}
    further["rows"] = [*result["rows"], row("alpha", 5, 70.0, 0.9), row("last", 5, 66.0)]
    result["recipe"]["tau"] = 5
    (figure,) = figures.accuracy_figures(points.of([result, further])).values()
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert {"conventional, dial, tau 5", "zsaa+, dial, tau 2", "conventional, last tokens"} <= set(lines)
    hollow = lines["zsaa+, last tokens"]
    assert hollow.get_markerfacecolor() == "white" and list(hollow.get_xdata()) == [5.0]
    assert "zsaa+, first tokens" not in lines
    figures.save_figure(figure, tmp_path / "further")
    taught = {**result, "task": {**result["task"], "training_substitute": "other sentences"}}
    (figure,) = figures.accuracy_figures(points.of([taught])).values()
    assert "Trained: conventional (full), on other sentences." in figure.get_label()
    figures.save_figure(figure, tmp_path / "taught")
    assert (tmp_path / "taught.txt").read_text() == figure.get_label() + "\n"


def test_recipes_that_differ_are_told_apart_and_seeds_become_one_line(result):
    """An adapter that was read again on fewer samples does not hide, nor double, its line."""
    runs = [{**result, "name": f"s{seed}", "recipe": {**result["recipe"], "seed": seed}} for seed in (0, 1)]
    longer = {**result, "name": "longer", "recipe": {**result["recipe"], "epochs": 3.0}}
    again = {
        **runs[0],
        "name": "again",
        "rows": [{**result["rows"][1], "n": 50, "accuracy": 10.0, "ci95": [1.0, 20.0]}],
    }
    (figure,) = figures.accuracy_figures(points.of([*runs, longer, again])).values()
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    whole, short = (lines[f"{name}, dial"] for name in ("conventional (full), 3 epochs", "conventional (full)"))
    assert list(whole.get_ydata()) == list(short.get_ydata()) == [90.0, 80.0]


def test_differences_are_between_runs_on_the_same_samples(result):
    result["task"]["fingerprint"] = "f"
    right = {80: "f" * 20 + "0" * 5, 85: "f" * 20 + "0" * 5, 86: "0" * 5 + "f" * 20}  # of the first 80, the last 80
    for r in result["rows"]:
        r["right"] = right.get(int(r["accuracy"]), right[80])
    dial = {**result, "name": "dial", "recipe": {**result["recipe"], "method": "alpha-sampled"}}
    table = tables.differences_table([dial, result]).set_index("against")
    assert set(table["n"]) == {100}
    assert table.loc["imdb-test, first tokens only", "2x"] == "+0.0 [+0.0, +0.0]"
    points, low, high = map(float, re.findall(r"[+-][\d.]+", table.loc["imdb-test, last tokens only", "2x"]))
    assert points == 0 and -15 < low < -10 < 10 < high < 15, "20 samples won, 20 lost"
    assert set(table["1x"]) == {"+0.0 [+0.0, +0.0]", "-"} and "dial, dial" not in table.index
    other = {**result, "task": {**result["task"], "fingerprint": "of other samples"}}
    assert len(tables.differences_table([dial, other])) == 2, "only its own controls"


def test_tables_and_figures_are_files(result, tmp_path):
    tables.save_table(tables.cells_table(tables.table_1_cells([result])), tmp_path / "tables/t", "A <title>")
    assert (tmp_path / "tables/t.md").read_text().count("|---") == 11
    tables.save_table(pd.DataFrame({"cell": ["long" * 50], "a|b": ["1.50"]}), tmp_path / "tables/whole", "A title")
    assert "| a\\|b   |" in (tmp_path / "tables/whole.md").read_text(), "a bar in a cell ends no cell"
    assert "| 1.50 " in (tmp_path / "tables/whole.md").read_text(), "numbers stay as they are written"
    assert "long" * 50 in (tmp_path / "tables/whole.html").read_text()
    figures.save_figure(figures.accuracy_figure(points.of([result])), tmp_path / "figures/a")
    figures.save_figure(figures.speed_figure(points.of([result])), tmp_path / "figures/b")
    kept = {0.9: [[0, 1, 2], [1, 2]], 0.5: [[1, 2], [2]]}
    figures.save_figure(figures.preservation_figure(kept, ["a", "b", "c"]), tmp_path / "figures/c")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        f"{n}.{s}" for n in "abc" for s in ("png", "svg", "txt")
    ]


def test_positions_of_a_long_text_are_numbered_and_a_short_one_stands_beside_its_panels():
    for n, long in ((256, True), (3, False)):
        figure = figures.preservation_figure({0.9: [list(range(n)), [0]], 0.5: [[0], [0]]}, ["word"] * n)
        figure.draw_without_rendering()
        axis = figure.axes[0]
        across, down = (
            [label.get_text() for label in side] for side in (axis.get_xticklabels(), axis.get_yticklabels())
        )
        assert ("200" in across) == long and (down == ["word"] * n) != long and across


@pytest.mark.full
def test_figure_2_draws_every_data_set_and_says_what_was_not_run(result, tmp_path):
    curves, lengths = [], []
    for task, (column, *_) in figures.DATA_SETS.items():
        here = {"name": task, "paper_column": column, "metric": "f1" if task in ("qqp", "mrpc") else "accuracy"}
        for method in ("alpha-sampled", "conventional"):
            made = the_papers_own(result, method=method)
            made["task"] = {**made["task"], **here}
            more = [row("random", 2, 70.0, 0.95), row("ends", 2, 81.0)]
            curves.append({**made, "rows": result["rows"] + more})
        rows = [{"target": t, "mac_reduction": float(t), "alpha": 1 / t, "preserved": 1 / t} for t in (1, 1.5, 2)]
        for shape in (None, "gpt2"):
            lengths.append(
                {**made, "name": f"{task}-{shape}", "kind": "lengths", "recipe": {"shape": shape}, "rows": rows}
            )
    figure = figures.figure_2(points.of([*curves, *lengths]))
    a, b, c = figure.axes
    ours_and_the_papers = 2 * len(figures.DATA_SETS) - 1  # of Rotten Tomatoes the paper has no curve
    assert len(a.lines) == ours_and_the_papers + 4 * len(figures.DATA_SETS), "the dial, four controls, the paper"
    assert len(b.lines) == len(c.lines) == 2 * 2 * len(figures.DATA_SETS)
    assert figure.get_label().count("not run: none") == 2
    figures.save_figure(figure, tmp_path / "f")
    assert (tmp_path / "f.txt").read_text() == figure.get_label() + "\n"
    caption = figures.figure_2(points.of(curves[:2])).get_label()
    assert "; not run: MNLIm, MNLImm, RTE, QQP, QNLI, SST-2, MRPC, Rotten Tomatoes. B and C" in caption
    assert "; not run: IMDB, MNLIm" in caption


def test_what_was_counted_is_rounded_once():
    """4,432 of 4,900 are 90.449%: 90.45 in the file, which is not to become 90.5."""
    once = {"correct": 4432, "n": 4900, "accuracy": 90.45, "ci95": [89.6, 91.24]}
    assert store.with_interval(once) == "90.4 [89.6, 91.2]"
    assert store.with_interval({**once, "covers": "several seeds"}).startswith("90.5 ["), "the mean of some, as it is"
    assert store.measured({**once, "f1": 77.7}) == 77.7


def test_damaged_results_are_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is not a result file"):
        store.load_results(tmp_path)


def test_pack_and_unpack_are_inverse():
    kept = {0.9: [[0, 1, 2], [1, 2]], 0.5: [[2], []]}
    assert store.unpack(json.loads(json.dumps(store.pack(kept, ["a", "b", "c"])))) == (kept, ["a", "b", "c"])


COMMITTED = store.load_results()


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


@pytest.mark.full
def test_every_picture_fits_a_column_can_be_read_and_has_a_caption(monkeypatch):
    """85 mm, nothing smaller than 6 points, nothing that runs over the edge. If names differ: make figures, and remove
    what is drawn no longer."""
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    def look(figure, path, caption=None):
        name = path.name
        figure.draw_without_rendering()
        wide = name.startswith("card_")  # for a slide
        assert wide or figure.get_figwidth() == pytest.approx(85 / 25.4), name
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 6, name
        box = figure.get_tightbbox()
        assert box.x0 > -0.03 and box.x1 < figure.get_figwidth() + 0.03, (name, box)
        assert figure.get_label().endswith(".") and len(figure.get_label()) > 60, name
        plt.close(figure)

    for module in (figures.committed, show.committed):
        monkeypatch.setattr(module, "save_figure", look)
    drawn = {path.name for path in (*figures.draw_committed("nowhere"), *show.draw_committed("nowhere"))}
    pictures = {path.name for path in (store.RESULTS.parent / "figures").glob("*.png")}
    assert drawn == pictures - {"slider.png"}, "the slider's picture is a screenshot"


def test_controls_of_a_prefill_are_hollow_and_off_the_lines(tmp_path):
    benchmarks = store.load_results(store.RESULTS / "speed/h100", kind="bench-prefill")
    drawn = figures.prefill_figures(points.of(benchmarks))
    assert set(drawn) == {"speed", "roofline", "memory"}
    speed = drawn["speed"].axes[0]
    shapes = {(r["model"], r["tokens"], r["batch"]) for b in benchmarks for r in b["rows"]}
    solid = [line for line in speed.lines if line.get_marker() != "None" and line.get_markerfacecolor() != "white"]
    assert len(solid) == len(shapes)
    for line in solid:
        x = list(line.get_xdata())
        assert len(set(x)) == len(x), "each setting once: the control is no part of the line"
    hollow = sum(len(line.get_xdata()) for line in speed.lines if line.get_markerfacecolor() == "white")
    assert hollow == sum(r["alpha"] < 1 for b in benchmarks if not b["fused"] for r in b["rows"]) > 0
    figures.save_figure(drawn["speed"], tmp_path / "prefill")


def test_memory_and_training_steps_are_drawn(tmp_path):
    memory, training = (
        store.load_results(store.RESULTS / "speed/h100", kind=f"bench-{n}") for n in ("memory", "train")
    )
    held, steps = figures.memory_figure(points.of(memory)), figures.training_figure(points.of(training))
    drawn = sum(len(line.get_xdata()) for line in held.axes[0].lines)
    assert drawn == 2 * sum(len(result["rows"]) for result in memory), "peak and cache of every row, none made up"
    assert [bar.get_width() for bar in steps.axes[0].patches][::-1] == [
        row["sampled_over_conventional"] for result in training for row in result["rows"]
    ]
    figures.save_figure(held, tmp_path / "memory")
