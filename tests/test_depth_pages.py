"""What docs/findings/depth.md and its tables say is what the results give; the tables' rules on made-up results."""

import json
from pathlib import Path

import pytest

from ablation.answers import both_results
from ablation.show import exits, healed
from zsaa.depth import published
from zsaa.measure.stats import to_bits

DOCS = Path(__file__).parent.parent / "docs"


def tables():
    yield "depths", exits.depths_table()
    yield "budgets", exits.budgets_table()
    if len(joint := exits.joint_table()):
        yield "joint", joint
        yield "rivals", exits.rivals_table()
        yield "losses", exits.losses_table()
        yield "words", exits.words_table()
    more = {
        "exam": healed.exam_table, "beside": healed.beside_table,
        "combined": healed.combined_table, "scores": healed.scores_table,
        "drafters": healed.drafters_table, "drafts": healed.drafts_table, "answers": both_results.table,
        "again": both_results.sure_table,
    }  # fmt: skip
    for name, made in more.items():
        if len(table := made()):
            yield name, table


@pytest.mark.full
def test_the_pages_tables_are_those_of_the_results():
    page = "".join((DOCS / name).read_text(encoding="utf-8") for name in ("findings/depth.md", "depth_tables.md"))
    for name, table in tables():
        assert len(table) and table.to_markdown(index=False, disable_numparse=True) in page, name
    assert published.table() in page


def result(folder, name, rows, n):
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            {"rows": [{**row, "n": n, "right": to_bits([1] * right + [0] * (n - right))} for row, right in rows]}
        )
    )


def test_settings_are_chosen_on_validation_and_judged_on_test(tmp_path):
    sure = [{"control": "confidence", "sure": s, "mac_reduction": m, "accuracy": a} for s, m, a in
            ((0.7, 4.0, 80.0), (0.8, 3.1, 85.0), (0.9, 2.5, 95.0))]  # fmt: skip
    result(tmp_path, "one", [(row, 0) for row in sure], 20)
    result(
        tmp_path / "test", "one", [({**row, "mac_reduction": 2.9}, right) for row, right in zip(sure, (20, 7, 19))], 20
    )
    row = exits.chosen("one", ("confidence",), 3, tmp_path)
    assert row["sure"] == 0.8 and exits.mean([row]) == "35.0", "though another is better on the test part"
    assert exits.chosen("one", ("confidence",), 5, tmp_path) is None
    assert exits.chosen("one", ("layers",), 2, tmp_path) is None


def test_a_rival_may_spend_what_both_dials_do():
    def row(reduction, right):
        return {
            "control": "alpha",
            "mac_reduction": reduction,
            "n": 20,
            "right": to_bits([1] * right + [0] * (20 - right)),
        }

    assert exits.saved([row(2, 0), row(6, 0)]) == pytest.approx(3), "costs are averaged, not reductions"
    settings = [row(2, 20), row(6, 0)]
    assert exits.as_dear(settings, 3).mean() == pytest.approx(0.5), "a half of the texts by either costs a third"
    assert exits.as_dear(settings, 1.5).mean() == 1 and exits.as_dear(settings, 9).mean() == 0
    assert exits.as_dear([{"n": 20, "right": to_bits([1] * 20)}], 3).mean() == 1, "a bag of words counts no MACs"


def test_what_is_recovered_is_a_share_of_the_nats_lost():
    nll = [(0, "untuned", "10 20 30"), (6, "untuned", "20 40 60"), (6, "distilled", "14 28 42")]
    rows = {(removed, how): [{"nll": line}] for removed, how, line in nll}
    share, (low, high) = healed.recovered(rows, 6, "distilled")
    assert share == pytest.approx(60) and low == pytest.approx(60) and high == pytest.approx(60)
    rows[6, "distilled"].append({"nll": "16 32 48"})
    assert healed.recovered(rows, 6, "distilled")[0] == pytest.approx(50), "in the mean over seeds"


def test_cells_have_a_row_for_each_seed_that_learned(tmp_path):
    for seed in (0, 1):
        kinds = (("untuned", None), ("text", {"steps": 3}), ("distilled", {"steps": 3 * seed}))
        rows = [{"removed": 6, "healed": how, "log": log, "mark": seed} for how, log in kinds]
        file = {"rows": rows, "provenance": {"seed": seed}}
        (tmp_path / f"heal-x-{seed}.json").write_text(json.dumps(file))
    found = healed.cells("heal-*.json", tmp_path)
    assert {cell: [row["mark"] for row in mine] for cell, mine in found.items()} == {
        (6, "untuned"): [0], (6, "text"): [0, 1], (6, "distilled"): [1]
    }  # fmt: skip


def test_drafts_stand_beside_the_same_code_without_drafts(tmp_path):
    row = {"n": 3, "same_text": 3, "passes_per_token": 0.5, "tokens_per_second": 10.0}
    ways = {"generate": [1, 1, 1], "plain": [2, 2, 2], "exit": [3, 3, 3], "recorded plain": [8, 8, 8],
            "recorded exit": [12, 12, 12]}  # fmt: skip
    rows = [{**row, "way": way, "depth": None, "ahead": None, "speedups": ratios} for way, ratios in ways.items()]
    result = {"rows": rows, "threads": 2, "provenance": {"hardware": {"device": "cpu"}}}
    (tmp_path / "draft-x.json").write_text(json.dumps(result))
    table = healed.drafts_table(tmp_path)
    assert [*table["over nothing drafted"]] == ["", "", "1.50 [1.50, 1.50]", "", "1.50 [1.50, 1.50]"]
    assert table["over stock"][4] == "12.00 [12.00, 12.00]" and table["on"][0] == "CPU, 2 threads"
