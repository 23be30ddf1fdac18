"""Public reports, tried with the dial on: training, adapters and weights."""

import copy
import tempfile

import accelerate
import datasets
import peft
import pytest
import tiny
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets.fingerprint import Hasher
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
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
    trains,
)
from safetensors.torch import load_model, save_model
from torch.nn.utils import prune

import zsaa


def rows(lengths):
    texts = [tiny.tokens([n], seed=n)[0][0].tolist() for n in lengths]
    return datasets.Dataset.from_list([{"input_ids": t, "attention_mask": [1] * len(t), "labels": t} for t in texts])


def trainer(model, folder, data=None, collator=None, **options):
    quiet = dict(report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    arguments = transformers.TrainingArguments(str(folder), **quiet, **options)
    return transformers.Trainer(model, arguments, train_dataset=data, data_collator=collator)


@trains
@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.full) for f in ("gpt2", "gemma2"))])
def test_gradient_accumulation_is_one_large_batch(family, tmp_path):
    """Samples of different lengths: the loss is a mean over all tokens of the step, not of the means."""
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        model = dialed(family)
        options = dict(max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0)
        collator = transformers.DataCollatorForTokenClassification(tiny.tokenizer())
        batches = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        trainer(model, tmp_path, rows([23, 9, 30, 12]), collator, **options, **batches).train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny.make(family).parameters()])
    assert not torch.equal(found[0], start)
    for other in found[1:]:
        close(other, found[0], rtol=1e-7, atol=1e-7)


@few
def test_trainer_predicts_for_padded_batches_what_the_model_says_of_each_sample(family, tmp_path):
    model, data = dialed(family, "sequence-classification"), rows([23, 9, 30, 12, 7])
    data = data.map(lambda row, i: {"labels": i % 2}, with_indices=True)
    collator = transformers.DataCollatorWithPadding(tiny.tokenizer())
    got = trainer(model, tmp_path, collator=collator, per_device_eval_batch_size=3).predict(data).predictions
    want = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in data])
    close(torch.tensor(got), want, rtol=1e-9, atol=1e-9)


@trains
def test_deterministic_algorithms_change_nothing(family):
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for deterministic in (False, True):
        model = dialed(family)
        torch.use_deterministic_algorithms(deterministic)  # memory is then filled with NaN before it is used
        try:
            out = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
            out.loss.backward()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@trains
def test_checkpointing_the_whole_body_replays_the_same_choice(family):
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for wrapped in (False, True):
        model = dialed(family)

        def body(ids, model=model):
            return model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state

        states = torch.utils.checkpoint.checkpoint(body, ids, use_reentrant=False) if wrapped else body(ids)
        states.square().mean().backward()
        found.append([p.grad for p in model.base_model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@trains
@few
def test_functional_gradients_are_the_models(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    model(ids, labels=ids).loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.grad(lambda w: torch.func.functional_call(model, w, (ids,), {"labels": ids}).loss)(weights)
    for name, parameter in model.named_parameters():
        close(found[name], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.full
@trains
def test_compiled_training_follows_the_dial(monkeypatch):
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 2
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: config)
    ids, mask, _ = tiny.tokens([23, 9])
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = dialed("llama").train()
        run = torch.compile(model, backend="eager") if compiled else model
        for alpha in (ALPHA, 0.5):
            zsaa.set_alpha(model, alpha)
            model.zero_grad()
            run(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert not torch.equal(found[0], found[1])
    for plain, other in zip(found[:2], found[2:]):
        close(other, plain, rtol=1e-7, atol=1e-7)


@pytest.mark.full
def test_a_model_that_was_compiled_before_takes_the_dial_on_and_off(monkeypatch):
    config = tiny.CONFIGS["llama"]()
    config.num_hidden_layers = 2
    monkeypatch.setitem(tiny.CONFIGS, "llama", lambda: config)
    torch._dynamo.reset()
    ids = tiny.tokens([23])[0]
    stock, pruned = tiny.make("llama")(ids).logits, dialed("llama")(ids).logits
    model = tiny.make("llama")
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(ids).logits, stock)
    zsaa.enable(compiled, alpha=ALPHA, tau=TAU)
    assert torch.equal(compiled(ids).logits, pruned)
    assert torch.equal(compiled(ids, alpha=1.0).logits, stock)
    zsaa.disable(compiled)
    assert torch.equal(compiled(ids).logits, stock)


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of its first use for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@few
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_model_that_accelerate_prepared_and_gave_back(family):
    """Mixed precision wraps its forward; unwrapping binds it anew."""
    ids = tiny.tokens([23])[0]
    plain = tiny.make(family, dtype=torch.float32)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny.make(family, dtype=torch.float32))
    zsaa.enable(prepared, alpha=ALPHA, tau=TAU)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = zsaa.enable(copy.deepcopy(plain), alpha=ALPHA, tau=TAU)(ids).logits
    assert torch.equal(prepared(ids).logits, want.float())
    alone = accelerate.utils.extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    with zsaa.at(alone, 1.0):
        assert torch.equal(alone(ids).logits, plain(ids).logits)


def lora(family, seed=1, **options):
    targets = {"target_modules": ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]}
    config = peft.LoraConfig(r=4, fan_in_fan_out=family == "gpt2", init_lora_weights=False, **{**targets, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(tiny.make(family), config).eval()


def test_an_adapter_that_is_swapped_while_it_is_in_use(family, tmp_path):
    ids = tiny.tokens([23])[0]
    for name, seed in (("first", 1), ("second", 2)):
        lora(family, seed).save_pretrained(tmp_path / name)
    first, second = (
        zsaa.enable(peft.PeftModel.from_pretrained(tiny.make(family), tmp_path / name).eval(), alpha=ALPHA, tau=TAU)
        for name in ("first", "second")
    )
    want = second(ids).logits
    assert not torch.allclose(first(ids).logits, want)
    hotswap_adapter(first, tmp_path / "second", adapter_name="default")
    assert torch.equal(first(ids).logits, want)
    with rescale_adapter_scale(first, 0.0):
        close(first(ids).logits, dialed(family)(ids).logits, rtol=1e-9, atol=1e-9)
    close(first.merge_and_unload(safe_merge=True)(ids).logits, want)


def test_trained_embeddings_and_head_survive_merging_saving_and_loading(family, tmp_path):
    """Also where they were tied before: then they no longer are."""
    trained = ["wte", "lm_head"] if family == "gpt2" else ["embed_tokens", "lm_head"]
    model, ids = lora(family, modules_to_save=trained), tiny.tokens([23])[0]
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.full_like(parameter, 0.2).cumsum(dim=-1) % 0.3)
    want = zsaa.enable(model, alpha=ALPHA, tau=TAU)(ids).logits
    merged = model.merge_and_unload()
    close(merged(ids).logits, want)
    merged.save_pretrained(tmp_path)
    how = dict(dtype=torch.float64, attn_implementation=merged.config._attn_implementation)
    loaded = zsaa.enable(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **how).eval())
    assert zsaa.dial.settings(loaded)["alpha"] == ALPHA
    close(loaded(ids).logits, want)


def test_safetensors_files_hold_the_stock_model(family):
    model, ids = dialed(family), tiny.tokens([23])[0]
    other, stock = dialed(family, seed=3), tiny.make(family, seed=4)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, f"{folder}/model.safetensors")
        for empty in (other, stock):
            load_model(empty, f"{folder}/model.safetensors")
    assert torch.equal(other(ids).logits, model(ids).logits)
    zsaa.set_alpha(model, 1.0)
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_weights_that_torch_prunes_at_each_call_are_used(family):
    """torch.nn.utils.prune computes the weight in a hook of the linear layer."""
    models = [tiny.make(family, attn_implementation=how, dtype=torch.float32) for how in ("sdpa", "eager")]
    for model in models:
        for layer in layers(model):
            linear = layer.mlp.c_fc if family == "gpt2" else layer.mlp.up_proj
            prune.l1_unstructured(linear, "weight", amount=0.5)
    ids = tiny.tokens([23])[0]
    got = zsaa.enable(models[0], alpha=ALPHA, tau=TAU)(ids).logits[0]
    close(got, by_reference(family, ids[0], model=models[1]), rtol=1e-3, atol=1e-3)


@few
def test_a_data_set_that_was_mapped_at_another_alpha_is_not_taken_for_this_one(family):
    """datasets finds a finished map by a hash of the function, and of the model in it."""
    model = dialed(family)
    hashes = [Hasher.hash(model)]
    zsaa.set_alpha(model, 0.9)
    hashes.append(Hasher.hash(model))
    for alpha in (0.3, 0.2):
        with zsaa.at(model, alpha):
            hashes.append(Hasher.hash(model))
    assert len(set(hashes)) == 4
    model(tiny.tokens([23])[0])
    assert Hasher.hash(model) == hashes[1]


def test_two_decoders_in_one_module_are_refused_by_name():
    pair = torch.nn.ModuleDict({"student": tiny.make("llama"), "teacher": tiny.make("llama", seed=1)})
    with pytest.raises(zsaa.UnsupportedModelError, match=r"2 decoders \(student.model, teacher.model\)"):
        zsaa.enable(pair, alpha=ALPHA)
    encoder, config = tiny.make("gpt2", "base"), tiny.CONFIGS["gpt2"]()
    config.add_cross_attention = config.is_decoder = True
    both = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.GPT2LMHeadModel(config))
    with pytest.raises(zsaa.UnsupportedModelError, match="2 decoders"):
        zsaa.enable(both, alpha=ALPHA)
    zsaa.enable(pair["student"], alpha=ALPHA)
    shared = torch.nn.ModuleDict({"one": pair["student"], "again": pair["student"]})
    zsaa.set_alpha(shared, 0.5)
    assert zsaa.dial.settings(pair["student"])["alpha"] == 0.5
