"""Texts that are answered behind the first layer that is sure: against the depth dial, one text at a time."""

import warnings

import pytest
import tiny
import torch

import zsaa
from zsaa.evaluation.sure import until_sure

pytestmark = pytest.mark.filterwarnings("ignore:depth = .*this model was trained only as a whole")


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_answers_are_those_of_the_first_depth_that_is_sure(family, padding):
    model = zsaa.enable(tiny.make(family, "sequence-classification", dtype=torch.float32))
    ids, mask, positions = tiny.tokens([19, 7, 12], padding=padding)
    said = []
    for depth in range(1, 5):
        with torch.no_grad():
            said.append(model(ids, attention_mask=mask, position_ids=positions, depth=depth).logits)
    sure = float(torch.stack(said).softmax(-1).amax(-1).quantile(0.5))  # some leave early, some stay
    found = until_sure(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, sure)
    for text in range(3):
        enough = (n for n in range(1, 5) if said[n - 1][text].softmax(-1).max() >= sure)
        depth = next(enough, 4)
        assert found.depths[text] == depth
        torch.testing.assert_close(found.logits[text], said[depth - 1][text], rtol=1e-3, atol=1e-4)
    assert found.ran == max(found.depths) and found.mean_depth == pytest.approx(found.depths.double().mean().item())


def test_the_layers_above_are_not_run():
    model, ids = tiny.make("llama", "sequence-classification"), tiny.tokens([9])[0]
    before, ran = model(ids).logits, []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    found = until_sure(model, {"input_ids": ids}, sure=0.01)
    assert found.ran == 1 and ran == [0]
    assert until_sure(model, {"input_ids": ids}, sure=0.01, first=3).ran == 3 and ran == [0, 0, 1, 2]
    assert until_sure(model, {"input_ids": ids}, sure=1.0).ran == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(ids).logits, before), "the next call is whole"


def test_a_depth_that_is_set_is_the_most():
    model, ids = zsaa.enable(tiny.make("llama", "sequence-classification"), depth=2), tiny.tokens([9, 12])[0]
    found = until_sure(model, {"input_ids": ids}, sure=1.0)
    assert found.depths.tolist() == [2, 2] and found.mean_depth == 2, "no layer above is counted"
    torch.testing.assert_close(found.logits, model(ids).logits.float())
    with zsaa.at(model, depth=3):
        assert until_sure(model, {"input_ids": ids}, sure=1.0).ran == 3
    with pytest.raises(ValueError, match="first must be from 1 to 2, the layers that run, got 3"):
        until_sure(model, {"input_ids": ids}, first=3)
    for name in ("alpha", "depth"):
        with pytest.raises(TypeError, match=f"{name} is no input of until_sure.*zsaa.at"):
            until_sure(model, {"input_ids": ids, name: 1})


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_end_where_the_stock_head_reads(family):
    """Also where padding is told by the pad token alone, as transformers' heads tell it."""
    model = tiny.make(family, "sequence-classification")
    ids, mask, _ = tiny.tokens([19, 7], padding="right")
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        torch.testing.assert_close(until_sure(model, given, sure=1.0).logits, model(**given).logits.float())


def test_nothing_is_dropped_out_and_modes_stay():
    model, ids = tiny.make("gpt2", "sequence-classification", dropout=0.5), {"input_ids": tiny.tokens([9])[0]}
    want = until_sure(model, ids, sure=1.0).logits
    model.train().transformer.h[1].eval()
    for _ in range(2):
        assert torch.equal(until_sure(model, ids, sure=1.0).logits, want)
    assert model.training and not model.transformer.h[1].training and model.transformer.h[2].training


def test_one_output_is_no_probability():
    model = tiny.make("llama", "sequence-classification")
    model.score = torch.nn.Linear(model.config.hidden_size, 1)
    with pytest.raises(ValueError, match="head gives 1 output.*2 classes or more"):
        until_sure(model, {"input_ids": tiny.tokens([9])[0]})


def test_what_cannot_be_is_said():
    ids = {"input_ids": tiny.tokens([9])[0]}
    model = tiny.make("llama", "sequence-classification")
    for sure in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sure"):
            until_sure(model, ids, sure)
    with pytest.raises(ValueError, match="first must be from 1 to 4, the layers that run, got 5"):
        until_sure(model, ids, first=5)
    with pytest.raises(ValueError, match=r"alpha is 0.5: until_sure is of whole texts"):
        until_sure(zsaa.enable(tiny.make("llama", "sequence-classification"), 0.5), ids)
    with pytest.raises(TypeError, match="no classification head"):
        until_sure(tiny.make("llama"), ids)
