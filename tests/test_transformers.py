"""The machinery of transformers and torch on a model with the dial on: generation at alpha = 1 is stock's bit for bit,
and below 1 nothing that leaves the weights alone changes a result. tools/transformers_suite.py runs the tests that
transformers publishes; those of generation are not among them, so their properties are tested here."""

import copy
import io
import pickle

import pytest
import tiny
import torch
import transformers

import zsaa
from zsaa.dial import settings

QUIET = dict(max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
WAYS = {
    "greedy": {"do_sample": False},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "attentions and hidden states": {"do_sample": False, "output_attentions": True, "output_hidden_states": True},
}
LOSSLESS = dict(rtol=1e-9, atol=1e-9)


def same(a, b):
    """Equal bit for bit, through tuples of tensors, caches and outputs."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, transformers.Cache):
        assert type(a) is type(b)
        for x, y in zip(a.layers, b.layers, strict=True):
            assert type(x) is type(y)
            same(x.keys, y.keys)
            same(x.values, y.values)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("way", WAYS)
def test_generate_at_alpha_one_is_stocks(family, way):
    """Tokens, logits, scores, caches, attentions and hidden states."""
    # float32: in float64, eager attention turns padding into NaN
    make = dict(dtype=torch.float32, attn_implementation="eager" if "output_attentions" in WAYS[way] else "sdpa")
    ids, mask, _ = tiny.tokens([13, 8], padding="left")
    options = dict(QUIET, **WAYS[way], output_logits=True, output_scores=True, return_dict_in_generate=True)
    found = []
    for model in (tiny.make(family, **make), zsaa.enable(tiny.make(family, **make), alpha=1.0)):
        transformers.set_seed(0)
        found.append(model.generate(ids, attention_mask=mask, **options))
    same(*found)


def test_assisted_generation_at_alpha_one_is_stocks(family):
    if family in tiny.MIXED_CACHES:
        pytest.importorskip("transformers", minversion="5.18", reason="older ones cannot crop a mixed stock cache")
    ids = tiny.tokens([11])[0].repeat(1, 2)
    models = tiny.make(family), zsaa.enable(tiny.make(family), alpha=1.0)
    drafts = tiny.make(family, seed=1), zsaa.enable(tiny.make(family, seed=1), alpha=1.0)
    options = dict(QUIET, do_sample=False)
    same(*(model.generate(ids, assistant_model=draft, **options) for model, draft in zip(models, drafts)))
    same(*(model.generate(ids, prompt_lookup_num_tokens=3, **options) for model in models))


def test_a_cache_continued_cropped_and_selected_at_alpha_one_is_stocks(family):
    ids = tiny.tokens([20, 20])[0]
    found = []
    for model in (tiny.make(family), zsaa.enable(tiny.make(family), alpha=1.0)):
        cache = transformers.DynamicCache()  # without a config: no layer slides, so all can be cropped
        model(ids[:, :8], past_key_values=cache)
        model(ids[:, 8:16], past_key_values=cache)
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 3]))
        found.append(model(ids[:, 16:], past_key_values=cache))
    same(*map(dict, found))


def test_inputs_embeds_and_input_ids_prune_alike(family):
    model = zsaa.enable(tiny.make(family), alpha=0.6, tau=3)
    ids, mask, _ = tiny.tokens([23, 9])
    embedded = model.get_input_embeddings()(ids)
    want, got = model(ids, attention_mask=mask), model(inputs_embeds=embedded, attention_mask=mask)
    same(got.logits, want.logits)
    options = dict(QUIET, do_sample=False)
    alone = model.generate(inputs_embeds=embedded[:1], **options)
    same(alone, model.generate(ids[:1], **options)[:, 23:])


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model):
    other = zsaa.enable(tiny.make(model.config.model_type, seed=1), **{k: settings(model)[k] for k in ("alpha", "tau")})
    other.load_state_dict(model.state_dict())
    return other


def with_more_tokens(model):
    model.resize_token_embeddings(103, mean_resizing=False)
    return model


HARMLESS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch_save,
    "state dict": through_state_dict,
    "more tokens": with_more_tokens,
    "train and eval": lambda model: model.train().eval(),
    "frozen": lambda model: model.requires_grad_(False),
    "tied again": lambda model: model.tie_weights() or model,
    "eager attention": lambda model: model.set_attn_implementation("eager") or model,
    "off and on": lambda model: zsaa.enable(zsaa.disable(model), alpha=0.6, tau=3),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_leaves_the_weights_alone_leaves_a_pruned_pass_alone(family, what):
    model = zsaa.enable(tiny.make(family), alpha=0.6, tau=3)
    ids, mask, _ = tiny.tokens([23, 9])
    with torch.no_grad(), zsaa.trace(model) as before:
        want = model(ids, attention_mask=mask).logits
    changed = HARMLESS[what](model)
    assert settings(changed) == settings(model)
    with torch.no_grad(), zsaa.trace(changed) as after:
        got = changed(ids, attention_mask=mask).logits
    assert all(torch.equal(p, q) for x, y in zip(before.kept, after.kept, strict=True) for p, q in zip(x, y))
    torch.testing.assert_close(got[..., :97], want, **LOSSLESS)
    if model.config.tie_word_embeddings:
        assert changed.get_output_embeddings().weight is changed.get_input_embeddings().weight


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_lives_on_its_own(family, copied):
    """Turning or disabling one does nothing to the other, and a disabled copy is the stock model, class by class."""
    model = zsaa.enable(tiny.make(family), alpha=0.6, tau=3)
    other = copied(model)
    ids = tiny.tokens([23])[0]
    want = model(ids).logits
    zsaa.set_alpha(other, 1.0)
    stock = tiny.make(family)
    same(other(ids).logits, stock(ids).logits)
    zsaa.disable(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
    assert not any(m._forward_pre_hooks for m in other.modules())
    same(model(ids).logits, want)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.full)])
def test_casting_before_or_after_enabling_is_the_same(family, dtype):
    ids = tiny.tokens([23])[0]
    before = zsaa.enable(tiny.make(family).to(dtype), alpha=0.6, tau=3)
    after = zsaa.enable(tiny.make(family), alpha=0.6, tau=3).to(dtype)
    same(after(ids).logits, before(ids).logits)


def test_a_model_on_the_meta_device_takes_the_dial_and_gets_its_weights_later(family):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny.CONFIGS[family](), dtype=torch.float64)
    model.set_attn_implementation(tiny.make(family).config._attn_implementation)
    zsaa.enable(model.eval(), alpha=0.6, tau=3)
    source = tiny.make(family)
    model.load_state_dict(source.state_dict(), assign=True)
    buffers = dict(source.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # not saved: rotary frequencies and embedding scales
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffers[name]
    model.tie_weights()
    ids = tiny.tokens([23])[0]
    same(model(ids).logits, zsaa.enable(source, alpha=0.6, tau=3)(ids).logits)
