"""The schedule "entry": all drops come before the first layer. Against the independent masked reference."""

import math

import pytest
import reference
import tiny
import torch
from tiny import NEW, QUIET, TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

import zsaa
from zsaa import attention
from zsaa.learned import salience
from zsaa.learned.salience import Salience
from zsaa.rule import Rule
from zsaa.score import FUNCTIONS

ALPHA, TAU = 0.4, 3
LENGTHS = [23, 9, 30]


def drawn(layer, hidden):
    """The control's scores of one text."""
    n = hidden.shape[1]
    return FUNCTIONS["random"](torch.zeros(1, n), torch.tensor([n]))


def learned(config):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Salience(config, range(4)).eval()


def model_of(family, head="causal-lm", score="random", alpha=ALPHA, **kwargs):
    """The model, and what scores the rows of one text for the reference."""
    model = tiny.make(family, head, **kwargs)
    if score == "salience":
        salience.attach(model, learned(model.config if head == "base" else model.base_model.config))
    zsaa.enable(model, alpha=alpha, tau=TAU, score=score, schedule="entry")
    return model, drawn if score == "random" else salience.scorer_of(model)


@pytest.mark.parametrize("score", ["random", "salience"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_pruned_equals_masked_reference(family, padding, score):
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    exempt = (mask.cumsum(1) % 5 == 2) & (mask == 1)
    model, judge = model_of(family, "base", score)
    eager = tiny.make(family, "base", attn_implementation="eager")
    with zsaa.trace(model) as t:
        out = model(
            ids, attention_mask=mask, position_ids=positions, exempt=exempt, output_hidden_states=True, use_cache=False
        )
    plain = model(ids, attention_mask=mask, position_ids=positions, exempt=exempt).last_hidden_state
    for b, n in enumerate(LENGTHS):
        row = ids[b][mask[b] == 1]
        stay = torch.where(exempt[b][mask[b] == 1])[0].tolist()
        want, kept = reference.run(eager, row, ALPHA, TAU, judge, exempt=stay, entry=True)
        assert [layer[b].tolist() for layer in t.kept] == kept and kept[0] == kept[-1]
        assert len(kept[0]) == max(math.floor(ALPHA * n), TAU, len({*stay, n - 1})) < n
        for found in (out.last_hidden_state, plain):
            torch.testing.assert_close(found[b][mask[b] == 1], want, **TOLERANCE)
        for state in out.hidden_states[:-1]:  # what leaves early leaves with its embedding
            gone = sorted(set(range(n)) - set(kept[0]))
            assert torch.equal(state[b][mask[b] == 1][gone], out.hidden_states[0][b][mask[b] == 1][gone])
        alone = model(row[None], exempt=exempt[b][mask[b] == 1][None]).last_hidden_state[0]
        torch.testing.assert_close(alone, want, **TOLERANCE)
    assert bool((plain[mask == 0] == 0).all())


def test_generate(family):
    """A left-padded batch of requests with an alpha each, with and without a cache, and beams."""
    ids, mask, _ = tiny.tokens(LENGTHS, padding="left")
    alphas = [0.6, 0.4, 1.0]
    model, _ = model_of(family)
    eager = tiny.make(family, attn_implementation="eager")
    options = dict(QUIET, output_logits=True, return_dict_in_generate=True)
    out = model.generate(ids, attention_mask=mask, alpha=alphas, **options)
    cap = getattr(eager.config, "final_logit_softcapping", None)
    for b, n in enumerate(LENGTHS):
        text = torch.cat([ids[b][mask[b] == 1], out.sequences[b, -NEW:]])
        with torch.no_grad():
            hidden, _ = reference.run(
                eager, text, alphas[b], TAU, lambda _, x, n=n: padded(drawn(0, x[:, :n]), x), n, entry=True
            )
            want = eager.get_output_embeddings()(hidden)[n - 1 : -1]
        want = want if cap is None else cap * torch.tanh(want / cap)
        torch.testing.assert_close(torch.stack([step[b] for step in out.logits]).double(), want, **TOLERANCE)
    rows = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert rows == [30 + NEW - 1] * 4, "every layer caches what entered the first"
    again = model.generate(ids, attention_mask=mask, alpha=alphas, use_cache=False, **QUIET)
    assert torch.equal(again, out.sequences)
    beams = dict(QUIET, num_beams=2, num_return_sequences=2)
    together = model.generate(ids, attention_mask=mask, **beams)[:, -NEW:].unflatten(0, (3, 2))
    for b in range(3):
        assert torch.equal(together[b], model.generate(ids[b][mask[b] == 1][None], **beams)[:, -NEW:])


def padded(scores, x):
    return torch.nn.functional.pad(scores, (0, x.shape[1] - scores.shape[1]))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_steps_with_the_prompts_mask(padding):
    """A dropped token's 1 in the mask is none that was padding before; a real change is still refused."""
    ids, mask, _ = tiny.tokens([23, 9], padding=padding)
    more = tiny.tokens([4, 4], seed=5)[0]
    model, _ = model_of("llama")
    whole = torch.cat([mask, torch.ones_like(more)], dim=1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    cache = model(ids, attention_mask=mask, position_ids=places[:, :23], use_cache=True).past_key_values
    given = dict(attention_mask=whole, position_ids=places[:, 23:])
    got = model(more, past_key_values=cache, **given).logits
    for b in range(2):
        one = model(ids[b][mask[b] == 1][None], use_cache=True).past_key_values
        torch.testing.assert_close(model(more[b : b + 1], past_key_values=one).logits[0], got[b], **TOLERANCE)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="attention_mask has a 1 where it had a 0"):
        model(more, attention_mask=torch.ones_like(whole), past_key_values=cache)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_reference(family, checkpointing):
    ids, weight = tiny.tokens([23])[0], torch.randn(23, 32, generator=torch.Generator().manual_seed(1)).double()
    model, _ = model_of(family, "base")
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    (model(ids, use_cache=False).last_hidden_state[0] * weight).sum().backward()
    eager = tiny.make(family, "base", attn_implementation="eager")
    reference.run(eager, ids[0], ALPHA, TAU, drawn, entry=True)[0].mul(weight).sum().backward()
    for (name, got), want in zip(model.named_parameters(), eager.parameters()):
        scale = want.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_classifiers_read_the_row_that_always_stays(family, padding):
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    model, _ = model_of(family, "sequence-classification")
    together = model(ids, attention_mask=mask, position_ids=positions).logits
    for b in range(3):
        torch.testing.assert_close(model(ids[b][mask[b] == 1][None]).logits[0], together[b], **TOLERANCE)


def test_alpha_one_is_the_stock_model_bit_for_bit():
    ids = tiny.tokens([23])[0]
    model, _ = model_of("llama")
    assert torch.equal(model(ids, alpha=1.0).logits, tiny.make("llama")(ids).logits)


def test_counts_and_costs(monkeypatch):
    config = tiny.CONFIGS["llama"]()
    assert zsaa.kept_counts(100, 0.3, 4, schedule="entry") == [30] * 4
    assert zsaa.kept_counts(7, 0.3, 2, schedule="entry") == [5, 5]
    rule = Rule(score="random", schedule="entry")
    assert rule.stages(100, 0.3, 2, exempt=40) == [40, 40, 40] and rule.stages(100, 1.0, 2) == [100] * 3
    assert zsaa.macs(config, 100, 0.3, score="random", schedule="entry") == zsaa.macs(config, 30)
    kv = zsaa.cost.kv_bytes(config, 100, 0.3, schedule="entry")
    assert kv == zsaa.cost.kv_bytes(config, 30) < zsaa.cost.kv_bytes(config, 100, 0.3)
    heads = zsaa.macs(config, 100, 0.3, score="salience", schedule="entry") - zsaa.macs(config, 30)
    assert heads == 100 * (32 * 64 + 64), "of all that might have entered, once"
    alpha = zsaa.alpha_for(config, 500, 3.0, score="random", schedule="entry")
    assert zsaa.mac_reduction(config, 500, alpha, score="random", schedule="entry") >= 3.0 > 2.9
    monkeypatch.setitem(attention.BLOCK_ELEMENTS, "cpu", 1 << 40)
    monkeypatch.delitem(attention.BLOCK_ROWS, "cpu")
    model, _ = model_of("gpt2", "base")
    with torch.no_grad(), zsaa.trace(model) as t, FlopCounterMode(display=False) as counter:
        model(tiny.tokens([40])[0], use_cache=False)
    assert counter.get_total_flops() == 2 * zsaa.macs(model.config, 40, ALPHA, TAU, "random", "entry")
    assert t.counts == [[16]] * 4 and t.lengths == [40]


@pytest.mark.parametrize("score", ["column_sum", "column_mean"])
def test_scores_of_attention_are_refused(score):
    says = f"drops tokens before the first layer, and score='{score}' is the attention .*random, salience"
    model = zsaa.enable(tiny.make("llama"))
    with pytest.raises(ValueError, match=says):
        zsaa.enable(model, score=score, schedule="entry")
    assert zsaa.settings(model)["schedule"] == "geometric", "and nothing is changed"
    with pytest.raises(ValueError, match=says):
        zsaa.macs(model.config, 9, 0.5, score=score, schedule="entry")


def test_settings_are_saved(tmp_path):
    import transformers

    model, _ = model_of("llama")
    model.save_pretrained(tmp_path)
    again = zsaa.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), alpha=ALPHA)
    assert zsaa.dial.rule(again) == {"tau": TAU, "score": "random", "schedule": "entry"}
    ids = tiny.tokens([23])[0]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
