"""The second study of answers: what is chosen on validation alone, and what its files say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import LlamaConfig

from ablation.answers import second, second_results, ship, third, verdict
from ablation.answers.second_results import pack, unpack

ONE, VALIDATION, TEST = "coqa-1", verdict.VALIDATION, verdict.TEST
STORIES = [1, 1, 2, 3]


def row(kind, split, f1s, target=3.0):
    found = {"task": ONE, "split": split, "kind": kind, "target": target, "f1": float(np.mean(f1s)), "n": len(f1s)}
    return found if split == VALIDATION else found | {"packed": pack(f1s)}


def written(folder):
    """Two seeds. BM25 is better on validation, lexical chunks on the test stories; the oracle is best anywhere."""
    for seed in (0, 1):
        dial = f"dial:s24.{seed}"
        rows = [row("whole", TEST, [100, 50, 50, 100], 1.0), row(dial, TEST, [90, 40 + 20 * seed, 60, 80])]
        rows += [row(dial, VALIDATION, [70]), row("bm25-all", VALIDATION, [60]), row("lexical-all", VALIDATION, [50])]
        rows += [row("bm25-all", TEST, [50, 20, 30, 60]), row("lexical-all", TEST, [60, 30, 40, 70])]
        rows += [row(k, s, [99] * n) for k in ("oracle-all", "minilm-free") for s, n in ((VALIDATION, 1), (TEST, 4))]
        (folder / f"plain-{seed}.json").write_text(json.dumps({"rows": rows}))
    (folder / "questions.json").write_text(json.dumps({"stories": {f"{ONE}, {TEST}": STORIES}}))
    return verdict.Second(folder)


def test_controls_are_chosen_on_validation_and_read_on_the_test_stories(tmp_path):
    a, cell = written(tmp_path), (ONE, TEST, 3.0)
    assert a.best("plain", cell) == "bm25-all" and verdict.dial_of(a, "plain") == "dial:s24.*"
    assert a.rivals("plain", cell) == ["bm25-all", "lexical-all"]
    (found,) = verdict.against(a, ("plain", "dial:s24.*"), "plain", [cell])
    assert found["kind"] == "bm25-all" and found["f1"] == 70 and found["control"] == 40
    mean, low, high = found["gain"]
    assert mean == 30 and 20 <= low < 30 < high <= 40
    assert found["own"] == pytest.approx(100 * 70 / 75) and found["seeds"] == [0, 1]
    assert a.f1s("plain", "dial:s24.*", cell).tolist() == [90, 50, 60, 80]


def test_the_third_study_sets_the_tuned_dial_beside_the_best_of_all_controls(tmp_path):
    """Validation likes the tuned rival's BM25; the test stories, the untuned one's lexical chunks; minilm has one
    seed."""
    told = {"tuned4": {third.DIAL: ([70], [90, 40, 60, 80])}, "plain": {"lexical-all": ([60], [80, 40, 60, 70])},
            "rival4": {"bm25-all": ([65], [50, 20, 30, 60]), "minilm": ([99], [99] * 4)}}  # fmt: skip
    for stem, kinds in told.items():
        for seed in (0, 1, 2):
            rows = [row("whole", TEST, [100, 50, 50, 100], 1.0)]
            for kind, (known, read) in kinds.items():
                if kind != "minilm" or seed == 0:
                    name = kind.replace("*", str(seed))
                    rows += [row(name, VALIDATION, known), row(name, TEST, read)]
            (tmp_path / f"{stem}-{seed}.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "questions.json").write_text(json.dumps({"stories": {f"{ONE}, {TEST}": STORIES}}))
    a, cell = third.Third(tmp_path, tmp_path / "later"), (ONE, TEST, 3.0)
    assert a.control(cell) == ("rival4", "bm25-all") and a.best(cell) == ("plain", "lexical-all")
    assert a.control(cell, theirs=("last4",)) is None
    (found,) = third.against(a, ("tuned4", third.DIAL), [cell], a.control)
    assert found["f1"] == 67.5 and found["theirs"] == 40 and found["seeds"] == [0, 1, 2]
    assert found["share"] == pytest.approx((90, 80, 120))  # the third story alone, or the second
    assert found["gain"][0] == 27.5 and found["gain"][1] <= 27.5 <= found["gain"][2]
    (found,) = third.against(a, ("tuned4", third.DIAL), [cell], a.best)
    assert found["gain"][0] == pytest.approx(5.0)
    assert len(third.told([found])) == 1 and set(third.stems(a)) == {"tuned4", "plain", "rival4"}


def test_what_was_read_later_goes_before_and_a_row_that_was_trained_anew_stands_alone(tmp_path):
    first, later = tmp_path / "first", tmp_path / "later"
    for folder in (first, later):
        folder.mkdir()
        (folder / "questions.json").write_text(json.dumps({"stories": {f"{ONE}, {TEST}": STORIES}}))
    dial, closed = "dial:s16-also.0", "dial:close:s16-also.0"
    old = [row("whole", TEST, [0] * 4, 1.0), row("dial:s16-also.1", TEST, [10] * 4)]
    (first / "tuned4-1.json").write_text(json.dumps({"rows": old}))
    (first / "rival4-0.json").write_text(
        json.dumps({"rows": [row("bm25", VALIDATION, [9]), row("last", VALIDATION, [8])]})
    )
    new = [row(dial, TEST, [50] * 4), row(dial, VALIDATION, [60]), row(closed, VALIDATION, [70])]
    (later / "tuned4-1.json").write_text(json.dumps({"rows": new, "log": [{"step": 1}]}))
    others = [row("bm25", TEST, [20] * 4), row("last", TEST, [30] * 4), row(dial, TEST, [40] * 4)]
    (later / "tuned4-0.json").write_text(json.dumps({"rows": others}))
    a, cell = third.Third(first, later), (ONE, TEST, 3.0)
    assert a.mean("tuned4", third.DIAL, cell) == 45 and list(a.seeds("tuned4", third.DIAL, cell)) == [0, 1]
    assert not a.seeds("tuned4", "whole", (ONE, TEST, 1.0)), "of the first training nothing counts"
    assert a.dial() == third.CLOSE and a.elsewhere(cell) == ("tuned4", "bm25")


def test_an_adapter_says_what_it_was_trained_for():
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    assert ship.reach("answers-adapter-plain-0", config) == (1.0, 1.0)
    low, high = ship.reach("answers-adapter-tuned4-0", config)
    assert 0 < low < 0.2 and high == 1
    assert ship.reach("adapter-dial-0", config)[0] < low == ship.reach("adapter-chunks4-1", config)[0]


def test_needles_that_are_left_are_told_by_depth():
    record = {"scorer": "s16-also.0", "tokens": 1024, "depth": 0.5, "n": 16, "held": {"3.0": 75.0, "11.0": 50.0}}
    rows = second_results.kept_of([record], {}, {})["rows"]
    assert [(r["task"], r["depth"], r["target"], r["held"], r["n"]) for r in rows] == [
        ("needles-1024, needle kept", 0.5, 3.0, 75.0, 16), ("needles-1024, needle kept", 0.5, 11.0, 50.0, 16)
    ]  # fmt: skip
    assert second_results.label("dial:close:s16-also.2") == "dial once, scorer s16-also, numbered anew"


def test_f1s_come_back_as_they_were_packed():
    assert unpack(pack([0, 100, 67, 50])).tolist() == [0, 100, 67, 50]


def test_a_needle_lies_between_two_sentences_at_its_depth():
    data = SimpleNamespace(
        needles=[{"says": [90, 91], "line": [7], "references": ["x"]}],
        pools={"test": [0, 1]},
        stories=[[11, 5] * 10, [12, 5] * 10],
        pre=[1],
        sep=[2],
        pieces=[f"w{i}" if i != 5 else "." for i in range(100)],
    )
    for depth in second.DEPTHS:
        s = second.needle(data, 0, 40, depth)
        first, last = s.gold
        assert len(s.body) == 40 and s.body[first : last + 1] == (90, 91)
        assert s.body[first - 1] == 5 and abs(first - depth * 38) <= 4
