"""The ablation's plain forward pass: equal to the package in the paper's settings, each variant to a slow reference."""

import json
import math
import random
import statistics
import sys
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from datasets import Dataset
from test_models import save_tiny

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import continuation, depth, run, sensitivity, ship, show, words
from ablation import forward as ablation
from ablation.forward import SCHEDULES, SCORES, Variant, between, counts, forward
from ablation.run import load_config
from ablation.scorers import Evidence, make, price
from ablation.train import SAMPLINGS, Bend, Merged, Training, curve, last_states, logits_of, train
from zsaa import finetune
from zsaa.cost import mac_reduction
from zsaa.cost import macs as package_macs
from zsaa.kit import figures
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import from_bits, to_bits
from zsaa.rule import SPREAD as PACKAGED
from zsaa.rule import kept_counts

LENGTHS = [23, 40, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("score", ["column_sum", "column_mean"])
@pytest.mark.parametrize("schedule", PACKAGED)
def test_the_package_s_settings_equal_the_package(family, score, schedule):
    model = zsaa.enable(tiny.make(family, "base"), score=score, schedule=schedule)
    ids, mask, _ = tiny.tokens(LENGTHS)
    with zsaa.at(model, 0.7), zsaa.trace(model) as t, torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, trail = forward(zsaa.disable(model), ids, LENGTHS, 0.7, Variant(score, schedule))
    for sample in range(len(LENGTHS)):
        kept = [layer[sample][layer[sample] >= 0].tolist() for layer in trail]
        assert kept == [layer[sample].tolist() for layer in t.kept]
        at_top = kept[-1]
        torch.testing.assert_close(hidden[sample, : len(at_top)], expected[sample, at_top], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_tail_equals_decoding_behind_the_pruned_prompt(family):
    model = zsaa.enable(tiny.make(family, "base"), alpha=0.7)
    ids, _, _ = tiny.tokens([30, 30])
    with torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
        expected = model(ids[:, 24:], past_key_values=cache).last_hidden_state
    hidden, _ = forward(zsaa.disable(model), ids, [30, 30], 0.7, Variant(), tail=6)
    torch.testing.assert_close(hidden[:, -6:], expected, rtol=1e-9, atol=1e-9)


def test_dropping_all_at_once_by_recency_keeps_what_truncation_keeps():
    """Behind layer 1, of the last k tokens; only layer 1 saw the others."""
    model = tiny.make("llama", "base")
    ids, _, _ = tiny.tokens([40])
    _, trail = forward(model, ids, [40], 0.8, Variant("recent", "once"))
    k = math.floor(0.8**4 * 40)
    assert all(layer.tolist() == [list(range(40 - k, 40))] for layer in trail)


@pytest.mark.parametrize("schedule", [*SCHEDULES, (0, 3, 1, 0)])
@pytest.mark.parametrize("more", [{}, {"ahead": True}, {"reference": 64}, {"dropped": "keys"}])
def test_macs_of_many_lengths_are_their_sum(schedule, more):
    config = tiny.make("llama", "base").config
    counted = Counter({3: 2, 17: 1, 40: 5, 300: 1, 511: 3})
    variant = Variant(schedule=schedule, tau=2, scorer_macs=(31, 7), **more)
    for alpha in (1.0, 0.97, 0.8, 0.5, 1e-4):
        expected = sum(times * ablation.macs(config, n, alpha, variant) for n, times in counted.items())
        assert ablation.total_macs(config, counted, alpha, variant) == expected


@pytest.mark.parametrize("schedule", [*SCHEDULES, (0, 3, 1, 0)])
@pytest.mark.parametrize("n", [3, 40, 511])
def test_schedules_end_alike_and_never_grow(schedule, n):
    for alpha in (1.0, 0.93, 0.4):
        found = counts(n, alpha, 4, Variant(schedule=schedule))
        assert found == sorted(found, reverse=True) and found[-1] >= min(n, 5)
        if schedule not in ("deep", "zipf"):  # the same compute instead
            assert abs(found[-1] - max(alpha**4 * n, min(n, 5))) <= 4  # rounding, once a layer
    assert counts(n, 0.9, 4, Variant()) == kept_counts(n, 0.9, 4)


@pytest.mark.parametrize("schedule", PACKAGED)
def test_macs_are_the_packages(schedule):
    config, variant = tiny.CONFIGS["llama"](), Variant(schedule=schedule)
    for alpha in (1.0, 0.9, 0.3):
        assert ablation.macs(config, 200, alpha, variant) == package_macs(config, 200, alpha, schedule=schedule)
    alpha = ablation.alpha_for(config, [200, 100], 3.0, variant)
    assert 3.0 <= mac_reduction(config, [200, 100], alpha, schedule=schedule) < 3.05
    assert abs(zsaa.alpha_for(config, [200, 100], 3.0, schedule=schedule) - alpha) < 2e-4  # the bench's is to 1e-4


def test_bad_schedules_of_the_bench():
    config = tiny.CONFIGS["llama"]()
    with pytest.raises(ValueError, match="cannot reach"):
        ablation.alpha_for(config, [200], 3.0, Variant(dropped="keys", schedule=(0, 0, 0, 1)))
    with pytest.raises(ValueError, match="4 weights"):
        counts(9, 0.5, 4, Variant(schedule=(1, 2)))


def slow(model, ids, alpha, variant):
    """One sample, row by row, with merged and kept-as-keys tokens in plain lists; scored by recency."""
    attention_of = [layer.self_attn for layer in model.layers]
    groups = attention_of[0].num_key_value_groups
    rows = [(p, model.embed_tokens.weight[t], 1.0) for p, t in enumerate(ids.tolist())]  # position, state, stands for
    bank = []
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn

        def heads(projection, position, state, rotated, layer=layer, attention=attention):
            x = projection(layer.input_layernorm(state)).view(-1, attention.head_dim)
            if not rotated:
                return x
            cos, sin = model.rotary_emb(state[None, None], torch.tensor([[position]]))
            half = x.shape[-1] // 2
            turned = torch.cat((-x[:, half:], x[:, :half]), -1)
            return x * cos[0] + turned * sin[0]

        keys = [
            (p, heads(attention.k_proj, p, s, True), heads(attention.v_proj, p, s, False), w) for p, s, w in rows + bank
        ]
        outputs = []
        for position, state, _ in rows:
            q = heads(attention.q_proj, position, state, True)
            seen = [key for key in keys if key[0] <= position]
            out = []
            for head in range(len(q)):
                logits = torch.stack(
                    [q[head] @ k[head // groups] * attention.scaling + math.log(w) for _, k, _, w in seen]
                )
                out.append(sum(p * v[head // groups] for p, (_, _, v, _) in zip(logits.softmax(0), seen)))
            outputs.append(torch.cat(out))
        keep = counts(len(ids), alpha, len(model.layers), variant)[number]
        if keep < len(rows):
            merged, group = [], []
            for index, (row, out) in enumerate(zip(rows, outputs)):
                group.append((row, out))
                if index in chosen(rows, keep, variant):
                    members = group if variant.dropped == "merged" else group[-1:]
                    if variant.dropped == "noted":  # the notes of `Hashed`: what the dropped rows' attention read
                        said = sum((out for _, out in group[:-1]), torch.zeros_like(group[-1][1]))
                        (position, state, w), out = group[-1]
                        state = state + said[: len(state)] / max(1, len(group) - 1) ** 0.5
                        members = [((position, state, w), out)]
                    if variant.dropped == "keys":
                        bank += [member for member, _ in group[:-1]]
                    whole = sum(w for (_, _, w), _ in members)
                    state = sum(w * s for (_, s, w), _ in members) / whole
                    merged.append(((row[0], state, whole), sum(w * o for (_, _, w), o in members) / whole))
                    group = []
            rows, outputs = [row for row, _ in merged], [out for _, out in merged]
        after = []
        for (position, state, w), out in zip(rows, outputs):
            state = state + attention.o_proj(out)
            after.append((position, state + layer.mlp(layer.post_attention_layernorm(state)), w))
        rows = after
    return [p for p, _, _ in rows], model.norm(torch.stack([s for _, s, _ in rows]))


def chosen(rows, keep, variant):
    """Evenly spread by a fixed hash, and the last row: an order that the test can follow without the scores."""
    order = sorted(range(len(rows) - 1), key=lambda i: -((rows[i][0] * 7919) % 101))
    return {len(rows) - 1, *order[: keep - 1]}


class Hashed(torch.nn.Module):
    """The same order as `chosen`, as a scorer; it needs the positions, which the hidden states do not tell."""

    def __init__(self, positions):
        super().__init__()
        self.positions = positions

    def forward(self, layer, hidden, output, tokens, real):
        self.notes, self.size = {layer: output * real[..., None]}, hidden.shape[-1]
        return ((self.positions[layer] * 7919) % 101).double()

    def read(self, layer, kept, wanted):
        return between(self.notes[layer], kept)[..., : self.size]


@pytest.mark.parametrize("dropped", ["gone", "merged", "keys", "noted"])
def test_what_becomes_of_dropped_tokens(dropped):
    model = tiny.make("llama", "base")
    ids, _, _ = tiny.tokens([19])
    variant = Variant(dropped=dropped)
    with torch.no_grad():
        kept, expected = slow(model, ids[0], 0.7, variant)
        positions, plan = [torch.arange(19)[None]], counts(19, 0.7, 4, variant)
        for keep in plan:  # what enters each layer, by the same rule
            rows = [(p, None, None) for p in positions[-1][0].tolist()]
            positions.append(positions[-1][:, sorted(chosen(rows, keep, variant))])
        hidden, trail = forward(model, ids, [19], 0.7, variant, scorer=Hashed(positions))
    assert trail[-1][0].tolist() == kept
    torch.testing.assert_close(hidden[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "score, dropped",
    [*((s, "gone") for s in SCORES), *(("value_mean", d) for d in ablation.DROPPED), ("last_8", "keys")],
)
def test_a_sample_does_not_depend_on_its_batch_and_gradients_flow(score, dropped):
    model = tiny.make("llama", "base")
    ids, _, _ = tiny.tokens(LENGTHS)
    variant = Variant(score, sinks=1, recent=0.3, dropped=dropped)
    if dropped == "noted":
        notes = Evidence(model.config, range(4), 2, noted=True, deciding=False)
        for head in notes.heads.values():
            torch.nn.init.normal_(head["read"].weight)

    def forward(*given):
        return ablation.forward(*given, **({"scorer": notes} if dropped == "noted" else {}))

    hidden, trail = forward(model, ids, LENGTHS, 0.6, variant)
    for sample, n in enumerate(LENGTHS):
        alone, own = forward(model, ids[sample : sample + 1, :n], [n], 0.6, variant)
        assert [x[0].tolist() for x in own] == [x[sample][x[sample] >= 0].tolist() for x in trail]
        close = 1e-4 if dropped == "noted" else 1e-9  # notes are float32
        torch.testing.assert_close(hidden[sample, : alone.shape[1]], alone[0], rtol=close, atol=close)
        assert own[-1][0, 0] == 0 and own[-1][0, -1] == n - 1  # the sink, and the last token
    hidden[0, 0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_scores_of_all_voters_are_the_soft_scores_columns():
    model = tiny.make("llama", "base", attn_implementation="eager")
    ids, _, _ = tiny.tokens([12])
    seen = {}
    original = dict(SCORES)
    try:
        for name in ("column_sum", "last_query", "last_8"):
            SCORES[name] = lambda view, name=name: seen.setdefault((name, view.layer), original[name](view))
            forward(model, ids, [12], 0.9, Variant(name))
    finally:
        SCORES.update(original)
    p = model(ids, output_attentions=True).attentions[0][0].sum(0)  # over heads: [queries, keys]
    for name, rows in (("column_sum", slice(None)), ("last_query", slice(-1, None)), ("last_8", slice(-8, None))):
        torch.testing.assert_close(seen[name, 0][0].double(), p[rows].sum(0), rtol=1e-5, atol=1e-5)


def test_windows_and_caps_are_refused():
    with pytest.raises(ValueError, match="no ablation for gemma2"):
        forward(tiny.make("gemma2", "base"), torch.ones(1, 4, dtype=torch.long), [4], 0.5, Variant())


# ------------------------------------------------------------------------------------------------ training


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


def test_a_bag_of_words_can_score():
    texts, labels = marked(384, 8, 0)
    training = Training("log", probe="words", epochs=0.2, batch_size=16, learning_rate=1e-3)
    probe, _ = train(classifier(), texts, labels, Variant(schedule="once", tau=2), training, progress=False)
    best = probe.salience.topk(2).indices
    assert set(best.tolist()) == {7, 8}
    assert probe(0, None, None, torch.tensor([[7, 50]])).argmax() == 0


@pytest.mark.parametrize(
    "row",
    [
        "salience-spared",
        "both-front",
        "lora-plus",
        "lora-wide",
        "lora-crops-deep",
        "wide-phrases",
        "phrases-zipf",
        "votes-geometric",
    ],
)
def test_gradients_teach_every_kind_of_head(row, tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    before, after = [], []

    def learn(net, *given):
        probe, log = train(net, *given)
        heads = probe.by_gradient.heads
        after.append(heads[str(3)][-1])
        return probe, log

    monkeypatch.setattr(run, "train", learn)
    for epochs in ("0.3", "2"):
        command = ["--model", str(tmp_path / "model"), "--rows", row, "--task", "depth", "--epochs", epochs]
        command += ["--targets", "1", "2", "--output-dir", str(tmp_path / epochs), "--save", str(tmp_path / "saved")]
        assert run.main(command) == 0
    before, after = ([p.detach().clone() for p in head.parameters()] for head in after)
    assert all((a != b).any() for a, b in zip(before, after))
    assert len(list((tmp_path / "saved" / row).glob("*e.safetensors"))) == 1
    if row.startswith("lora"):
        given = [*command[:-3], str(tmp_path / "read"), "--saved", str(tmp_path / "saved" / row)]
        assert run.main(given) == 0
        read, trained = (
            json.loads((tmp_path / folder / "depth" / f"{row}-epochs2.json").read_text()) for folder in ("read", "2")
        )
        assert [r["right"] for r in read["rows"]] == [r["right"] for r in trained["rows"]]
        assert read["log"]["steps"] == 0 < trained["log"]["steps"]


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


@pytest.mark.parametrize("schedule", ["once", "twice"])
def test_evidence_finds_the_telling_tokens(schedule):
    """Learned on the way, from the labels alone; counted in the MACs."""
    texts, labels = marked(384, 8, 0)
    model, variant = classifier(), Variant(schedule=schedule, tau=2, scorer_macs=(100, 100))
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
    plain = Variant(schedule=schedule, tau=2)
    layers = model.config.num_hidden_layers
    extra = ablation.macs(model.config, 20, 0.8, variant) - ablation.macs(model.config, 20, 0.8, plain)
    entering = [20, *counts(20, 0.8, layers, plain)]
    assert extra == sum(100 * n for n, after in pairwise(entering) if after < n)
    rows = curve(model, texts[:40], labels[:40], variant, training, probe, [1, 2])
    assert [row["control"] for row in rows] == ["scorer", "alpha", "alpha"] and log["steps"] == 96


@pytest.mark.parametrize("row", ["votes-once", "votes-told"])
def test_phrases_vote_where_no_token_tells_by_itself(row):
    """The same two tokens in every text; their order decides. What was seen of them can be told to the kept rows."""
    generator = torch.Generator().manual_seed(3)
    texts, labels = torch.randint(10, 97, (400, 12), generator=generator), torch.arange(400) % 2
    at = torch.randint(0, 11, (400,), generator=generator)
    texts[torch.arange(400), at], texts[torch.arange(400), at + 1] = 7 + labels, 8 - labels
    texts, labels = texts.tolist(), labels.tolist()
    fields = load_config()["rows"][row]
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
    if row == "votes-told":
        assert all((matrix.weight != 0).any() for matrix in probe.heads["0"]["read"])


def test_what_is_known_ahead_asks_no_queries():
    config, n, alpha = tiny.CONFIGS["llama"](), 50, 0.8
    plain, ahead = Variant(), Variant(ahead=True)
    q_dim = config.num_attention_heads * config.head_dim
    entering = [n, *counts(n, alpha, config.num_hidden_layers, plain)]
    saved = sum((a - b) * (q_dim * config.hidden_size + 2 * a * q_dim) for a, b in pairwise(entering))
    assert ablation.macs(config, n, alpha, plain) - ablation.macs(config, n, alpha, ahead) == saved > 0
    assert ablation.macs(config, n, 1.0, plain) == ablation.macs(config, n, 1.0, ahead)
    with pytest.raises(ValueError, match="looks at a layer's attention"):
        make("evidence", config, ahead, 2)
    assert counts(100, 0.5, 4, Variant(schedule="zipf")) == [50, 33, 25, 20]
    halves = counts(100, 0.5, 4, Variant(schedule="zipf:0.5"))
    assert halves[0] == 50 and halves[-1] > 20  # slower afterwards


def test_settings_that_cannot_be_are_refused():
    for wrong in ({"sampling": "x"}, {"probe": "gradient"}, {"distill": 0.5}, {"epochs": None}, {"side": "middle"}):
        with pytest.raises(ValueError, match="must be|must be given|need"):
            Training(**wrong)


# ------------------------------------------------------------------------------------- continuation, depth, rows


def test_continuations_at_alpha_1_are_the_stock_models():
    model = tiny.make("llama")
    ids, _, _ = tiny.tokens([40, 40, 40])
    rows = continuation.curve(model, ids, 8, {"paper": Variant(), "keys": Variant(dropped="keys")}, [1, 2])
    logits = model(ids).logits[:, -9:-1].detach()
    nll = -logits.log_softmax(-1).gather(2, ids[:, -8:, None]).squeeze(-1)
    for row in rows[:3]:  # stock, and at 1x whatever the variant
        assert row["agreement"] == 100 and row["nll"] == pytest.approx(nll.mean(1).tolist(), abs=1e-5)
    two = {row["variant"]: row for row in rows if row["target"] == 2}
    assert set(two) == {"truncation", "paper", "keys"}
    with zsaa.at(zsaa.enable(model), two["paper"]["alpha"]), torch.no_grad():
        prompt = model(ids[:, :32], use_cache=True)
        follows = model(ids[:, 32:], past_key_values=prompt.past_key_values).logits[:, :-1]
    logits = torch.cat((prompt.logits[:, -1:], follows), 1)
    nll = -logits.log_softmax(-1).gather(2, ids[:, 32:, None]).squeeze(-1)
    assert two["paper"]["nll"] == pytest.approx(nll.mean(1).tolist(), abs=1e-5)


def test_the_verdict_stands_anywhere_among_balanced_fillers():
    texts, labels = [f"sentence {i}" for i in range(60)], [i % 2 for i in range(60)]
    made, answers, places = depth.passages(texts, labels, 9, seed=3)
    assert answers == labels and made == depth.passages(texts, labels, 9, seed=3)[0]
    assert set(places) == set(range(9))
    for passage, own, place in zip(made, texts, places):
        lines = passage.split("\n")
        assert lines[place] == depth.MARK + own and len(lines) == 9 and passage.count(own + "\n") <= 1
        fillers = [labels[texts.index(line)] for i, line in enumerate(lines) if i != place]
        assert sum(fillers) == 4
    with pytest.raises(ValueError, match="odd"):
        depth.passages(texts, labels, 8, seed=0)


def test_every_row_of_the_configuration_can_be_run_and_says_why():
    config = load_config()
    assert all(row["about"] and row["group"] in config["groups"] for row in config["rows"].values())
    assert not any(row["about"].startswith(("the same", "and ")) for row in config["rows"].values()), (
        "each stands alone"
    )
    for fields in config["continuation"]["variants"].values():
        Variant(**fields)


def two_reviews():
    """40 short texts to train on and 20 to be tested on, in the tiny tokenizer's words."""
    sides = [
        Dataset.from_dict({"text": [f"w{i % 90} w{i % 7}" for i in range(n)], "label": [i % 2 for i in range(n)]})
        for n in (40, 20)
    ]
    return SimpleNamespace(train=sides[0], test=sides[1], source="made up")


def test_a_row_from_the_command_line_is_run_once(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    command = ["--model", str(tmp_path / "model"), "--rows", "probe-once", "--task", "depth", "--epochs", "0.5",
               "--targets", "1", "2", "--output-dir", str(tmp_path / "out")]  # fmt: skip
    assert run.main(command) == 0
    (path,) = (tmp_path / "out").rglob("*.json")
    assert path.relative_to(tmp_path / "out").as_posix() == "depth/probe-once-epochs0.5.json"
    result = json.loads(path.read_text())
    assert result["provenance"]["seed"] == 0 and result["rows"][0]["n"] == 20
    before = path.stat().st_ino  # a new file would be another one
    assert run.main(command) == 0 and path.stat().st_ino == before
    assert run.main([*command, "--seeds", "1"]) == 0 and len(list((tmp_path / "out").rglob("*.json"))) == 2


def test_a_saved_row_is_judged_under_the_schedule_that_it_learned(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "model", "llama")
    config = load_config()
    config["rows"]["learned"]["training"] |= {"lora": 4}  # --saved reads adapters
    monkeypatch.setattr(run, "load_config", lambda: config)
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    learned = [0.5, 1.5, 0.75, 1.25]

    def learn(*given):
        probe, log = train(*given)
        return probe, {**log, "schedule": learned}

    monkeypatch.setattr(run, "train", learn)
    command = ["--task", "depth", "--model", str(base), "--rows", "learned", "--epochs", "0.5", "--targets", "2"]
    folder = tmp_path / "rows" / "learned"
    assert run.main([*command, "--output-dir", str(tmp_path / "trained"), "--save", str(folder.parent)]) == 0
    assert run.main([*command, "--output-dir", str(tmp_path / "read"), "--saved", str(folder)]) == 0
    found, before = (json.loads(next((tmp_path / n).rglob("*.json")).read_text()) for n in ("read", "trained"))
    assert found["variant"] == before["variant"] and found["variant"]["schedule"] == learned
    assert found["log"]["schedule"] == learned
    assert [r["alpha"] for r in found["rows"]] == [r["alpha"] for r in before["rows"]]
    file = folder / run.SCHEDULE_FILE
    again = [*command, "--output-dir", str(tmp_path / "again"), "--saved", str(folder)]
    file.write_text(json.dumps({"schedule": learned[:3]}))
    with pytest.raises(ValueError, match="has 3 weights, and the model has 4 layers"):
        run.main(again)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no schedule.json.*Train and --save it anew"):
        run.main(again)


def test_a_ladder_is_called_by_one_name(tmp_path, monkeypatch):
    """The package and the bench ask the same function."""
    (tmp_path / "zsaa.json").write_text(json.dumps({"alpha_range": None, "score": "salience", "schedule": "rising"}))
    monkeypatch.setattr(ship, "load_task", lambda *args, **kwargs: None)
    monkeypatch.setattr(ship, "task_record", lambda data: {})
    monkeypatch.setattr(ship, "model_record", lambda name: {})
    assert ship.method_of is finetune.method_of
    for sampling, name in (("ladder", "zsaa+"), ("alpha", "alpha-sampled"), ("log", "log")):
        training = asdict(Training(sampling=sampling))
        result = {"training": training, "variant": {"tau": 2}, "row": "r", "task": {"name": "t"}, "rows": []}
        result |= {"model": {"name": "m"}, "log": {"steps": 1, "seconds": 1}, "provenance": {"eval_samples": 1}}
        assert ship.curve_of(result, tmp_path, 9)["recipe"]["method"] == name
    recipe = finetune.Recipe(sampling="ladder")
    assert finetune.describe(recipe, tiny.make("llama"))["method"] == "zsaa+"


@pytest.mark.parametrize("row", ["lora-crops", "wide", "paper"])
def test_a_saved_row_is_shipped_with_the_dial_on(row, tmp_path, monkeypatch):
    """What the package then says is what the bench says, to the float16 that both were saved in."""
    base = save_tiny(tmp_path / "model", "llama")
    monkeypatch.setattr(run, "load_task", lambda *args, **kwargs: two_reviews())
    shared = ["--task", "depth", "--model", str(base)]
    command = ["--rows", row, "--epochs", "0.5", "--targets", "1", "--output-dir", str(tmp_path / "out")]
    kept = []

    def learn(net, *given):
        kept.extend((net, trained := train(net, *given)))
        return trained

    monkeypatch.setattr(run, "train", learn)
    assert run.main([*command, *shared, "--save", str(tmp_path / "rows")]) == 0
    folder = tmp_path / "rows" / row
    assert ship.main([str(folder), *shared]) == 0
    net, _ = finetune.load(folder, kind="sequence-classification", dtype=torch.float32)
    variant = Variant(**load_config()["rows"][row].get("variant", {}))
    dial = zsaa.dial.settings(net)
    assert dial["score"] == ("column_sum" if row == "paper" else "salience") and dial["schedule"] == variant.schedule
    assert 0 < dial["alpha_range"][0] < dial["alpha_range"][1] == 1
    ids, _, _ = tiny.tokens([150], vocab=90)
    bench, (probe, _) = kept
    alpha = 0.9
    with zsaa.at(net, alpha), torch.no_grad():
        found = net(ids).logits
        expected = logits_of(bench, ids, [150], alpha, variant, **({} if probe is None else {"scorer": probe}))[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    assert counts(150, alpha, 4, variant) == kept_counts(150, alpha, 4, variant.tau, variant.schedule)
    assert counts(150, alpha, 4, variant)[-1] < 150


def test_a_variant_that_the_package_lacks_is_not_shipped(tmp_path):
    spared, once = {"reference": 512}, {"schedule": "once", "reference": 512}
    with pytest.raises(ValueError, match="the package has no Variant.*, learned: its schedules"):
        ship.settings_of(tmp_path, Variant(), Training("ladder", distill=0.5, bends=True), [9])
    others = {"schedule": "once"}, {"schedule": "late"}, {"schedule": "rising:2"}, {"dropped": "merged"}, {"smooth": 3}
    for fields in (once, spared, *others):
        with pytest.raises(ValueError, match="the package has no Variant.*its schedules are geometric and rising"):
            ship.settings_of(tmp_path, Variant(**fields), Training(), [20])
    for probe in ("words", "evidence", "gradient"):
        with pytest.raises(ValueError, match=f"probe='{probe}'"):
            ship.settings_of(tmp_path, Variant(), Training(sampling="log", probe=probe), [20])
    with pytest.raises(ValueError, match="probe='wide', and salience.safetensors is not there"):
        ship.settings_of(tmp_path, Variant(), Training(sampling="ladder", probe="wide"), [20])


def test_what_drew_nothing_keeps_the_range_of_the_adapter_that_it_went_on_from(tmp_path):
    (tmp_path / "zsaa.json").write_text(json.dumps({"alpha_range": [0.5, 1.0]}))
    for start, known, schedule in ((str(tmp_path), [0.5, 1.0], "geometric"), ("", None, "rising")):
        training = Training(sampling="conventional", start=start)
        found = ship.settings_of(tmp_path, Variant(schedule=schedule), training, [20])
        rule = {"tau": 5, "score": "column_sum", "schedule": schedule}
        assert found == {"alpha": 1.0, **rule, "alpha_range": known}


# ------------------------------------------------------------------------------------------------ showing


def made_up(row, control, rights, about="made up"):
    n = len(rights[0])
    cells = [
        {"control": control, "target": target, "mac_reduction": float(target), "correct": sum(r), "n": n,
         "accuracy": 100 * sum(r) / n, "ci95": [0.0, 100.0], "right": to_bits(r)}
        for target, r in zip((1, 2), rights)
    ]  # fmt: skip
    log = {"epochs_of_compute": 1.0, "seconds": 60.0, "steps": 1}
    how = {"training": {"seed": 0, "epochs": 1, "learning_rate": 4e-5}, "variant": {"tau": 5}}
    return {"row": row, "about": about, "rows": cells, "log": log, **how}


def test_paired_tests_say_who_is_ahead(tmp_path):
    n = 400
    whole, half = [1] * n, [i % 2 for i in range(n)]
    results = {
        "paper": made_up("paper", "alpha", (whole, half)),
        "better": made_up("better", "alpha", (whole, [int(i % 4 > 0) for i in range(n)])),
        "truncated-last": made_up("truncated-last", "last", (whole, whole)),
    }
    table = show.paired_table(results, (1, 2, 3)).set_index("row")
    assert table.loc["better", "2x"].startswith("+25.0 [") and table.loc["better", "2x"].endswith("*")
    assert table.loc["paper", "2x"] == "+0.0 [+0.0, +0.0]" and set(table["3x"]) == {"-"}
    rival = show.paired_table(results, (1, 2), "truncation").set_index("row")
    assert rival.loc["better", "2x"].startswith("-25.0 [") and rival.loc["better", "1x"] == "-"
    assert show.paired_table({"better": results["better"]}, (1, 2)) is None
    rows = {**load_config()["rows"]}
    accuracy = show.accuracy_table(results, (1, 2), rows).set_index("row")
    assert accuracy.loc["truncated-last, last tokens", "2x"] == "100.0 [0.0, 100.0]"
    assert accuracy.loc["merged", "2x"] == "not run" and len(accuracy) == len(rows) + 1
    assert accuracy.loc["paper", "what it shows"] == rows["paper"]["about"], "the configuration's words, not the run's"
    order = [name.split(",")[0] for name in accuracy.index]
    assert order == [*rows, "better"] and accuracy.loc["better", "what it shows"] == "made up"
    figures.save_figure(show.accuracy_figure(results, "made up"), tmp_path / "accuracy")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


def test_continuations_are_shown_beside_truncation(tmp_path):
    rows = [
        {"variant": name, "target": target, "mac_reduction": float(target), "agreement": 50.0, "perplexity": ppl,
         "nll": [math.log(ppl)] * 2, "n": 2}
        for name, target, ppl in (("stock", 1, 10), ("truncation", 2, 11), ("good", 2, 10.5), ("bad", 2, 900))
    ]  # fmt: skip
    result = {"rows": rows, "model": {"name": "made up"}}
    table = show.continuation_table(result).set_index("variant")
    assert table.loc["good", "nats over truncation"] == "-0.047 ± 0.000"
    assert table.loc["good", "over stock"] == "1.050x"
    figure = show.continuation_figure(result)
    assert "bad (90.0x)" in figure.get_label()
    assert figure.axes[1].get_ylim()[1] < 3, "what blows up squashes nothing"
    figures.save_figure(figure, tmp_path / "continuation")
    depths = {"column_sum": [1.0, 0.2], "random": [0.5, 1.0]}
    figures.save_figure(show.survival_figure(depths, ["a", " b"], "made up"), tmp_path / "survival")


COMMITTED = RESULTS / "ablation"
TASKS = [
    path.name for path in sorted(COMMITTED.iterdir()) if path.is_dir() and show.own_row(show.load(COMMITTED, path.name))
]
TARGETS = (1, 2, 3, 5, 7, 9, 11)


def texts_of(figure) -> set[str]:
    return {text.get_text() for axis in figure.axes for text in axis.texts}


def heroes_of(results) -> dict[str, dict]:
    """Result by shown name of the protagonists that were run."""
    return {
        shown: result
        for (row, _), (shown, *_) in show.protagonists(results).items()
        for result in results.values()
        if result["row"] == row and show.is_main(result) and not show.seed_of(result)
    }


@pytest.mark.parametrize("task", TASKS)
def test_committed_rows_are_drawn_by_name(task, tmp_path):
    results = show.load(COMMITTED, task)
    heroes = heroes_of(results)
    assert "salience (zsaa+)" in heroes and "paper's recipe, dial" in heroes
    figure = show.accuracy_figure(results, task)
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == set(heroes), "grey lines have no names"
    votes = show.scorer_of(heroes["evidence, one drop"]) if "evidence, one drop" in heroes else None
    reach = figure.axes[0].get_xlim()[1]
    assert reach < 14, "no half axis for what is not drawn"
    caption = figure.get_label()
    assert f"salience (zsaa+) {heroes['salience (zsaa+)']['log']['epochs_of_compute']:.2g};" in caption
    assert ("a control" in caption) == bool(votes)
    if votes:
        assert f"have {votes['accuracy']:.1f} [" in caption and f"at {votes['mac_reduction']:.0f}x" in caption
    figures.save_figure(figure, tmp_path / "accuracy")


@pytest.mark.parametrize("task", TASKS)
def test_every_committed_row_has_its_panel_and_its_name(task, tmp_path):
    results, heroes = show.load(COMMITTED, task), show.protagonists(show.load(COMMITTED, task))
    drawn = show.rows_figures(results, task)
    axes = [axis for figure in drawn for axis in figure.axes]
    assert all(len(figure.axes) <= 3 for figure in drawn) and len(axes) > 3
    named = [t.get_text().split(" (")[0] for axis in axes for t in axis.texts]
    assert sorted(named) == sorted(
        name.removesuffix(" tokens")
        for name, result, control in show.curves(results)
        if not show.seed_of(result) and (not show.is_main(result) or (result["row"], control) not in heroes)
    )
    for axis in axes:
        low, high = axis.get_ylim()
        places = sorted(t.get_position()[1] for t in axis.texts)
        room = max(show.ROOM, len(axis.texts) + 0.2)
        assert all(after - before > 0.99 * (high - low) / room for before, after in pairwise(places))
        assert all(low < place < high for place in places), "no name outside its panel"
    titles = {axis.get_title(loc="left"): {t.get_text() for t in axis.texts} for axis in axes}
    assert set(titles) <= set(load_config()["groups"].values())
    if task == "imdb":
        assert "evidence-smooth-epochs3" in titles[load_config()["groups"]["budget"]]
        assert "lora-smooth-epochs3" in titles[load_config()["groups"]["lora"]]
    for number, figure in enumerate(drawn):
        figures.save_figure(figure, tmp_path / f"rows_{number}")
    assert show.rows_figures({"paper": results["paper"]}, task) == []
    captions = " ".join(figure.get_label() for figure in drawn)
    assert ("evidence-smooth-epochs3 (3 epochs)" in captions) == (task == "imdb") == ("counts MACs" in captions)


def test_committed_runs_of_other_budgets_are_told_apart_and_shown_last():
    results = show.load(COMMITTED, "imdb")
    budgets = {name: show.budget_of(result) for name, result in results.items()}
    assert (
        budgets["evidence-smooth-epochs3"] == "3 epochs" and budgets["truncated-ends-compute"] == "compute of 1 epoch"
    )
    assert budgets["lora-probe-continued-epochs0.35"] == "0.35 epochs more" and not budgets["probe-geometric-seed1"]
    for task in TASKS:
        for name, result in show.load(COMMITTED, task).items():
            budget = name.removeprefix(result["row"])  # a row may be called paper-compute
            assert show.is_main(result) == ("-epochs" not in budget and "-compute" not in budget)
    smooth = [name for name in results if name.startswith("evidence-smooth") and "-9" not in name]
    assert smooth == ["evidence-smooth", "evidence-smooth-seed1", "evidence-smooth-seed2",
                      *sorted(smooth[3:], key=lambda name: (show.seed_of(results[name]), name))]  # fmt: skip
    assert list(results).index("conventional") < list(results).index("paper") < list(results).index("probe-geometric")


def test_committed_truncation_is_beaten_within_its_budget():
    """A run of the task's epochs never faces truncation of other budgets, nor does one of equal compute."""
    results = show.load(COMMITTED, "imdb")
    table = show.paired_table(results, TARGETS, "truncation").set_index("row")

    def rows_at(target, keep):
        return [
            r
            for _, result, control in show.curves(results)
            if control != "alpha" and keep(show.budget_of(result))
            for r in result["rows"]
            if (r["control"], r["target"]) == (control, target)
        ]

    for name, keep in (
        ("probe-geometric", lambda budget: not budget),
        ("evidence-smooth-compute", lambda budget: budget == "compute of 1 epoch"),
        ("evidence-smooth-epochs3", lambda budget: True),
    ):
        for target in (2, 7, 11):
            ours = next(r for r in results[name]["rows"] if (r["control"], r["target"]) == ("alpha", target))
            best = max(r["accuracy"] for r in rows_at(target, keep))
            gain = float(table.loc[name, f"{target}x"].split()[0])
            assert gain == pytest.approx(ours["accuracy"] - best, abs=0.07)
    assert table.loc["evidence-smooth-epochs3", "budget"] == "3 epochs"


def test_committed_rows_are_tested_in_pairs(tmp_path):
    """What the figure says of IMDB follows from the bits of the files."""
    results = show.load(COMMITTED, "imdb")
    table = show.rivals(results)
    seeds = sorted(r["training"]["seed"] for r in results.values() if r["row"] == "wide-tau2")
    best = [f"best cut inputs{f' (seed {seed})' if seed else ''}" for seed in seeds]
    means = f"best way to cut, means of seeds (ours {len(seeds)})"
    assert len(seeds) > 1 and list(table)[: len(seeds) + 2] == [means, *best, "evidence, one drop"]
    gain, (low, high) = show.ahead(*table[means][11])
    ours, cut = [statistics.fmean(cell["accuracy"] for cell in cells) for cells in table[means][11]]
    assert gain == pytest.approx(ours - cut, abs=0.02) and low < gain < high and len(table[means][11][0]) == len(seeds)
    singles = [show.ahead(*table[name][11])[0] for name in best]
    assert statistics.fmean(singles) <= gain, "the best run is no worse than the best mean"
    assert {"tuned on both ends", "tuned on last tokens", "conventional, last tokens", "conventional, dial",
            "paper's recipe, dial"} <= set(table)  # fmt: skip
    assert not any("scorer" in name for name in table), "a score taught by gradients has no verdict"
    assert "own scorer alone, 116x" in show.rivals(results, "evidence-smooth")
    ours, ends, smooth = (
        next(r for r in results[name]["rows"] if (r["control"], r["target"]) == (control, 11))
        for name, control in (("wide-tau2", "alpha"), ("truncated-ends-faster", "ends"), ("evidence-smooth", "alpha"))
    )
    assert table["tuned on both ends"][11] == (ours, ends) and table["evidence, one drop"][11] == (ours, smooth)
    gain, (low, high) = show.ahead(ours, ends)
    assert gain == pytest.approx(ours["accuracy"] - ends["accuracy"], abs=0.02) and low < gain < high
    a, b = (sum(from_bits(r["right"], r["n"])) for r in (ours, ends))
    assert gain == pytest.approx(100 * (a - b) / ours["n"], abs=0.006)
    for name, row in table.items():  # the best is at least as good as each
        if name.startswith(("tuned", "conventional")) and not name.endswith("dial"):
            best = table["best cut inputs"]
            assert all(best[t][1]["accuracy"] >= rival["accuracy"] for t, (_, rival) in row.items())
    figure = show.paired_figure(results, "IMDB")
    assert f"{gain:+.1f}" in texts_of(figure) and f"{low:.1f}\n{high:.1f}" in texts_of(figure)
    assert "IMDB: points by which salience (row wide-tau2" in figure.get_label()
    figures.save_figure(figure, tmp_path / "paired")
    without = {name: r for name, r in results.items() if r["row"] in ("wide-tau2", "paper")}
    assert set(show.rivals(without)) == {"paper's recipe, dial"}, "missing rows are left out"
    assert show.paired_figure({"paper": results["paper"]}, "IMDB") is None
    main = {name: r for name, r in results.items() if show.is_main(r)}
    assert len(main) < len(results) and show.rivals(main) == table, "rows of another budget are no rivals"


@pytest.mark.parametrize("task", TASKS)
def test_committed_tables_know_seeds_scorers_and_rows_not_run(task):
    results, rows = show.load(COMMITTED, task), load_config()["rows"]
    table = show.accuracy_table(results, TARGETS, rows).set_index("row")
    assert table.index.is_unique and not any("scorer" in name for name in table.index)
    alone = show.scorer_of(results["evidence-distilled"])
    assert table.loc["evidence-distilled", "scorer alone"].endswith(f"at {alone['mac_reduction']:.0f}x")
    assert table.loc["paper", "scorer alone"] == "-" and (table["11x"] == show.NOT_RUN).sum() > 5
    assert table.loc["probe-geometric", "what it shows"] == rows["probe-geometric"]["about"]
    for against in ("paper", "truncation", "scorer"):
        paired = show.paired_table(results, TARGETS, against).set_index("row")
        assert set(paired.index) <= set(table.index)
    assert paired.loc["evidence-distilled", "1x"].endswith("*") and paired.loc["paper", "1x"] == "-"
    assert paired.loc["probe-geometric", "1x"] == "-"
    if task == "imdb":
        assert {"evidence-distilled-seed1", "probe-geometric-seed1"} <= set(table.index)
        assert table.loc["probe-geometric", "training MACs (epochs)"] == 1.73
        assert table.loc["evidence-smooth-compute", "budget"] == "compute of 1 epoch"


def test_committed_continuations_are_not_squashed(tmp_path):
    figure = show.continuation_figure(json.loads((COMMITTED / "continuation.json").read_text()))
    agreement, ratio = figure.axes
    assert ratio.get_ylim()[1] < 2.5 and set(show.CONTINUED) <= texts_of(figure)
    assert "hybrid, kept as keys (665 to 7,316x)" in figure.get_label()
    figures.save_figure(figure, tmp_path / "continuation")


def test_names_are_moved_apart_and_no_further():
    assert show.apart([1.0, 5.0, 9.0], 1, 0, 10) == [1.0, 5.0, 9.0]
    assert show.apart([5.0, 5.0], 2, 0, 10) == [4.0, 6.0]
    assert show.apart([0.0, 0.1, 0.2], 1, 0, 10) == pytest.approx([0, 1, 2])
    many = show.apart([3.0, 3.1, 9.9, 10.0, 3.05], 1, 0, 10)
    assert all(after - before > 0.999 for before, after in pairwise(sorted(many)))
    assert sorted(range(5), key=many.__getitem__) == [0, 4, 1, 2, 3]


def test_a_schedule_is_solved_from_what_drops_cost():
    config = tiny.make("llama", "base").config
    alpha, variant = sensitivity.only(2, 4, share=0.5)
    assert counts(40, alpha, 4, variant) == [40, 40, 20, 20]
    even = sensitivity.solve([1.0] * 4, config, 100, 3.0)
    assert sum(even) == pytest.approx(4, abs=0.01) and even == sorted(even, reverse=True), "early drops save most"
    dear = sensitivity.solve([5.0, 1.0, 1.0, 1.0], config, 100, 3.0)
    assert dear[0] < even[0] and dear[1] > even[1]
    for weights in (even, dear):
        solved = Variant(schedule=tuple(weights), tau=1)
        assert ablation.alpha_for(config, [100], 3.0, solved) < 1


def test_sensitivity_is_what_one_layer_alone_costs():
    model = tiny.make("llama", "sequence-classification")
    texts = [tiny.tokens([n], seed=n)[0][0].tolist() for n in (30, 20, 30)]
    found = sensitivity.sensitivity(model, None, texts, batch_size=2, progress=False)
    assert len(found) == 4 and min(found) >= 0 and max(found) > 0
    want = 0.0
    for text in texts:
        ids = torch.tensor([text])
        whole, pruned = (
            logits_of(model, ids, [len(text)], alpha, variant)[0].double().log_softmax(-1)
            for alpha, variant in ((1.0, Variant()), sensitivity.only(1, 4, 0.5))
        )
        want += (whole.exp() * (whole - pruned)).sum().item() / 3
    assert found[1] == pytest.approx(want, rel=1e-3, abs=1e-6)
