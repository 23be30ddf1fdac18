"""The ablation's tables and figures, of made-up rows and of the committed ones."""

import json
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import show
from ablation.run import load_config
from zsaa.kit import figures
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import from_bits, to_bits


def made_up(row, control, rights, about="made up"):
    n = len(rights[0])
    cells = [
        {"control": control, "target": target, "mac_reduction": float(target), "correct": sum(r), "n": n,
         "accuracy": 100 * sum(r) / n, "ci95": [0.0, 100.0], "right": to_bits(r)}
        for target, r in zip((1, 2), rights)
    ]  # fmt: skip
    log = {"epochs_of_compute": 1.0, "seconds": 60.0, "steps": 1}
    how = {"training": {"seed": 0, "epochs": 1, "learning_rate": 4e-5}, "variant": {"tau": 5}}
    return {"row": row, "about": about, "rows": cells, "log": log, **how}


def test_paired_tests_say_who_is_ahead(tmp_path):
    n = 400
    whole, half = [1] * n, [i % 2 for i in range(n)]
    results = {
        "paper": made_up("paper", "alpha", (whole, half)),
        "better": made_up("better", "alpha", (whole, [int(i % 4 > 0) for i in range(n)])),
        "truncated-last": made_up("truncated-last", "last", (whole, whole)),
    }
    table = show.paired_table(results, (1, 2, 3)).set_index("row")
    assert table.loc["better", "2x"].startswith("+25.0 [") and table.loc["better", "2x"].endswith("*")
    assert table.loc["paper", "2x"] == "+0.0 [+0.0, +0.0]" and set(table["3x"]) == {"-"}
    rival = show.paired_table(results, (1, 2), "truncation").set_index("row")
    assert rival.loc["better", "2x"].startswith("-25.0 [") and rival.loc["better", "1x"] == "-"
    assert show.paired_table({"better": results["better"]}, (1, 2)) is None
    rows = {**load_config()["rows"]}
    accuracy = show.accuracy_table(results, (1, 2), rows).set_index("row")
    assert accuracy.loc["truncated-last, last tokens", "2x"] == "100.0 [99.0, 100.0]", "as counted"
    assert accuracy.loc["merged", "2x"] == "not run" and len(accuracy) == len(rows) + 1
    assert accuracy.loc["paper", "what it shows"] == rows["paper"]["about"], "the configuration's words, not the run's"
    order = [name.split(",")[0] for name in accuracy.index]
    assert order == [*rows, "better"] and accuracy.loc["better", "what it shows"] == "made up"
    figures.save_figure(show.accuracy_figure(results, "made up"), tmp_path / "accuracy")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_continuations_are_shown_beside_truncation(tmp_path):
    rows = [
        {"variant": name, "target": target, "mac_reduction": float(target), "agreement": 50.0, "perplexity": ppl,
         "nll": [math.log(ppl)] * 2, "n": 2}
        for name, target, ppl in (("stock", 1, 10), ("truncation", 2, 11), ("good", 2, 10.5), ("bad", 2, 900))
    ]  # fmt: skip
    result = {"rows": rows, "model": {"name": "made up"}}
    table = show.continuation_table(result).set_index("variant")
    assert table.loc["good", "nats over truncation"] == "-0.047 ± 0.000"
    assert table.loc["good", "over stock"] == "1.050x"
    figure = show.continuation_figure(result)
    assert "bad (90.0x)" in figure.get_label()
    assert figure.axes[1].get_ylim()[1] < 3, "what blows up squashes nothing"
    figures.save_figure(figure, tmp_path / "continuation")
    depths = {"column_sum": [1.0, 0.2], "random": [0.5, 1.0]}
    figures.save_figure(show.survival_figure(depths, ["a", " b"], "made up"), tmp_path / "survival")


COMMITTED = RESULTS / "ablation"

TASKS = [
    path.name for path in sorted(COMMITTED.iterdir()) if path.is_dir() and show.own_row(show.load(COMMITTED, path.name))
]

TARGETS = (1, 2, 3, 5, 7, 9, 11)
each_task = pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task == "imdb" else pytest.mark.full) for task in TASKS]
)


def texts_of(figure) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


def heroes_of(results) -> dict[str, dict]:
    """Result by shown name of the protagonists that were run."""
    return {
        shown: result
        for (row, _), (shown, *_) in show.protagonists(results).items()
        for result in results.values()
        if result["row"] == row and show.is_main(result) and not show.seed_of(result)
    }


@each_task
def test_committed_rows_are_drawn_by_name(task, tmp_path):
    results = show.load(COMMITTED, task)
    heroes = heroes_of(results)
    assert "salience (zsaa+)" in heroes and "paper's recipe, dial" in heroes
    figure = show.accuracy_figure(results, task)
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == set(heroes), "grey lines have no names"
    votes = show.scorer_of(heroes["evidence, one drop"]) if "evidence, one drop" in heroes else None
    reach = figure.axes[0].get_xlim()[1]
    assert reach < 14, "no half axis for what is not drawn"
    caption = figure.get_label()
    assert f"salience (zsaa+) {heroes['salience (zsaa+)']['log']['epochs_of_compute']:.2g};" in caption
    assert ("a control" in caption) == bool(votes)
    if votes:
        assert f"have {votes['accuracy']:.1f} [" in caption and f"at {votes['mac_reduction']:.0f}x" in caption
    figures.save_figure(figure, tmp_path / "accuracy")


@pytest.mark.full
@each_task
def test_every_committed_row_has_its_panel_and_its_name(task, tmp_path):
    results, heroes = show.load(COMMITTED, task), show.protagonists(show.load(COMMITTED, task))
    drawn = show.rows_figures(results, task)
    axes = [axis for figure in drawn for axis in figure.axes]
    assert all(len(figure.axes) <= 3 for figure in drawn) and len(axes) > 3
    named = [t.get_text().split(" (")[0] for axis in axes for t in axis.texts]
    assert sorted(named) == sorted(
        name.removesuffix(" tokens")
        for name, result, control in show.curves(results)
        if not show.seed_of(result) and (not show.is_main(result) or (result["row"], control) not in heroes)
    )
    for axis in axes:
        low, high = axis.get_ylim()
        places = sorted(t.get_position()[1] for t in axis.texts)
        room = max(show.ROOM, len(axis.texts) + 0.2)
        assert all(after - before > 0.99 * (high - low) / room for before, after in pairwise(places))
        assert all(low < place < high for place in places), "no name outside its panel"
    titles = {axis.get_title(loc="left"): {t.get_text() for t in axis.texts} for axis in axes}
    assert set(titles) <= set(load_config()["groups"].values())
    if task == "imdb":
        assert "evidence-smooth-epochs3" in titles[load_config()["groups"]["budget"]]
        assert "lora-smooth-epochs3" in titles[load_config()["groups"]["lora"]]
    for number, figure in enumerate(drawn):
        figures.save_figure(figure, tmp_path / f"rows_{number}")
    assert show.rows_figures({"paper": results["paper"]}, task) == []
    captions = " ".join(figure.get_label() for figure in drawn)
    assert ("evidence-smooth-epochs3 (3 epochs)" in captions) == (task == "imdb") == ("counts MACs" in captions)


def test_committed_runs_of_other_budgets_are_told_apart_and_shown_last():
    results = show.load(COMMITTED, "imdb")
    budgets = {name: show.budget_of(result) for name, result in results.items()}
    assert (
        budgets["evidence-smooth-epochs3"] == "3 epochs" and budgets["truncated-ends-compute"] == "compute of 1 epoch"
    )
    assert budgets["lora-probe-continued-epochs0.35"] == "0.35 epochs more" and not budgets["probe-geometric-seed1"]
    for task in TASKS:
        for name, result in show.load(COMMITTED, task).items():
            budget = name.removeprefix(result["row"])  # a row may be called paper-compute
            assert show.is_main(result) == ("-epochs" not in budget and "-compute" not in budget)
    smooth = [name for name in results if name.startswith("evidence-smooth") and "-9" not in name]
    assert smooth == ["evidence-smooth", "evidence-smooth-seed1", "evidence-smooth-seed2",
                      *sorted(smooth[3:], key=lambda name: (show.seed_of(results[name]), name))]  # fmt: skip
    assert list(results).index("conventional") < list(results).index("paper") < list(results).index("probe-geometric")


@pytest.mark.full
def test_committed_truncation_is_beaten_within_its_budget():
    """A run of the task's epochs never faces truncation of other budgets, nor does one of equal compute."""
    results = show.load(COMMITTED, "imdb")
    table = show.paired_table(results, TARGETS, "truncation").set_index("row")

    def cut_at(reduction, keep):
        """What each curve on cut inputs has at just these MACs, the two cuts beside it mixed."""
        for _, result, control in show.curves(results):
            if control != "alpha" and keep(show.budget_of(result)):
                rows = [r for r in result["rows"] if r["control"] in (control, "alpha")]
                rows = {r["mac_reduction"]: r["accuracy"] for r in rows if r["control"] == control or r["target"] == 1}
                costs = sorted((1 / macs, accuracy) for macs, accuracy in rows.items())
                yield np.interp(1 / reduction, *zip(*costs))

    for name, keep in (
        ("probe-geometric", lambda budget: not budget),
        ("evidence-smooth-compute", lambda budget: budget == "compute of 1 epoch"),
        ("evidence-smooth-epochs3", lambda budget: True),
    ):
        for target in (2, 7, 11):
            ours = next(r for r in results[name]["rows"] if (r["control"], r["target"]) == ("alpha", target))
            best = max(cut_at(ours["mac_reduction"], keep))
            gain = float(table.loc[name, f"{target}x"].split()[0])
            assert gain == pytest.approx(ours["accuracy"] - best, abs=0.15)  # within 1% MACs count as equal
    assert table.loc["evidence-smooth-epochs3", "budget"] == "3 epochs"


@pytest.mark.full
def test_committed_rows_are_tested_in_pairs(tmp_path):
    """What the figure says of IMDB follows from the bits of the files."""
    results = show.load(COMMITTED, "imdb")
    table = show.rivals(results)
    seeds = sorted(r["training"]["seed"] for r in results.values() if r["row"] == "wide-tau2")
    best = [f"best cut inputs{f' (seed {seed})' if seed else ''}" for seed in seeds]
    means = f"best way to cut, means of seeds (ours {len(seeds)})"
    assert len(seeds) > 1 and list(table)[: len(seeds) + 2] == [means, *best, "evidence, one drop"]
    gain, (low, high) = show.ahead(*table[means][11])
    ours, cut = [statistics.fmean(cell["accuracy"] for cell in cells) for cells in table[means][11]]
    assert gain == pytest.approx(ours - cut, abs=0.02) and low < gain < high and len(table[means][11][0]) == len(seeds)
    singles = [show.ahead(*table[name][11])[0] for name in best]
    assert statistics.fmean(singles) <= gain, "the best run is no worse than the best mean"
    assert {"tuned on both ends", "tuned on last tokens", "conventional, last tokens", "conventional, dial",
            "paper's recipe, dial"} <= set(table)  # fmt: skip
    assert not any("scorer" in name for name in table), "a score taught by gradients has no verdict"
    assert "own scorer alone, 116x" in show.rivals(results, "evidence-smooth")
    ours, two, smooth, longer, shorter = (
        next(r for r in results[name]["rows"] if (r["control"], r["target"]) == (control, target))
        for name, control, target in (
            ("wide-tau2", "alpha", 11), ("wide-tau2", "alpha", 2), ("evidence-smooth", "alpha", 11),
            ("truncated-ends-faster", "ends", 9), ("truncated-ends-faster", "ends", 11),
        )
    )  # fmt: skip
    assert table["evidence, one drop"][2][0] == two and table["evidence, one drop"][11][0] == ours
    assert table["evidence, one drop"][11][1]["accuracy"] >= smooth["accuracy"], "smooth's own 11x has fewer MACs"
    gain, (low, high) = show.ahead(*table["tuned on both ends"][11])
    a, b, c = (sum(from_bits(r["right"], r["n"])) for r in (ours, longer, shorter))
    cost, most, least = (1 / r["mac_reduction"] for r in (ours, longer, shorter))
    share = (cost - least) / (most - least)
    assert 0 < share < 0.5 and table["tuned on both ends"][11][1]["mixed"] == pytest.approx((9.22, 11.37), abs=0.01)
    assert gain == pytest.approx(100 * (a - share * b - (1 - share) * c) / ours["n"], abs=0.006) and low < gain < high
    for name, row in table.items():  # the best is at least as good as each
        if name.startswith(("tuned", "conventional")) and not name.endswith("dial"):
            best = table["best cut inputs"]
            assert all(best[t][1]["accuracy"] >= rival["accuracy"] for t, (_, rival) in row.items())
    figure = show.paired_figure(results, "IMDB")
    assert f"{gain:+.1f}" in texts_of(figure) and f"{low:.1f}\n{high:.1f}" in texts_of(figure)
    assert "IMDB: points by which salience (row wide-tau2" in figure.get_label()
    figures.save_figure(figure, tmp_path / "paired")
    without = {name: r for name, r in results.items() if r["row"] in ("wide-tau2", "paper")}
    assert set(show.rivals(without)) == {"paper's recipe, dial"}, "missing rows are left out"
    assert show.paired_figure({"paper": results["paper"]}, "IMDB") is None
    main = {name: r for name, r in results.items() if show.is_main(r)}
    assert len(main) < len(results) and show.rivals(main) == table, "rows of another budget are no rivals"


@pytest.mark.full
@each_task
def test_committed_tables_know_seeds_scorers_and_rows_not_run(task):
    results, rows, ends = show.load(COMMITTED, task), load_config()["rows"], [1, 11]
    table = show.accuracy_table(results, ends, rows).set_index("row")
    assert table.index.is_unique and not any("scorer" in name for name in table.index)
    alone = show.scorer_of(results["evidence-distilled"])
    assert table.loc["evidence-distilled", "scorer alone"].endswith(f"at {alone['mac_reduction']:.0f}x")
    assert table.loc["paper", "scorer alone"] == "-" and (table["11x"] == show.NOT_RUN).sum() > 5
    assert table.loc["probe-geometric", "what it shows"] == rows["probe-geometric"]["about"]
    for against in ("paper", "truncation", "scorer"):
        paired = show.paired_table(results, ends, against).set_index("row")
        assert set(paired.index) <= set(table.index)
    assert paired.loc["evidence-distilled", "1x"].endswith("*") and paired.loc["paper", "1x"] == "-"
    assert paired.loc["probe-geometric", "1x"] == "-"
    if task == "imdb":
        assert {"evidence-distilled-seed1", "probe-geometric-seed1"} <= set(table.index)
        assert table.loc["probe-geometric", "training MACs (epochs)"] == 1.73
        assert table.loc["evidence-smooth-compute", "budget"] == "compute of 1 epoch"


def test_committed_continuations_are_not_squashed(tmp_path):
    figure = show.continuation_figure(json.loads((COMMITTED / "continuation.json").read_text()))
    agreement, ratio = figure.axes
    assert ratio.get_ylim()[1] < 2.5 and set(show.CONTINUED) <= texts_of(figure)
    assert "hybrid, kept as keys (665 to 7,316x)" in figure.get_label()
    figures.save_figure(figure, tmp_path / "continuation")


def test_names_are_moved_apart_and_no_further():
    assert show.apart([1.0, 5.0, 9.0], 1, 0, 10) == [1.0, 5.0, 9.0]
    assert show.apart([5.0, 5.0], 2, 0, 10) == [4.0, 6.0]
    assert show.apart([0.0, 0.1, 0.2], 1, 0, 10) == pytest.approx([0, 1, 2])
    many = show.apart([3.0, 3.1, 9.9, 10.0, 3.05], 1, 0, 10)
    assert all(after - before > 0.999 for before, after in pairwise(sorted(many)))
    assert sorted(range(5), key=many.__getitem__) == [0, 4, 1, 2, 3]
