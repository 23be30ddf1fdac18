"""The ablation's training: what each sampling, probe and scorer learns of made-up texts that one token decides."""

import math
import random
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

from ablation import kept, run, show, words
from ablation import train as bench_train
from ablation import variants as ablation
from ablation.bend import Bend
from ablation.curves import curve, logits_of
from ablation.forward import forward
from ablation.merged import Merged
from ablation.run import load_config
from ablation.scorers import make, price
from ablation.train import last_states, train
from ablation.training import SAMPLINGS, Training
from ablation.variants import Variant
from zsaa import finetune
from zsaa.kit import figures

LENGTHS = [23, 40, 9]


def marked(count, length, seed):
    """Texts in which one token, anywhere, decides: 7 for class 1, 8 for class 0."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(10, 97, (count, length), generator=generator)
    labels = torch.arange(count) % 2
    texts[torch.arange(count), torch.randint(0, length, (count,), generator=generator)] = 8 - labels
    return texts.tolist(), labels.tolist()


def classifier():
    return tiny.make("llama", "sequence-classification", dtype=torch.float32)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_sampling_trains_and_counts_its_compute(sampling):
    texts, labels = marked(32, 20, 0)
    training = Training(sampling, epochs=2.0, batch_size=8, learning_rate=1e-3)
    probe, log = train(classifier(), texts, labels, Variant(tau=1), training, progress=False)
    assert probe is None and log["steps"] == 8 and log["samples"] == 64
    compute = log["epochs_of_compute"]
    assert (
        compute == 2
        if sampling == "conventional"
        else 2 < compute < 4
        if sampling in ("sandwich", "ladder", "cuts")
        else compute < 2
    )
    half = Training(sampling, epochs=None, compute=compute / 2, batch_size=8, learning_rate=1e-3)
    _, shorter = train(classifier(), texts, labels, Variant(tau=1), half, progress=False)
    assert compute / 2 <= shorter["epochs_of_compute"] <= compute / 2 + 1.2  # ends with the step that reaches it
    again = train(classifier(), texts, labels, Variant(tau=1), training, progress=False)[1]
    assert {**again, "seconds": 0} == {**log, "seconds": 0}


@pytest.mark.full
def test_the_rate_rises_for_its_share_and_the_log_has_the_longest_gradients(monkeypatch):
    texts, labels = marked(64, 10, 0)
    begun, begin = [], bench_train._Weights.begin
    monkeypatch.setattr(bench_train._Weights, "begin", lambda s, w, left: begun.append((w, left)) or begin(s, w, left))
    for warmup in (0.1, 0.5):
        training = Training("conventional", epochs=10.0, batch_size=8, learning_rate=1e-3, warmup=warmup)
        _, log = train(classifier(), texts, labels, Variant(), training, progress=False)
        rates, begun[:] = [warm * left for warm, left in begun], []
        done = [step / len(rates) for step in range(len(rates))]
        top = rates.index(max(rates))
        assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
        assert abs(done[top] - max(warmup, 20 / len(rates))) < 0.06
        assert len(log["gradient"]) == 20 and all(length > 0 for length in log["gradient"])
    training = Training("conventional", epochs=10.0, seconds=10.0, batch_size=8, learning_rate=1e-3)
    clock = iter([0.0, *(0.5 * n for n in range(1000))])  # half a second a step, as the clock says
    monkeypatch.setattr(bench_train, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    _, log = train(classifier(), texts, labels, Variant(), training, progress=False)
    assert log["steps"] == 20 and begun[-1][1] == pytest.approx(0.05), "the rate falls to 0 by the clock"
    with pytest.raises(ValueError, match="warmup is a share of the training, above 0"):
        Training(warmup=0.0)


def test_fewer_layers_may_have_a_dial():
    texts, labels = marked(16, 30, 0)
    training = Training("alpha", layers=2, alpha_range=(0.02, 1.0), epochs=1.0, batch_size=8)
    model = classifier()
    kept.shorten(model, training.layers)
    probe, _ = train(model, texts, labels, Variant(tau=1), training, progress=False)
    rows = run.judge(model, texts, labels, Variant(tau=1), training, probe, [1, 2], [])
    assert [(row["control"], row["target"]) for row in rows] == [("alpha", 1), ("alpha", 2)]
    assert model.config.num_hidden_layers == 2 and rows[1]["mac_reduction"] >= 2


@pytest.mark.full
def test_a_probe_finds_the_tokens_that_decide():
    texts, labels = marked(384, 24, 1)
    variant = Variant(schedule="once", tau=2)
    training = Training("sandwich", probe="gradient", distill=0.5, epochs=5.0, batch_size=16, learning_rate=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForSequenceClassification(tiny.CONFIGS["llama"]())
    probe, _ = train(model, texts, labels, variant, training, progress=False)
    held_out, answers = marked(200, 24, 2)
    chosen = curve(model, held_out, answers, variant, training, probe, (1, 5), sides=("last",))
    found = {(row["control"], row["target"]): row for row in chosen}
    assert found["alpha", 1]["accuracy"] > 85
    assert found["alpha", 5]["accuracy"] > 85 and found["alpha", 5]["mac_reduction"] >= 5
    assert found["last", 5]["accuracy"] < 75
    bits = f"{int(found['alpha', 5]['right'], 16):0200b}"
    assert bits.count("1") == found["alpha", 5]["correct"]


@pytest.mark.full
def test_a_bag_of_words_finds_them_too_and_ends_lose_them(tmp_path):
    train_side, test_side = marked(384, 24, 1), marked(200, 24, 2)
    rows = words.curve(train_side, test_side, tiny.CONFIGS["llama"](), (1, 5), steps=400)
    found = {row["control"]: row["accuracy"] for row in rows}
    assert set(found) == {"whole", *words.RULES}
    assert found["whole"] > 85 and found["salient"] > 85
    assert max(found[rule] for rule in ("first", "last", "ends", "random")) < 75
    figures.save_figure(show.words_figure([{"rows": rows, "task": {"name": "made up"}}]), tmp_path / "words")
    assert {row["keep_tokens"] for row in rows[1:]} == {5}
    text = torch.arange(30)
    for rule in words.RULES:
        kept = words.keep(text, 4, rule, salience=-text.float())
        assert len(kept) == 4 and kept.tolist() == sorted(kept.tolist())
    assert kept.tolist() == words.keep(text, 4, "random", -text.float()).tolist()
    assert words.keep(text, 4, "salient", -text.float()).tolist() == [0, 1, 2, 3]


@pytest.mark.full
def test_a_bag_of_words_can_score():
    texts, labels = marked(384, 8, 0)
    training = Training("log", probe="words", epochs=0.2, batch_size=16, learning_rate=1e-3)
    probe, _ = train(classifier(), texts, labels, Variant(schedule="once", tau=2), training, progress=False)
    best = probe.salience.topk(2).indices
    assert set(best.tolist()) == {7, 8}
    assert probe(0, None, None, torch.tensor([[7, 50]])).argmax() == 0


def test_merged_adapters_have_the_gradients_of_adapters():
    """Over two passes, as a step has them; what is left behind is peft's own layer again."""
    recipe = finetune.Recipe(tuning="lora", lora_rank=3, lora_alpha=6, dropout=0.0)
    model = finetune.add_lora(tiny.make("llama", "sequence-classification"), recipe)
    own = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in own:  # peft's B starts at 0
            torch.nn.init.normal_(parameter, std=0.3)
    ids, _, _ = tiny.tokens(LENGTHS)

    def learn() -> list[torch.Tensor]:
        for alpha in (1.0, 0.8):
            logits, *_ = logits_of(model, ids, LENGTHS, alpha, Variant())
            logits.square().sum().backward()
        return logits

    expected = learn()
    gradients = [p.grad.clone() for p in own]
    for parameter in own:
        parameter.grad = None
    merged = Merged(model)
    merged.merge()
    torch.testing.assert_close(learn(), expected, rtol=1e-5, atol=1e-6)
    merged.split()
    for parameter, gradient in zip(own, gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
    assert len(merged.layers) == 7 * model.config.num_hidden_layers
    merged.release()
    assert not any("forward" in vars(layer) for layer in merged.layers)
    dropping = finetune.add_lora(tiny.make("llama", "sequence-classification"), replace(recipe, dropout=0.1))
    with pytest.raises(ValueError, match="without dropout"):
        Merged(dropping)


def test_the_last_token_is_found_in_every_layer():
    """Its state behind a layer is that of a pass over its text alone; behind the top one the pass itself returns it."""
    model, entered = tiny.make("llama", "base"), {}
    ids, _, _ = tiny.tokens(LENGTHS)
    _, trail = forward(model, ids, LENGTHS, 0.7, Variant(), entered=entered)
    found = last_states(entered, trail)
    assert len(found) == model.config.num_hidden_layers - 1
    for row, n in enumerate(LENGTHS):
        alone = {}
        forward(model, ids[row : row + 1, :n], [n], 0.7, Variant(), entered=alone)
        for layer, states in enumerate(found, start=1):
            torch.testing.assert_close(states[row], alone[layer][0, -1].float())


def test_matching_in_every_layer_teaches():
    texts, labels = marked(32, 8, 0)
    training = Training("ladder", distill=1.0, probe="wide", epochs=2, batch_size=16, dropout=0.0, learning_rate=1e-3)
    learned = []
    for change in ({}, {"match": 0.5}, {"match": 0.5, "deep": True}, {"deep": True}):
        model = classifier()
        train(model, texts, labels, Variant(tau=2), replace(training, **change), progress=False)
        learned.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    plain, final, every, nothing = learned
    assert torch.equal(plain, nothing) and not torch.equal(plain, final) and not torch.equal(final, every)


@pytest.mark.parametrize("rivals", [False, True])
def test_gradients_teach_the_shares_of_what_is_left(rivals):
    config = tiny.make("llama", "base").config
    probe = make("gradient", config, Variant(), 2)
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(2, 5, config.hidden_size, generator=generator, requires_grad=True)
    weights = torch.tensor([[1.0, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    (state.sum(-1) * weights).sum().backward()
    at = torch.tensor([[2, 3, 5, 8, 9], [0, 4, 6, -1, -1]])  # layer 1 of a pruned pass
    name, left = "1", (at >= 0) & ((at != at.amax(1, keepdim=True)) | (not rivals))
    probe.heads = torch.nn.ModuleDict({name: probe.heads[name]})
    found = probe.loss({1: state}, torch.zeros(2, 10, dtype=torch.long), [None, at], rivals)
    expected = 0.0
    for row in range(2):
        pull = ((state[row].sum(-1) * weights[row]).abs() * left[row])[left[row]].double()
        said = probe.heads[name](state[row]).squeeze(-1)[left[row]].double().log_softmax(0)
        expected -= (pull / pull.sum() * said).sum() / 2
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    alone = torch.where(torch.arange(5) == 0, 0, -1).expand(2, -1)  # nothing but the last token is left
    probe.loss({1: state}, torch.zeros(2, 10, dtype=torch.long), [None, alone], rivals).backward()
    assert all(p.grad.isfinite().all() for p in probe.parameters() if p.grad is not None)


def test_a_bend_goes_where_answers_stay_the_same():
    bend, draw = Bend([1.0] * 12, seed=0), random.Random(0)
    wanted = torch.tensor([0.6, -0.4], dtype=torch.float64)

    def apart() -> float:
        return (bend.at - wanted).norm().item()

    before, after = apart(), []
    for step in range(1200):
        tried, size = bend.neighbour(), draw.uniform(0, 2.5)
        divergence = size - step / 600 + (tried - wanted).square().sum().item() + draw.gauss(0, 0.5)
        bend.learn(tried, math.exp(size), math.exp(divergence))
        after += [apart()] if step > 600 else []
    assert sum(after) / len(after) < before / 2
    assert sum(bend.weights()) == pytest.approx(12) and bend.weights()[0] < bend.weights()[8]


@pytest.mark.full
def test_a_learned_schedule_is_trained_and_evaluated():
    texts, labels = marked(64, 20, 0)
    training = Training("ladder", distill=0.5, bends=True, probe="gradient", epochs=30.0, batch_size=16)
    model = classifier()
    _, log = train(model, texts, labels, Variant(tau=1), training, progress=False)
    assert sum(log["schedule"]) == pytest.approx(4, abs=0.01)
    assert len(set(log["schedule"])) == 4  # no layer drops as another


def test_texts_are_cut_anew():
    data = SimpleNamespace(
        train=Dataset.from_dict({"text": list("abcdefgh"), "label": [0, 1] * 4}),
        test=Dataset.from_dict({"text": list("uvwxyz"), "label": [0, 1] * 3}),
    )
    train_side, test_side = run._cut_anew(data, 1, train=9, test=4)
    found = [list(side["text"]) for side in (train_side, test_side)]
    assert list(map(len, found)) == [9, 4] and len({*found[0], *found[1]}) == 13
    assert set(found[1]) & set("abcdefgh")


@pytest.mark.full
def test_notes_tell_what_a_blind_choice_dropped():
    """Tokens are kept evenly spaced, and the one that decides is mostly not among them."""
    (texts, labels), (held_out, answers) = marked(384, 24, 1), marked(200, 24, 2)
    found = {}
    for dropped, probe in (("gone", ""), ("noted", "notes")):
        variant = Variant(score="even", schedule="once", tau=2, dropped=dropped)
        training = Training("ladder", distill=0.5, match=0.1, probe=probe, epochs=5, batch_size=16, learning_rate=1e-2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.LlamaForSequenceClassification(tiny.CONFIGS["llama"]())
        notes, _ = train(model, texts, labels, variant, training, progress=False)
        found[dropped] = curve(model, held_out, answers, variant, training, notes, (5,))[0]["accuracy"]
    assert found["noted"] > 85 > 80 > found["gone"]


@pytest.mark.full
def test_evidence_finds_the_telling_tokens():
    """Learned on the way, from the labels alone; counted in the MACs."""
    texts, labels = marked(384, 8, 0)
    model, variant = classifier(), Variant(schedule="twice", tau=2, scorer_macs=(100, 100))
    training = Training(
        "sandwich", distill=0.5, probe="evidence", warm=0.2, epochs=4, batch_size=16, learning_rate=1e-3
    )
    probe, log = train(model, texts, labels, variant, training, progress=False)
    votes = probe.table.weight.detach()
    assert set((votes[:, 0] - votes[:, 1]).abs().topk(2).indices.tolist()) == {7, 8}
    ids, lengths = torch.tensor(texts), [len(text) for text in texts]
    _, trail = forward(model, ids, lengths, 0.5, variant, scorer=probe)
    found = [bool({7, 8} & {text[i] for i in kept if i >= 0}) for text, kept in zip(texts, trail[0].tolist())]
    assert sum(found) > 0.9 * len(texts)  # two or three of eight stay; by lot it would be a third
    alone = [forward(model, ids[i : i + 1], lengths[i : i + 1], 0.5, variant, scorer=probe)[1][0] for i in range(4)]
    assert all(torch.equal(one[0], both) for one, both in zip(alone, trail[0]))
    plain = Variant(schedule="twice", tau=2)
    layers = model.config.num_hidden_layers
    extra = ablation.macs(model.config, 20, 0.8, variant) - ablation.macs(model.config, 20, 0.8, plain)
    entering = [20, *plain.counts(20, 0.8, layers)]
    assert extra == sum(100 * n for n, after in pairwise(entering) if after < n)
    rows = curve(model, texts[:40], labels[:40], variant, training, probe, [1, 2])
    assert [row["control"] for row in rows] == ["scorer", "alpha", "alpha"] and log["steps"] == 96


@pytest.mark.full
def test_phrases_vote_where_no_token_tells_by_itself():
    """The same two tokens in every text; their order decides. What was seen of them can be told to the kept rows."""
    generator = torch.Generator().manual_seed(3)
    texts, labels = torch.randint(10, 97, (400, 12), generator=generator), torch.arange(400) % 2
    at = torch.randint(0, 11, (400,), generator=generator)
    texts[torch.arange(400), at], texts[torch.arange(400), at + 1] = 7 + labels, 8 - labels
    texts, labels = texts.tolist(), labels.tolist()
    fields = load_config()["rows"]["votes-told"]
    variant = Variant(**{**fields["variant"], "tau": 2, "smooth": 1, "reference": None})
    training = Training(**{**fields["training"], "epochs": 6, "batch_size": 16, "learning_rate": 1e-3})
    model = classifier()
    variant = replace(variant, scorer_macs=price(training.probe, model.config, variant, 2))
    probe, _ = train(model, texts, labels, variant, training, progress=False)
    rows = curve(model, texts[:100], labels[:100], variant, training, probe, [1, 2])
    assert rows[0]["control"] == "scorer" and rows[0]["accuracy"] > 90
    alone = rows[0]["mac_reduction"]
    assert alone == pytest.approx(ablation.macs(model.config, 12, 1.0, variant) / 12 / variant.scorer_macs[0])
    ids, lengths = torch.tensor(texts[:6]), [12] * 6
    together, trail = forward(model, ids, lengths, 0.4, variant, scorer=probe)
    assert len(trail[0][0]) < 12
    for i in range(6):  # whatever its batch
        padded = torch.cat((ids[i : i + 1], 0 * ids[i : i + 1]), 1) if i % 2 else ids[i : i + 1]
        one, kept = forward(model, padded, [12], 0.4, variant, scorer=probe)
        torch.testing.assert_close(one[0], together[i], rtol=1e-4, atol=1e-5)
        assert torch.equal(kept[0][0], trail[0][i])
    assert all((matrix.weight != 0).any() for matrix in probe.heads["0"]["read"])


def test_what_is_known_ahead_asks_no_queries():
    config, n, alpha = tiny.CONFIGS["llama"](), 50, 0.8
    plain, ahead = Variant(), Variant(ahead=True)
    q_dim = config.num_attention_heads * config.head_dim
    entering = [n, *plain.counts(n, alpha, config.num_hidden_layers)]
    saved = sum((a - b) * (q_dim * config.hidden_size + 2 * a * q_dim) for a, b in pairwise(entering))
    assert ablation.macs(config, n, alpha, plain) - ablation.macs(config, n, alpha, ahead) == saved > 0
    assert ablation.macs(config, n, 1.0, plain) == ablation.macs(config, n, 1.0, ahead)
    with pytest.raises(ValueError, match="looks at a layer's attention"):
        make("evidence", config, ahead, 2)
    assert Variant(schedule="zipf").counts(100, 0.5, 4) == [50, 33, 25, 20]
    halves = Variant(schedule="zipf:0.5").counts(100, 0.5, 4)
    assert halves[0] == 50 and halves[-1] > 20  # slower afterwards


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"sampling": "x"}, {"probe": "gradient"}, {"distill": 0.5}, {"epochs": None}, {"side": "middle"}):
        with pytest.raises(ValueError, match="must be|must be given|need"):
            Training(**wrong)
