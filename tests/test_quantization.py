"""bitsandbytes under the dial: nf4 and int8 models are pruned like any other, and QLoRA trains them.

Some tests run once more on a GPU: `pytest tests/test_quantization.py -m cuda -s`; they need nothing but the packages.
"""

import functools
import gc
import importlib.metadata
import logging
import re
from pathlib import Path

import pytest
import reference
import tiny
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import zsaa
from zsaa.dial import settings
from zsaa.finetune import Recipe, add_lora, fine_tune, load, prepare_quantized
from zsaa.learned import salience
from zsaa.models import BITSANDBYTES, AssetError, load_model

bnb = pytest.importorskip("bitsandbytes")

ALPHA, TAU = 0.7, 3
EXACT = dict(rtol=1e-5, atol=2e-5)  # 4-bit layers compute in float32
QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
each_kind = pytest.mark.parametrize("quantization", ["nf4", "int8"])
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def wide(family):
    """tiny.py's configuration with rows of 64 and more, which 4-bit blocks need."""
    config = tiny.CONFIGS[family]()
    sizes = {"n_embd": 64} if family == "gpt2" else {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    return type(config)(**{**config.to_dict(), **sizes})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a float32 language model of each family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    configs = {family: wide(family) for family in tiny.FAMILIES}
    with pytest.MonkeyPatch.context() as patch:
        for family in tiny.FAMILIES:
            patch.setitem(tiny.CONFIGS, family, functools.partial(configs.get, family))
            tiny.make(family, dtype=torch.float32).save_pretrained(folder / family)
            tiny.tokenizer().save_pretrained(folder / family)
    return folder


@pytest.fixture(autouse=True)
def skip_without_gpu(request):
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QUANTIZED)}


def in_float64(model):
    """All but the quantized layers in float64, 4-bit layers in float32, and int8 layers without their care for
    outliers, which looks across rows: what is left is the rounding of each row by itself."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32
        elif isinstance(module, bnb.nn.Linear8bitLt):
            module.state.threshold = 0.0
        else:
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                tensor.data = tensor.data.double() if tensor.is_floating_point() else tensor.data
    return model


def dequantized(linear):
    """The weight [outputs, inputs] that a quantized layer stands for, in float64."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
    holder = linear.weight if linear.state.CB is None else linear.state
    return holder.CB.double() * holder.SCB.double()[:, None] / 127


def plain_of(model, folder):
    """A model without quantization, in float64 on the CPU, that has the weights of the quantized `model`."""
    plain, _ = load_model(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        for name, linear in linears(model).items():
            target, weight = plain.get_submodule(name), dequantized(linear).cpu()
            weight = weight.T if isinstance(target, Conv1D) else weight
            assert distance(weight, target.weight) > 1e-3, "quantization matters"
            target.weight.copy_(weight)
    return plain


def pruned(model, ids):
    """Final hidden states [tokens, hidden] and the positions that each layer kept."""
    with zsaa.trace(zsaa.enable(model, ALPHA, TAU)) as t:
        hidden = model.base_model(ids).last_hidden_state[0]
    zsaa.disable(model)
    return hidden, [layer[0].tolist() for layer in t.kept]


def masked(model, ids):
    with torch.device(ids.device):
        return reference.run(model, ids[0], ALPHA, TAU)


def distance(a, b):
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm())


# ----------------------------------------------------------------------------------------------- loading


@each_kind
def test_what_is_quantized_and_what_alpha_one_is(family, quantization, checkpoints):
    head = "causal-lm" if family in ("gpt2", "llama") else "sequence-classification"
    model, _ = load_model(checkpoints / family, head, quantization=quantization)
    assert len(linears(model)) == 4 * (4 if family == "gpt2" else 7), "all of the decoder, GPT-2's Conv1D too"
    rest = [
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not isinstance(m, QUANTIZED)
    ]
    assert rest == ["lm_head" if head == "causal-lm" else "score"]
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    ids, mask, positions = tiny.tokens([23, 9])
    inputs = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    with torch.no_grad():
        want = model(**inputs).logits
        zsaa.enable(model, 1.0)
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0, equal_nan=True)
        zsaa.set_alpha(model, 0.5)
        assert not torch.equal(model(**inputs).logits, want)
        zsaa.disable(model)
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=0, equal_nan=True)


@each_kind
def test_a_fresh_head_is_the_same_as_without_quantization(quantization, checkpoints):
    heads = [
        load_model(checkpoints / "llama", "sequence-classification", quantization=q)[0] for q in (None, quantization)
    ]
    assert torch.equal(heads[0].score.weight, heads[1].score.weight)


@each_kind
def test_a_quantized_model_saved_and_loaded(quantization, checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints / "llama", quantization=quantization)
    ids = tiny.tokens([23])[0]
    with torch.no_grad():
        want = zsaa.enable(model, ALPHA, TAU)(ids).logits
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        for asked in (None, quantization):
            again, _ = load_model(tmp_path, quantization=asked)
            assert len(linears(again)) == 28
            assert torch.equal(zsaa.enable(again)(ids).logits, want), "with the dial where it was"
    other = {"nf4": "int8", "int8": "nf4"}[quantization]
    with pytest.raises(ValueError, match=f"is stored as {quantization}, and cannot become {other}"):
        load_model(tmp_path, quantization=other)


def test_bad_requests_say_what_is_allowed(checkpoints, monkeypatch):
    with pytest.raises(ValueError, match="quantization is 'int4'; it must be one of 'nf4', 'int8', or None"):
        load_model(checkpoints / "llama", quantization="int4")
    for other in ("quantization_config", "gguf_file"):
        with pytest.raises(ValueError, match=f"quantization='nf4' and {other}="):
            load_model(checkpoints / "llama", quantization="nf4", **{other: "x"})
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.48.1" if name == "bitsandbytes" else version(name)
    )
    with pytest.raises(AssetError, match=r"0.48.2 or newer; 0.48.1 is installed.*pip install -U 'zsaa\[quant\]'"):
        load_model(checkpoints / "llama", quantization="nf4")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(AssetError, match=r"not installed. Get it with: pip install 'zsaa\[quant\]'"):
        load_model(checkpoints / "llama", quantization="int8")


def test_the_version_asked_for_is_the_one_declared():
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    assert set(re.findall(r"bitsandbytes>=([\d.]+)", text)) == {BITSANDBYTES}


def test_computing_in_16_bits_where_the_gpu_does(monkeypatch):
    """The choice alone: a GPU with bfloat16, one without (T4), and what is asked for by name."""
    from zsaa.models.quantize import quantized

    def chosen(dtype=None, device="cuda", quantization="nf4"):
        dtype, kwargs = quantized(quantization, dtype, device, {})
        assert kwargs["device_map"] == {"": device}
        config = kwargs["quantization_config"]
        assert not config.bnb_4bit_use_double_quant
        return dtype, config.bnb_4bit_compute_dtype

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert chosen() == (bf16, bf16)
    assert chosen(fp32) == (fp32, bf16)
    assert chosen(fp16) == (fp16, fp16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert chosen() == (fp32, fp16)
    assert chosen(device="cpu") == (fp32, fp32)
    assert chosen(quantization="int8")[0] == fp32


def test_int8_says_nothing_at_every_call(checkpoints, caplog):
    model, _ = load_model(checkpoints / "llama", quantization="int8")
    with caplog.at_level(logging.DEBUG), torch.no_grad():
        model(tiny.tokens([23])[0])
    assert not [r for r in caplog.records if r.name.startswith("bitsandbytes")]


# ------------------------------------------------------------------------------------------------ pruning


@each_kind
@each_device
def test_pruned_equals_the_masked_reference(family, quantization, device, checkpoints):
    options = dict(attn_implementation="eager", dtype=torch.float32, quantization=quantization, device=device)
    model = in_float64(load_model(checkpoints / family, **options)[0])
    plain = plain_of(model, checkpoints / family)
    ids = tiny.tokens([23])[0]
    with torch.no_grad():
        got, kept = pruned(model, ids.to(device))
        want, kept_by_reference = masked(model, ids.to(device))
        assert kept == kept_by_reference
        torch.testing.assert_close(got, want, **EXACT)
        if quantization == "nf4":  # int8 rounds activations, too
            want, kept_by_plain = pruned(plain, ids)
            assert kept == kept_by_plain
            torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


@each_device
def test_int8_shifts_by_less_than_its_rounding_when_rows_leave(device):
    """A column in which any row of the pass has an outlier (6 or more) is computed in 16 bits for all rows, else in 8.
    So a row may change when another leaves: by half a step of its own scale per such column, at most."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 128, generator=generator).clamp(-5, 5)
    x[7, 3], x[21, 50], x[8, 64] = 9.0, -30.0, 8.0
    kept = torch.arange(0, 40, 4)  # row 8 stays, 7 and 21 go
    weight = torch.randn(64, 128, generator=generator)
    linear = bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    linear.load_state_dict({"weight": weight})
    linear, x = linear.to(device).eval(), x.to(device)
    with torch.no_grad():
        whole = linear(x).double().cpu()
        shift = (whole[kept] - linear(x[kept]).double().cpu()).abs()
    x, columns = x.double().cpu()[kept], dequantized(linear).cpu()[:, [3, 50]].abs()
    half_step = x.masked_fill(x.abs() >= 6, 0).abs().amax(dim=1, keepdim=True) / 127 / 2
    # Activations are rounded to float16 before that; and on a GPU the result, too.
    bound = half_step * columns.sum(dim=1) + x[:, [3, 50]].abs() * 2**-11 @ columns.T + whole.max() * 2**-10
    assert shift.max() > 0
    assert (shift <= bound).all()


def test_int8_with_outliers_stays_within_its_error(family, checkpoints):
    """The whole model: pruned and masked differ by less than int8 and float32 do."""
    model, _ = load_model(checkpoints / family, quantization="int8", attn_implementation="eager")
    original, _ = load_model(checkpoints / family, attn_implementation="eager")
    ids = tiny.tokens([23])[0]
    with torch.no_grad():
        want, kept_by_reference = masked(model, ids)
        got, kept = pruned(model, ids)
        assert distance(got, want) < distance(want, masked(original, ids)[0])
    assert kept[0] == kept_by_reference[0]


@each_kind
def test_batch_mates_and_padding_change_nothing(quantization, checkpoints):
    model = in_float64(load_model(checkpoints / "mistral", "sequence-classification", quantization=quantization)[0])
    zsaa.enable(model, ALPHA, TAU)
    ids, mask, positions = tiny.tokens([23, 9, 30], padding="left")
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for b in range(3):
            torch.testing.assert_close(model(ids[b][mask[b] == 1][None]).logits[0], together[b], **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_equals_that_of_the_plain_model(family, checkpoints):
    model = in_float64(load_model(checkpoints / family, quantization="nf4")[0])
    plain = plain_of(model, checkpoints / family)
    ids, mask, _ = tiny.tokens([21, 9], padding="left")
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    texts = [zsaa.enable(net, ALPHA, TAU).generate(ids, **options) for net in (model, plain)]
    assert torch.equal(*texts)


# ------------------------------------------------------------------------------------------------- QLoRA


def samples(count=48):
    """Label 1 when token 7 occurs: learnable, and only by attending."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        n = int(torch.randint(8, 30, (1,), generator=generator))
        ids = torch.randint(8, 97, (n,), generator=generator).tolist()
        ids[n // 2] = 7 if i % 2 else ids[n // 2]
        rows.append({"input_ids": ids, "attention_mask": [1] * n, "labels": i % 2})
    return rows


def lora_gradients(model, device="cpu", alpha=ALPHA):
    ids, mask, _ = tiny.tokens([23, 9])
    model.train().zero_grad()
    zsaa.enable(model, alpha, TAU)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=torch.tensor([0, 1]).to(device))
    out.loss.backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(got, want, tolerance):
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max() + 1e-12
        torch.testing.assert_close(got[name] / scale, want[name] / scale, rtol=0, atol=tolerance, msg=name)


def with_lora(model, recipe):
    model = add_lora(model, recipe)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("family", "quantization"), [*((family, "nf4") for family in tiny.FAMILIES), ("llama", "int8"), ("gpt2", "int8")]
)
@each_device
def test_gradients_of_qlora(family, quantization, device, checkpoints):
    """Those of LoRA on a plain model of the same weights; also after an evaluation and a save, which harm a model that
    bitsandbytes may repack (CPUs with bfloat16 units); and with gradient checkpointing."""
    recipe = Recipe(tuning="lora", dropout=0.0, lora_rank=4)
    options = dict(attn_implementation="eager", dtype=torch.float32, quantization=quantization, device=device)
    quantized, _ = load_model(checkpoints / family, "sequence-classification", **options)
    for layer in linears(quantized).values():
        layer.compute_dtype = torch.float32
    plain, _ = load_model(checkpoints / family, "sequence-classification", attn_implementation="eager")
    with torch.no_grad():
        for name, linear in linears(quantized).items():
            target, weight = plain.get_submodule(name), dequantized(linear).float().cpu()
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    model = with_lora(prepare_quantized(quantized, recipe), recipe)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    first = lora_gradients(model, device)
    assert any("score" in name for name in first) and all(g.abs().max() > 0 for g in first.values())
    plain = with_lora(plain, recipe)
    if quantization == "nf4" or device == "cpu":
        assert_same_gradients(lora_gradients(plain), first, 1e-3)
    else:  # on a GPU int8 rounds the activations too, which can tip the choice of tokens: compare where there is none
        assert_same_gradients(lora_gradients(plain, alpha=1.0), lora_gradients(model, device, alpha=1.0), 0.3)

    with torch.no_grad():
        model.eval()(tiny.tokens([23])[0].to(device))
    model.state_dict()
    assert_same_gradients(lora_gradients(model, device), first, 1e-5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_gradients(lora_gradients(model, device), first, 1e-5)


def test_repacked_weights_are_not_trained(checkpoints):
    if not getattr(bnb.functional, "has_avx512bf16", bool)():
        pytest.skip("bitsandbytes repacks on CPUs with bfloat16 units only")
    model, _ = load_model(checkpoints / "llama", "sequence-classification", quantization="nf4")
    for linear in linears(model).values():
        linear.support_avx512bf16_for_cpu = True  # as bitsandbytes has it
    with torch.no_grad():
        model(tiny.tokens([23])[0])
    with pytest.raises(ValueError, match="repacked this model's weights.*Load it anew"):
        prepare_quantized(model, Recipe(tuning="lora"))


def test_full_tuning_of_a_quantized_model_is_refused(checkpoints, tmp_path):
    model, tokenizer = load_model(checkpoints / "llama", "sequence-classification", quantization="nf4")
    with pytest.raises(ValueError, match="tuning='full' cannot train a quantized model.*tuning='lora'"):
        fine_tune(model, tokenizer, samples(), Recipe(), tmp_path, progress=False)


trained_on_a_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="training takes the GPU: test_qlora_on_a_gpu"
)  # fmt: skip


@pytest.mark.full
@trained_on_a_cpu
@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("gpt2", "int8")])
def test_qlora_learns_saves_and_loads(family, quantization, checkpoints, tmp_path):
    options = dict(kind="sequence-classification", quantization=quantization)
    model, tokenizer = load_model(checkpoints / family, **options)
    before = {name: linear.weight.data.clone() for name, linear in linears(model).items()}
    recipe = Recipe(
        tuning="lora", learning_rate=1e-2 if family == "gpt2" else 3e-3, epochs=6, alpha_range=(0.6, 1.0), tau=4,
        lora_rank=4, gradient_checkpointing=family == "llama", dropout=0.0,
    )  # fmt: skip
    trained, log = fine_tune(model, tokenizer, samples(), recipe, tmp_path, log_steps=4, progress=False)
    losses = [loss for _, loss in log["loss"]]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses
    assert settings(trained)["alpha_range"] == (0.6, 1.0) and settings(trained)["alpha"] == 1.0
    for name, linear in linears(trained).items():
        assert torch.equal(
            linear.weight.data, before[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        )
    assert (tmp_path / "model" / "adapter_model.safetensors").stat().st_size < 400_000, "the adapter alone"

    ids, mask, _ = tiny.tokens([25, 12])
    logits = {}
    with torch.no_grad():
        for asked in (quantization, None):
            again, _ = load(tmp_path / "model", **{**options, "quantization": asked})
            assert settings(again) == settings(trained) and bool(linears(again)) == bool(asked)
            zsaa.set_alpha(again, 0.7)
            logits[asked] = again(input_ids=ids, attention_mask=mask).logits
        zsaa.set_alpha(trained, 0.7)
        want = trained(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[quantization], want, rtol=1e-5, atol=1e-5)
    assert distance(logits[None], want) > 0, "the base is another"


@trained_on_a_cpu
@pytest.mark.parametrize(
    ("family", "quantization"), [pytest.param("llama", "nf4", marks=pytest.mark.full), ("gpt2", "int8")]
)
def test_a_learned_score_stays_in_float32_beside_quantized_weights(family, quantization, checkpoints, tmp_path):
    options = dict(kind="sequence-classification", quantization=quantization)
    model, tokenizer = load_model(checkpoints / family, **options)
    changes = {"max_steps": 3, "tau": 4, "strongest": 2.0, "lora_rank": 4, "dropout": 0.0}
    recipe = Recipe.named("zsaa+", tuning="lora", gradient_checkpointing=family == "llama", **changes)
    trained, _ = fine_tune(model, tokenizer, samples(), recipe, tmp_path, progress=False)
    again, _ = load(tmp_path / "model", **options)
    ids, mask, _ = tiny.tokens([25, 12])
    logits = []
    for net in (trained, again):
        scorer = salience.scorer_of(net)
        assert {p.dtype for p in scorer.parameters()} == {torch.float32}
        assert not linears(scorer) and not any("lora" in name for name, _ in scorer.named_parameters())
        norm = scorer.heads["0"][0].weight
        assert not torch.equal(norm, torch.ones_like(norm)), "it was trained"
        with torch.no_grad(), zsaa.at(net.eval(), 0.7):
            logits.append(net(input_ids=ids, attention_mask=mask).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- pretrained and GPU


@pytest.mark.full
@pytest.mark.assets
def test_nf4_of_pretrained_weights():
    """The first layers of SmolLM2: real weights have other scales than random ones."""
    try:
        options = dict(quantization="nf4", attn_implementation="eager", num_hidden_layers=8)
        model, tokenizer = load_model("smollm2-135m", **options)
    except AssetError as error:
        pytest.skip(str(error))
    text = "The film begins slowly, but its second half is a joy: warm, funny and beautifully played by all."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        got, kept = pruned(model, ids)
        want, kept_by_reference = masked(model, ids)
    assert kept == kept_by_reference
    assert distance(got, want) < 1e-3


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A random LLaMA of 150 million parameters, 8 layers of 1,024, and its folder."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=3584, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("middle")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.cuda
@each_kind
@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "as on a T4"])
def test_on_a_gpu_in_16_bits(quantization, bfloat16, middle, monkeypatch):
    """Memory, and 16-bit kernels within their own noise: that of the masked model against 32 bits."""
    if not bfloat16:
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=False: False)
    options = dict(device="cuda", attn_implementation="eager")
    gc.collect()
    start = torch.cuda.memory_allocated()
    model, _ = load_model(middle, quantization=quantization, **options)
    gc.collect()
    used = torch.cuda.memory_allocated() - start
    linear = sum(layer.in_features * layer.out_features for layer in linears(model).values())
    others = [p for p in model.parameters() if p.is_floating_point()]
    # 4 bits and a float32 for each 64 weights; 8 bits and a float32 for each row.
    expected = linear * {"nf4": 0.5 + 4 / 64, "int8": 1.0}[quantization] + sum(p.nbytes for p in others)
    whole = 4 * (linear + sum(p.numel() for p in others))
    print(f"{quantization}: {used / 1e6:.0f} MB on the GPU, {whole / 1e6:.0f} MB in float32")
    assert expected <= used < 1.1 * expected

    ids = torch.randint(1, 8192, (1, 300), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with torch.no_grad():
        full, _ = load_model(middle, **options)
        for name, layer in linears(model).items():
            full.get_submodule(name).weight.copy_(dequantized(layer))
        exact = masked(full, ids)[0]
        want, kept_by_reference = masked(model, ids)
        got, kept = pruned(model, ids)
    shared = [len(set(a) & set(b)) / len(a) for a, b in zip(kept, kept_by_reference)]
    print(f"{quantization}: pruned to masked {distance(got, want):.4f}, masked to 32 bits {distance(want, exact):.4f}")
    assert torch.isfinite(got).all() and min(shared) > 0.9, shared
    assert distance(got[-1], want[-1]) < 4 * distance(want[-1], exact[-1]) + 1e-3
    text = zsaa.enable(model, ALPHA, TAU).generate(ids, max_new_tokens=8, min_new_tokens=8, pad_token_id=0)
    assert text.shape == (1, 308)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_qlora_on_a_gpu(precision, middle, tmp_path, monkeypatch):
    """fp16 as on a T4, which has no bfloat16, and bf16; with gradient checkpointing."""
    if precision == "fp16":
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=False: False)
    model, tokenizer = load_model(middle, "sequence-classification", device="cuda", quantization="nf4")
    computes = {layer.compute_dtype for layer in linears(model).values()}
    assert computes == {torch.float16 if precision == "fp16" else torch.bfloat16}
    recipe = Recipe(tuning="lora", learning_rate=1e-3, max_steps=60, gradient_checkpointing=True)
    torch.cuda.reset_peak_memory_stats()
    trained, log = fine_tune(model, tokenizer, samples(96), recipe, tmp_path, log_steps=5, progress=False)
    print(f"{precision}: {log['seconds']} s, peak {torch.cuda.max_memory_allocated() / 1e6:.0f} MB, {log['loss']}")
    assert log["precision"] == precision
    losses = [loss for _, loss in log["loss"]]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), losses
    weights = [p for p in trained.parameters() if p.requires_grad]
    assert {p.dtype for p in weights} == {torch.float32} and all(torch.isfinite(p).all() for p in weights)
    ids, mask, _ = (t.to("cuda") for t in tiny.tokens([25, 12]))
    with torch.no_grad(), zsaa.at(trained, 0.7):
        want = trained(input_ids=ids, attention_mask=mask).logits
        again, _ = load(tmp_path / "model", kind="sequence-classification", device="cuda", quantization="nf4")
        prepare_quantized(again, recipe)  # float32 around the 4-bit layers, as the trained one has
        got = zsaa.enable(again, 0.7)(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
