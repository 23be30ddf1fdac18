"""A classifier that answers behind every layer: against models of so many layers; its curves against plain counting."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from datasets import Dataset

import zsaa
from ablation import exits
from ablation.run import judge
from ablation.train import train
from ablation.training import Training
from ablation.variants import Variant, alpha_for, macs, total_macs
from zsaa.data.batching import pad
from zsaa.depth import remove_layers
from zsaa.dial import settings, trained_for
from zsaa.evaluation.accuracy import tally
from zsaa.finetune import Recipe, fine_tune

SAMPLES = [tiny.tokens([n], seed=n)[0][0].tolist() for n in (9, 17, 5, 30, 12, 21)]
LABELS = [0, 1, 1, 0, 1, 0]
TEXTS = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": y} for ids, y in zip(SAMPLES, LABELS)]


def model():
    return tiny.make("llama", "sequence-classification", dtype=torch.float32)


def first(depth):
    return remove_layers(model(), range(depth, 4)) if depth < 4 else model()


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_the_answers_are_those_of_models_of_fewer_layers(alpha):
    rule, net = Variant(tau=2), model()
    said = exits.asked(net, SAMPLES, alpha, rule, None, [2, 3, 4], batch_size=4)
    for depth, answers in zip((2, 3, 4), said):
        alone = exits.asked(first(depth), SAMPLES, alpha, rule, None, [depth])[0]
        torch.testing.assert_close(answers, alone)
        if alpha == 1:
            stock = torch.cat([first(depth)(torch.tensor([ids])).logits for ids in SAMPLES]).detach()
            torch.testing.assert_close(answers, stock, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(said[0], said[2])


def test_costs_are_of_the_layers_that_run():
    config, rule = model().config, Variant(tau=2, schedule="rising")
    from collections import Counter

    for alpha in (1.0, 0.6):
        whole = total_macs(config, Counter([40]), alpha, rule)
        assert whole == macs(config, 40, alpha, rule) == macs(config, 40, alpha, rule, depth=4)
        assert total_macs(config, Counter([40]), alpha, rule, 2) == macs(config, 40, alpha, rule, 2) < whole
    alpha = alpha_for(config, [40], 4.0, rule, depth=3)
    stock = macs(config, 40, 1.0, rule)
    assert stock / macs(config, 40, alpha, rule, 3) >= 4 > stock / macs(config, 40, alpha + 0.02, rule, 3)
    assert alpha_for(config, [40], 2.0, rule, depth=2) == 1.0 and len(rule.counts(40, alpha, 4)) == 4


def test_the_loss_is_the_mean_over_depths():
    torch.manual_seed(0)
    said, wanted, teacher = torch.randn(3, 5, 2), torch.tensor([0, 1, 1, 0, 1]), torch.rand(5, 2).softmax(-1)
    hard = torch.stack([F.cross_entropy(one, wanted) for one in said]).mean()
    soft = torch.stack([F.kl_div(one.log_softmax(-1), teacher, reduction="batchmean") for one in said]).mean()
    torch.testing.assert_close(exits.loss(said, wanted, teacher, 0.0), hard)
    torch.testing.assert_close(exits.loss(said, wanted, teacher, 0.25), 0.75 * hard + 0.25 * soft)


def test_depths_are_drawn_from_all_parts_of_the_range():
    draw = random.Random(0)
    assert exits.drawn(29, 30, draw) == list(range(3, 30)) and exits.drawn(9, 4, draw) == [1, 2, 3]
    found = [exits.drawn(3, 30, draw) for _ in range(200)]
    assert all(3 <= a < 12 <= b < 21 <= c < 30 for a, b, c in found) and {a for a, *_ in found} == set(range(3, 12))
    left = [exits.skipped(0.5, 30, draw) for _ in range(2000)]
    share = [sum(at in one for one in left) / 2000 for at in range(30)]
    assert share[0] == 0 and exits.skipped(0.0, 30, draw) == frozenset()
    assert share[29] == pytest.approx(0.5, abs=0.05) and share[15] == pytest.approx(
        0.5 * (2 ** (15 / 29) - 1), abs=0.05
    )


def test_a_text_leaves_where_it_is_sure():
    sure = torch.tensor([[[2.0, 0.0], [9.0, 0.0]], [[0.0, 9.0], [0.0, 9.0]], [[0.0, 1.0], [1.0, 0.0]]])
    right = torch.tensor([1, 0])
    costs = torch.tensor([[3.0, 6.0], [4.0, 8.0], [6.0, 12.0]])
    found = exits.by_confidence(sure, costs, right, 0.95, whole=18)
    assert found["mac_reduction"] == pytest.approx(18 / (4 + 6)) and found["right"] == tally([1, 1])["right"]
    never = exits.by_confidence(sure, costs, right, 1.0, whole=18)
    assert never["mac_reduction"] == 1.0 and never["accuracy"] == 100.0


@pytest.mark.parametrize("sampling", ["conventional", pytest.param("ladder", marks=pytest.mark.full)])
def test_it_learns_at_every_depth_and_is_judged(sampling, tmp_path):
    rule, net = Variant(tau=2), model()
    more = {"probe": "gradient"} if sampling == "ladder" else {"skips": 0.2}
    training = Training(
        sampling=sampling, exits=9, distill=0.5, epochs=8, batch_size=3, learning_rate=3e-3, dropout=0.0, **more
    )
    before = exits.asked(net, SAMPLES, 1.0, rule, None, [1, 2, 3, 4])
    probe, _ = train(net, SAMPLES, LABELS, rule, training, progress=False)
    after = exits.asked(net, SAMPLES, 1.0, rule, None, [1, 2, 3, 4])
    wanted = torch.tensor(LABELS)
    for was, now in zip(before, after):
        assert F.cross_entropy(now, wanted) < F.cross_entropy(was, wanted)
    rows = judge(net, SAMPLES, LABELS, rule, training, probe, [1, 3], [], raw=tmp_path / "said.npz")
    layers = [row for row in rows if row["control"] == "layers"]
    assert [row["layers"] for row in layers] == [1, 2, 3, 4]
    for row, answers in zip(layers, after):
        assert row["right"] == tally((answers.argmax(-1) == wanted).int().tolist())["right"]
    surest = [row for row in rows if row["control"] == "confidence"]
    assert len(surest) == len(exits.SURE) and all(1 <= row["mac_reduction"] <= 4 for row in surest)
    pruned = [row for row in rows if row["control"] == "both-confidence" and row["tokens"] == 3]
    assert len(pruned) == (len(exits.SURE) if sampling == "ladder" else 0)
    assert all(row["mac_reduction"] >= 3 for row in pruned)
    assert [r["target"] for r in rows if r["control"] == "alpha"] == ([1, 3] if sampling == "ladder" else [])
    ways = exits.chosen_ways(rows)
    kinds = ["layers-sure", "both-fixed", "tokens-sure", "both-sure"] if sampling == "ladder" else ["layers-sure"]
    assert list(dict.fromkeys(way["control"] for way in ways)) == kinds
    assert all(row["mac_reduction"] >= row["target"] for row in rows if "stages" in row)
    again = judge(net, SAMPLES, LABELS, rule, training, probe, [1, 3], [], ways)
    assert [row for row in again if "stages" in row] == [row for row in rows if "stages" in row]
    kept = np.load(tmp_path / "said.npz")
    assert ((kept["said-1"][-1] > 0) == after[-1].argmax(-1).numpy()).all() and kept["depths"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "wrong",
    [{"exits": 2, "teacher": "conventional", "distill": 0.5}, {"exits": 2, "sampling": "alpha"}, {"skips": 0.1}],
)
def test_settings_that_do_not_go_together(wrong):
    with pytest.raises(ValueError, match=r"exits teach themselves|skips are of|teacher needs"):
        Training(**{"sampling": "conventional", **wrong})


@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_of_states_are_the_depth_dials(family, padding, alpha):
    from zsaa.finetune.exits import answers

    net = zsaa.enable(tiny.make(family, "sequence-classification"), alpha, tau=2)
    ids, mask, _ = tiny.tokens([9, 17], padding=padding)
    trained_for(net, None, (1, 4))
    with torch.no_grad():
        states = net(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        said = answers(net, net.score, states, mask, [1, 2, 3])
        for depth, one in zip((1, 2, 3), said):
            torch.testing.assert_close(one, net(ids, attention_mask=mask, depth=depth).logits.float())


BY_LADDER = pytest.param({"sampling": "ladder", "strongest": 3.0, "tau": 2}, marks=pytest.mark.full)


@pytest.mark.parametrize("changes", [{}, BY_LADDER, {"tuning": "lora"}])
def test_a_recipe_teaches_every_depth(changes, tmp_path):
    """Of the package's trainer: accuracy behind each layer, and the range that the dial then knows."""
    recipe = Recipe.named(
        "depth", **{"learning_rate": 1e-2, "batch_size": 3, "epochs": 10.0, "dropout": 0.0, **changes}
    )
    net, wanted = tiny.make("llama", "sequence-classification", dtype=torch.float32), torch.tensor(LABELS)

    def losses(of):
        ids, mask = pad(SAMPLES, 0, "cpu")
        with torch.no_grad():
            said = [of(input_ids=ids, attention_mask=mask, depth=depth).logits for depth in (1, 2, 3, 4)]
        return [float(F.cross_entropy(one, wanted)) for one in said]

    zsaa.enable(net)
    trained_for(net, None, (1, 4))
    before = losses(net)
    trained, log = fine_tune(net, tiny.Padder(), Dataset.from_list(TEXTS), recipe, tmp_path, progress=False)
    after = losses(trained)
    assert log["steps"] == 20 and all(now < was for was, now in zip(before, after)), (before, after)
    assert settings(trained)["depth_range"] == (1, 4) and settings(trained)["depth"] is None
    adapter = tmp_path / "model" / "zsaa.json"
    written = adapter.read_text() if adapter.is_file() else (tmp_path / "model" / "config.json").read_text()
    assert (json.loads(written) if adapter.is_file() else json.loads(written)["zsaa"])["depth_range"] == [1, 4]


@pytest.mark.parametrize(
    "wrong", [{"sampling": "exits"}, {"exits": 3}, {"sampling": "exits", "exits": 3, "method": "conventional"}]
)
def test_recipes_that_teach_no_depth(wrong):
    with pytest.raises(ValueError, match=r"depths are taught by sampling='exits'|draws depths: it goes neither"):
        Recipe(**wrong)
