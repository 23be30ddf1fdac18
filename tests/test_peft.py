"""PEFT under the dial: an adapted model equals the plain model with the adapter worked into its weights."""

import copy

import peft
import pytest
import reference
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import zsaa
from zsaa import finetune
from zsaa.dial import settings
from zsaa.learned import salience

ALPHA, TAU = 0.7, 3
# PyTorch's RMSNorm in transformers rounds to float32 on the way, also in a float64 model; GPT-2 has none.
TOLERANCE = {family: dict(rtol=1e-6, atol=1e-6) for family in tiny.FAMILIES}
TOLERANCE["gpt2"] = dict(rtol=1e-11, atol=1e-11)
RULE = {"tau": TAU, "score": "column_sum", "schedule": "geometric"}
SETTINGS = {"alpha": ALPHA, **RULE, "alpha_range": None, "depth": None, "depth_range": None}
FEW = ["llama", "gpt2"]


def dialed(model):
    return zsaa.enable(model, ALPHA, TAU)


def fill(model, seed=1):
    """Adapters and copied heads that matter: PEFT starts with ones that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def config(family, **options):
    options = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return peft.LoraConfig(fan_in_fan_out=family == "gpt2", **options)


def adapted(family, head="causal-lm", seed=1, **options):
    return fill(peft.get_peft_model(tiny.make(family, head), config(family, **options)), seed)


def merged(model, family, head="causal-lm"):
    """A plain model with the weights W + scaling B A of `model`'s active adapters, worked out here, not by PEFT."""
    plain = tiny.make(family, head)
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                linear = plain.get_submodule(name)
                for adapter in set(module.active_adapters) & set(module.lora_A):
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    delta = module.scaling[adapter] * b @ a
                    linear.weight += delta.T if isinstance(linear, Conv1D) else delta
            elif isinstance(module, peft.utils.ModulesToSaveWrapper):
                plain.set_submodule(name, copy.deepcopy(module.modules_to_save[module.active_adapters[0]]))
    return plain


def run(model, **kwargs):
    ids, mask, positions = tiny.tokens([23, 9, 30])
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, **kwargs)[0]


def same(a, b, family):
    torch.testing.assert_close(a, b, equal_nan=True, **TOLERANCE[family])  # stock Gemma 2 has NaN in padding rows


def differ(a, b):
    return bool(((a - b).abs() > 0.1).any())


@pytest.mark.parametrize(
    ("order", "head"), [*(("adapter first", head) for head in tiny.HEADS), ("dial first", "causal-lm")]
)
def test_lora_equals_the_merged_model(family, head, order):
    if order == "adapter first":
        model = dialed(adapted(family, head))
    else:
        model = fill(peft.get_peft_model(dialed(tiny.make(family, head)), config(family)))
    assert settings(model) == SETTINGS
    got, plain = run(model), merged(model, family, head)
    same(got, run(dialed(plain)), family)
    assert differ(got, run(dialed(tiny.make(family, head)))), "the adapter matters"
    assert differ(got, run(zsaa.disable(plain))), "and so does the dial"
    zsaa.disable(model)
    same(run(model), run(plain), family)


@pytest.mark.parametrize("family", FEW)
def test_merging_and_unloading_keep_the_dial(family):
    model = dialed(adapted(family))
    want, plain = run(model), merged(model, family)
    model.merge_adapter()
    same(run(model), want, family)
    model.unmerge_adapter()
    same(run(model), want, family)
    clone = copy.deepcopy(model).unload()
    same(run(clone), run(dialed(tiny.make(family))), family)
    alone = model.merge_and_unload()
    assert isinstance(alone, type(plain)) and settings(alone) == SETTINGS
    same(run(alone), want, family)
    zsaa.set_alpha(alone, 1.0)
    same(run(alone), run(plain), family)


@pytest.mark.parametrize("family", FEW)
def test_several_adapters_switched_summed_and_switched_off(family):
    model = dialed(adapted(family))
    model.add_adapter("other", config(family, r=5, target_modules=["c_attn"] if family == "gpt2" else ["v_proj"]))
    fill(model, seed=2)
    results = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        results[name] = run(model)
        same(results[name], run(dialed(merged(model, family))), family)
    assert differ(results["default"], results["other"])
    model.base_model.set_adapter(["default", "other"])
    same(run(model), run(dialed(merged(model, family))), family)
    model.set_adapter("other")
    bare = run(dialed(tiny.make(family)))
    with model.disable_adapter():
        same(run(model), bare, family)
        assert settings(model) == SETTINGS
    same(run(model), results["other"], family)
    # One adapter for each sample of a batch; "__base__" is none.
    mixed = run(model, adapter_names=["other", "__base__", "default"])
    same(mixed, torch.stack([results["other"][0], bare[1], results["default"][2]]), family)
    model.delete_adapter("other")
    same(run(model), results["default"], family)
    assert settings(model) == SETTINGS


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
def test_saved_and_loaded_with_a_trained_head(family, head, tmp_path):
    classifies = head == "sequence-classification"
    trained = {"task_type": "SEQ_CLS"} if classifies else {"modules_to_save": ["lm_head"]}
    model = dialed(adapted(family, head, **trained))
    want = run(model)
    same(want, run(dialed(merged(model, family, head))), family)
    with model.disable_adapter():
        same(run(model), run(dialed(tiny.make(family, head))), family)
    model.save_pretrained(tmp_path)
    for base in (dialed(tiny.make(family, head)), tiny.make(family, head)):
        again = dialed(peft.PeftModel.from_pretrained(base, tmp_path).eval())
        same(run(again), want, family)


def test_gradients_of_an_adapter_are_those_of_the_merged_weights(family):
    """With W + s B A in place of W: dA = s B' dW and dB = s dW A'."""
    model = dialed(adapted(family))
    plain = dialed(merged(model, family))
    ids, mask, _ = tiny.tokens([23, 9])
    labels = ids.masked_fill(mask == 0, -100)
    for net in (model, plain):
        net(ids, attention_mask=mask, labels=labels).loss.backward()
    seen = 0
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
            full = plain.get_submodule(name).weight.grad
            full = full.T if family == "gpt2" else full
            for got, want in ((a.grad, scale * b.T @ full), (b.grad, scale * full @ a.T)):
                size = want.abs().max()
                torch.testing.assert_close(got / size, want / size, rtol=1e-4, atol=1e-5, msg=name)
                seen += 1
    assert seen == 2 * 4 * (4 if family == "gpt2" else 7)


@pytest.mark.parametrize("family", FEW)
def test_generation_with_an_adapter(family):
    model = dialed(adapted(family, task_type="CAUSAL_LM"))
    ids, mask, _ = tiny.tokens([21, 9], padding="left")
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    want = dialed(merged(model, family)).generate(ids, **options)
    assert torch.equal(model.generate(input_ids=ids, **options), want)
    one = {**options, "attention_mask": None}
    assisted = model.generate(input_ids=ids[:1], assistant_model=tiny.make(family), **one)
    assert torch.equal(assisted, want[:1])
    assert not torch.equal(zsaa.disable(model).generate(input_ids=ids, **options), want)


def test_adapters_put_on_by_transformers_itself():
    pytest.importorskip("peft", minversion="0.19.1")  # which transformers asks for
    model = dialed(tiny.make("llama"))
    model.add_adapter(config("llama"), "mine")
    fill(model)
    got = run(model)
    same(got, run(dialed(fill(peft.get_peft_model(tiny.make("llama"), config("llama"))))), "llama")
    model.disable_adapters()
    same(run(model), run(dialed(tiny.make("llama"))), "llama")
    model.enable_adapters()
    same(run(model), got, "llama")


ALL = {
    "LoRA": lambda model, family: peft.get_peft_model(model, config(family)),
    "LoRA, the head trained": lambda model, family: peft.get_peft_model(model, config(family, task_type="SEQ_CLS")),
    "ours": lambda model, family: finetune.add_lora(model, finetune.Recipe(tuning="lora", lora_rank=3)),
    "LoHa": lambda model, family: peft.get_peft_model(model, peft.LoHaConfig(target_modules="all-linear")),
    "transformers": lambda model, family: model.add_adapter(config(family), "mine") or model,
}


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("way", ALL)
def test_all_linear_layers_are_the_model_s_not_those_of_a_learned_score(way, family, tmp_path):
    """The same modules are adapted as without it, whoever asks; its heads judge as before, and stay out of the file."""
    if family == "gpt2" and way == "LoHa":
        pytest.skip("PEFT has no LoHa for GPT-2's Conv1D")
    if way == "transformers":
        pytest.importorskip("peft", minversion="0.19.1")  # transformers' own door asks for it
    plain = ALL[way](tiny.make(family, "sequence-classification"), family)
    model = tiny.make(family, "sequence-classification")
    scorer = salience.attach(model, salience.fresh(model))
    before = {name: weight.clone() for name, weight in scorer.state_dict().items()}
    model = ALL[way](zsaa.enable(model, ALPHA, TAU, score="salience"), family)

    def adapters(net):
        return [name for name, module in net.named_modules() if isinstance(module, BaseTunerLayer)]

    assert adapters(model) == adapters(plain) and adapters(plain)
    assert scorer.state_dict().keys() == before.keys()
    assert all(torch.equal(scorer.state_dict()[name], before[name]) for name in before)
    fill(model)
    want = run(model)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights and not any("salience" in name for name in weights)
    if way == "LoRA":
        base = tiny.make(family, "sequence-classification")
        salience.attach(base, scorer)
        again = peft.PeftModel.from_pretrained(zsaa.enable(base, ALPHA, TAU, score="salience"), tmp_path).eval()
        same(run(again), want, family)


LINEAR = {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}
METHODS = {
    "DoRA": lambda: peft.LoraConfig(use_dora=True, **LINEAR),
    "rsLoRA": lambda: peft.LoraConfig(use_rslora=True, **LINEAR),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **LINEAR),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(**LINEAR),
    "LoKr": lambda: peft.LoKrConfig(**LINEAR),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, **LINEAR),
    "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"]),
    "HRA": lambda: peft.HRAConfig(**LINEAR),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(1, 60))),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_equal_the_masked_reference(method):
    """The reference runs the adapted stock model, so it needs no merging."""
    model = peft.get_peft_model(tiny.make("llama", attn_implementation="eager"), METHODS[method]()).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    ids = tiny.tokens([23])[0]
    inner = model.get_base_model()
    with torch.no_grad():
        with zsaa.trace(dialed(model)) as t:
            got = model(ids).logits[0]
        zsaa.disable(model)
        want, kept = reference.run(inner, ids[0], ALPHA, TAU)
        want = inner.lm_head(want)
        bare = dialed(tiny.make("llama"))(ids).logits[0]
    assert [layer[0].tolist() for layer in t.kept] == kept
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert differ(got, bare)


VIRTUAL = 6
PROMPTS = {
    "prompt tuning": lambda **o: peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL, **o),
    "p-tuning": lambda **o: peft.PromptEncoderConfig(num_virtual_tokens=VIRTUAL, encoder_hidden_size=16, **o),
}


def embeddings(model, ids, mask):
    """What PEFT's virtual tokens amount to: embeddings in front of the prompt, never padding."""
    prompt = model.get_prompt(len(ids)).double()
    inputs = torch.cat([prompt, model.get_base_model().get_input_embeddings()(ids)], dim=1)
    return inputs, torch.cat([torch.ones(len(ids), VIRTUAL, dtype=mask.dtype), mask], dim=1)


@pytest.mark.parametrize(("method", "padding"), [("prompt tuning", "right"), ("p-tuning", "left")])
def test_virtual_tokens_are_tokens_like_any_other(family, method, padding):
    """They count, vote and are dropped; padding between them and the prompt does not."""
    model = dialed(peft.get_peft_model(tiny.make(family), PROMPTS[method](task_type="CAUSAL_LM")).double().eval())
    plain, lengths = dialed(tiny.make(family)), [23, 9, 30]
    ids, mask, _ = tiny.tokens(lengths, padding=padding)
    with torch.no_grad(), zsaa.trace(model) as t:
        got = model(ids, attention_mask=mask).logits
    assert t.lengths == [n + VIRTUAL for n in lengths]
    inputs, wide = embeddings(model, ids, mask)
    with torch.no_grad():
        same(got, plain(inputs_embeds=inputs, attention_mask=wide).logits, family)
    eager = tiny.make(family, attn_implementation="eager")
    for b, n in enumerate(lengths):
        if padding == "left" and n < max(lengths):
            continue  # without position_ids the stock model, too, leaves a gap in the positions
        # The reference takes token ids, so the virtual tokens get ids of their own.
        real = inputs[b][wide[b] == 1]
        eager.set_input_embeddings(torch.nn.Embedding.from_pretrained(real))
        want, kept = reference.run(eager, torch.arange(len(real)), ALPHA, TAU)
        assert [layer[b].tolist() for layer in t.kept] == kept
        want, cap = eager.lm_head(want), getattr(eager.config, "final_logit_softcapping", None)
        want = cap * torch.tanh(want / cap) if cap else want
        torch.testing.assert_close(got[b][wide[b] == 1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_generation_behind_virtual_tokens(family):
    model = dialed(
        peft.get_peft_model(tiny.make(family), PROMPTS["prompt tuning"](task_type="CAUSAL_LM")).double().eval()
    )
    ids, mask, _ = tiny.tokens([21, 21])
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    got = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 21:]
    inputs, wide = embeddings(model, ids, mask)
    plain = dialed(tiny.make(family))
    assert torch.equal(got, plain.generate(inputs_embeds=inputs, attention_mask=wide, **options))
    assert not torch.equal(got, zsaa.disable(plain).generate(inputs_embeds=inputs, attention_mask=wide, **options))


def test_a_classifier_behind_virtual_tokens_needs_left_padding():
    """Stock transformers finds no padding in embeddings and reads the last row, whatever it is."""
    base = tiny.make("llama", "sequence-classification")
    model = dialed(peft.get_peft_model(base, PROMPTS["prompt tuning"](task_type="SEQ_CLS")).double().eval())
    ids, mask, _ = tiny.tokens([23, 9])
    with pytest.raises(ValueError, match="inputs_embeds.*Pad on the left"):
        model(ids, attention_mask=mask)
    ids, mask, _ = tiny.tokens([23, 9], padding="left")
    inputs, wide = embeddings(model, ids, mask)
    plain = dialed(tiny.make("llama", "sequence-classification"))
    same(model(ids, attention_mask=mask).logits, plain(inputs_embeds=inputs, attention_mask=wide).logits, "llama")


def test_a_prefix_put_on_later_is_noticed():
    model = dialed(tiny.make("llama"))
    later = peft.get_peft_model(model, REFUSED["PREFIX_TUNING"]()).double()
    with pytest.warns(UserWarning, match="alpha has no effect.*was not pruned"):
        later(tiny.tokens([23])[0])


REFUSED = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "aLoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6]),
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_look_across_tokens_are_refused_by_name(method):
    model = peft.get_peft_model(tiny.make("llama"), REFUSED[method]())
    types = [type(m) for m in model.modules()]
    with pytest.raises(zsaa.UnsupportedModelError, match=f"'default' is {method}.*Use LoRA, or prompt tuning"):
        zsaa.enable(model, 0.5)
    assert [type(m) for m in model.modules()] == types
    later = peft.get_peft_model(zsaa.enable(tiny.make("llama")), REFUSED[method]())
    with pytest.raises(zsaa.UnsupportedModelError, match=method):
        zsaa.set_alpha(later, 0.5)


def test_an_adapter_that_came_after_the_dial_writes_no_pruned_text():
    model = peft.get_peft_model(zsaa.enable(tiny.make("llama"), 0.5), REFUSED["aLoRA"]())
    with pytest.raises(zsaa.UnsupportedModelError, match="aLoRA"):
        model.generate(input_ids=tiny.tokens([23])[0], **tiny.QUIET)


def test_an_attention_that_was_replaced_after_the_dial_is_named():
    model = peft.get_peft_model(zsaa.enable(tiny.make("llama"), 0.5), REFUSED["ADAPTION_PROMPT"]())
    with pytest.raises(RuntimeError, match="the attention of layer . has a forward of another library"):
        model(input_ids=tiny.tokens([23])[0])


@pytest.mark.full
@pytest.mark.assets
def test_lora_on_a_pretrained_model():
    from zsaa.models import AssetError, load_model, resolve

    try:
        resolve("smollm2-135m")
    except AssetError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model("smollm2-135m")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    text = "The film begins slowly, but its second half is a joy: warm, funny and beautifully played by all."
    batch = tokenizer([text, text[:40]], return_tensors="pt", padding=True)
    zsaa.enable(model, 0.9)
    with torch.no_grad(), model.disable_adapter():
        bare = model(**batch).logits[:, -1]
    with torch.no_grad():
        got = model(**batch).logits[:, -1]
        want = model.merge_and_unload()(**batch).logits[:, -1]
    assert differ(got, bare)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-3)  # float32, through 30 layers
