"""CoQA by both dials: what lower layers answer, how a reduction is split, and what the table says of files."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_answers import lm, sample, scorer_for  # noqa: F401 - a fixture
from transformers import LlamaConfig

from ablation.answers import both, both_results, cost, guess, judge, train
from ablation.answers.model import adapt
from ablation.answers.reader import answer, at_answers, batch, chunks_of, norm, ranks, read
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


def standing(lm, ids, region, still, stays):  # noqa: F811
    """Logits by transformers' own layers, which are given the region as it stood before layer `still`."""
    ids, place = ids[stays], torch.arange(len(ids))[stays]
    x, by = lm.model.embed_tokens(ids[None]), lm.model.rotary_emb(torch.zeros(1, dtype=torch.double), place[None])
    mask = torch.full((len(ids), len(ids)), -1e30, dtype=torch.double).triu(1)[None, None]
    for number, layer in enumerate(lm.model.layers):
        if number == still:
            stood = x
        if number >= still:
            x = torch.where((place < region)[None, :, None], stood, x)
        x = layer(x, attention_mask=mask, position_embeddings=by)
        x = x[0] if isinstance(x, tuple) else x
    return lm.lm_head(lm.model.norm(x))[0]


@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("still", [0, 1, 3])
def test_a_passage_that_stands_still_is_seen_as_it_stood(lm, still, less):  # noqa: F811
    samples = [sample(50, 1), sample(20, 2, turns=9)]
    b, width = batch(samples, "cpu"), 12
    scores = torch.rand(2, width, generator=torch.Generator().manual_seed(0))
    how, stay = {"still": still}, torch.ones_like(b.ids, dtype=torch.bool)
    if less:
        keep = torch.tensor([[30], [22]])
        how |= {"steps": (0,), "keep": keep, "choose": lambda x: scores, "unit": chunks_of(b, 8)}
        stay = ranks(scores, b, chunks_of(b, 8)) < keep
    logs, gold, owner = at_answers(lm, read(lm, b, **how), b)
    for i, s in enumerate(samples):
        total, answers = int(b.total[i]), len(s.answer)
        want = standing(lm, b.ids[i, :total], b.region[i], still, stay[i, :total])[-answers - 1 : -1]
        assert torch.allclose(logs[owner == i].double(), want.log_softmax(-1), atol=1e-5)
    b, likely = batch(samples, "cpu", answers=False), []
    for i, said in enumerate(answer(lm, b, end=-1, limit=5, likely=likely, **how)):
        ids, log = b.ids[i, : b.prompt[i]], 0.0
        for token in said:
            here = torch.cat([stay[i, : b.prompt[i]], torch.ones(len(ids) - int(b.prompt[i]), dtype=torch.bool)])
            foretold = standing(lm, ids, b.region[i], still, here)[-1].log_softmax(-1)
            assert foretold.argmax() == token
            ids, log = torch.cat([ids, torch.tensor([token])]), log + foretold.max().item()
        assert likely[i] == pytest.approx(math.exp(log), rel=1e-4), "how likely the whole answer is"


def test_keys_of_upper_layers_are_foretold_in_closed_form(lm):  # noqa: F811
    """The layer itself exactly, those above it better than by their own projections."""
    model, dial = copy.deepcopy(lm), train.Dial(train.Row("x", "dial", "once"), scorer_for(), lm.config)
    lots = [batch([sample(60, 4 * i + j) for j in range(4)], "cpu", answers=False) for i in range(12)]
    shares = guess.attach(model, dial, lots, 1)
    assert len(shares) == 3 and shares[0] == pytest.approx(1, abs=0.01) and shares[0] > shares[1] > shares[2] > 0.1
    assert not hasattr(model.model.layers[0].self_attn, "guess")
    held, passed = lots[0], []
    read(lm, held, passed=passed)
    mine = torch.arange(held.ids.shape[1]) < held.region[:, None]
    for layer, own in zip(model.model.layers[1:], range(1, 4)):
        given = norm(layer.input_layernorm, passed[1].x)[mine]
        wanted = layer.self_attn.k_proj(norm(layer.input_layernorm, passed[own].x)[mine])
        apart = [
            (found - wanted).norm() for found in (layer.self_attn.guess(given)[:, :16], layer.self_attn.k_proj(given))
        ]
        assert apart[0] < apart[1] if own > 1 else apart[0] < 0.1 * wanted.norm()
    logs, gold, _ = at_answers(
        model, read(model, batch([sample(40, 99)], "cpu"), still=1), batch([sample(40, 99)], "cpu")
    )
    assert logs.shape[0] == len(gold) == 4
    assert len(adapt(model, 0, 4)) == 2 * (7 * 4 + 3), "what foretells is trained, too"


def test_what_stands_still_costs_its_keys_and_values():
    shape, n, asking = (576, 9, 3, 64, 1536, 30), 100, 10
    token, states, pair = 576 * 64 * (2 * 9 + 2 * 3) + 3 * 576 * 1536, 2 * 576 * 3 * 64, 2 * 9 * 64
    want = 20 * (n * token + n * n * pair) + 10 * (asking * token + (n - asking) * states + asking * n * pair)
    assert cost.macs(shape, n, still=20, asking=asking) == want
    assert cost.macs(shape, n, still=30, asking=asking) == cost.macs(shape, n)
    kept = cost.solve(shape, 1200, 30, 5.0, cost.SCHEDULES["once"], 10**8, 16, 20)
    spent = cost.macs(shape, 1200, cost.SCHEDULES["once"], kept, 16, 20) + 10**8
    assert 0.97 < cost.macs(shape, 1200) / spent / 5.0 < 1.05


def test_a_reduction_is_split_between_layers_and_tokens(lm, monkeypatch):  # noqa: F811
    asked = []

    def judged(less, samples, data, device, dial, rest):
        b = batch(samples, device, answers=False)
        reached = dial.reached(b, rest) if dial else [1.0]
        asked.append((less.config.num_hidden_layers, dial and dial.still))
        return {"f1": 0.0, "reached": sum(reached) / len(reached)}

    monkeypatch.setattr(judge, "judged", judged)
    samples = [sample(900, seed) for seed in range(3)]
    for depth in (4, 3, 2):
        found = both.judged(lm, scorer_for(), samples, None, "cpu", "both", depth, 2.0)
        assert found["mac_reduction"] == pytest.approx(2.0, rel=0.02), "the scorer's own cost is in it"
    for depth in (4, 3, 2):
        found = both.judged(lm, scorer_for(), samples, None, "cpu", "passage", depth, 3.0)
        assert found["mac_reduction"] == pytest.approx(3.0, rel=0.02), "the question's own layers are in it, too"
    assert asked == [(4, None), (3, None), (2, None), (4, None), (4, 3), (4, 2)] and lm.config.num_hidden_layers == 4


def test_depths_end_where_no_token_needs_to_leave():
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3)  # fmt: skip
    assert both.depths("both", config, 3.0) == [30, 24, 20, 15, 12, 10]
    assert both.depths("layers", config, 5.0) == [6] and both.depths("tokens", config, 5.0) == [30]
    assert both.depths("passage", config, 3.0) == [30, 26, 24, 22, 20, 16, 8]
    assert both.depths("passage", config, 5.0) == [30, 26, 24, 22, 20, 16, 3]
    assert both.depths("guess18", config, 2.0) == [18] and both.depths("passage", config, 2.0) == [30, 26, 22]


def test_the_table_takes_depths_from_validation(tmp_path):
    def rows(kind, f1s):
        for split, where in f1s.items():
            for depth, f1 in where.items():
                yield {"target": 3.0, "split": SPLITS[split][1], "depth": depth, "f1": f1,
                       "packed": pack([f1] * 4), "stories": [0, 0, 1, 1]}  # fmt: skip

    files = {
        "passage-0": {"validation": {30: 50, 15: 70, 10: 40}, "test": {30: 80, 15: 60, 10: 30}},
        "tokens-0": {"validation": {30: 50}, "test": {30: 55}},
        "tokens-1": {"validation": {30: 50}, "test": {30: 99}},
        "layers-0": {"validation": {10: 50}, "test": {10: 20}},
    }
    for name, f1s in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [*rows(name, f1s)]}))
    table = both_results.table(tmp_path)
    assert [*table["layers"]] == ["10", "15"], "15, though 30 is better on the test stories"
    assert [*table["F1 (seeds)"]] == ["20.0 (1)", "60.0 (1)"] and [*table["fewer tokens"]] == ["55.0", "55.0"]
    assert [*table["ahead by"]] == ["-35.0 [-35.0, -35.0]", "+5.0 [+5.0, +5.0]"]


def test_a_row_reads_validation_first(lm, monkeypatch):  # noqa: F811
    scores = {("validation", None): 9, ("validation", 3): 1, ("validation", 2): 5}

    def judged(lm, scorer, samples, data, device, kind, depth, reduction):
        f1 = scores.get((samples, depth if reduction > 1 else None), 0)
        return {
            "f1": float(f1),
            "em": 0.0,
            "n": 2,
            "f1s": [f1, f1],
            "mac_reduction": reduction,
            "sure": [9, 9],
            "said": 3,
        }

    monkeypatch.setattr(both, "judged", judged)
    monkeypatch.setattr(both, "REDUCTIONS", (4.0,))
    monkeypatch.setattr(judge, "samples_of", lambda data, split, passages, limit: split)
    monkeypatch.setattr(judge, "chosen", lambda data, split, limit: [0, 1])
    data = SimpleNamespace(turns=[{"story": 0}, {"story": 1}])
    found = [*both.read("both", lm, None, data, "cpu", {"validation": 2, "test": 2}, float("inf"))]
    test = [row["depth"] for row in found if row["split"] == SPLITS["test"][1]]
    assert test == [4, 4, 2, 1] and len(found) == len(test) + 1 + len(both.depths("both", lm.config, 4.0))


def test_what_is_read_again_is_paid_for_twice():
    first = both_results.Reading(0.2, np.array([0.0, 100.0, 40.0, 0.0]), np.array([10.0, 90.0, 50.0, 20.0]), 0.01)
    second = both_results.Reading(0.5, np.array([80.0, 0.0, 60.0, 50.0]), np.array([50.0] * 4), 0.01)
    cost, f1 = both_results.twice(first, second, 30)
    assert cost == pytest.approx(0.2 + 0.5 * (0.5 + 0.01)) and f1.tolist() == [80, 100, 40, 50]
    there = {(5.0, 30): first, (2.0, 30): second}
    assert both_results.chosen(there, 5.0, True) == ((5.0, 30), None, 0.0), "more cannot be paid for"
    one, other, threshold = both_results.chosen(there, 2.0, True)
    assert (one, other) == ((5.0, 30), (2.0, 30)) and 20 < threshold < 50
    assert both_results.chosen(there, 2.0, False) == ((2.0, 30), None, 0.0)
    mixed = both_results.at_cost([first, second], 0.35)
    assert mixed.tolist() == pytest.approx([40, 50, 50, 25])
    assert both_results.at_cost([first, second], 0.9).tolist() == second.f1.tolist()


def test_the_second_table_sets_reading_twice_beside_reading_once(tmp_path):
    def row(split, target, depth, f1s, sure):
        return {"target": target, "split": SPLITS[split][1], "depth": depth, "f1": sum(f1s) / 4,
                "mac_reduction": target, "packed": pack(f1s), "sure": pack(sure), "said": 4.1,
                "stories": [0, 0, 1, 1]}  # fmt: skip

    once = ((2.0, 30, [80] * 4, [9] * 4), (3.0, 30, [50] * 4, [9] * 4), (11.0, 30, [90, 90, 0, 0], [99, 99, 5, 5]))
    rows = [row(split, *one) for split in ("validation", "test") for one in once]
    (tmp_path / "tokens-0.json").write_text(json.dumps({"rows": rows}))
    (line, *_) = both_results.sure_table(tmp_path).to_dict("records")
    assert line["MACs"] == "3.81x" and line["F1 (seeds)"] == "70.0 (1)", "2x behind 11x is too dear"
    assert line["ahead of fewer tokens, once, by"].startswith("+21.5 [")
