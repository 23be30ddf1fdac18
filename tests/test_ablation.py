"""The ablation's plain forward pass: equal to the package in the paper's settings, each variant to a slow reference."""

import math
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import sensitivity
from ablation import variants as ablation
from ablation.curves import logits_of
from ablation.forward import SCORES, between, forward
from ablation.scorers import Evidence
from ablation.variants import SCHEDULES, Variant
from zsaa.cost import mac_reduction
from zsaa.cost import macs as package_macs
from zsaa.rule import SPREAD as PACKAGED
from zsaa.rule import Rule, kept_counts

LENGTHS = [23, 40, 9]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("score", ["column_sum", "column_mean"])
@pytest.mark.parametrize("schedule", PACKAGED)
def test_the_package_s_settings_equal_the_package(family, score, schedule):
    model = zsaa.enable(tiny.make(family, "base"), score=score, schedule=schedule)
    ids, mask, _ = tiny.tokens(LENGTHS)
    with zsaa.at(model, 0.7), zsaa.trace(model) as t, torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, trail = forward(zsaa.disable(model), ids, LENGTHS, 0.7, Variant(score=score, schedule=schedule))
    for sample in range(len(LENGTHS)):
        kept = [layer[sample][layer[sample] >= 0].tolist() for layer in trail]
        assert kept == [layer[sample].tolist() for layer in t.kept]
        at_top = kept[-1]
        torch.testing.assert_close(hidden[sample, : len(at_top)], expected[sample, at_top], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma3_text", "mistral", "qwen2"])
def test_texts_within_the_window_equal_the_package(family):
    model, lengths = zsaa.enable(tiny.make(family, "base"), tau=2), [9, 8, 5]
    ids, mask, _ = tiny.tokens(lengths)
    with zsaa.at(model, 0.7), torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    hidden, trail = forward(zsaa.disable(model), ids, lengths, 0.7, Variant(tau=2))
    for sample, at_top in enumerate(trail[-1]):
        at_top = at_top[at_top >= 0]
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
    _, trail = forward(model, ids, [40], 0.8, Variant(score="recent", schedule="once"))
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
        found = Variant(schedule=schedule).counts(n, alpha, 4)
        assert found == sorted(found, reverse=True) and found[-1] >= min(n, 5)
        if schedule not in ("deep", "zipf"):  # the same compute instead
            assert abs(found[-1] - max(alpha**4 * n, min(n, 5))) <= 4  # rounding, once a layer
    assert Variant().counts(n, 0.9, 4) == kept_counts(n, 0.9, 4)


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
        Variant(schedule=(1, 2)).counts(9, 0.5, 4)


def test_a_variant_is_the_package_s_rule_with_checked_settings():
    assert isinstance(Variant(), Rule) and SCORES.keys() == {*ablation.SCORES}
    for field, value, says in (
        ("score", "colum_sum", "column_sum"), ("score", "salience", "Available"), ("schedule", "raising", "rising"),
        ("schedule", "once:often", "once:10"), ("schedule", "late:2", "late"), ("dropped", "lost", "merged"),
        ("sinks", -1, "sinks"), ("recent", 1.5, "recent"), ("smooth", 0, "smooth"), ("reference", 0, "reference"),
        ("tau", 0, "tau"), ("ahead", "no", "ahead"), ("scorer_macs", (1, -2), "scorer_macs"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            Variant(**{field: value})


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
        keep = variant.counts(len(ids), alpha, len(model.layers))[number]
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
        positions, plan = [torch.arange(19)[None]], variant.counts(19, 0.7, 4)
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
    variant = Variant(score=score, sinks=1, recent=0.3, dropped=dropped)
    if dropped == "noted":
        notes = Evidence(model.config, range(4), 2, noted=True, deciding=False)
        for head in notes.heads.values():
            torch.nn.init.normal_(head["read"].weight)

    def passed(*given):
        return forward(*given, **({"scorer": notes} if dropped == "noted" else {}))

    hidden, trail = passed(model, ids, LENGTHS, 0.6, variant)
    for sample, n in enumerate(LENGTHS):
        alone, own = passed(model, ids[sample : sample + 1, :n], [n], 0.6, variant)
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
            forward(model, ids, [12], 0.9, Variant(score=name))
    finally:
        SCORES.update(original)
    p = model(ids, output_attentions=True).attentions[0][0].sum(0)  # over heads: [queries, keys]
    for name, rows in (("column_sum", slice(None)), ("last_query", slice(-1, None)), ("last_8", slice(-8, None))):
        torch.testing.assert_close(seen[name, 0][0].double(), p[rows].sum(0), rtol=1e-5, atol=1e-5)


def test_windows_and_caps_are_refused():
    with pytest.raises(ValueError, match="no ablation for gemma2"):
        forward(tiny.make("gemma2", "base"), torch.ones(1, 4, dtype=torch.long), [4], 0.5, Variant())
    with pytest.raises(ValueError, match="texts of 10 tokens.*cut the texts to 9"):
        forward(tiny.make("gemma3_text", "base"), torch.ones(1, 10, dtype=torch.long), [10], 0.5, Variant())


@pytest.mark.full
def test_a_schedule_is_solved_from_what_drops_cost():
    config = tiny.make("llama", "base").config
    alpha, variant = sensitivity.only(2, 4, share=0.5)
    assert variant.counts(40, alpha, 4) == [40, 40, 20, 20]
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
