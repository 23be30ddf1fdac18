"""The learned score: equal to the ablation's plain forward pass, saved apart, and refused where it cannot judge."""

import copy
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_graphs import stand_in  # noqa: F401 - a fixture

sys.path.insert(0, str(Path(__file__).parent.parent))  # ablation/ stands beside the package, not in it

import zsaa
from ablation import forward as bench
from ablation import train as bench_train
from zsaa import evidence, finetune
from zsaa.dial import settings
from zsaa.evidence import FILE, Evidence
from zsaa.keep import SCHEDULES, dropping_layers, kept_counts, scorer_macs

ALPHA = {"geometric": 0.7, "once": 0.06, "deep": 0.1}  # short texts keep tokens by a budget
LENGTHS = [23, 60, 9]


def trained(config, layers=range(4), seed=0, bias=False):
    """A scorer with an opinion, as from training; in the bench's own class where it has a bias."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = bench_train.Evidence(config, layers, 2) if bias else Evidence(config, layers, 2)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def model_of(family="llama", schedule="once", head="sequence-classification", alpha=1.0, **kwargs):
    model = tiny.make(family, head, **kwargs)
    evidence.attach(model, trained(model.config))
    return zsaa.enable(model, alpha=alpha, tau=3, score="evidence", schedule=schedule)


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return request.param


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_it_equals_the_bench(family, schedule, bias, padding, monkeypatch):
    """Kept positions and hidden states, with a scorer of the bench's own; its plan is the package's here."""
    monkeypatch.setattr(bench, "counts", lambda n, a, layers, v: kept_counts(n, a, layers, v.tau, schedule))
    model = tiny.make(family, "base")
    judge = trained(model.config, bias=True)
    if not bias:
        for head in judge.heads.values():
            head["votes"].bias.data.zero_()
    want, trail = bench.forward(
        model, tiny.tokens(LENGTHS)[0], LENGTHS, ALPHA[schedule], bench.Variant(tau=3), scorer=judge
    )
    mine = Evidence(model.config, range(4), 2, bias)
    mine.load_state_dict({k: v for k, v in judge.state_dict().items() if bias or not k.endswith("votes.bias")})
    evidence.attach(model, mine.eval())
    ids, mask, positions = tiny.tokens(LENGTHS, padding=padding)
    zsaa.enable(model, ALPHA[schedule], tau=3, score="evidence", schedule=schedule)
    with zsaa.trace(model) as t, torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    for sample, n in enumerate(LENGTHS):
        kept = [layer[sample][layer[sample] >= 0].tolist() for layer in trail]
        assert kept == [layer[sample].tolist() for layer in t.kept]
        rows = found[sample][mask[sample] == 1]
        torch.testing.assert_close(rows[kept[-1]], want[sample, : len(kept[-1])], rtol=1e-6, atol=1e-6)
        assert len(kept[-1]) < n or (n == 9 and schedule != "geometric")


def test_padding_and_batch_mates_change_nothing(schedule):
    model = model_of(schedule=schedule, alpha=ALPHA[schedule])
    ids, mask, positions = tiny.tokens(LENGTHS)
    with torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        for sample, n in enumerate(LENGTHS):
            torch.testing.assert_close(model(ids[sample : sample + 1, :n]).logits[0], together[sample])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_decoding_goes_on_behind_such_a_prefill(family):
    """Token by token or in one piece; every layer caches what entered it."""
    model = tiny.make(family, "base")
    evidence.attach(model, trained(model.config))
    zsaa.enable(model, 0.06, tau=3, score="evidence", schedule="once")
    ids, _, _ = tiny.tokens([30, 30])
    with torch.no_grad():
        cache = model(ids[:, :24], use_cache=True).past_key_values
        rows = [layer.keys.shape[-2] for layer in cache.layers]
        found = model(ids[:, 24:], past_key_values=cache).last_hidden_state
        step, again = [], model(ids[:, :24], use_cache=True).past_key_values
        for i in range(24, 30):
            step.append(model(ids[:, i : i + 1], past_key_values=again).last_hidden_state)
    assert rows == [24, *kept_counts(24, 0.06, 4, 3, "once")[:-1]] and rows[1] < 24
    torch.testing.assert_close(torch.cat(step, 1), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_it_stays_in_float32(dtype):
    model = model_of(dtype=torch.float32, alpha=0.06)
    before = copy.deepcopy(model.model.evidence.state_dict())
    model = model.to(dtype)
    assert all(p.dtype == torch.float32 for p in model.model.evidence.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.model.evidence.state_dict().items())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert model(tiny.tokens([40])[0]).logits.isfinite().all()


def test_macs_are_the_bench_s():
    config = tiny.CONFIGS["llama"]()
    assert scorer_macs(config, "evidence") == bench_train.Evidence.macs(config, config.num_labels)
    assert scorer_macs(config, "column_sum") == 0
    for n, alpha in ((700, 0.4), (512, 0.2), (60, 0.1)):
        variant = bench.Variant(schedule="deep", reference=512, scorer_macs=scorer_macs(config, "evidence"))
        assert kept_counts(n, alpha, 4, 5, "deep") == bench.counts(n, alpha, 4, variant)
        assert zsaa.macs(config, n, alpha, 5, "deep", "evidence") == bench.macs(config, n, alpha, variant)


def test_the_bench_s_heads_are_enough():
    for layers in (4, 12, 30):
        config = transformers.LlamaConfig(num_hidden_layers=layers)
        for name in SCHEDULES:
            variant = bench.Variant(schedule=name, reference=None if name == "geometric" else 512)
            assert set(dropping_layers(layers, name)) <= set(bench_train.dropping(config, variant))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_it_is_saved_apart_and_comes_back(adapter, tmp_path):
    base = tmp_path / "base"
    tiny.make("llama", "sequence-classification", dtype=torch.float32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    if adapter:
        model = finetune.add_lora(model, finetune.Recipe(tuning="lora"))
    evidence.attach(model, trained(model.config))
    zsaa.enable(model.eval(), 1.0, tau=3, score="evidence", schedule="once")
    ids = tiny.tokens([50])[0]
    with zsaa.at(model, 0.05), torch.no_grad():
        want = model(ids).logits
    folder = tmp_path / "model"
    finetune.save(model, tiny.tokenizer(), folder)
    assert (folder / FILE).is_file()
    weights = load_file(folder / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    assert not any("evidence" in name for name in weights)
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
        assert not hasattr(stock.model, "evidence")


def test_a_plain_save_leaves_it_out_and_says_how_to_keep_it(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    assert not any("evidence" in name for name in load_file(tmp_path / "model.safetensors"))
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="finetune.save does not"):
        zsaa.enable(stock)
    zsaa.enable(stock, score="column_sum")


def test_without_a_scorer_there_is_advice_and_nothing_changes():
    model = tiny.make("llama", "sequence-classification")
    with pytest.raises(
        ValueError, match=r'is learned, and this model has none.*fine_tune and Recipe.named\("zsaa\+"\)'
    ):
        zsaa.enable(model, score="evidence")
    assert not hasattr(model.model, "_zsaa")


def test_a_schedule_that_the_heads_do_not_cover_is_refused():
    model = tiny.make("llama", "sequence-classification")
    evidence.attach(model, trained(model.config, layers=[0]))
    zsaa.enable(model, score="evidence", schedule="once")
    with pytest.raises(ValueError, match=r"layers \[1, 2, 3\].*has no head \(it has \[0\]\)"):
        zsaa.enable(model, schedule="geometric")
    assert settings(model)["schedule"] == "once"


@pytest.mark.parametrize("change", ["width", "shape", "empty"])
def test_a_file_of_another_model_is_refused(change, tmp_path):
    config = tiny.CONFIGS["llama"]()
    weights = trained(config).state_dict()
    if change == "width":
        weights = {k: v[..., :5].contiguous() if "features.weight" in k else v for k, v in weights.items()}
    elif change == "shape":
        weights["table.weight"] = weights["table.weight"][:5].contiguous()
    save_file({} if change == "empty" else weights, tmp_path / FILE)
    with pytest.raises(ValueError, match="is not a scorer for this llama"):
        evidence.read(config, tmp_path)


def test_embeddings_alone_are_refused():
    model = model_of(alpha=0.06)
    embedded = model.get_input_embeddings()(tiny.tokens([40])[0])
    with pytest.raises(ValueError, match="inputs_embeds only.*choose another score"):
        model(inputs_embeds=embedded)
    zsaa.set_alpha(model, 1.0)
    model(inputs_embeds=embedded)


def test_the_dial_keeps_its_promises_with_it():
    """Copies, other scores and back, disable, alpha = 1."""
    model, ids = model_of(), tiny.tokens([50])[0]
    stock = tiny.make("llama", "sequence-classification")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)
        with zsaa.at(model, 0.05):
            want = model(ids).logits
            assert torch.equal(copy.deepcopy(model)(ids).logits, want)
            zsaa.enable(model, score="column_sum")
            assert not torch.equal(model(ids).logits, want)
            zsaa.enable(model, score="evidence")
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


def test_it_compiles():
    model, ids = model_of(alpha=0.05, dtype=torch.float32), tiny.tokens([50])[0]
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        model.forward = torch.compile(model.forward, backend="eager")
        torch.testing.assert_close(model(ids, use_cache=False).logits, want)
