"""A bag of words before a model: who is asked, what it costs, and how the choice is made."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import words_first

CONFIDENCE, EASY = np.array([0.9, 0.6, 0.8, 0.5]), np.array([1, 0, 1, 0])
WHOLE = np.array([10.0, 20.0, 10.0, 40.0])


def test_texts_that_the_bag_is_less_sure_of_are_the_models_and_cost_what_it_costs():
    correct, reduction = words_first.at(0.7, CONFIDENCE, EASY, np.array([0, 1, 0, 1]), WHOLE / 2, WHOLE)
    assert correct.tolist() == [1, 1, 1, 1] and reduction == WHOLE.sum() / (20 / 2 + 40 / 2)
    correct, reduction = words_first.at(0.0, CONFIDENCE, EASY, np.zeros(4), WHOLE, WHOLE)
    assert correct.tolist() == EASY.tolist() and reduction == WHOLE.sum(), (
        "nobody asks: the bag's own MACs are not counted"
    )


def test_the_best_by_the_mean_of_seeds_among_those_that_save_enough(monkeypatch):
    monkeypatch.setattr(words_first, "PLAIN", ("whole", "half"))
    monkeypatch.setattr(words_first, "DIALS", ())
    monkeypatch.setattr(words_first, "seeds_of", lambda name: [name, f"{name}-seed1"])
    lucky, steady = np.array([0, 1, 0, 1]), np.array([0, 0, 0, 1])
    models = {
        ("all layers", 1.0): (np.ones(4), WHOLE),
        ("whole", 1.0): (lucky, WHOLE), ("whole-seed1", 1.0): (np.zeros(4), WHOLE),
        ("half", 1.0): (steady, WHOLE / 2), ("half-seed1", 1.0): (steady, WHOLE / 2),
    }  # fmt: skip
    (name, tokens), sure, accuracy = words_first.choose(3.5, CONFIDENCE, EASY, models)
    assert (name, tokens, accuracy) == ("half", 1.0, 75.0), "the lucky seed's model has 75 and 50"
    assert 0.5 < sure <= 0.8
    with pytest.raises(ValueError, match="max"):
        words_first.choose(1e9, np.full(4, 0.5), EASY, {("all layers", 1.0): (np.ones(4), WHOLE)})
