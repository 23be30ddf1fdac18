"""Tokens that are never dropped: `exempt=` with the call, against the independent masked reference."""

import pytest
import reference
import tiny
import torch
import transformers
from tiny import NEW, QUIET, TOLERANCE

import zsaa
from zsaa.rule import Rule

ALPHA, TAU = 0.6, 3
LENGTHS = [23, 9, 30]


def marked(mask, share=0.3, seed=7):
    """Some of the real tokens, and of the padding."""
    return torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)) < share


def places(exempt, mask, b):
    return torch.where(exempt[b][mask[b] == 1])[0].tolist()


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("score", ["column_sum", "column_mean"])
def test_pruned_equals_masked_reference(family, padding, score):
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    exempt = marked(mask)
    model = zsaa.enable(tiny.make(family, "base"), alpha=ALPHA, tau=TAU, score=score)
    eager = tiny.make(family, "base", attn_implementation="eager")
    with zsaa.trace(model) as t:
        out = model(ids, attention_mask=mask, position_ids=positions, exempt=exempt).last_hidden_state
        changed = [[rows.tolist() for rows in layer] for layer in t.kept]
        model(ids, attention_mask=mask, position_ids=positions)
        assert changed != [[rows.tolist() for rows in layer] for layer in t.kept], "it matters"
        model(ids, attention_mask=mask, position_ids=positions, exempt=exempt)
    for b in range(len(LENGTHS)):
        row, stay = ids[b][mask[b] == 1], places(exempt, mask, b)
        want, kept = reference.run(eager, row, ALPHA, TAU, score, exempt=stay)
        assert [layer[b].tolist() for layer in t.kept] == kept and set(stay) <= set(kept[-1])
        torch.testing.assert_close(out[b][mask[b] == 1], want, **TOLERANCE)
        alone = model(row[None], exempt=exempt[b][mask[b] == 1][None]).last_hidden_state[0]
        torch.testing.assert_close(alone, want, **TOLERANCE)
    assert min(map(sum, zip(*t.counts))) < 4 * 9, "something is dropped all the same"


def test_generate_and_alphas_of_requests(family):
    """Each step's logits, beams too, are the reference's: the mask is the prompt's, and of each request."""
    ids, mask, _ = tiny.tokens(LENGTHS, padding="left")
    exempt, alphas = marked(mask), [0.6, 0.4, 0.8]
    model = zsaa.enable(tiny.make(family), tau=TAU)
    eager = tiny.make(family, attn_implementation="eager")
    options = dict(QUIET, output_logits=True, return_dict_in_generate=True)
    out = model.generate(ids, attention_mask=mask, alpha=alphas, exempt=exempt, **options)
    cap = getattr(eager.config, "final_logit_softcapping", None)
    for b, n in enumerate(LENGTHS):
        text = torch.cat([ids[b][mask[b] == 1], out.sequences[b, -NEW:]])
        with torch.no_grad():
            hidden, _ = reference.run(eager, text, alphas[b], TAU, prompt=n, exempt=places(exempt, mask, b))
            want = eager.get_output_embeddings()(hidden)[n - 1 : -1]
        want = want if cap is None else cap * torch.tanh(want / cap)
        torch.testing.assert_close(torch.stack([step[b] for step in out.logits]).double(), want, **TOLERANCE)
    beams = dict(QUIET, num_beams=2, num_return_sequences=2)
    together = model.generate(ids, attention_mask=mask, alpha=0.5, exempt=exempt, **beams)[:, -NEW:].unflatten(
        0, (3, 2)
    )
    for b in range(3):
        row, mine = ids[b][mask[b] == 1][None], exempt[b][mask[b] == 1][None]
        assert torch.equal(together[b], model.generate(row, alpha=0.5, exempt=mine, **beams)[:, -NEW:])


@pytest.mark.parametrize("how", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_the_mask_is_of_the_prompt_alone(how):
    ids = tiny.tokens([12])[0].repeat(1, 2)
    exempt = torch.arange(24)[None] % 3 == 0
    model = zsaa.enable(tiny.make("llama"), alpha=0.5, tau=TAU)
    want = model.generate(ids, exempt=exempt, **QUIET)
    assert torch.equal(model.generate(ids, exempt=exempt, **QUIET, **how), want)
    first = model.generate(ids[:, :16], exempt=exempt[:, :16], **{**QUIET, "max_new_tokens": 1, "min_new_tokens": 1})
    assert first.shape == (1, 17)


def test_a_prompt_in_pieces_takes_its_first_piece_s_part():
    ids = tiny.tokens([30])[0]
    exempt = torch.arange(30)[None] % 3 == 0
    model = zsaa.enable(tiny.make("llama"), alpha=0.5, tau=TAU)
    with zsaa.trace(model) as t:
        model.generate(ids, exempt=exempt, prefill_chunk_size=16, **QUIET)
    assert t.lengths == [16] and {0, 3, 6, 9, 12, 15} <= set(t.kept[-1][0].tolist())


def test_pipelines_hand_it_on():
    tokenizer = tiny.tokenizer()
    model = zsaa.enable(tiny.make("llama"), alpha=0.4, tau=TAU)
    run = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    exempt = torch.arange(27)[None] < 9
    with zsaa.trace(model) as t:
        run("w7 w8 w9 " * 9, exempt=exempt, max_new_tokens=2, do_sample=False)
    assert set(range(9)) <= set(t.kept[-1][0].tolist())


def test_where_all_are_exempt_nothing_is_dropped():
    ids, mask, _ = tiny.tokens([23, 9])
    model = zsaa.enable(tiny.make("llama"), alpha=0.3, tau=1)
    with zsaa.trace(model) as t:
        out = model(ids, attention_mask=mask, exempt=torch.ones_like(mask, dtype=torch.bool)).logits
    assert t.counts == [[23, 9]] * 4
    stock = tiny.make("llama")(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[mask == 1], stock[mask == 1], **TOLERANCE)
    assert torch.equal(model(ids, alpha=1.0, exempt=mask == 1).logits, tiny.make("llama")(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_the_reference(checkpointing):
    ids, exempt = tiny.tokens([23])[0], torch.arange(23)[None] % 4 == 1
    model = zsaa.enable(tiny.make("llama", "base"), alpha=ALPHA, tau=TAU)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    weight = torch.randn(23, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (model(ids, exempt=exempt, use_cache=False).last_hidden_state[0] * weight).sum().backward()
    eager = tiny.make("llama", "base", attn_implementation="eager")
    reference.run(eager, ids[0], ALPHA, TAU, exempt=range(1, 23, 4))[0].mul(weight).sum().backward()
    for (name, got), want in zip(model.named_parameters(), eager.parameters()):
        scale = want.grad.abs().max()
        torch.testing.assert_close(got.grad / scale, want.grad / scale, rtol=1e-4, atol=2e-5, msg=name)


def test_counts_never_fall_below_the_exempt():
    assert Rule().counts(100, 0.5, 4, exempt=30) == [50, 30, 30, 30]
    assert Rule().counts(20, 0.5, 2, exempt=20) == [20, 20]
    assert Rule(tau=8).counts(100, 0.2, 2, exempt=3) == [20, 8]


@pytest.mark.parametrize(
    ("exempt", "error", "says"),
    [
        ([[True] * 23], TypeError, "exempt must be a bool tensor .batch, tokens.*got a list"),
        (torch.ones(2, 23), TypeError, "exempt must be a bool tensor.*got a tensor of torch.float32"),
        (torch.ones(23, dtype=torch.bool), ValueError, r"exempt has shape \(23,\), and the input .*batch, tokens"),
        (torch.ones(2, 22, dtype=torch.bool), ValueError, r"exempt has shape \(2, 22\), and the input .*\(2, 23\)"),
        (torch.ones(3, 23, dtype=torch.bool), ValueError, r"exempt has shape \(3, 23\), and the input .*\(2, 23\)"),
        (torch.arange(23).expand(2, -1) > 15, ValueError, "exempt names padding only in sample 1"),
    ],
    ids=str,
)
def test_masks_that_do_not_fit_are_refused(exempt, error, says):
    ids, mask, _ = tiny.tokens([23, 9])
    model = zsaa.enable(tiny.make("llama"), alpha=0.5)
    with pytest.raises(error, match=says):
        model(ids, attention_mask=mask, exempt=exempt)


def test_a_plain_model_knows_no_such_argument():
    model = zsaa.disable(zsaa.enable(tiny.make("llama")))
    with pytest.raises(ValueError, match="exempt"):
        model.generate(tiny.tokens([9])[0], exempt=torch.ones(1, 9, dtype=torch.bool), **QUIET)


def test_a_negative_prompt_is_another_text():
    """Guidance asks the model about a text of its own, of which the mask says nothing."""
    ids, other = tiny.tokens([24])[0], tiny.tokens([11], seed=3)[0]
    exempt = torch.arange(24)[None] % 3 == 0
    model = zsaa.enable(tiny.make("llama"), alpha=0.5, tau=TAU)
    seen = []

    def of(step):
        return getattr(getattr(step, "given", None), "exempt", None)

    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(of(kwargs.get("zsaa"))), with_kwargs=True
    )
    model.generate(ids, exempt=exempt, guidance_scale=1.5, negative_prompt_ids=other, **QUIET)
    hook.remove()
    assert torch.equal(seen[0], exempt) and all(mask is None for mask in seen[1:])
