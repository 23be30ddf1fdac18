"""Ways of leaving when sure: against a text at a time, and that the search finds the best of all."""

import pytest
import tiny
import torch

from ablation import cascade
from ablation.cascade import Pass
from ablation.variants import Variant, macs
from zsaa.evaluation.accuracy import tally

DEPTHS, TEXTS = (1, 2, 3, 4), 40


def passes(seed=0):
    """Answers that are the more often right the deeper, and the fewer tokens were dropped."""
    draw = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 2, (TEXTS,), generator=draw)
    signs = torch.stack([2.0 * (wanted == 0) - 1, 2.0 * (wanted == 1) - 1], -1)
    found = {}
    for tokens in (1.0, 2.0, 5.0):
        noise = torch.randn(4, TEXTS, 2, generator=draw)
        said = signs * torch.arange(1, 5)[:, None, None] / tokens**0.5 + 2 * noise
        costs = torch.arange(1, 5).double()[:, None] * torch.linspace(1, 2, TEXTS).double() / tokens
        found[tokens] = Pass(said, costs, DEPTHS)
    return found, wanted, float(found[1.0].costs[-1].sum())


def one_by_one(stages, found, wanted):
    """(right, cost) of each text, as it goes."""
    rows = []
    for text in range(TEXTS):
        cost = 0.0
        for number, (tokens, first, deepest, sure) in enumerate(stages):
            for at, depth in enumerate(DEPTHS):
                if first <= depth <= deepest:
                    shares = found[tokens].said[at, text].softmax(-1)
                    if shares.max() >= sure or depth == deepest:
                        break
            cost += float(found[tokens].costs[at, text])
            if shares.max() >= sure or number == len(stages) - 1:
                break
        rows.append((int(shares.argmax() == wanted[text]), cost))
    return rows


@pytest.mark.parametrize(
    "stages",
    [
        [[1.0, 1, 4, 0.9]],
        [[5.0, 1, 3, 0.8], [1.0, 2, 4, 0.95]],
        [[5.0, 4, 4, 0.99], [2.0, 4, 4, 1.0]],
        [[2.0, 2, 2, 1.0]],
    ],
    ids=str,
)
def test_what_a_way_comes_to_is_that_of_each_text(stages):
    found, wanted, whole = passes()
    row = cascade.judged({"control": "x", "target": 2.0, "stages": stages}, found, wanted, whole)
    rows = one_by_one(stages, found, wanted)
    assert row["right"] == tally([right for right, _ in rows])["right"]
    assert row["mac_reduction"] == pytest.approx(whole / sum(cost for _, cost in rows))
    assert ("again" in row) is (len(stages) > 1)


def test_the_best_way_of_each_kind_is_found(monkeypatch):
    monkeypatch.setattr(cascade, "SURE", (0.6, 0.8, 0.9, 0.97))
    monkeypatch.setattr(cascade, "TRIED", (0.5, 1.0))
    found, wanted, whole = passes()
    rows = {(r["control"], r["target"]): r["stages"] for r in cascade.solve(found, wanted, whole, (2.0, 3.0))}
    assert {kind for kind, _ in rows} == {"layers-sure", "both-fixed", "tokens-sure", "both-sure"}
    every = {1: [[[1.0, 1, d, s]] for d in (2, 4) for s in cascade.SURE]}
    every[2] = [
        [[t, 1, d, s], [m, 1, e, u]]
        for t, m in ((5.0, 2.0), (5.0, 1.0), (2.0, 1.0))
        for d in (2, 4) for e in (2, 4) for s in cascade.SURE for u in cascade.SURE
    ]  # fmt: skip
    every[2] += [[[t, 1, d, s]] for t in found for d in (2, 4) for s in cascade.SURE]
    for kind, ways in (("layers-sure", every[1]), ("both-sure", every[2])):
        for budget in (2.0, 3.0):
            tried = [cascade.judged({"stages": way}, found, wanted, whole) for way in ways]
            best = max(row["accuracy"] for row in tried if row["mac_reduction"] >= budget)
            mine = cascade.judged({"stages": rows[kind, budget]}, found, wanted, whole)
            assert mine["accuracy"] == best and mine["mac_reduction"] >= budget


def test_costs_are_those_of_the_first_layers():
    config, rule = tiny.make("llama", "sequence-classification").config, Variant(tau=2, schedule="rising")
    costs = cascade.costs_of(config, [9, 30, 9], 0.6, rule, (2, 4))
    assert costs.tolist() == [[macs(config, n, 0.6, rule, depth) for n in (9, 30, 9)] for depth in (2, 4)]
