"""The depth dial: the first layers of a model, against a model of which the others were removed."""

import threading
import warnings

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache

import zsaa
from zsaa import finetune
from zsaa.depth import remove_layers
from zsaa.dial import settings, trained_for

pytestmark = pytest.mark.filterwarnings("ignore:depth = .*this model was trained only as a whole")
TAU = 3


def make(family="llama", head="causal-lm", **options):
    # Gemma 2's eager attention says NaN of padding in float64: the mask's least number is -inf in its softmax.
    return tiny.make(family, head, dtype=torch.float32 if family == "gemma2" else torch.float64, **options)


def pair(family, depth, head="causal-lm", **options):
    """A model with the dial on, and the model of its first `depth` layers."""
    return zsaa.enable(make(family, head), tau=TAU, **options), zsaa.enable(
        first(family, depth, head), tau=TAU, **options
    )


def first(family, depth, head="causal-lm"):
    model = make(family, head)
    return remove_layers(model, range(depth, 4)) if depth < 4 else model


@pytest.mark.parametrize("head", tiny.HEADS)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_is_the_model_of_the_first_layers_bit_for_bit(family, alpha, head):
    """Prefill, hidden states and padding; alpha = 1 is the stock code of the shorter model."""
    ids, mask, positions = tiny.tokens([23, 9], padding="left")
    given = dict(attention_mask=mask, output_hidden_states=True)
    given |= {} if head == "sequence-classification" else {"position_ids": positions}
    for depth in (1, 2, 3, 4):
        model, less = pair(family, depth, head)
        with torch.no_grad():
            got, want = model(ids, alpha=alpha, depth=depth, **given), less(ids, alpha=alpha, **given)
        real = mask.bool() if head != "sequence-classification" else slice(None)
        assert torch.equal(got[0][real], want[0][real]), depth
        assert len(got.hidden_states) == len(want.hidden_states) == depth + 1
        for a, b in zip(got.hidden_states, want.hidden_states):
            assert torch.equal(a[mask.bool()], b[mask.bool()]), depth
    if alpha == 1:  # and that model without any dial
        with torch.no_grad():
            stock = first(family, 2, head)(ids, **given)
            assert torch.equal(model(ids, depth=2, **given)[0], stock[0]) or family == "gemma2"


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_generates_what_the_model_of_the_first_layers_generates(family, alpha, cached):
    model, less = pair(family, 2, alpha=alpha)
    ids, mask, _ = tiny.tokens([23, 9], padding="left")
    options = dict(attention_mask=mask, use_cache=cached, **tiny.QUIET)
    want = less.generate(ids, **options)
    assert torch.equal(model.generate(ids, depth=2, **options), want)
    with zsaa.at(model, depth=2):
        assert torch.equal(model.generate(ids, **options), want)
        beams = dict(num_beams=3, **options)
        assert torch.equal(model.generate(ids, **beams), less.generate(ids, **beams))
    assert torch.equal(model.generate(ids, **options), zsaa.enable(make(family), alpha, TAU).generate(ids, **options))


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_a_cache_of_another_depth_cannot_be_continued(family, alpha):
    model, ids = zsaa.enable(make(family), alpha, TAU), tiny.tokens([23])[0]
    with torch.no_grad():
        short = model(ids, depth=2, past_key_values=DynamicCache(config=model.config)).past_key_values
        whole = model(ids, use_cache=True).past_key_values
        for cache, filled, depth in ((short, 2, None), (short, 2, 3), (whole, 4, 2)):
            runs = depth or 4
            with pytest.raises(ValueError, match=f"filled by {filled} layers, and the model now runs {runs}.*empty"):
                model(ids[:, :1], past_key_values=cache, depth=depth)
        after = model(ids[:, :1], past_key_values=short, depth=2).logits
        less = zsaa.enable(first(family, 2), alpha, TAU)
        want = less(ids[:, :1], past_key_values=less(ids, use_cache=True).past_key_values).logits
    assert torch.equal(after, want), "refused calls leave a cache as it was"


def test_other_caches_are_refused_by_name():
    model, ids = zsaa.enable(make()), tiny.tokens([9])[0]
    with pytest.raises(NotImplementedError, match="2 of 4 layers fills .* DynamicCache only, got StaticCache"):
        model.generate(ids, depth=2, cache_implementation="static", **tiny.QUIET)
    model.generate(ids, depth=4, cache_implementation="static", **tiny.QUIET)


@pytest.mark.parametrize(
    ("depth", "error", "said"),
    [
        (0, ValueError, "from 1 to 4, the layers of this model, got 0"),
        (5, ValueError, "got 5"),
        (True, TypeError, "got True"),
        (1.5, TypeError, r"got 1\.5"),
        ([1, 2], TypeError, "one depth, for all requests"),
    ],
)
def test_a_depth_out_of_range_changes_nothing(depth, error, said):
    model, stock, ids = zsaa.enable(make(), depth=3), make(), tiny.tokens([9])[0]
    calls = [
        lambda: zsaa.enable(stock, depth=depth),
        lambda: zsaa.set_depth(model, depth),
        lambda: zsaa.at(model, depth=depth).__enter__(),
        lambda: model(ids, depth=depth),
        lambda: model.generate(ids, depth=depth, **tiny.QUIET),
        lambda: zsaa.macs(model.config, 9, depth=depth),
    ]
    for call in calls:
        with pytest.raises(error, match=said):
            call()
    assert settings(model)["depth"] == 3 and type(stock) is transformers.LlamaForCausalLM
    with pytest.raises(TypeError, match="give alpha, depth or both"), zsaa.at(model):
        pass


def test_a_depth_that_was_not_trained_warns_once():
    model, ids = zsaa.enable(make()), tiny.tokens([9])[0]
    with pytest.warns(UserWarning, match="depth = 2: this model was trained only as a whole"):
        model(ids, depth=2)
    trained = zsaa.enable(make())
    trained_for(trained, None, (2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, depth=1)  # said before
        for depth in (2, 3, 4):
            zsaa.set_depth(trained, depth)
    with pytest.warns(UserWarning, match="depth = 1: this model was trained at depths from 2 to 4"):
        zsaa.set_depth(trained, 1)


def test_blocks_calls_and_threads():
    """What a call is given comes first, then the block of this thread, then the model's own."""
    model, ids = zsaa.enable(make(), depth=3), tiny.tokens([9])[0]
    want = {depth: first("llama", depth)(ids).logits for depth in (1, 2, 3, 4)}
    found = {}
    with zsaa.at(model, depth=2):
        assert torch.equal(model(ids).logits, want[2]) and settings(model)["depth"] == 2
        assert torch.equal(model(ids, depth=1).logits, want[1])
        with zsaa.at(model, 0.5):
            assert settings(model)["depth"] == 2 and settings(model)["alpha"] == 0.5
        thread = threading.Thread(target=lambda: found.update(other=model(ids).logits))
        thread.start(), thread.join()
        assert torch.equal(found["other"], want[3])
        zsaa.set_depth(model, 4)
        assert torch.equal(model(ids).logits, want[4]), "the block goes on at the new depth"
    zsaa.set_depth(model, None)
    assert torch.equal(model(ids).logits, want[4]) and settings(model)["depth"] is None
    assert torch.equal(zsaa.disable(zsaa.enable(model, depth=2))(ids).logits, want[4])


def test_a_trace_is_of_the_layers_that_ran():
    model, ids = zsaa.enable(make(), 0.7, TAU), tiny.tokens([23])[0]
    with zsaa.trace(model) as t:
        model(ids, depth=2)
    assert [counts[0] for counts in t.counts] == zsaa.kept_counts(23, 0.7, 4, TAU)[:2] and len(t.kept) == 2
    with zsaa.trace(model) as t:
        model(ids, alpha=1.0, depth=3)
    assert t.counts == [[23]] * 3


def test_saved_and_loaded(tmp_path):
    model, ids = zsaa.enable(make(), depth=2), tiny.tokens([9])[0]
    trained_for(model, None, (2, 4))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, make()(ids).logits)  # for transformers it is the whole model
    with pytest.warns(UserWarning, match=r"depth = 2 was saved with this model.*set_depth\(model, None\)"):
        zsaa.enable(again)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    assert settings(again)["depth_range"] == (2, 4)
    finetune.save(model, tiny.tokenizer(), tmp_path / "kept")
    loaded, _ = finetune.load(tmp_path / "kept", kind="causal-lm")
    assert settings(loaded)["depth"] is None and settings(loaded)["depth_range"] == (2, 4)


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_adapters_of_layers_that_do_not_run_stay_out_of_it(alpha):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model, ids = peft.get_peft_model(make(), config).eval(), tiny.tokens([23])[0]
    merged = peft.get_peft_model(make(), config)
    merged.load_state_dict(model.state_dict())
    less = zsaa.enable(remove_layers(merged.merge_and_unload(), [2, 3]).eval(), alpha, TAU)
    zsaa.enable(model, alpha, TAU)
    torch.testing.assert_close(model(ids, depth=2).logits, less(ids).logits, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.generate(input_ids=ids, depth=2, **tiny.QUIET), less.generate(ids, **tiny.QUIET))


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_gradients_are_the_shorter_models_and_none_above(family, alpha):
    """With gradient checkpointing and without; embeddings and head are tied in all of them."""
    ids, mask, _ = tiny.tokens([9, 7])
    less = zsaa.enable(first(family, 2), alpha, TAU).train()
    less(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    want = {name: p.grad for name, p in less.named_parameters()}
    for checked in (False, True):
        model = zsaa.enable(make(family), alpha, TAU).train()
        if checked:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ids, attention_mask=mask, labels=ids, depth=2).loss.backward()
        for name, parameter in model.named_parameters():
            if any(f"{at}.{layer}." in name for at in ("h", "layers") for layer in (2, 3)):
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, want[name])


@pytest.mark.parametrize("alpha", [1.0, 0.7])
def test_costs_are_the_shorter_models(alpha):
    whole, less = make().config, first("llama", 2).config
    rule = dict(alpha=alpha, tau=TAU)
    assert zsaa.macs(whole, 50, depth=2, **rule) == zsaa.macs(less, 50, **rule)
    assert zsaa.macs(whole, 50, depth=4, **rule) == zsaa.macs(whole, 50, **rule)
    reduced = zsaa.mac_reduction(whole, [50, 20], depth=2, **rule)
    assert reduced == pytest.approx(2 * zsaa.mac_reduction(less, [50, 20], **rule))
    from zsaa.cost import kv_bytes

    assert kv_bytes(whole, 50, depth=2, **rule) == kv_bytes(less, 50, **rule)


def test_layers_that_were_exchanged_are_refused():
    model, ids = zsaa.enable(make()), tiny.tokens([9])[0]
    model.model.layers[3] = make(seed=1).model.layers[3]
    with pytest.raises(RuntimeError, match="layer 3 of the decoder is not the one that it was"):
        model(ids, depth=2)


def test_recorded_prefills_know_their_depth():
    from zsaa.passes import Request

    fields = dict(lengths=(9,), width=9, alphas=(0.5,), rule=None, num_layers=4, carry=True, device=torch.device("cpu"))
    assert Request(**fields, stop=2) != Request(**fields, stop=3) and Request(**fields).depth == 4


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_early_exit_drafts_of_a_shorter_model_give_its_greedy_text(family, alpha):
    """With both dials turned: the first two layers draft, the first three check."""
    model, ids = zsaa.enable(make(family), alpha, TAU, depth=3), tiny.tokens([23])[0]
    options = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
    want = model.generate(ids, **options)
    if family == "gpt2" and alpha == 1:
        with pytest.raises(NotImplementedError, match="made for 2 layers, and GPT2Model runs all its 4"):
            model.generate(ids, assistant_early_exit=2, **options)
        return
    if alpha == 1 and family not in ("llama", "mistral"):
        pytest.importorskip("transformers", minversion="5.18", reason="older ones cannot crop layers without rows")
    assert torch.equal(model.generate(ids, assistant_early_exit=2, **options), want)
    assert settings(model)["depth"] == 3 and model.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_draft_that_fails_leaves_all_layers(family):
    """transformers drafts on a configuration of fewer layers, and sets it back only where nothing is raised."""
    model, ids = zsaa.enable(make(family)), tiny.tokens([23])[0]
    want = model(ids).logits

    class Fails(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            raise RuntimeError("in a draft" if model.config.num_hidden_layers < 4 else "in a check")

    with pytest.raises((RuntimeError, NotImplementedError), match="in a draft|runs all its 4"):
        model.generate(ids, assistant_early_exit=2, logits_processor=[Fails()], **tiny.QUIET)
    assert model.config.num_hidden_layers == 4 and torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("early", [0, -1, 5, True, 1.5])
def test_an_early_exit_out_of_range_is_refused(early):
    model, ids = zsaa.enable(make()), tiny.tokens([23])[0]
    for given in (
        {"assistant_early_exit": early, **tiny.QUIET},
        {"generation_config": transformers.GenerationConfig(assistant_early_exit=early, **tiny.QUIET)},
    ):
        with pytest.raises(ValueError, match=f"assistant_early_exit must be a whole number from 1 to 4.*got {early}"):
            model.generate(ids, **given)
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("storage", ["int8", "nf4", "hqq"])
def test_quantized_layers(storage):
    """The dial runs the first of them, and others can be removed: the same numbers either way."""
    pytest.importorskip("hqq" if storage == "hqq" else "bitsandbytes")
    from zsaa.depth.combined import stored
    from zsaa.models import never_repack

    def quantized(model):
        model = stored(model.float(), storage)
        never_repack(model)  # which wants wider layers than these
        return model

    ids, model = tiny.tokens([9])[0], zsaa.enable(quantized(make()))
    with torch.no_grad():
        want = quantized(remove_layers(make(), [2, 3]))(ids).logits
        assert torch.equal(model(ids, depth=2).logits, want)
        assert torch.equal(remove_layers(zsaa.disable(model), [2, 3])(ids).logits, want)
