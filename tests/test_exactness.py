"""The promises of the method, on tiny random models of every family, against an independent masked reference."""

import copy

import pytest
import reference
import tiny
import torch

import zsaa
from zsaa import attention, layer

ALPHA, TAU = 0.7, 3
# transformers' RMSNorm and eager softmax round to float32 on the way, also in a float64 model; GPT-2 does not.
TOLERANCE = {family: dict(rtol=1e-5, atol=1e-5) for family in tiny.FAMILIES}
TOLERANCE["gpt2"] = dict(rtol=1e-11, atol=1e-11)
BATCHES = [
    pytest.param([23], "right", id="one"),
    pytest.param([23, 23], "right", id="equal"),
    pytest.param([23, 9, 30], "right", id="right-padded"),
    pytest.param([23, 9, 30], "left", id="left-padded"),
]


def identical(a, b):
    """Bit for bit; NaN equals NaN, as stock eager attention puts it into fully masked padding rows."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def real(x, mask, b):
    return x[b][mask[b] == 1]


@pytest.mark.parametrize("head", tiny.HEADS)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_alpha_one_is_the_stock_model_bit_for_bit(family, head, padding):
    ids, mask, positions = tiny.tokens([17, 11], padding=padding)
    stock = tiny.make(family, head)
    dialed = zsaa.enable(tiny.make(family, head), alpha=1.0)
    name = "last_hidden_state" if head == "base" else "logits"
    for kwargs in ({}, {"attention_mask": mask, "position_ids": positions}):
        want = getattr(stock(ids, **kwargs), name)
        identical(getattr(dialed(ids, **kwargs), name), want)
    zsaa.set_alpha(dialed, 0.5)
    dialed(ids, attention_mask=mask)
    zsaa.set_alpha(dialed, 1.0)
    identical(getattr(dialed(ids, **kwargs), name), want)


@pytest.mark.parametrize("score", ["column_sum", "column_mean"])
@pytest.mark.parametrize(("lengths", "padding"), BATCHES)
def test_pruned_equals_masked_reference(family, lengths, padding, score):
    ids, mask, positions = tiny.tokens(lengths, padding=padding)
    model = zsaa.enable(tiny.make(family, "base"), alpha=ALPHA, tau=TAU, score=score)
    eager = tiny.make(family, "base", attn_implementation="eager")
    with zsaa.trace(model) as t:
        out = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    dropped = 0
    for b, n in enumerate(lengths):
        want, kept = reference.run(eager, real(ids, mask, b), ALPHA, TAU, score)
        assert [layer[b].tolist() for layer in t.kept] == kept
        assert [counts[b] for counts in t.counts] == [len(layer) for layer in kept]
        torch.testing.assert_close(real(out, mask, b), want, **TOLERANCE[family])
        dropped += n - len(kept[-1])
    assert dropped > 0
    assert bool((out[mask == 0] == out[mask == 0][:1]).all()), "padding rows carry no information"


def test_padding_side_and_batch_mates_change_nothing(family):
    lengths = [23, 9, 30]
    model = zsaa.enable(tiny.make(family, "sequence-classification"), alpha=ALPHA, tau=TAU)
    right = tiny.tokens(lengths, padding="right")
    left = tiny.tokens(lengths, padding="left")
    rows = []
    for ids, mask, positions in (right, left):
        rows.append(model(ids, attention_mask=mask, position_ids=positions).logits)
    torch.testing.assert_close(rows[0], rows[1], **TOLERANCE[family])
    ids, mask, _ = right
    for b in range(len(lengths)):
        alone = model(real(ids, mask, b)[None]).logits[0]
        torch.testing.assert_close(alone, rows[0][b], **TOLERANCE[family])
    wide = torch.nn.functional.pad(ids, (0, 13)), torch.nn.functional.pad(mask, (0, 13))
    torch.testing.assert_close(model(wide[0], attention_mask=wide[1]).logits, rows[0], **TOLERANCE[family])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_reference(family, checkpointing):
    lengths = [23, 9]
    ids, mask, _ = tiny.tokens(lengths)
    model = zsaa.enable(tiny.make(family, "base"), alpha=ALPHA, tau=TAU)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # dropout is 0 in these configurations
    eager = tiny.make(family, "base", attn_implementation="eager")
    weight = torch.randn(30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    out = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    sum((real(out, mask, b) * weight[:n]).sum() for b, n in enumerate(lengths)).backward()
    for b, n in enumerate(lengths):
        (reference.run(eager, real(ids, mask, b), ALPHA, TAU)[0] * weight[:n]).sum().backward()
    for (name, got), want in zip(model.named_parameters(), eager.parameters()):
        assert want.grad.abs().max() > 0, name
        scale = want.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=1e-4, atol=2e-5, msg=name)


def test_gradient_checkpointing_replays_the_same_choice_with_dropout(family):
    """Dropout noise must not change what the replay keeps: with it, gradients equal those without checkpointing."""
    ids, mask, _ = tiny.tokens([23, 9])
    gradients = []
    for checkpointing in (False, True):
        model = zsaa.enable(tiny.make(family, "base", dropout=0.1), alpha=ALPHA, tau=TAU).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(3)
        model(ids, attention_mask=mask, use_cache=False).last_hidden_state.pow(2).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, replayed in zip(*gradients):
        torch.testing.assert_close(plain, replayed, rtol=1e-6, atol=1e-9 * float(plain.abs().max()) + 1e-12)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_decode_steps_equal_the_reference(family, padding):
    """Prefill, then 8 single tokens and a block of 4, through a cache whose layers hold different tokens."""
    lengths, new = [23, 9], 12
    ids, mask, positions = tiny.tokens(lengths, padding=padding)
    more = tiny.tokens([new, new], seed=5)[0]
    model = zsaa.enable(tiny.make(family, "base"), alpha=ALPHA, tau=TAU)
    eager = tiny.make(family, "base", attn_implementation="eager")
    step = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    cache, got = step.past_key_values, []
    for start, end in [*((i, i + 1) for i in range(8)), (8, 12)]:
        mask = torch.cat([mask, torch.ones(2, end - start, dtype=torch.long)], dim=1)
        where = torch.tensor(lengths)[:, None] + torch.arange(start, end)
        step = model(more[:, start:end], attention_mask=mask, position_ids=where, past_key_values=cache)
        assert step.past_key_values is cache
        got.append(step.last_hidden_state)
    got = torch.cat(got, dim=1)
    entered = [max(lengths), *(max(zsaa.kept_counts(n, ALPHA, 4, TAU)[i] for n in lengths) for i in range(3))]
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + new for n in entered]
    assert cache.get_seq_length() == max(lengths) + new
    ids, mask, _ = tiny.tokens(lengths, padding=padding)
    for b, n in enumerate(lengths):
        whole = torch.cat([real(ids, mask, b), more[b]])
        want, _ = reference.run(eager, whole, ALPHA, TAU, prompt=n)
        torch.testing.assert_close(got[b], want[n:], **TOLERANCE[family])


def test_two_calls_never_share_state(family):
    model = zsaa.enable(tiny.make(family, "base"), alpha=ALPHA, tau=TAU)
    ids, mask, _ = tiny.tokens([23, 9])
    other = tiny.tokens([14, 30, 5], seed=9)
    first = model(ids, attention_mask=mask)
    model(other[0], attention_mask=other[1])
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 10_000))
    second = model(ids, attention_mask=mask)
    assert torch.equal(first.last_hidden_state, second.last_hidden_state)
    assert first.past_key_values is not second.past_key_values


@pytest.mark.parametrize("head", tiny.HEADS)
def test_disable_gives_the_stock_model_back(family, head):
    ids, mask, _ = tiny.tokens([17, 11])
    model = tiny.make(family, head)
    types = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    config, want = model.config.to_dict(), model(ids, attention_mask=mask)[0]
    zsaa.enable(model, alpha=0.5)
    assert not torch.equal(model(ids, attention_mask=mask)[0], want)
    zsaa.disable(model)
    assert [type(m) for m in model.modules()] == types
    assert [set(m.__dict__) for m in model.modules()] == attributes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules() if type(m) in types[:2])
    assert model.config.to_dict() == config
    assert torch.equal(model(ids, attention_mask=mask)[0], want)
    zsaa.disable(model)


def test_deepcopy_has_a_dial_of_its_own(family):
    ids, mask, _ = tiny.tokens([17, 11])
    model = zsaa.enable(tiny.make(family, "base"), alpha=0.5)
    clone = copy.deepcopy(model)
    want = model(ids, attention_mask=mask).last_hidden_state
    zsaa.set_alpha(model, 1.0)
    assert torch.equal(clone(ids, attention_mask=mask).last_hidden_state, want)
    assert not torch.equal(model(ids, attention_mask=mask).last_hidden_state, want)
    zsaa.disable(clone)
    zsaa.set_alpha(model, 0.5)
    assert torch.equal(model(ids, attention_mask=mask).last_hidden_state, want)


def test_loss_of_every_position_is_defined_and_trains(family):
    """Language-model labels: a dropped token is scored on the state in which it left."""
    ids, mask, _ = tiny.tokens([23, 9])
    model = zsaa.enable(tiny.make(family, "causal-lm"), alpha=ALPHA, tau=TAU).train()
    out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_finite_and_close(family, dtype):
    ids, mask, _ = tiny.tokens([23, 9])
    exact = zsaa.enable(tiny.make(family, "sequence-classification"), alpha=ALPHA, tau=TAU)
    low = zsaa.enable(tiny.make(family, "sequence-classification").to(dtype), alpha=ALPHA, tau=TAU)
    assert torch.isfinite(low(ids, attention_mask=mask).logits).all()
    if dtype == torch.float32:
        a, b = exact(ids, attention_mask=mask).logits, low(ids, attention_mask=mask).logits
        torch.testing.assert_close(a, b.double(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_scores_are_computed_where_they_decide_something_and_nowhere_else(family, monkeypatch):
    """Once tau is reached no layer drops a token: nobody asks for its sums, and its output is the same without."""
    asked, real = [], layer.attend_and_score

    def watched(*args, score, **kwargs):
        output, sums = real(*args, score=score, **kwargs)
        assert (sums is not None) == score
        with_sums, _ = real(*args, score=True, **kwargs)
        assert torch.equal(output, with_sums)
        asked.append(score)
        return output, sums

    monkeypatch.setattr(layer, "attend_and_score", watched)
    model = zsaa.enable(tiny.make(family), alpha=0.3, tau=5)
    ids, mask, positions = tiny.tokens([30, 8], padding="left")
    model(ids, attention_mask=mask, position_ids=positions)
    assert zsaa.kept_counts(30, 0.3, 4, 5) == [9, 5, 5, 5]
    assert asked == [True, True, False, False]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_blocks_of_query_rows_decide_nothing(family, monkeypatch):
    ids, mask, _ = tiny.tokens([41, 23])
    results = []
    for rows in (1 << 40, 16):
        monkeypatch.setitem(attention.BLOCK_ROWS, "cpu", rows)
        model = zsaa.enable(tiny.make(family), alpha=0.9, tau=3)
        with torch.no_grad(), zsaa.trace(model) as t:
            model(ids, attention_mask=mask)
        loss = model(ids, attention_mask=mask).logits[mask == 1].square().mean()
        loss.backward()
        results.append((t.kept, loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, **TOLERANCE[family])
