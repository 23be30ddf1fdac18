"""Pruned caches in fewer bits, against full caches whose rows went through the same arithmetic by hand."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import QuantizedCache

pytest.importorskip("hqq", reason="quantized caches need hqq: pip install 'zsaa[reuse]'")

import zsaa
from zsaa.reuse.quantized import QuantizedPrunedLayer

FAMILIES = ["gpt2", "llama", "qwen3"]  # transformers has quantized caches for models without sliding windows alone
FULL = dict(return_dict_in_generate=True, output_logits=True, **tiny.QUIET)
HOW = {"backend": "hqq", "axis_key": 1, "axis_value": 1, "q_group_size": 8}


def quantized(bits):
    return {"cache_implementation": "quantized", "cache_config": {**HOW, "nbits": bits}}


def cache_of(model, bits, **options):
    return QuantizedCache(config=model.config, nbits=bits, **{**HOW, **options})


@torch.no_grad()
def by_hand(model, bits, read, alpha):
    """A pruned cache in full, of one prompt, all of whose rows but the last were rounded."""
    cache = model(**read, alpha=alpha, past_key_values=DynamicCache()).past_key_values
    (like, *_) = cache_of(model, bits).layers
    for layer in cache.layers:
        like.keys = layer.keys
        for name in ("keys", "values"):
            x = getattr(layer, name)
            rows = x.shape[2] - 1
            padded = torch.nn.functional.pad(x[:, :, :-1], (0, 0, 0, -rows % 8)).contiguous()
            rounded = like._dequantize(like._quantize(padded, axis=1))[:, :, :rows]
            setattr(layer, name, torch.cat([rounded, x[:, :, -1:]], dim=2))
    return cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_decoded_sees_the_prompt_rounded_once(family, bits):
    model = zsaa.enable(tiny.make(family, dtype=torch.float32))
    ids = tiny.tokens([40])[0]
    found = model.generate(ids, alpha=0.7, **FULL, **quantized(bits))
    layers = found.past_key_values.layers
    assert all(type(layer) is QuantizedPrunedLayer for layer in layers)
    assert len({layer.columns.shape[1] for layer in layers}) > 2  # of unequal length
    cache = by_hand(model, bits, {"input_ids": ids}, 0.7)
    with torch.no_grad():
        for token, logits in zip(found.sequences[0, 40:-1], found.logits[1:]):
            step = model(token[None, None], past_key_values=cache)
            torch.testing.assert_close(step.logits[:, -1], logits, rtol=1e-4, atol=1e-4)
    plain = model.generate(ids, alpha=0.7, **FULL).past_key_values.layers
    saved = sum(x.keys.nbytes + x.values.nbytes for x in plain) / sum(layer.nbytes for layer in layers)
    assert saved > (1.5 if bits == 8 else 1.8)  # scales and the rows that were written weigh much in so small a model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_quantized_as_if_alone(family):
    model = zsaa.enable(tiny.make(family, dtype=torch.float64))
    ids, mask, positions = tiny.tokens([40, 33, 21], padding="left")
    with torch.no_grad():
        together = model(
            ids, attention_mask=mask, position_ids=positions, alpha=0.7, past_key_values=cache_of(model, 4)
        ).past_key_values
        for b, n in enumerate((40, 33, 21)):
            alone = model(ids[b : b + 1, 40 - n :], alpha=0.7, past_key_values=cache_of(model, 4)).past_key_values
            for one, other in zip(alone.layers, together.layers):
                rows = one.rows
                for x, y in zip(one._unpacked(), other._unpacked()):
                    torch.testing.assert_close(x[0], y[b, :, :rows], rtol=1e-3, atol=1e-3)
                assert torch.equal(one.columns[0, :rows] + 40 - n, other.columns[b, :rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_reorder_packed_samples(family):
    """The cache of beam search is that of its hypotheses: what each would have had alone."""
    model = zsaa.enable(tiny.make(family, dtype=torch.float32))
    ids = tiny.tokens([30, 30])[0]
    with torch.no_grad():
        cache = model(ids, alpha=0.7, past_key_values=cache_of(model, 8)).past_key_values
        cache.batch_repeat_interleave(2)
        order = torch.tensor([2, 0, 0, 3])
        cache.reorder_cache(order)
        for layer in cache.layers:
            assert layer.packed[1] is layer.packed[2]
        new = tiny.tokens([1] * 4, seed=4)[0]
        found = model(new, past_key_values=cache).logits
        for b, source in enumerate((1, 0, 0, 1)):
            alone = model(ids[source : source + 1], alpha=0.7, past_key_values=cache_of(model, 8)).past_key_values
            expected = model(new[b : b + 1], past_key_values=alone).logits
            torch.testing.assert_close(found[b], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("lengths", [(23, 23), (23, 17)])
def test_cropping_gives_back_what_was_written(lengths):
    """Six tokens decoded, three given back, three others decoded: as if only the latter had ever been there. And the
    prompt's last token can be decoded again."""
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32))
    ids, mask, positions = tiny.tokens(list(lengths), padding="left")
    more, other = tiny.tokens([6, 6], seed=3)[0], tiny.tokens([3, 3], seed=8)[0]

    def go(cache, *pieces):
        seen = mask
        for piece in pieces:
            seen = torch.cat([seen, torch.ones_like(piece)], dim=1)
            places = (seen.cumsum(1) - 1)[:, -piece.shape[1] :]
            logits = model(piece, attention_mask=seen, position_ids=places, past_key_values=cache).logits
        return logits

    with torch.no_grad():
        read = dict(input_ids=ids, attention_mask=mask, position_ids=positions, alpha=0.7)
        first = model(**read, past_key_values=cache_of(model, 8))
        one, two = first.past_key_values, model(**read, past_key_values=cache_of(model, 8)).past_key_values
        go(one, more)
        one.crop(-3)
        seen = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], dim=1)
        places = (seen.cumsum(1) - 1)[:, -3:]
        found = model(
            other[:, :3],
            attention_mask=torch.cat([seen[:, :26], torch.ones(2, 3, dtype=mask.dtype)], dim=1),
            position_ids=places,
            past_key_values=one,
        ).logits
        torch.testing.assert_close(found, go(two, more[:, :3], other), rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="can only give back"):
            two.crop(-8)
        two.crop(-7)
        again = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=two).logits
        plain = DynamicCache()
        model(**read, past_key_values=plain)
        assert (again[:, -1] - first.logits[:, -1]).abs().max() < 0.3  # by rounded rows
        assert two.get_seq_length() == 23


def test_what_cannot_be_quantized_is_refused_by_name():
    model = zsaa.enable(tiny.make("llama", dtype=torch.float32))
    ids = tiny.tokens([40])[0]
    with pytest.raises(ValueError, match="q_group_size is 64, and a prompt of 39 tokens"):
        model(ids, alpha=0.7, past_key_values=cache_of(model, 8, q_group_size=64))
    with pytest.raises(ValueError, match="only full attention"):
        cache_of(tiny.make("gemma2"), 8)
    fp8 = getattr(__import__("transformers.cache_utils").cache_utils, "Fp8QuantizedLayer", None)
    if fp8 is not None:
        with pytest.raises(NotImplementedError, match="backends hqq and quanto, got Fp8"):
            model(ids, alpha=0.7, past_key_values=QuantizedCache("fp8", model.config))
    cache = cache_of(model, 8)
    with torch.no_grad():
        model(ids, alpha=0.7, past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(ids, alpha=0.7, past_key_values=cache)
    assert all(type(layer) is QuantizedPrunedLayer for layer in again.past_key_values.layers)


@torch.no_grad()
def test_what_breaks_qwen_2_is_refused_by_name_and_the_rest_runs():
    """Few bits of its keys by token: results/serving/bits.json. Llama bears them."""
    ids = tiny.tokens([40])[0]
    config = tiny.CONFIGS["qwen2"]()
    config.use_sliding_window, config.layer_types = False, ["full_attention"] * config.num_hidden_layers
    model = zsaa.enable(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    with pytest.raises(NotImplementedError, match="Qwen 2's keys do not bear 4 bits .* Set axis_key to 0"):
        model(ids, alpha=0.7, past_key_values=cache_of(model, 4))
    for bits, axis in ((4, 0), (8, 1)):
        found = model(ids, alpha=0.7, past_key_values=cache_of(model, bits, axis_key=axis)).past_key_values
        assert all(type(layer) is QuantizedPrunedLayer for layer in found.layers)
    other = zsaa.enable(tiny.make("llama", dtype=torch.float32))
    other(ids, alpha=0.7, past_key_values=cache_of(other, 4))
