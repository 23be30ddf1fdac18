"""The plainest rival: its strength is chosen on other texts than it is judged on, and the test part is read once."""

import json
import random
import sys
from pathlib import Path

import pytest
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import bags, films, reading
from zsaa.evaluation.accuracy import tally
from zsaa.measure.stats import from_bits


def reviews(count, seed, good="fine", bad="dull"):
    draw, labels = random.Random(seed), [i % 2 for i in range(count)]
    return [
        f"{draw.choice('abcdef')} film {good if label else bad} {draw.choice('uvwxyz')} night" for label in labels
    ], labels


def test_it_finds_the_telling_word_and_counts_what_it_knows():
    model = bags.fit(*reviews(60, 1), 10.0)
    (row,) = bags.judge(model, ["the film is fine", "a dull film", "dull dull"], [1, 0, 1])
    assert (row["correct"], row["n"], row["control"]) == (2, 3, "bag")
    assert from_bits(row["right"], 3) == [1, 1, 0]
    assert row["macs_per_text"] == pytest.approx(5 / 3)  # film, fine; film, dull; dull: single letters are no words
    assert row["ms"] > 0


def test_the_strength_is_the_best_on_the_texts_given_for_that(monkeypatch):
    class Fitted:
        def __init__(self, strength):
            self.strength = strength

        def score(self, texts, labels):
            return {1.0: 0.6, 3.0: 0.9, 10.0: 0.7}[self.strength]

    monkeypatch.setattr(bags, "STRENGTHS", (1.0, 3.0, 10.0))
    monkeypatch.setattr(bags, "fit", lambda texts, labels, strength: Fitted(strength))
    assert bags.choose(reviews(4, 1), reviews(4, 2)) == (3.0, {"1": 60.0, "3": 90.0, "10": 70.0})


def test_the_test_part_of_films_is_read_once_and_noted(monkeypatch, tmp_path):
    """Chosen on validation, where words mean the same; judged on the test part, where they mean the opposite."""
    sides = {"train": reviews(60, 1), "validation": reviews(20, 2), "test": reviews(20, 3, good="dull", bad="fine")}
    monkeypatch.setattr(
        films, "side", lambda part: (Dataset.from_dict(dict(zip(("text", "label"), sides[part]))), f"{part} part")
    )
    result = bags.measure("imdb_films", tmp_path)
    assert set(result["training"]["tried"].values()) == {100.0} and result["rows"][0]["accuracy"] == 0
    assert result["rows"][0] | tally([0] * 20) == result["rows"][0]
    assert json.loads((tmp_path / "imdb_films/test/bag.json").read_text())["task"]["source"] == "test part"
    assert bags.measure("imdb_films", tmp_path)["rows"] == result["rows"], "found again, not read again"
    assert [line["name"] for line in reading.readings(tmp_path / "imdb_films")] == ["bag"]
    (tmp_path / "imdb_films/test/bag.json").unlink()
    with pytest.raises(ValueError, match="bag was read once before"):
        bags.measure("imdb_films", tmp_path)
