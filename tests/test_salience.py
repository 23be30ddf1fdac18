"""The learned score: equal to plain references, taught by gradients, saved apart, and refused where it cannot judge."""

import contextlib
import copy
import sys
from pathlib import Path

import peft
import pytest
import reference
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_graphs import everything, held, on_gpu, same, stand_in  # noqa: F401 - a fixture

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import forward
from ablation import scorers as bench_scorers
from ablation import variants as bench
from zsaa import finetune
from zsaa.cost import prices
from zsaa.dial import settings
from zsaa.finetune import Recipe
from zsaa.learned import salience
from zsaa.learned.salience import FILE, Salience
from zsaa.rule import SPREAD, kept_counts

ALPHA = 0.7
LENGTHS = [23, 60, 9]


def opinionated(scorer, seed=0):
    """`scorer` with weights as from training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return scorer.eval()


def trained(config, layers=range(4)):
    return opinionated(Salience(config, layers))


def model_of(family="llama", head="sequence-classification", alpha=1.0, **kwargs):
    model = tiny.make(family, head, **kwargs)
    salience.attach(model, trained(model.config))
    return zsaa.enable(model, alpha=alpha, tau=3, score="salience")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_equals_the_masked_reference(family):
    """Kept positions and final states, by a reference that gathers nothing and asks the same heads."""
    model = tiny.make(family, "base", attn_implementation="eager")
    judge, ids = trained(model.config), tiny.tokens([40])[0]
    with torch.no_grad():
        want, kept = reference.run(model, ids[0], 0.7, tau=3, score=judge)
    salience.attach(model, judge)
    zsaa.enable(model, 0.7, tau=3, score="salience")
    with zsaa.trace(model) as t, torch.no_grad():
        found = model(ids).last_hidden_state[0]
    assert [layer[0].tolist() for layer in t.kept] == kept and len(kept[-1]) < 10
    torch.testing.assert_close(found[kept[-1]], want[kept[-1]], rtol=1e-5, atol=1e-5)
    zsaa.enable(model, score="column_sum")
    with zsaa.trace(model) as t, torch.no_grad():
        model(ids)
    assert [layer[0].tolist() for layer in t.kept] != kept, "another score keeps others"


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("schedule", SPREAD)
def test_it_equals_the_bench(family, padding, schedule):
    """Kept positions and hidden states, with a scorer of the bench's own."""
    model = tiny.make(family, "base")
    judge = opinionated(bench_scorers.Probe(model.config.hidden_size, range(4), wide=True))
    variant = bench.Variant(tau=3, schedule=schedule)
    want, trail = forward.forward(model, tiny.tokens(LENGTHS)[0], LENGTHS, ALPHA, variant, scorer=judge)
    mine = Salience(model.config, range(4))
    mine.load_state_dict(judge.state_dict())
    salience.attach(model, mine.eval())
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    zsaa.enable(model, ALPHA, tau=3, score="salience", schedule=schedule)
    with zsaa.trace(model) as t, torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    for sample, n in enumerate(LENGTHS):
        kept = [layer[sample][layer[sample] >= 0].tolist() for layer in trail]
        assert kept == [layer[sample].tolist() for layer in t.kept]
        rows = found[sample][mask[sample] == 1]
        torch.testing.assert_close(rows[kept[-1]], want[sample, : len(kept[-1])], rtol=1e-6, atol=1e-6)
        assert len(kept[-1]) < n


def test_padding_and_batch_mates_change_nothing():
    model = model_of(alpha=ALPHA)
    ids, mask, positions = tiny.tokens(LENGTHS)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for sample, n in enumerate(LENGTHS):
            torch.testing.assert_close(model(ids[sample : sample + 1, :n]).logits[0], together[sample])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_decoding_goes_on_behind_such_a_prefill(family):
    """Token by token or in one piece; every layer caches what entered it."""
    model = tiny.make(family, "base")
    salience.attach(model, trained(model.config))
    zsaa.enable(model, ALPHA, tau=3, score="salience")
    ids, _, _ = tiny.tokens([30, 30])
    with torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
        rows = [layer.keys.shape[-2] for layer in cache.layers]
        found = model(ids[:, 24:], past_key_values=cache).last_hidden_state
        step, again = [], model(ids[:, :24], use_cache=True).past_key_values
        for i in range(24, 30):
            step.append(model(ids[:, i : i + 1], past_key_values=again).last_hidden_state)
    assert rows == [24, *kept_counts(24, ALPHA, 4, 3)[:-1]] and rows[1] < 24
    torch.testing.assert_close(torch.cat(step, 1), found, rtol=1e-5, atol=1e-5)


def test_embeddings_do_as_well_as_tokens():
    model, ids = model_of(alpha=0.7), tiny.tokens([40])[0]
    with torch.no_grad():
        want = model(ids).logits
        assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, want)


# ------------------------------------------------------------------------------------------- the teacher


def watched(model, lengths=LENGTHS, padding="right"):
    """What a loss notes, and the mask; the loss of each text counts differently."""
    ids, mask, _ = tiny.tokens(lengths, padding=padding)
    scorer = salience.scorer_of(model) or salience.attach(model, trained(model.config))
    with salience.watch(model, scorer) as entered:
        logits = model(input_ids=ids, attention_mask=mask).logits
        (logits[:, 0] * torch.arange(1.0, 1 + len(ids))).sum().backward()
    return entered, mask.bool()


@pytest.mark.parametrize("asked", [False, True])
def test_the_caller_s_tensor_is_left_as_it_was(asked):
    """And gets the gradient that it asked for."""
    model = tiny.make("llama", "sequence-classification").requires_grad_(False)
    states = model.get_input_embeddings()(tiny.tokens([20])[0]).detach().requires_grad_(asked)
    scorer, found = salience.attach(model, trained(model.config)), []
    for watching in (True, False):
        states.grad = None
        with salience.watch(model, scorer) if watching else contextlib.nullcontext({}) as entered:
            score = model(inputs_embeds=states).logits[:, 0].sum()
            if watching or asked:
                score.backward()
        found.append(states.grad)
        assert states.requires_grad is asked and not states._backward_hooks
        assert not watching or (len(entered) == 4 and all(pull.any() for _, pull in entered.values()))
    assert torch.equal(*found) if asked else found == [None, None]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_shares_are_those_of_state_times_gradient(family, padding):
    """Against gradients that autograd is asked for, state by state, in float64; and the loss, written out."""
    model = tiny.make(family, "sequence-classification", dropout=0.0)
    entered, real = watched(model, padding=padding)
    ids, mask, _ = tiny.tokens(LENGTHS, padding=padding)
    stock = tiny.make(family, "sequence-classification", dropout=0.0)
    output = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    total = (output.logits[:, 0] * torch.arange(1.0, 4)).sum()
    states = output.hidden_states[:4]  # what enters each layer
    gradients = torch.autograd.grad(total, states)
    scorer, want = salience.scorer_of(model), 0.0
    assert sorted(entered) == [0, 1, 2, 3]
    for layer, (state, gradient) in enumerate(zip(states, gradients)):
        pull = (state * gradient).sum(-1).abs()
        torch.testing.assert_close(entered[layer][1][real], pull[real].float(), rtol=1e-4, atol=1e-6)
        for sample, n in enumerate(LENGTHS):
            share = pull[sample][real[sample]] / pull[sample][real[sample]].sum()
            scores = scorer(layer, state[sample : sample + 1])[0][real[sample]]
            assert len(share) == n
            want = want - (share * scores.double().log_softmax(0)).sum() / 3
    torch.testing.assert_close(scorer.loss(entered, real).double(), want, rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in reference.parts(model)[1]), "the hooks are gone"


@pytest.mark.parametrize("change", ["lora", "checkpointing", "both"])
def test_frozen_embeddings_and_checkpointing_change_no_share(change):
    want, real = watched(tiny.make("llama", "sequence-classification"))
    model = tiny.make("llama", "sequence-classification")
    if change != "checkpointing":  # fresh adapters say nothing yet
        model = finetune.add_lora(model, Recipe(tuning="lora", dropout=0.0))
    if change != "lora":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, _ = watched(model.train())
    for layer in range(4):
        for one, other in zip(found[layer], want[layer]):
            torch.testing.assert_close(one[real], other[real], rtol=1e-5, atol=1e-7)
        assert found[layer][1].sum(1).min() > 0


def test_a_fresh_one_is_the_bench_s():
    model = tiny.make("llama", "sequence-classification")
    size, made = model.config.hidden_size, []
    torch.manual_seed(0)
    made.append(bench_scorers.Probe(size, range(4), wide=True).state_dict())
    torch.manual_seed(0)
    bench_scorers.Probe(size, range(4))  # the bench draws linear heads first, and puts others in their place
    made.append(salience.fresh(model).state_dict())
    assert list(made[0]) == list(made[1]) and {"heads.3.1.0.weight", "heads.3.1.2.bias"} <= set(made[0])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_it_keeps_the_tokens_that_its_lessons_name():
    """Token 7, anywhere. Behind layer 2, where a third is left, it stays; not so by the heads as they began, nor by the
    attention that it receives. Lessons that gradients give are those above, and in test_recipes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 97, (100, 24), generator=generator)
    ids[range(100), torch.randint(0, 23, (100,), generator=generator)] = 7
    lessons, held_out = ids[:60], ids[60:]
    model = tiny.make("llama", "base", dtype=torch.float32)
    torch.manual_seed(0)
    scorer = salience.attach(model, salience.fresh(model))
    zsaa.enable(model, 1.0, tau=2, score="salience")

    def stays():
        with zsaa.at(model, 0.6), zsaa.trace(model) as t, torch.no_grad():
            model(held_out)
        return held_out.gather(1, torch.stack(list(t.kept[1]))).eq(7).any(1).float().mean()

    as_it_began = stays()
    with torch.no_grad():
        states = model(lessons, output_hidden_states=True).hidden_states[:4]
    entered = {layer: (state, (lessons == 7) + 0.01) for layer, state in enumerate(states)}
    optimizer = torch.optim.AdamW(scorer.groups())
    for _ in range(100):
        optimizer.zero_grad()
        scorer.loss(entered, torch.ones_like(lessons, dtype=torch.bool)).backward()
        optimizer.step()
    learned = stays()
    zsaa.enable(model, score="column_sum")
    assert learned > 0.8 and as_it_began < 0.3 and stays() < 0.3, (learned, as_it_began, stays())


# ------------------------------------------------------------------------------ in a model, and in a file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_stays_in_float32(dtype):
    model = model_of(dtype=torch.float32, alpha=0.06)
    before = copy.deepcopy(model.model.salience.state_dict())
    model = model.to(dtype)
    assert all(p.dtype == torch.float32 for p in model.model.salience.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.model.salience.state_dict().items())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert model(tiny.tokens([40])[0]).logits.isfinite().all()


def test_macs_are_the_bench_s():
    """Those of two products per row that enters a layer which drops some."""
    config = tiny.CONFIGS["llama"]()
    price = bench_scorers.price("wide", config, bench.Variant(), 2)
    assert prices(config, "salience").scored == 32 * 64 + 64 == price[0] and prices(config).scored == 0
    for schedule in SPREAD:
        for n, alpha in ((700, 0.9), (512, 0.8), (60, 0.4)):
            variant = bench.Variant(schedule=schedule, scorer_macs=price)
            found = zsaa.macs(config, n, alpha, 5, "salience", schedule)
            assert found == bench.macs(config, n, alpha, variant) > zsaa.macs(config, n, alpha, schedule=schedule)


def test_the_bench_s_heads_are_enough():
    for layers in (4, 12, 30):
        config = transformers.LlamaConfig(num_hidden_layers=layers)
        for schedule in SPREAD:
            assert set(range(layers)) <= set(bench_scorers.dropping(config, bench.Variant(schedule=schedule)))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_is_saved_apart_and_comes_back(adapter, tmp_path):
    base = tmp_path / "base"
    tiny.make("llama", "sequence-classification", dtype=torch.float32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    if adapter:
        model = finetune.add_lora(model, Recipe(tuning="lora"))
    salience.attach(model, trained(model.config))
    zsaa.enable(model.eval(), 1.0, tau=3, score="salience")
    ids = tiny.tokens([50])[0]
    with zsaa.at(model, 0.05), torch.no_grad():
        want = model(ids).logits
    folder = tmp_path / "model"
    finetune.save(model, tiny.tokenizer(), folder)
    assert (folder / FILE).is_file()
    weights = load_file(folder / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    assert not any("salience" in name for name in weights)
    again, _ = finetune.load(folder, kind="sequence-classification", dtype=torch.float32)
    assert settings(again) == {**settings(model), "alpha": 1.0}
    with zsaa.at(again, 0.05), torch.no_grad():
        torch.testing.assert_close(again(ids).logits, want)
    if adapter:
        stock = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        stock = peft.PeftModel.from_pretrained(stock, folder)
    else:
        stock, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not report["unexpected_keys"] and not report["missing_keys"]
        with zsaa.at(zsaa.enable(stock), 0.05), torch.no_grad():  # by the folder that its config names
            torch.testing.assert_close(stock(ids).logits, want)
        zsaa.disable(stock)
        assert not hasattr(stock.model, "salience")


def test_a_plain_save_leaves_it_out_and_says_how_to_keep_it(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    assert not any("salience" in name for name in load_file(tmp_path / "model.safetensors"))
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="finetune.save does not"):
        zsaa.enable(stock)
    zsaa.enable(stock, score="column_sum")


def test_without_a_scorer_there_is_advice_and_nothing_changes():
    model = tiny.make("llama", "sequence-classification")
    with pytest.raises(
        ValueError, match=r'is learned, and this model has none.*fine_tune and Recipe.named\("zsaa\+"\)'
    ):
        zsaa.enable(model, score="salience")
    assert not hasattr(model.model, "_zsaa")


def test_a_scorer_that_lacks_heads_is_refused():
    model = tiny.make("llama", "sequence-classification")
    salience.attach(model, trained(model.config, layers=[0]))
    zsaa.enable(model)
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3\].*has no head \(it has \[0\]\)"):
        zsaa.enable(model, score="salience")
    assert settings(model)["score"] == "column_sum"


@pytest.mark.parametrize("change", ["width", "depth", "bias", "empty"])
def test_a_file_of_another_model_is_refused(change, tmp_path):
    config = tiny.CONFIGS["llama"]()
    weights = trained(config).state_dict()
    if change == "width":
        weights = {k: v[..., :5].contiguous() for k, v in weights.items()}
    elif change == "depth":
        weights |= {k.replace(".3.", ".4."): v.clone() for k, v in weights.items() if "heads.3." in k}
    elif change == "bias":
        weights = {k: v for k, v in weights.items() if not k.endswith("2.bias")}
    save_file({} if change == "empty" else weights, tmp_path / FILE)
    with pytest.raises(ValueError, match="is not a scorer for this llama"):
        salience.read(config, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_of_the_bench_s_is_read_as_it_is(dtype, tmp_path):
    config = tiny.CONFIGS["llama"]()
    saved = opinionated(bench_scorers.Probe(config.hidden_size, range(4), wide=True)).to(dtype).state_dict()
    save_file(saved, tmp_path / FILE)
    found = salience.read(config, tmp_path).state_dict()
    assert all(torch.equal(found[name], weights.float()) for name, weights in saved.items())


def test_linear_heads_of_earlier_versions_are_refused(tmp_path):
    config = tiny.CONFIGS["llama"]()
    save_file(bench_scorers.Probe(config.hidden_size, range(1, 4)).state_dict(), tmp_path / FILE)
    with pytest.raises(ValueError, match=r'no hidden layer, as in earlier versions.*anew.*Recipe.named\("zsaa\+"\)'):
        salience.read(config, tmp_path)


def test_the_dial_keeps_its_promises_with_it():
    """Copies, other scores and back, disable, alpha = 1."""
    model, ids = model_of(), tiny.tokens([50])[0]
    stock = tiny.make("llama", "sequence-classification")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
        with zsaa.at(model, 0.05):
            want = model(ids).logits
            assert torch.equal(copy.deepcopy(model)(ids, alpha=0.05).logits, want)
            zsaa.enable(model, score="column_sum")
            assert not torch.equal(model(ids).logits, want)
            zsaa.enable(model, score="salience")
            assert torch.equal(model(ids).logits, want)
        zsaa.disable(model)
        assert model.state_dict().keys() == stock.state_dict().keys()
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_recordings_read_the_tokens_of_every_call(stand_in):  # noqa: F811
    model = model_of(head="causal-lm", alpha=0.05, dtype=torch.float32)
    inputs = [dict(zip(("input_ids", "attention_mask"), tiny.tokens([50, 33], seed=seed))) for seed in range(4)]
    with torch.no_grad():
        outputs = [model(**given).logits for given in inputs]
        assert [g["replays"] for g in zsaa.captured(model)["graphs"]] == [3] and zsaa.captured(model)["off"] is None
        zsaa.enable(model, graphs=False)
        for given, output in zip(inputs, outputs):
            assert torch.equal(model(**given).logits, output)


@pytest.mark.full
def test_it_compiles():
    model, ids = model_of(alpha=0.05, dtype=torch.float32), tiny.tokens([50])[0]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        model.forward = torch.compile(model.forward, backend="eager")
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)


@on_gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_on_a_gpu_it_keeps_what_the_cpu_keeps(family):
    """In float32, with the row kernels, beside PyTorch in float64."""
    ids, mask, positions = tiny.tokens([230, 60, 9], padding="left")
    found = {}
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = model_of(family, alpha=ALPHA).to(device, dtype)
        with zsaa.trace(model) as t:
            given = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
            logits = model(**{name: x.to(device) for name, x in given.items()}).logits
        found[device] = [[kept.tolist() for kept in layer] for layer in t.kept], logits.cpu().double()
    assert found["cuda"][0] == found["cpu"][0]
    torch.testing.assert_close(found["cuda"][1], found["cpu"][1], rtol=1e-4, atol=1e-4)


@on_gpu
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("lengths", [[23, 9, 30], [200, 200]], ids=str)
@torch.inference_mode()
def test_real_graphs_replay_it_bit_for_bit(head, lengths):
    """In half precision, as on a T4."""
    model, plain = (zsaa.enable(model_of("llama", head, alpha=ALPHA).half().cuda(), graphs=on) for on in (True, False))
    for seed in range(3):
        ids, mask, positions = (x.cuda() for x in tiny.tokens(lengths, seed, "left"))
        given = dict(attention_mask=mask, position_ids=positions)
        same(everything(model(ids, **given)), everything(plain(ids, **given)))
    assert zsaa.captured(model)["off"] is None
    assert [replays for *_, replays in held(model)] == [3]
