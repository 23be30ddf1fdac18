"""Table 2 and its figure, from made-up results: what stands in is never called reproduced, controls stay controls."""

import copy

import pytest

from zsaa.kit import figures, labels, paper, points, tables
from zsaa.kit.verdicts import counts

TUNED = "gpt2, alpha-sampled fine-tuning; 5 epochs, 7,925 steps of 8 of 12,678 windows"


def row(control, target, ppl, score=None, alpha=None):
    return {
        "control": control, "score": score, "target": target, "alpha": alpha, "keep_tokens": None if alpha else 50,
        "mac_reduction": float(target), "perplexity": ppl, "ci95": [ppl - 1, ppl + 1], "n": 9,
        "word_perplexity": 2 * ppl, "word_ci95": [2 * ppl - 1, 2 * ppl + 1], "ratio": ppl / 34, "ratio_ci95": [1, 2],
        "agreement": 75.0, "agreement_first": 50.0,
    }  # fmt: skip


@pytest.fixture
def result():
    """The paper's own setting: it may reproduce."""
    return {
        "name": "wt103", "kind": "perplexity",
        "provenance": {"seed": 0, "train_samples": 12678, "commit": None, "hardware": {"device": "GPU"}},
        "model": {"name": "gpt2", "kind": "hub"}, "train": {"steps": 7925, "processes": 1},
        "task": {
            "name": "wikitext-103", "title": "WikiText-103", "substitute": False, "paper_column": "WikiText-103",
            "source": "made up",
        },
        "recipe": {
            "method": "alpha-sampled", "tuning": "full", "epochs": 5.0, "max_steps": -1, "batch_size": 8,
            "gradient_accumulation": 1, "seed": 0,
        },
        "protocol": {
            "name": "prefix", "prefix": 224, "continuation": 32, "reads_future": False, "normalisation": "token"
        },
        "rows": [
            row("alpha", 1, 34.0, alpha=1.0), row("alpha", 2, 99.0, "column_sum", 0.9),
            row("alpha", 2, 39.1, "column_mean", 0.9), row("last", 2, 39.1), row("random", 2, 300.0, "random", 0.9),
        ],
    }  # fmt: skip


def cell(cells, row, column, per="per token"):
    return next(c for c in cells if (c.row, c.column) == (row, column) and (per in c.protocol or c.ours is None))


def test_every_number_of_the_paper_has_a_cell(result):
    cells = tables.table_2_cells([{**result, "kind": "curve"}])
    assert {(c.row, c.column): c.published for c in cells} == {
        **{(f"{t}x", column): value for t, row in paper.TABLE_2.items() for column, value in row.items()},
        **{(f"{t}x", "TTFT"): t for t in (2, 3)},
    }
    assert {c.verdict for c in cells} == {"not run"}
    assert counts(cells) == {"reproduced": 0, "consistent": 0, "differs": 0, "substitute": 0, "not run": 14}


def test_only_the_papers_score_on_the_papers_model_and_data_can_reproduce(result):
    cells = tables.table_2_cells([result])
    at_1x, at_2x = (cell(cells, t, "WikiText-103") for t in ("1x", "2x"))
    assert (at_1x.ours, at_1x.interval, at_1x.n, at_1x.verdict) == (34.0, (33.0, 35.0), 9, "reproduced")
    assert (at_2x.ours, at_2x.verdict) == (99.0, "differs")  # not column_mean's, nor the control's 39.1
    assert cell(cells, "1x", "WikiText-103", "per word").ours == 68.0
    assert cell(cells, "3x", "WikiText-103").verdict == "not run"
    for part, change in (
        ("model", {"model": {"name": "smollm2-135m", "kind": "packaged"}}),
        ("model", {"model": {"name": "gpt2", "kind": "local"}}),
        ("data", {"task": {**result["task"], "substitute": True}}),
        ("training", {"task": {**result["task"], "training_substitute": "reviews"}}),
        ("training", {"recipe": {"method": "untuned", "tuning": "none"}, "train": None}),
        ("training", {"recipe": {**result["recipe"], "epochs": 1.0}}),
        ("training", {"recipe": {**result["recipe"], "max_steps": 10}}),
        ("training", {"recipe": {**result["recipe"], "batch_size": 32}}),
    ):
        other = cell(tables.table_2_cells([{**result, **change}]), "1x", "WikiText-103")
        assert (other.verdict, other.substitute) == ("substitute", part)


def test_only_the_papers_schedule_counts(result):
    for schedule, counted in (("geometric", True), ("rising", False)):
        cells = tables.table_2_cells([{**result, "recipe": {**result["recipe"], "schedule": schedule}}])
        assert any(c.ours is not None for c in cells) is counted


def test_reading_the_future_is_said_wherever_it_is_printed(result):
    carried = copy.deepcopy(result)
    carried["protocol"] |= {"name": "carry-through", "reads_future": True}
    warned = "WHAT IS KEPT READS THE FUTURE"
    assert warned in cell(tables.table_2_cells([carried]), "1x", "WikiText-103").protocol
    for table in (tables.table_2_controls(points.of([carried])), tables.table_2_settings(points.of([carried]))):
        assert all(warned in text for text in table["protocol"])
    assert warned in tables.table_2(tables.table_2_cells([carried]))["protocol"][1]
    assert warned in figures.perplexity_figure(points.of([carried])).get_label()


def test_last_words_count_per_word(result):
    result["protocol"]["normalisation"] = "word"
    result["protocol"]["name"] = "last-word"
    cells = [c for c in tables.table_2_cells([result]) if c.ours is not None]
    assert [(c.row, c.ours) for c in cells] == [("1x", 68.0), ("2x", 198.0)]


def test_the_table_prints_ours_beside_the_papers(result):
    table = tables.table_2(tables.table_2_cells([result]))
    published = table[table["measured"].str.startswith("paper")]
    assert list(published["corpus"]) == [*paper.TABLE_2_COLUMNS, "any: speed-up of the first token"]
    assert published.iloc[0]["3x"] == "48.59"
    ours = table[table["measured"] == f"{TUNED}, seed 0; WikiText-103"]
    assert list(ours["2x"]) == ["99.00 [98.00, 100.00]", "198.00 [197.00, 199.00]"]
    assert set(ours["3x"]) == {"not run"} and ours.iloc[0]["verdict"] == "1x reproduced, 2x differs, 3x not run"
    missing = table[(table["corpus"] == "PTB") & (table["measured"] == "not run")]
    assert list(missing[["1x", "2x", "3x", "verdict"]].iloc[0]) == ["not run"] * 4


def test_seeds_keep_rows_of_their_own(result):
    again = {**copy.deepcopy(result), "name": "wt103-seed1"}
    again["provenance"]["seed"] = again["recipe"]["seed"] = 1
    table = tables.table_2(tables.table_2_cells([result, again]))
    assert sum(table["measured"] == f"{TUNED}, seed 1; WikiText-103") == 2


def test_every_training_has_rows_of_its_own_that_say_what_it_was(result):
    """Fine-tuned, in both ways, beside the model as it comes: in tables, report and figure."""
    conventional = {**result, "name": "c", "recipe": {**result["recipe"], "method": "conventional", "max_steps": 600}}
    conventional |= {"train": {"steps": 600, "processes": 2}, "model": {"name": "m", "kind": "packaged"}}
    untuned = {**result, "name": "u", "recipe": {"method": "untuned", "tuning": "none"}, "train": None}
    adapted = {**result, "name": "a", "recipe": {**result["recipe"], "tuning": "lora"}}
    saved = {**untuned, "name": "s", "recipe": {"method": "saved"}, "provenance": {**result["provenance"], "seed": 3}}
    names = {
        "wt103": f"{TUNED}, seed 0",
        "c": "m, conventional fine-tuning; 600 steps of 16 of 12,678 windows, seed 0",
        "u": "gpt2, untuned",
        "a": TUNED.replace("fine", "LoRA fine") + ", seed 0",
        "s": "gpt2, tuned before, seed 3",
    }
    everything = [result, conventional, untuned, adapted, saved]
    cells = [cell for cell in tables.table_2_cells(everything) if cell.ours is not None]
    assert {cell.result: cell.subject for cell in cells} == {k: f"{v}; WikiText-103" for k, v in names.items()}
    assert {cell.substitute for cell in cells if cell.result == "c"} == {"model, training"}
    shown = {f"{name}; WikiText-103" for name in names.values()}
    assert (
        shown <= {*tables.table_2(cells)["measured"]}
        and {*tables.table_2_controls(points.of(everything))["measured"]} == shown
    )
    figure = figures.perplexity_figure(points.of(everything))
    titles = [axis.get_title().replace("\n", " ") for axis in figure.axes]
    shown = {"gpt2, alpha-sampled, 5 epochs", "m, conventional, 600 steps", "gpt2, untuned", "gpt2, tuned before"}
    assert set(titles) == {*shown, "gpt2, alpha-sampled LoRA, 5 epochs"} and len(titles) == 5
    assert all(f"{name}: 34.0" in figure.get_label() for name in ("gpt2, untuned", names["wt103"], names["c"]))


def test_trainings_of_every_length_are_drawn(result):
    short = {**result, "name": "short", "recipe": {**result["recipe"], "max_steps": 600}}
    short["train"] = {**result["train"], "steps": 600}
    axes = figures.perplexity_figure(points.of([short, result])).axes
    assert [axis.get_title().split(", ")[-1] for axis in axes] == ["600 steps", "5 epochs"]
    rising = {**short, "recipe": {**short["recipe"], "schedule": "rising"}}
    assert ", schedule rising; " in labels.perplexity_subject(rising)


def test_controls_stand_beside_the_dial(result):
    table = tables.table_2_controls(points.of([result]))
    assert dict(zip(table["keeps"], table["2x"])) == {
        "dial, column_sum": "x2.91 [1.00, 2.00], 75% the same",
        "dial, column_mean": "x1.15 [1.00, 2.00], 75% the same",
        "last tokens only": "x1.15 [1.00, 2.00], 75% the same",
        "random tokens": "x8.82 [1.00, 2.00], 75% the same",
    }
    settings = tables.table_2_settings(points.of([result]))
    assert set(settings["TTFT"]) == {"not run"} and list(settings["alpha"])[-2:] == ["-", "0.9"]
    result["rows"][1]["speedup"] = 1.5
    assert list(tables.table_2_settings(points.of([result]))["TTFT"])[1] == "1.50x"


def test_a_perplexity_that_blew_up_stays_legible(result):
    result["rows"][1] |= {"perplexity": 2.588e9, "ci95": [1e9, 5.4e9], "ratio": 7e7, "ratio_ci95": [1e7, 9e7]}
    table = tables.table_2(tables.table_2_cells([result]))
    assert "2.6e+09 [1.0e+09, 5.4e+09]" in list(table["2x"])
    axis = figures.perplexity_figure(points.of([result])).axes[0]
    assert len([t for t in axis.get_yticks() if t >= axis.get_ylim()[0]]) <= 6


def test_the_figures_are_one_per_text_with_a_panel_per_training(result):
    other = {**result, "name": "o", "model": {"name": "other"}}
    carried = {**copy.deepcopy(result), "name": "c"}
    carried["protocol"] |= {"name": "carry-through", "reads_future": True}
    drawn = figures.perplexity_figures(points.of([result, other, carried]))
    assert {name: len(figure.axes) for name, figure in drawn.items()} == {"wikitext-103": 2, "wikitext-103_carry": 1}
    figure = drawn["wikitext-103"]
    assert all(axis.get_yscale() == "log" for axis in figure.axes)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[0] == "score: column sum" and "paper, its corpus" in names
    rows = [r for r in result["rows"] if r["control"] == "alpha" and r["score"] != "column_mean"]
    drawn_line = figure.axes[0].containers[0].lines[0]
    assert list(drawn_line.get_xdata()) == [r["mac_reduction"] for r in rows]
    assert list(drawn_line.get_ydata()) == [r["ratio"] for r in rows]
