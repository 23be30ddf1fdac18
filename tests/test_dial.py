"""The dial's manners: settings, errors that help, generation, and what it refuses."""

import json
import subprocess
import sys
import warnings

import pytest
import tiny
import torch
import transformers

import zsaa
from zsaa.dial import settings, trained_for

WHOLE = {"alpha_range": None, "depth": None, "depth_range": None}  # trained for nothing, all layers


@pytest.fixture
def model():
    return zsaa.enable(tiny.make("llama"), alpha=0.6, tau=3)


def test_at_restores_alpha_also_after_an_exception(model):
    with zsaa.at(model, 0.3) as same:
        assert same is model and settings(model)["alpha"] == 0.3
        with zsaa.at(model, 0.9):
            assert settings(model)["alpha"] == 0.9
        assert settings(model)["alpha"] == 0.3
    assert settings(model)["alpha"] == 0.6
    with pytest.raises(KeyboardInterrupt), zsaa.at(model, 0.3):
        raise KeyboardInterrupt
    assert settings(model)["alpha"] == 0.6
    with pytest.raises(ValueError, match="alpha must be in"), zsaa.at(model, 3):
        pass
    assert settings(model)["alpha"] == 0.6


def test_alpha_turns_between_calls(model):
    ids = tiny.tokens([40])[0]
    counts = []
    for alpha in (0.9, 0.5, 1.0, 0.9):
        zsaa.set_alpha(model, alpha)
        with zsaa.trace(model) as t:
            model(ids)
        counts.append([c[0] for c in t.counts])
    assert counts == [zsaa.kept_counts(40, a, 4, 3) for a in (0.9, 0.5, 1.0, 0.9)]


def test_enable_again_changes_the_settings_and_a_bad_one_changes_nothing(model):
    chosen = {"alpha": 0.4, "tau": 7, "score": "column_mean", "schedule": "rising"}
    zsaa.enable(model, **chosen)
    assert settings(model) == {**chosen, **WHOLE}
    for bad in ({"alpha": 2}, {"tau": 0}, {"score": "luck"}, {"schedule": "luck"}, {"schedule": "once"}):
        with pytest.raises(ValueError, match="alpha|tau|unknown score 'luck'. Available: column_sum|unknown schedule"):
            zsaa.enable(model, **{"alpha": 0.9, "tau": 9, **bad})
    assert settings(model) == {**chosen, **WHOLE}
    assert settings(zsaa.enable(model, alpha=0.5)) == {**chosen, "alpha": 0.5, **WHOLE}


def test_settings_of_earlier_versions_are_read_if_their_schedule_is_there(tmp_path):
    """Those that name none in config.json had Eq. 2 alone."""
    zsaa.enable(tiny.make("llama"), alpha=0.4, tau=7, score="column_mean").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["zsaa"].pop("schedule") == "geometric"
    ids = tiny.tokens([30])[0]
    for schedule in (None, "geometric", "rising", "once"):
        config["zsaa"].update({} if schedule is None else {"schedule": schedule})
        file.write_text(json.dumps(config))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        if schedule != "once":
            rule = {"tau": 7, "score": "column_mean", "schedule": schedule or "geometric"}
            assert zsaa.alpha_for(model, 300, 2) == zsaa.alpha_for(model.config, 300, 2, **rule)
            found = settings(zsaa.enable(model))
            assert found == {"alpha": 0.4, **rule, **WHOLE}
            assert model.config.zsaa == found
            continue
        want = model(ids).logits
        for call in (lambda: zsaa.enable(model), lambda: zsaa.alpha_for(model, 300, 2)):  # noqa: B023
            with pytest.raises(ValueError, match=r"with schedule 'once'.*only 'geometric' .*'rising' and 'entry' are"):
                call()
        assert torch.equal(model(ids).logits, want) and not hasattr(model.model, "_zsaa")


def test_a_bad_setting_leaves_a_stock_model_untouched():
    model = tiny.make("llama")
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="alpha"):
        zsaa.enable(model, alpha=0)
    assert [type(m) for m in model.modules()] == types
    assert not model.model._forward_pre_hooks
    with pytest.raises(RuntimeError, match=r"zsaa.enable\(model\) first"):
        zsaa.set_alpha(model, 0.5)


def test_unsupported_models_are_told_what_is_supported():
    bert = transformers.BertModel(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    with pytest.raises(zsaa.UnsupportedModelError, match=f"'bert'.*{', '.join(zsaa.SUPPORTED)}"):
        zsaa.enable(bert)
    with pytest.raises(zsaa.UnsupportedModelError, match="Linear"):
        zsaa.enable(torch.nn.Linear(2, 2))
    cross = tiny.CONFIGS["gpt2"]()
    cross.add_cross_attention = True
    with pytest.raises(zsaa.UnsupportedModelError, match="cross-attention"):
        zsaa.enable(transformers.GPT2Model(cross))


def test_four_d_masks_are_refused(model):
    ids = tiny.tokens([8])[0]
    with pytest.raises(ValueError, match="2-D attention_mask.*4-D"):
        model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="got a dict"):
        zsaa.enable(tiny.make("gemma3_text"), alpha=0.5)(ids, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match=r"\(1, 5\)"):
        model(ids, attention_mask=torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\(1, 9\).*must have shape \(1, 8\)"):
        model(ids, attention_mask=torch.ones(1, 9, dtype=torch.long))
    zsaa.set_alpha(model, 1.0)
    causal = torch.ones(8, 8).tril().log().to(torch.float64)
    model(ids, attention_mask=causal[None, None])  # stock behaviour at alpha = 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype_mean_the_same(model, dtype):
    ids, mask, _ = tiny.tokens([21, 9])
    want = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, want)


def test_packed_sequences_are_refused(model):
    ids = tiny.tokens([8])[0]
    with pytest.raises(ValueError, match="packed sequences.*position_ids that restart"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    lengths = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="packed sequences.*cu_seq_lens_q"):
        model(ids, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


def test_empty_samples_attentions_and_reentrant_checkpointing_are_refused(model):
    ids, mask, _ = tiny.tokens([8, 4])
    mask[1] = 0
    with pytest.raises(ValueError, match="sample 1 of the batch has no real token"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="zsaa.trace"):
        model(ids, output_attentions=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.train()
    with pytest.raises(ValueError, match="'use_reentrant': False"):
        model(ids)


def test_the_error_paths_leave_the_model_usable(model):
    ids = tiny.tokens([8])[0]
    want = model(ids).logits
    with pytest.raises(ValueError, match="4-D"):
        model(ids, attention_mask=torch.zeros(1, 1, 8, 8))
    assert torch.equal(model(ids).logits, want)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("strategy", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_with_left_padding_equals_single_samples(family, strategy):
    model = zsaa.enable(tiny.make(family), alpha=0.7, tau=3)
    ids, mask, _ = tiny.tokens([21, 9], padding="left")
    options = dict(strategy, max_new_tokens=6, min_new_tokens=6, pad_token_id=0)
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for b in range(2):
        alone = model.generate(ids[b][mask[b] == 1][None], **options)[0, -6:]
        assert torch.equal(alone, together[b])


def test_generate_restores_stock_text_at_alpha_one(model):
    ids = tiny.tokens([21])[0]
    zsaa.set_alpha(model, 1.0)
    want = tiny.make("llama").generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), want)


def test_a_pruned_cache_stays_pruned_and_guards_itself(model):
    ids = tiny.tokens([21])[0]
    cache = model(ids, use_cache=True).past_key_values
    zsaa.set_alpha(model, 1.0)  # a cache in flight continues as it was pruned
    model(ids[:, :3], past_key_values=cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [24, 15, 10, 7]
    cache.crop(-2)
    assert cache.get_seq_length() == 22
    with pytest.raises(ValueError, match="dropped prompt tokens are gone"):
        cache.crop(-3)
    zsaa.disable(model)
    with pytest.raises(RuntimeError, match="zsaa.enable"):
        model(ids[:, :1], past_key_values=cache)


def test_unknown_caches_are_refused(model):
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(NotImplementedError, match="StaticCache"):
        model(tiny.tokens([21])[0], past_key_values=cache)


def test_a_range_once_trained_for_warns_once(model):
    trained_for(model, (0.5, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zsaa.set_alpha(model, 0.5)
    with pytest.warns(UserWarning, match=r"alpha = 0.4 is below the range \[0.5, 1.0\]"):
        zsaa.set_alpha(model, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zsaa.set_alpha(model, 0.3)


def test_trace_before_a_prefill_says_so(model):
    with zsaa.trace(model) as t, pytest.raises(RuntimeError, match="no prefill has run"):
        _ = t.kept


def test_importing_zsaa_changes_nothing_and_stays_light():
    code = """
import sys, torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
import transformers.cache_utils as cache_utils
def state():
    return (sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), sorted(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
            {k: id(v) for k, v in vars(llama).items() if callable(v)}, dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
            id(torch.nn.functional.scaled_dot_product_attention), torch.get_default_dtype(), torch.get_num_threads(),
            torch.is_grad_enabled(), {n: id(v) for n, v in vars(llama.LlamaDecoderLayer).items()})
before, loaded = state(), set(sys.modules)
import zsaa
assert state() == before
heavy = {"anywidget", "datasets", "ipywidgets", "matplotlib", "papermill", "pandas", "peft", "seaborn"}
heavy &= set(sys.modules) - loaded
assert not heavy, heavy
assert callable(zsaa.slider)
sys.modules["anywidget"] = None
try:
    zsaa.slider(None, None)
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'zsaa[lab]'" in done.stdout
