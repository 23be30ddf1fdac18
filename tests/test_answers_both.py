"""CoQA by both dials: what lower layers answer, how a reduction is split, and what the table says of files."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from test_answers import lm, sample, scorer_for  # noqa: F401 - a fixture

from ablation.answers import both, judge, train
from ablation.answers.reader import at_answers, batch, read
from ablation.answers.second_results import SPLITS, pack
from zsaa.depth import remove_layers


def test_lower_layers_lose_what_the_model_of_these_would(lm):  # noqa: F811
    b = batch([sample(40, 1), sample(25, 2)], "cpu")
    passed: list = []
    logs, gold, _ = at_answers(lm, read(lm, b, passed=passed), b)
    assert len(passed) == 5
    losses = []
    for depth in (1, 3):
        less = remove_layers(copy.deepcopy(lm), range(depth, 4))
        mine, _, _ = at_answers(less, read(less, b), b)
        told = F.kl_div(mine, logs, log_target=True, reduction="sum")
        losses.append((F.nll_loss(mine, gold, reduction="sum") + told) / 2)
    assert train.early(lm, passed, [1, 3], b, logs).item() == pytest.approx(sum(losses).item() / 2, rel=1e-4)


def test_a_reduction_is_split_between_layers_and_tokens(lm, monkeypatch):  # noqa: F811
    asked = []

    def judged(less, samples, data, device, dial, rest):
        b = batch(samples, device, answers=False)
        reached = dial.reached(b, rest) if dial else [1.0]
        asked.append((less.config.num_hidden_layers, dial is None))
        return {"f1": 0.0, "reached": sum(reached) / len(reached)}

    monkeypatch.setattr(judge, "judged", judged)
    samples = [sample(900, seed) for seed in range(3)]
    for depth in (4, 3, 2):
        found = both.judged(lm, scorer_for(), samples, None, "cpu", depth, 2.0)
        assert found["mac_reduction"] == pytest.approx(2.0, rel=0.02), "the scorer's own cost is in it"
    assert asked == [(4, False), (3, False), (2, True)] and lm.config.num_hidden_layers == 4
    assert both.depths("both", 30, 3.0) == [30, 24, 20, 15, 12, 10]
    assert both.depths("layers", 30, 5.0) == [6] and both.depths("tokens", 30, 5.0) == [30]


def test_the_table_takes_depths_from_validation(tmp_path):
    def rows(kind, f1s):
        for split, where in f1s.items():
            for depth, f1 in where.items():
                yield {"target": 3.0, "split": SPLITS[split][1], "depth": depth, "f1": f1,
                       "packed": pack([f1] * 4), "stories": [0, 0, 1, 1]}  # fmt: skip

    files = {
        "both-0": {"validation": {30: 50, 15: 70, 10: 40}, "test": {30: 80, 15: 60, 10: 30}},
        "tokens-0": {"validation": {30: 50}, "test": {30: 55}},
        "layers-0": {"validation": {10: 50}, "test": {10: 20}},
    }
    for name, f1s in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [*rows(name, f1s)]}))
    table = both.table(tmp_path)
    assert [*table["layers"]] == ["15", "30", "10", "30", "10"], "15, though 30 is better on the test stories"
    assert [*table["both are ahead by"]] == ["", "-20.0 [-20.0, -20.0]", "+30.0 [+30.0, +30.0]",
                                             "+5.0 [+5.0, +5.0]", "+40.0 [+40.0, +40.0]"]  # fmt: skip


def test_a_row_reads_validation_first(lm, monkeypatch):  # noqa: F811
    scores = {("validation", None): 9, ("validation", 3): 1, ("validation", 2): 5}

    def judged(lm, scorer, samples, data, device, depth, reduction):
        f1 = scores.get((samples, depth if reduction > 1 else None), 0)
        return {"f1": float(f1), "em": 0.0, "n": 2, "f1s": [f1, f1], "mac_reduction": reduction}

    monkeypatch.setattr(both, "judged", judged)
    monkeypatch.setattr(both, "REDUCTIONS", (4.0,))
    monkeypatch.setattr(judge, "samples_of", lambda data, split, passages, limit: split)
    monkeypatch.setattr(judge, "chosen", lambda data, split, limit: [0, 1])
    data = SimpleNamespace(turns=[{"story": 0}, {"story": 1}])
    found = [*both.read("both", lm, None, data, "cpu", {"validation": 2, "test": 2}, float("inf"))]
    test = [row["depth"] for row in found if row["split"] == SPLITS["test"][1]]
    assert test == [4, 4, 2, 1] and len(found) == len(test) + 1 + len(both.depths("both", 4, 4.0))
