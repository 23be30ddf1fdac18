"""results/points.csv: in step with the result files, whole, and enough to redraw a figure from."""

import re

import pytest

from zsaa.kit import points, store, tables

FOUND = store.all_results()
COMMITTED = points.read()


def test_the_committed_points_are_those_of_the_result_files():
    """If this fails: make figures."""
    assert points.text(FOUND) == (store.RESULTS / "points.csv").read_text(encoding="utf-8")


def test_the_columns_are_those_that_are_promised():
    promised = "task,model,method,recipe,seed,mac_reduction,metric,value,low,high,n,split,hardware,commit,file"
    assert list(COMMITTED.columns) == promised.split(",") == list(points.COLUMNS)
    whole = COMMITTED[["task", "model", "method", "metric", "split", "hardware", "commit", "file"]]
    assert (whole != "").all(axis=None) and COMMITTED["value"].notna().all()
    assert re.fullmatch(r"[0-9a-f]{10}", COMMITTED["commit"].iloc[0])


@pytest.mark.full
def test_every_measured_number_has_a_row_with_its_interval():
    held: dict[str, list[dict]] = {}
    for setting in points.settings(COMMITTED).to_dict("records"):
        held.setdefault(setting["file"], []).append(setting)
    fields = ("accuracy", "perplexity", "ratio", "footprint_reduction", "realised", "preserved", "sampled_ms")
    compared = 0
    for file, result in FOUND:
        rows = result.get("rows") or ()
        rows = [row for row in rows if row.get("value", 0) is not None]  # of a card, what was not measured
        if result.get("kind") in points.DERIVED or "latency_batch" in (rows[0] if rows else {}):
            continue
        settings = [s for s in held.get(file, []) if s["method"] != "training"][: len(rows)]
        assert len(settings) == len(rows), file
        for row, setting in zip(rows, settings):
            for field in (field for field in fields if row.get(field) is not None):
                scored = field == "perplexity" and "f1" in row  # then the interval is that of F1
                ends = (None, None) if scored else row.get(points.INTERVALS.get(field), (None, None))
                mine = setting[field], setting[f"{field}_low"], setting[f"{field}_high"]
                want = row[field], *ends
                assert all(a == b or (b is None and a != a) for a, b in zip(mine, want)), (file, field)
                assert "mac_reduction" not in row or setting["mac_reduction"] == row["mac_reduction"]
                compared += 1
    assert compared > 2500


def test_every_number_with_an_interval_that_the_papers_tables_show_is_a_point():
    """Tables 1 to 3 say more of a number than points can carry, so they read the result files; not other numbers."""
    found = store.load_results()
    cells = [*tables.table_1_cells(found), *tables.table_2_cells(found), *tables.table_3_cells(found)]
    held: dict[tuple, list[tuple]] = {}
    for row in COMMITTED.itertuples():
        held.setdefault((row.file.rpartition("/")[2], row.n), []).append((row.value, row.low, row.high))
    shown = {(f"{c.result}.json", c.n, c.ours, *c.interval) for c in cells if c.n is not None}
    assert len(shown) > 80
    for file, n, *number in shown:  # as counted; in the files, rounded to two digits
        assert any(point == pytest.approx(number, abs=0.011) for point in held[file, n]), (file, number)


def test_times_have_the_macs_of_the_batch_that_was_timed():
    result = next(result for file, result in FOUND if file == "speed/imdb-latency-h100.json")
    mine = points.settings(COMMITTED[COMMITTED["file"] == "speed/imdb-latency-h100.json"])
    assert len(mine) == len(result["rows"])
    for row, (_, setting) in zip(result["rows"], mine.iterrows()):
        assert setting["mac_reduction"] == row["latency_mac_reduction"]
        assert (setting["latency_ms_low"], setting["latency_ms_high"]) == tuple(row["latency_ms_quartiles"])
        assert (setting["batch"], setting["tokens"], setting["speedup"]) == (
            row["latency_batch"], row["latency_tokens"], row["speedup"]
        )  # fmt: skip


@pytest.fixture
def result():
    hardware = {"device": "cpu", "threads": 2}
    row = {"control": "alpha", "target": 2, "alpha": 0.9, "mac_reduction": 2.01, "n": 10, "correct": 8}
    return {
        "name": "mine", "kind": "curve", "model": {"name": "tiny"},
        "task": {"name": "mrpc", "source": "hub: MRPC, dev"},
        "recipe": {"method": "zsaa+", "tuning": "lora", "tau": 2, "score": "salience", "seed": 3},
        "provenance": {"commit": "c0ffee" * 8, "hardware": hardware, "seed": 0},
        "rows": [{**row, "accuracy": 80.0, "f1": 70.0, "ci95": [60.0, 75.0], "right": "0ff"}],
    }  # fmt: skip


def test_f1_has_the_interval_where_there_is_f1(result):
    found = points.of([result]).set_index("metric")
    assert list(found.index) == ["target", "alpha", "accuracy", "f1"]
    assert (found["low"].dropna().to_dict(), found["high"].dropna().to_dict()) == ({"f1": 60.0}, {"f1": 75.0})
    assert found["n"].dropna().to_dict() == {"accuracy": 10.0, "f1": 10.0}
    row = found.loc["f1"]
    assert (row["method"], row["recipe"], row["seed"]) == ("dial (score salience, tau 2)", "zsaa+ (LoRA)", 3)
    assert (row["task"], row["split"], row["hardware"], row["file"]) == ("mrpc", "MRPC, dev", "CPU, 2 threads", "mine")


def test_settings_that_the_dial_cannot_tell_apart_stay_two(result):
    result["rows"] = [{**result["rows"][0], "target": target} for target in (7, 11)]
    assert list(points.settings(points.of([result]))["target"]) == [7, 11]


def test_a_kind_that_is_not_known_is_gathered_under_the_names_in_its_rows():
    hardware = {"device": "A GPU", "threads": 1}
    facts = {"commit": "c0ffee", "hardware": hardware, "seed": 0}
    rows = [{"setting": "library", "step": "train", "cost": 2.5}, {"setting": "one", "step": "train", "cost": 1.5}]
    found = points.of([{"kind": "new", "rows": rows, "provenance": facts}])
    assert list(zip(found["task"], found["method"], found["metric"], found["value"])) == [
        ("new", "library, train", "cost", 2.5), ("new", "one, train", "cost", 1.5)
    ]  # fmt: skip


def test_a_perplexity_with_its_clock_times_keeps_both():
    """As a run writes it; the committed ones were not timed. Both are of one setting: the table has them in a row."""
    result = next(result for _, result in FOUND if result.get("kind") == "perplexity")
    timed = {
        "latency_ms": 3.5,
        "latency_ms_quartiles": [3, 4],
        "speedup": 1.5,
        "latency_batch": 1,
        "latency_tokens": 64,
    }
    rows = [row if row["control"] == "random" else {**row, **timed} for row in result["rows"]]
    plain, clocked = (tables.table_2_settings(points.of([{**result, "rows": r}])) for r in (result["rows"], rows))
    assert (plain["TTFT"] == "not run").all() and len(plain) == len(clocked) == len(rows)
    assert list(clocked["TTFT"]) == ["1.50x" if "speedup" in row else "not run" for row in rows]
    assert plain.drop(columns="TTFT").equals(clocked.drop(columns="TTFT"))
    assert tables.table_2_controls(points.of([{**result, "rows": rows}])).equals(
        tables.table_2_controls(points.of([result]))
    )
