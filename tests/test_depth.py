"""Fewer layers: distances against plain arithmetic, and models without layers against models built without them."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn
from transformers import GPT2LMHeadModel

import zsaa
from ablation import peers
from zsaa.data.corpora import Corpus
from zsaa.depth import origin_of, remove_layers, similarity, study
from zsaa.dial import settings, trained_for
from zsaa.families import find_decoder


def batch(lengths, padding="right"):
    ids, mask, _ = tiny.tokens(lengths, padding=padding)
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def plain(model, rows):
    """Angular distances and influences one text at a time, from transformers' own hidden states."""
    decoder, family = find_decoder(model)
    layers = len(getattr(decoder, family.layers))
    angles, alike, tokens = torch.zeros(layers + 1, layers + 1, dtype=torch.float64), [0.0] * layers, 0
    ends = []
    getattr(decoder, family.layers)[-1].register_forward_hook(lambda m, a, out: ends.append(out))
    for row in rows:
        states = [*decoder(input_ids=row[None], output_hidden_states=True).hidden_states[:-1], ends[-1]]
        states = [state.double() for state in states]
        for low in range(layers + 1):
            for high in range(low, layers + 1):
                a, b = states[low][0, -1], states[high][0, -1]
                angles[low, high] += math.acos(min(1, float(a @ b / (a.norm() * b.norm())))) / math.pi
        for layer in range(layers):
            for a, b in zip(states[layer][0], states[layer + 1][0]):
                alike[layer] += float(a @ b / (a.norm() * b.norm()))
        tokens += len(row)
    return angles / len(rows), [1 - total / tokens for total in alike]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_similarity_is_that_of_plain_arithmetic(family, padding):
    # Gemma 2's eager attention says NaN of left padding in float64: the mask's least number is -inf in its softmax.
    model = tiny.make(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    lengths = [7, 12, 5]
    given = batch(lengths, padding)
    found = similarity(model, [{k: v[:2] for k, v in given.items()}, {k: v[2:] for k, v in given.items()}])
    rows = [ids[mask.bool()] for ids, mask in zip(given["input_ids"], given["attention_mask"])]
    angles, influence = plain(model, rows)
    upper = torch.ones_like(angles).triu(1).bool()
    torch.testing.assert_close(found.angular[upper], angles[upper], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found.influence, torch.tensor(influence, dtype=torch.float64), atol=1e-6, rtol=1e-6)
    assert (found.texts, found.tokens, found.num_layers) == (3, sum(lengths), 4)


def test_the_best_block_is_the_one_of_least_distance():
    model = tiny.make("llama")
    found = similarity(model, [batch([9, 9])])
    for n in (1, 2):
        for spare in (True, False):
            starts = [start for start in range(1, 4) if start + n <= 4 - spare]
            best = min(starts, key=lambda start: found.angular[start, start + n])
            assert found.block(n, spare) == list(range(best, best + n))
    assert found.block(3, spare_last=False) == [1, 2, 3]
    least = found.least_influential(2)
    others = [layer for layer in (1, 2, 3) if layer not in least]
    assert max(found.influence[least]) <= min(found.influence[others])


def test_peers_would_remove_the_same_layers():
    """As PruneMe and ShortGPT compute them from transformers' own states."""
    draw = torch.Generator().manual_seed(0)
    model = tiny.make("llama", layers=8)
    for layer in model.model.layers:  # so that the last one changes most, as in models that were trained
        layer.mlp.down_proj.weight.data *= float(torch.rand((), generator=draw)) * 0.8
    model.model.layers[-1].mlp.down_proj.weight.data *= 50
    batches = [{"input_ids": torch.randint(3, 90, (1, 9 + i), generator=draw)} for i in range(4)]
    rows = peers.compared(model, batches, (1, 2, 3, 5))
    assert [row["variant"] for row in rows] == ["PruneMe", "ShortGPT"] * 4
    assert all(row["same"] and row["apart"] < 1e-6 for row in rows)
    assert rows[0]["layers"] != [1] and len(rows[-1]["layers"]) == 5
    assert peers.named([1, 2, 3, 7]) == "1 to 3, 7"


@pytest.mark.parametrize(("n", "spare", "most"), [(0, True, 2), (3, True, 2), (4, False, 3), (True, True, 2)])
def test_a_block_that_is_not_there_is_refused(n, spare, most):
    found = similarity(tiny.make("llama"), [batch([5])])
    with pytest.raises(ValueError, match=rf"n = {n!r} layers of 4: choose 1 to {most} \(the first"):
        found.block(n, spare)


def test_a_layer_that_changes_nothing_has_no_influence():
    model = tiny.make("llama")
    layer = model.model.layers[2]
    nn.init.zeros_(layer.self_attn.o_proj.weight)
    nn.init.zeros_(layer.mlp.down_proj.weight)
    found = similarity(model, [batch([9, 6])])
    assert found.block(1) == [2] == found.least_influential(1)
    assert found.influence[2] < 1e-12 and found.angular[2, 3] < 1e-6
    given = batch([9, 6])
    before = model(**given).logits
    torch.testing.assert_close(remove_layers(model, found.block(1))(**given).logits, before)


def test_pruned_passes_have_no_states_to_compare():
    model = zsaa.enable(tiny.make("llama"), alpha=0.5, tau=2)
    with pytest.raises(ValueError, match=r"alpha is 0\.5: dropped tokens have no state"):
        similarity(model, [batch([9])])
    with zsaa.at(model, 1.0):
        on = similarity(model, [batch([9])])
    torch.testing.assert_close(on.angular, similarity(tiny.make("llama"), [batch([9])]).angular, equal_nan=True)
    with pytest.raises(ValueError, match="no batches were given"):
        similarity(tiny.make("llama"), [])


def test_layers_that_do_not_run_are_not_compared():
    model = zsaa.enable(tiny.make("llama"), depth=4)
    with (
        zsaa.at(model, depth=2),
        pytest.raises(ValueError, match=r"depth is 2: .* no states.*zsaa.at\(model, depth=4\)"),
    ):
        similarity(model, [batch([9])])
    assert similarity(model, [batch([9])]).num_layers == 4


def test_modules_keep_their_modes():
    model = tiny.make("gpt2", dropout=0.5)
    want = similarity(model, [batch([9])]).influence
    model.train().transformer.h[1].eval()
    assert torch.equal(similarity(model, [batch([9])]).influence, want), "nothing is dropped out"
    assert model.training and not model.transformer.h[1].training and model.transformer.h[2].training


@pytest.mark.parametrize("head", tiny.HEADS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_left_is_the_model_of_fewer_layers(family, head):
    """A model of the same class with three layers, given the weights of layers 0, 2 and 3, agrees in every bit."""
    whole = tiny.make(family, head)
    weights = {}
    for name, tensor in whole.state_dict().items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in ("h", "layers")), None)
        if place is not None:
            number = int(parts[place + 1])
            if number == 1:
                continue
            parts[place + 1] = str(max(0, number - 1))
        weights[".".join(parts)] = tensor
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in (0, 2, 3)]
    options = dict(attn_implementation=whole.config._attn_implementation, dtype=torch.float64)
    small = tiny.HEADS[head].from_config(config, **options).eval()
    small.load_state_dict(weights)
    given = batch([9, 14, 7])
    removed = remove_layers(whole, [1])
    assert torch.equal(removed(**given)[0], small(**given)[0])
    assert origin_of(removed) == [0, 2, 3] and removed.config.num_hidden_layers == 3
    for model in (removed, small):
        zsaa.enable(model, alpha=0.6, tau=2)
    assert torch.equal(removed(**given)[0], small(**given)[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_generates_saves_and_loads_as_a_stock_model(family, tmp_path):
    model = remove_layers(remove_layers(tiny.make(family), [2]), [1])
    assert origin_of(model) == [0, 3]
    ids, mask, _ = tiny.tokens([9, 9])
    options = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    text = model.generate(ids, **options)
    assert torch.equal(text, model.generate(ids, **options, use_cache=False)), "caches know their layers"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=model.config._attn_implementation
    )
    assert torch.equal(again.generate(ids, **options), text) and origin_of(again) == [0, 3]


def test_depths_of_the_whole_model_are_none_of_what_is_left(tmp_path):
    model = zsaa.enable(tiny.make("llama"), depth=3)
    trained_for(model, (0.5, 1.0), (2, 4))
    model.save_pretrained(tmp_path)
    again = remove_layers(type(tiny.make("llama")).from_pretrained(tmp_path), [1, 2])
    kept = settings(zsaa.enable(again))
    assert kept["depth"] is None and kept["depth_range"] is None and kept["alpha_range"] == (0.5, 1.0)


def test_attention_that_is_scaled_by_a_layers_number_is_refused(tmp_path):
    """In a file these layers would have other numbers, and another scale."""
    config = copy.deepcopy(tiny.make("gpt2").config)
    config.scale_attn_by_inverse_layer_idx = True
    model = GPT2LMHeadModel(config).double().eval()
    with pytest.raises(NotImplementedError, match="scale_attn_by_inverse_layer_idx.*the last layers alone"):
        remove_layers(model, [1])
    assert len(model.transformer.h) == 4
    ids = tiny.tokens([9])[0]
    remove_layers(model, [2, 3]).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_an_adapter_of_the_whole_model_does_not_fit(tmp_path):
    """PEFT names layers by number, and would put it on other layers without a word."""
    import peft

    from zsaa.models.adapters import put_on
    from zsaa.models.errors import AssetError

    peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert put_on(tiny.make("llama"), tmp_path).peft_config
    with pytest.raises(AssetError, match="layer 3.*has layers 0 to 2"):
        put_on(remove_layers(tiny.make("llama"), [1]), tmp_path)


def test_a_shared_configuration_stays_as_it_is():
    model = tiny.make("qwen2")
    other = type(model)(model.config)
    remove_layers(model, [3])
    assert other.config.num_hidden_layers == 4 and len(other.config.layer_types) == 4
    assert model.config is model.model.config and len(model.config.layer_types) == 3
    assert getattr(other.config, "zsaa_layers", None) is None


@pytest.mark.parametrize("layers", [[], [0], [4], [-1], [1, 1], [1.5], [True]])
def test_layers_that_cannot_go_are_named(layers):
    model = tiny.make("llama")
    with pytest.raises(ValueError, match="of 4 cannot be removed: give different whole numbers from 1 to 3"):
        remove_layers(model, layers)
    assert len(model.model.layers) == 4


def test_what_must_come_after_is_refused():
    import peft

    on = zsaa.enable(tiny.make("llama"))
    with pytest.raises(RuntimeError, match=r"call zsaa\.disable\(model\), remove layers"):
        remove_layers(on, [1])
    remove_layers(zsaa.disable(on), [1])
    adapted = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(RuntimeError, match="carries PEFT adapters"):
            remove_layers(model, [1])


def test_it_trains_with_gradient_checkpointing():
    plain_, checked = (remove_layers(tiny.make("llama"), [1]).train() for _ in range(2))
    checked.gradient_checkpointing_enable()
    ids, mask, _ = tiny.tokens([9, 7])
    for model in (plain_, checked):
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for a, b in zip(plain_.parameters(), checked.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


WORDS = " ".join(f"w{3 + (7 * i) % 94}" for i in range(2000)).split()


@pytest.fixture
def small(monkeypatch):
    """A tiny model and a tiny corpus in place of those that the study loads."""
    texts = [" ".join(WORDS[40 * i : 40 * i + 300]) for i in range(12)]
    corpus = Corpus("wikitext-103", "words", texts[:8], texts[4:], False, "here: words", True, "WikiText-103")
    monkeypatch.setattr(study, "load_corpus", lambda *_, **__: corpus)
    monkeypatch.setattr(study, "load_model", lambda *_, **__: (tiny.make("llama"), tiny.tokenizer()))


def test_the_study_measures_what_it_says(small, tmp_path):
    result = study.run("tiny", "wikitext-103", "auto", 5, 6, tmp_path, "python -m zsaa.depth")
    assert result["similarity"]["texts"] == 5 and result["similarity"]["tokens"] == 5 * 256
    stock, *rows = result["rows"]
    assert (stock["variant"], stock["removed"], stock["ratio"]) == ("stock", 0, 1.0)
    assert {(row["way"], row["removed"]) for row in rows} == {(way, n) for way in study.WAYS for n in (1, 2)}
    samples = study.windows(study.load_corpus(), tiny.tokenizer(), count=6)
    for row in result["rows"]:
        model = tiny.make("llama")
        model = remove_layers(model, row["layers"]) if row["layers"] else model
        nll = 0.0
        for window in samples:
            with torch.no_grad():
                logits = model(torch.tensor([window.ids])).logits[0].double().log_softmax(-1)
            nll -= sum(float(logits[t - 1, window.ids[t]]) for t in range(224, 256))
        assert row["perplexity"] == pytest.approx(math.exp(nll / (6 * 32)), rel=1e-4), row["variant"]
        assert row["mac_reduction"] == pytest.approx(4 / (4 - row["removed"]), abs=1e-4)
        assert row["ratio_ci95"][0] <= row["ratio"] <= row["ratio_ci95"][1]
    assert study.run("tiny", "wikitext-103", "auto", 5, 6, tmp_path, "again") == result, "found again"


def test_the_command_names_the_corpus_and_its_source(monkeypatch):
    said = []
    monkeypatch.setattr(study, "run", lambda *given: said.append(given[-1]))
    study.main([]), study.main(["--corpus", "ptb", "--source", "hub", "--texts", "5"])
    whole = "python -m zsaa.depth --model smollm2-135m"
    assert said == [f"{whole} --texts 64 --windows 200", f"{whole} --texts 5 --windows 200 --corpus ptb --source hub"]


def test_its_figure_says_what_it_shows(small, tmp_path):
    from zsaa.kit import figures

    result = study.run("tiny", "wikitext-103", "auto", 5, 6, tmp_path, "python -m zsaa.depth")
    figure = figures.depth_figure(result)
    figures.save_figure(figure, tmp_path / "depth")
    said = (tmp_path / "depth.txt").read_text()
    assert "Fewer layers of tiny, untuned" in said and "n = 6 windows" in said and "1: layers" in said
    heat, cost, *_ = figure.axes
    assert [line.get_label() for line in cost.lines] == ["block, angular distance", "least influence", "top layers"]
    assert heat.get_ylabel() == "layers in the block"


def test_the_whole_model_stays_whole():
    model = tiny.make("llama")
    less = study.without(model, [1, 2])
    assert len(model.model.layers) == 4 and len(less.model.layers) == 2
    assert less.model.layers[1].mlp.up_proj.weight is model.model.layers[3].mlp.up_proj.weight, "no second copy"
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize(("count", "length"), [(13, 256), (1, 301)])
def test_too_few_texts_to_compare_layers_on_are_refused(count, length):
    texts = [" ".join(WORDS[:300])] * 12
    with pytest.raises(ValueError, match=rf"texts have {length} tokens: ask for fewer than {count}"):
        study.calibration(tiny.tokenizer(), texts, count, length)


def test_an_unknown_way_is_named():
    found = similarity(tiny.make("llama"), [batch([5])])
    with pytest.raises(ValueError, match="unknown way 'first' to choose layers; these are known: block, influence"):
        study.chosen(found, "first", 1)
