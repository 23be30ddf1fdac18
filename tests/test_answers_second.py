"""The second study of answers: what is chosen on validation alone, and what its files say."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ablation.answers import second, verdict
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
