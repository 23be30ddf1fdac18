"""Prompts that come again: not a bit changes, whatever the batch; what differs in anything is read anew."""

import threading

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_asked import scorer_of

import zsaa
from zsaa.reuse import Prompts
from zsaa.reuse.store import Kept, Store

FULL = dict(return_dict_in_generate=True, output_logits=True, **tiny.QUIET)
ALPHAS = (1.0, 0.8, 0.3)


def model_of(family="llama", **options):
    return zsaa.enable(tiny.make(family, dtype=torch.float32), **options)


def batch(lengths=(20,), seed=0):
    ids, mask, _ = tiny.tokens(list(lengths), seed, padding="left")
    return {"input_ids": ids, "attention_mask": mask}


def placed(inputs):
    """With the positions that generate gives."""
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def same(one, other):
    """Bit for bit: tokens, and the logits of each."""
    equal = all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))
    return torch.equal(one.sequences, other.sequences) and equal


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prompt_that_comes_again_is_answered_bit_for_bit(family):
    model = model_of(family)
    for alpha in ALPHAS:
        plain = model.generate(**batch(), alpha=alpha, **FULL)
        with Prompts(model) as prompts:
            for hits in range(3):
                assert same(plain, model.generate(**batch(), alpha=alpha, **FULL))
                assert prompts.counts["hits"] == hits and prompts.counts["misses"] == 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_in_a_batch_a_prompt_has_the_bits_that_it_has_alone(family):
    """However it is padded, whichever prompts come with it, known or not."""
    model, inputs = model_of(family), batch((20, 13, 17))
    for alpha in (0.8, 1.0):
        with torch.no_grad(), Prompts(model) as prompts:
            cold = model.generate(**inputs, alpha=alpha, **FULL)
            assert same(cold, model.generate(**inputs, alpha=alpha, **FULL))
            assert prompts.counts["hits"] == 3
            prompts.clear()
            few = placed({name: x[1:, 3:] for name, x in inputs.items()})  # two of the three, padded less
            states = model.base_model(**few, alpha=alpha).last_hidden_state
            assert prompts.counts["misses"] == 5
            assert same(cold, model.generate(**inputs, alpha=alpha, **FULL)) and prompts.counts["hits"] == 5
            assert torch.equal(states, model.base_model(**placed(inputs), alpha=alpha).last_hidden_state[1:, 3:])
        plain = model.generate(**inputs, alpha=alpha, **FULL)
        for a, b in zip(plain.logits, cold.logits):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums over other shapes


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_beams_and_samples_are_read_once(family):
    model, inputs = model_of(family), batch((20, 13))
    options = dict(num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)
    for alpha in (1.0, 0.7, [0.7, 0.4]):
        plain = model.generate(**inputs, alpha=alpha, **{**tiny.QUIET, **options})
        with Prompts(model) as prompts:
            found = [model.generate(**inputs, alpha=alpha, **{**tiny.QUIET, **options}) for _ in range(2)]
            assert prompts.counts["misses"] == prompts.counts["hits"] == 2  # six rows, two prompts
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert torch.equal(found[0].sequences_scores, found[1].sequences_scores)
        torch.testing.assert_close(plain.sequences_scores, found[0].sequences_scores, rtol=1e-4, atol=1e-4)


def test_draws_are_not_kept_and_exempt_tokens_are_part_of_the_prompt():
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32), score="random", schedule="entry")
    with Prompts(model) as prompts:
        model.generate(**batch(), alpha=0.5, **FULL)
        assert prompts.counts == {"passed": 1}  # draws are no property of a prompt
    zsaa.enable(model, score="column_mean", schedule="rising")
    exempt = torch.zeros(2, 20, dtype=torch.bool)
    exempt[:, 10:12] = True
    inputs = batch((20, 13))
    with Prompts(model) as prompts:
        one = model.generate(**inputs, alpha=0.5, exempt=exempt, **FULL)
        assert same(one, model.generate(**inputs, alpha=0.5, exempt=exempt, **FULL))
        other = model.generate(**inputs, alpha=0.5, **FULL)
        assert prompts.counts["misses"] == 4 and prompts.counts["hits"] == 2 and not same(one, other)


def test_by_the_score_that_is_asked_the_question_is_part_of_the_prompt():
    model = tiny.make("llama", dtype=torch.float32)
    zsaa.salience.attach(model, scorer_of())
    zsaa.enable(model, tau=3, score="asked", schedule="entry")
    inputs, question = batch((40, 33)), torch.zeros(2, 40, dtype=torch.bool)
    question[:, 30:] = True
    with Prompts(model) as prompts:
        found = [model.generate(**inputs, alpha=0.4, question=question, **FULL) for _ in range(2)]
        assert same(*found) and prompts.counts["hits"] == prompts.counts["misses"] == 2
        question[:, 30:35] = False
        other = model.generate(**inputs, alpha=0.4, question=question, **FULL)
        assert prompts.counts["misses"] == 4 and not same(found[0], other)
    plain = model.generate(**inputs, alpha=0.4, question=question, **FULL)
    for a, b in zip(plain.logits, other.logits):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_whatever_decides_the_result_is_in_the_key():
    model, inputs = model_of(), batch()
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.eval()
    zsaa.enable(lora)

    def ask(**options):
        return lora.generate(**inputs, **{**FULL, **options})

    layer = next(m for m in lora.modules() if hasattr(m, "merged_adapters"))
    with Prompts(lora) as prompts:
        before = ask(alpha=0.6)
        assert same(before, ask(alpha=0.6)) and prompts.counts["hits"] == 1
        layer.scaling["default"] *= 2
        scaled = ask(alpha=0.6)
        layer.scaling["default"] /= 2
        with lora.disable_adapter():
            without = ask(alpha=0.6)
        zsaa.enable(lora, tau=9)
        other_rule = ask(alpha=0.6)
        zsaa.enable(lora, tau=5)
        other_alpha = ask(alpha=0.7)
        assert prompts.counts["misses"] == 5
        assert same(before, ask(alpha=0.6)) and prompts.counts["hits"] == 2
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        trained = ask(alpha=0.6)
        assert prompts.counts["misses"] == 6 and prompts.counts["cleared"] == 5
    for one in (scaled, without, other_rule, other_alpha, trained):
        assert not same(before, one)
    assert same(trained, ask(alpha=0.6))  # without the store


def test_the_store_forgets_the_least_recently_used_and_keeps_to_its_bytes():
    def kept(numbers):
        return Kept(torch.zeros(numbers), (), object)

    store = Store(100)
    for key in "abc":
        store.put(key, kept(8))  # 32 bytes each
    assert store.get("a") is not None and store.nbytes == 96
    store.put("d", kept(8))
    assert store.get("b") is None and all(store.get(key) for key in "acd")
    store.put("e", kept(30))
    assert len(store) == 3 and store.counts["too_large"] == 1 and store.nbytes <= 100
    store.put("f", kept(20))
    assert store.nbytes == 80 and len(store) == 1 and store.counts["evicted"] == 4
    with pytest.raises(ValueError, match="most_bytes must be"):
        Store(-1)


def test_a_bound_that_is_too_small_changes_no_answer():
    model, inputs = model_of(), batch((20, 13))
    plain = [model.generate(**batch(), alpha=0.7, **FULL) for _ in range(2)]
    with Prompts(model, most_bytes=0) as prompts:
        assert same(plain[0], model.generate(**batch(), alpha=0.7, **FULL))
        model.generate(**inputs, alpha=0.7, **FULL)
        assert len(prompts.store) == 0 and prompts.counts["too_large"] == 3
    with Prompts(model, most_bytes=30_000) as prompts:
        for seed in range(6):
            model.generate(**batch(seed=seed), alpha=0.7, **FULL)
            assert prompts.store.nbytes <= 30_000
        assert prompts.counts["evicted"] > 0


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_prefix_is_pruned_by_itself_and_read_once(family):
    """As one would by hand: prefill it, and let generate go on from its cache."""
    model, ids = model_of(family), batch((24,))["input_ids"]
    other = torch.cat([ids[:, :16], batch((8,), seed=5)["input_ids"]], dim=1)
    for alpha in (1.0, 0.6):
        prompts = Prompts(model)
        for number, prompt in enumerate((ids, other, ids)):
            with torch.no_grad():
                cache = model(ids[:, :16], use_cache=True, alpha=alpha).past_key_values
            expected = model.generate(prompt, past_key_values=cache, alpha=1.0, **FULL)
            assert same(expected, prompts.generate(prompt, prefix=16, alpha=alpha, **FULL))
            assert prompts.counts["misses"] == 1 and prompts.counts["hits"] == number
    whole = model.generate(ids, alpha=0.6, **FULL)
    assert not same(whole, expected)  # another result than to prune the whole


def test_one_prefix_may_have_rests_of_several_lengths_and_beams():
    model, ids = model_of(), batch((24,))["input_ids"]
    rows, mask = ids.repeat(2, 1), torch.ones(2, 24, dtype=torch.long)
    mask[1, 16:19] = 0  # a shorter rest, behind padding
    rows[1, 16:19] = 0
    prompts = Prompts(model)
    found = prompts.generate(rows, 16, 0.6, mask, **FULL)
    assert prompts.counts["misses"] == 1  # the rows share it
    alone = prompts.generate(torch.cat([ids[:, :16], ids[:, 19:]], dim=1), 16, 0.6, **FULL)
    assert torch.equal(found.sequences[1, 24:], alone.sequences[0, 21:])
    for a, b in zip(found.logits, alone.logits):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)
    beams = [prompts.generate(ids, 16, 0.6, **{**tiny.QUIET, "num_beams": 3}) for _ in range(2)]
    assert torch.equal(*beams)


def test_a_prefix_that_makes_no_sense_is_refused():
    model, ids = model_of(), batch((24,))["input_ids"]
    prompts = Prompts(model)
    for prefix in (0, 24, True, 2.0):
        with pytest.raises(ValueError, match=r"prefix must be a whole number of columns in \[1, 23\]"):
            prompts.generate(ids, prefix)
    exempt = torch.zeros(1, 24, dtype=torch.bool)
    exempt[0, 20] = True
    with pytest.raises(ValueError, match="exempt names tokens behind the prefix"):
        prompts.generate(ids, 16, 0.6, exempt=exempt)
    with pytest.raises(ValueError, match="the cache is the prefix's"):
        prompts.generate(ids, 16, past_key_values=object())
    with pytest.raises(RuntimeError, match="the dial is not enabled"):
        Prompts(tiny.make("llama"))


def test_calls_that_cannot_be_reused_are_made_as_without_it():
    model, inputs = model_of(), batch()
    with Prompts(model) as prompts:
        model(**inputs, alpha=0.7).logits.sum().backward()
        with torch.no_grad():
            with zsaa.trace(model) as trace:
                model(**inputs, alpha=0.7)
            assert len(trace.kept) == 4
            assert len(model(**inputs, alpha=0.7, output_hidden_states=True).hidden_states) == 5
            model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), alpha=0.7)
            for alpha in (1.0, 0.7):
                model(**inputs, alpha=alpha, depth=2)
            model(**batch((20, 13)), alpha=0.7)  # no positions given: those of the second count its padding
            model.generate(**batch((20, 13)), alpha=[1.0, 0.5], **FULL)
        assert prompts.counts == {"passed": 8}


def test_a_hook_of_one_s_own_is_heeded_and_nothing_of_it_is_kept():
    """Such as one that steers: what it does may change with every call."""
    model, inputs = model_of(), batch()
    stock = model.generate(**inputs, alpha=0.7, **FULL).logits[0]
    with Prompts(model) as prompts:
        model.generate(**inputs, alpha=0.7, **FULL)
        hook = model.model.layers[1].mlp.register_forward_hook(lambda mlp, given, out: 2 * out)
        steered = model.generate(**inputs, alpha=0.7, **FULL).logits[0]
        hook.remove()
        again = model.generate(**inputs, alpha=0.7, **FULL).logits[0]
        assert prompts.counts["passed"] == 1
    assert (steered - stock).abs().max() > 1e-2
    torch.testing.assert_close(again, stock, rtol=1e-4, atol=1e-4)


def test_only_calls_of_the_block_ask_the_store_and_the_class_comes_back():
    model, inputs = model_of(), batch()
    classes, counts = type(model.model), []
    with Prompts(model) as prompts:
        thread = threading.Thread(target=lambda: model.generate(**inputs, alpha=0.7, **FULL))
        thread.start()
        thread.join()
        counts.append(dict(prompts.counts))
        with prompts:
            model.generate(**inputs, alpha=0.7, **FULL)
        model.generate(**inputs, alpha=0.7, **FULL)
    assert counts == [{}] and prompts.counts["hits"] == 1
    assert type(model.model) is classes
    model.generate(**inputs, alpha=0.7, **FULL)
    assert prompts.counts["hits"] == 1
    with Prompts(model):
        zsaa.disable(model)
    assert type(model.model) is type(tiny.make("llama").model)
