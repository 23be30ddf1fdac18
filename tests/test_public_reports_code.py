"""Public reports, tried with the dial on: other people's code in the model, and the tools around it."""

import copy

import accelerate
import pytest
import tiny
import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from reported import (
    ALPHA,
    TAU,
    apart,  # noqa: F401 - the fixture `family` of every test here
    by_reference,
    close,
    dialed,
    few,
    layers,
    no_gradients,  # noqa: F401 - of every test here
    real,
    words,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import zsaa
from zsaa.evaluation import harness

# ------------------------------------------------------------------------------------- other people's code in the model


def attention(model, layer=1):
    layer = layers(model)[layer]
    return layer.attn if hasattr(layer, "attn") else layer.self_attn


def silence(output):
    return torch.zeros_like(output[0]), *output[1:]


def put_hook(module):
    module.register_forward_hook(lambda _, args, output: silence(output))


def put_pre_hook(module):
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)


def put_forward(module):
    before = module.forward
    module.forward = lambda *args, **kwargs: silence(before(*args, **kwargs))


def put_class(module):
    class Silent(type(module)):
        def forward(self, *args, **kwargs):
            return silence(super().forward(*args, **kwargs))

    module.__class__ = Silent


@pytest.mark.parametrize("put", [put_hook, put_pre_hook, put_forward, put_class], ids=lambda put: put.__name__)
def test_what_hangs_on_an_attention_is_called_or_refused(family, put):
    """A pruned pass computes attention itself, so a hook there (kvpress, activation patching) would do nothing."""
    model, ids = dialed(family, alpha=1.0), tiny.tokens([23])[0]
    stock = tiny.make(family)
    for plain in (model, stock):
        put(attention(plain))
    assert torch.equal(model(ids).logits, stock(ids).logits)
    with zsaa.at(model, ALPHA), pytest.raises(RuntimeError, match="the attention of layer 1 has a (hook|forward)"):
        model(ids)


def test_hooks_that_transformers_leaves_behind_are_no_hindrance(family):
    """It records hidden states and attentions by hooks, which stay."""
    model, ids = dialed(family, attn_implementation="eager"), tiny.tokens([23])[0]
    want = model(ids).logits
    with zsaa.at(model, 1.0):
        model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.equal(model(ids).logits, want)


def test_a_hook_on_a_layer_is_told_which_rows_it_sees(family):
    """One that treats all rows alike (steering) is right; one that looks for a column is warned."""
    ids, mask, positions = tiny.tokens([23, 9], padding="left")
    model, eager = dialed(family), tiny.make(family, attn_implementation="eager")
    push = torch.linspace(-1, 1, 32, dtype=torch.float64)
    for plain in (model, eager):
        layers(plain)[1].register_forward_hook(
            lambda _, args, out: (out[0] + push, *out[1:]) if isinstance(out, tuple) else out + push
        )
    with pytest.warns(UserWarning, match="a hook on layer 1 of the decoder sees the rows that are alive"):
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    for b, text in enumerate(real(ids, mask)):
        close(got[b, -1], by_reference(family, text, model=eager)[-1])


def test_attention_functions_of_ones_own_are_used_or_refused(family, monkeypatch):
    def cold(module, q, k, v, mask, **kwargs):
        return sdpa_attention_forward(module, 0.5 * q, k, v, mask, **{**kwargs, "softcap": None})

    if family == "gemma2":
        pytest.skip("transformers offers it no sdpa")
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "cold", cold)
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, "cold", sdpa_mask)
    model, ids = dialed(family), tiny.tokens([23])[0]
    want = model(ids).logits
    model.set_attn_implementation("cold")
    with pytest.raises(ValueError, match="attn_implementation='cold'"):
        model(ids)
    with zsaa.at(model, 1.0):
        assert not torch.allclose(model(ids).logits, tiny.make(family)(ids).logits)
    model.set_attn_implementation("eager")
    close(model(ids).logits, want)


def test_a_softcap_that_transformers_ignores_is_ignored(monkeypatch):
    """Gemma 3 still stores Gemma 2's, and does not apply it."""
    config = tiny.CONFIGS["gemma3_text"]()
    config.attn_logit_softcapping = 0.5
    monkeypatch.setitem(tiny.CONFIGS, "gemma3_text", lambda: config)
    ids = tiny.tokens([23])[0]
    close(dialed("gemma3_text")(ids).logits[0], by_reference("gemma3_text", ids[0]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dispatched_model_is_pruned_and_takes_the_dial_off_only_after_its_hooks(family, tmp_path):
    """accelerate gives each layer a forward of its own; here one layer's weights wait on the disk."""
    model, ids = dialed(family, dtype=torch.float32), tiny.tokens([23])[0]
    want, other = model(ids).logits, dialed(family, alpha=0.5, dtype=torch.float32)(ids).logits
    body = "transformer" if family == "gpt2" else "model"
    places = {name: "cpu" for name, _ in model.named_children() if name != body}
    places |= {f"{body}.{name}": "cpu" for name, _ in model.base_model.named_children() if name not in ("h", "layers")}
    blocks = f"{body}.{'h' if family == 'gpt2' else 'layers'}"
    places |= {f"{blocks}.{i}": "disk" if i == 3 else "cpu" for i in range(4)}
    accelerate.dispatch_model(model, places, offload_dir=tmp_path, main_device="cpu")
    close(model(ids).logits, want, rtol=1e-4, atol=1e-4)
    zsaa.enable(model, alpha=0.5)
    close(model(ids).logits, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="remove_hook_from_submodules"):
        zsaa.disable(model)
    close(model(ids).logits, other, rtol=1e-4, atol=1e-4)


KEPT_LAYERS = {"fewer": [0, 1], "one left out": [0, 2, 3], "one twice": [0, 1, 1, 2, 3], "reversed": [3, 2, 1, 0]}


@pytest.mark.parametrize("which", KEPT_LAYERS)
@few
def test_layers_that_were_cut_out_after_enabling_are_noticed(family, which):
    """Depth pruning by hand. What is numbered anew and enabled again is right."""
    kept, ids = KEPT_LAYERS[which], tiny.tokens([23])[0]

    def cut(model):
        chosen = torch.nn.ModuleList([copy.deepcopy(layers(model)[i]) for i in kept])
        setattr(model.base_model, "h" if family == "gpt2" else "layers", chosen)
        model.config.num_hidden_layers = len(kept)

    def number(model):
        for i in range(len(kept)):
            attention(model, i).layer_idx = i

    eager = tiny.make(family, attn_implementation="eager")
    cut(eager)
    number(eager)
    want, model = by_reference(family, ids[0], model=eager), dialed(family)
    cut(model)
    if which == "fewer":
        close(model(ids, use_cache=False).logits[0], want)
    else:
        with pytest.raises(RuntimeError, match="layer_idx"):
            model(ids, use_cache=False)
    number(model)
    close(zsaa.enable(model)(ids).logits[0], want)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.full
def test_exporting_leaves_no_fake_tensors_behind(family):
    """What is kept for later passes (plans) must not be made of what torch.export traces with."""
    models, ids = [dialed(family) for _ in range(2)], tiny.tokens([37], seed=1)[0]  # a length that no other test has
    programs = [
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False) for model in models
    ]
    other = tiny.tokens([37], seed=2)[0]
    want = by_reference(family, other[0])
    close(models[0](other).logits[0], want)
    for program in programs:
        close(program.module()(input_ids=other, use_cache=False).logits[0], want)


def test_tracing_is_refused(monkeypatch):
    model = dialed("llama")
    model.config.use_cache = model.config.return_dict = False
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(model, (tiny.tokens([23])[0],), strict=False, check_trace=False)


# ------------------------------------------------------------------------------------------------------------ the tools


def word_tokenizer(bos):
    """Words, with or without a BOS before each text, as Gemma's and Llama's tokenizers put there."""
    tokenizer = tiny.tokenizer()
    if bos:
        single = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer._tokenizer.post_processor = single
    return tokenizer


def lm_requests(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


LM_EVAL = {
    "plain": {},
    "add_bos_token": {"add_bos_token": True},
    "a tokenizer with BOS": {"bos": True},
    "both": {"bos": True, "add_bos_token": True},
    "prefix_token_id": {"prefix_token_id": 5},
    "max_length": {"max_length": 12},
    "truncation": {"max_length": 12, "truncation": True},
    "logits_cache": {"logits_cache": False},
    "think_end_token": {"think_end_token": "w5"},
}


@pytest.mark.parametrize("setting", LM_EVAL)
def test_lm_evals_settings_mean_the_same_as_without_the_dial(setting):
    """At an alpha that keeps every token the scores are lm-eval's own, of its own model class, whatever is set."""
    options = dict(LM_EVAL[setting])
    options |= {"tokenizer": word_tokenizer(options.pop("bos", False)), "batch_size": 2}
    ours, theirs = harness.ZsaaLM(tiny.make("llama"), 0.9999, 1000, **options), HFLM(tiny.make("llama"), **options)
    texts = words([30, 9, 1, 17])
    answers = " w3 w4", " w20", " w5 w3 w9", " w40"
    asked = lm_requests([*zip(texts, answers, strict=True), (texts[1], " w21"), ("", "w3 w4 w5")])
    scores = [model.loglikelihood(asked, disable_tqdm=True) for model in (ours, theirs)]
    for (mine, is_mine), (its, is_its) in zip(*scores, strict=True):
        assert mine == pytest.approx(its, rel=1e-9) and is_mine == is_its
    until = lm_requests([(text, {"max_gen_toks": 5, "until": ["w7"]}) for text in texts], "generate_until")
    assert ours.generate_until(until, disable_tqdm=True) == theirs.generate_until(until, disable_tqdm=True)


def test_a_bos_of_the_tokenizer_is_not_doubled_and_not_scored():
    """In perplexity tasks each piece is read after BOS and the tokens before it, N in all."""
    text, n = words([50])[0], 12
    model = harness.ZsaaLM(tiny.make("llama"), ALPHA, TAU, tokenizer=word_tokenizer(True), rolling_prefix=n)
    bos, *ids = word_tokenizer(True)(text).input_ids
    assert bos == 1 and len(ids) == 50
    want = 0.0
    for start in range(0, len(ids), n):
        context, piece = [bos, *ids[max(0, start - n + 1) : start]], ids[start : start + n]
        read = by_reference("llama", torch.tensor(context + piece[:-1]), len(context))[len(context) - 1 :]
        want += float(read.log_softmax(-1).gather(1, torch.tensor(piece)[:, None]).sum())
    got = model.loglikelihood_rolling(lm_requests([(text,), ("",)], "loglikelihood_rolling"), disable_tqdm=True)
    assert got == pytest.approx([want, 0.0], rel=1e-6)
