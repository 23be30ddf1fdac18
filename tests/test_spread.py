"""A dialled model whose layers lie on several devices, as accelerate spreads them: the pass goes with the states."""

import accelerate
import pytest
import tiny
import torch

import zsaa
from zsaa.fast import rows
from zsaa.fast.plans import plan
from zsaa.passes import Given, Prefill, Request
from zsaa.rule import Rule

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def held(x):
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        return held(list(x.values()))
    if isinstance(x, (list, tuple)):
        return [tensor for each in x for tensor in held(each)]
    return held(vars(x)) if type(x).__name__ in ("Plan", "Given", "Left") else []


def test_a_pass_goes_to_another_device_with_all_that_it_holds():
    """Others' plans stay where they are."""
    request = Request((9, 5), 9, (0.5, 0.5), Rule(2), 4, True, torch.device("cpu"))
    shapes = plan(request)
    step = Prefill(request, shapes, Given(torch.arange(9) < torch.tensor([[9], [5]])))
    step.begin(torch.randn(2, 9, 8))
    step.choose(0, torch.rand(2, 9), torch.randn(2, 9, 8))
    step.move(0, torch.randn(2, 9, 8), torch.randn(2, 9, 8))
    before = len(held(vars(step)))
    assert step.to(torch.device("cpu")) is step and step.plan is shapes
    assert step.to("meta", non_blocking=True) is step
    assert {x.device.type for x in held(vars(step))} == {"meta"} and len(held(vars(step))) == before > 10
    assert {x.device.type for x in held(shapes)} == {"cpu"}


def test_a_number_names_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **_: asked.append(device) or self)
    step = Prefill(request := Request((9,), 9, (0.5,), Rule(2), 4, True, torch.device("cpu")), plan(request), Given())
    rows.moved(step, 1)
    assert set(asked) == {torch.device("cuda", 1)}


@two_gpus
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize(("lengths", "padding"), [([150, 150], "right"), ([150, 40, 200], "left")], ids=str)
@torch.no_grad()
def test_real_gpus_give_what_one_gives(family, lengths, padding):
    model, plain = (zsaa.enable(tiny.make(family, dtype=torch.float32), alpha=0.7, tau=3, graphs=False) for _ in "ab")
    body = "transformer" if family == "gpt2" else "model"
    blocks = f"{body}.{'h' if family == 'gpt2' else 'layers'}"
    places = {name: 1 for name, _ in model.named_children() if name != body}
    places |= {f"{body}.{name}": 0 for name, _ in model.base_model.named_children() if name not in ("h", "layers")}
    places |= {f"{blocks}.{i}": int(i >= 2) for i in range(4)}
    if model.config.tie_word_embeddings:
        places = {name: 0 if name == "lm_head" else where for name, where in places.items()}
    accelerate.dispatch_model(model, places, main_device=0)
    plain = plain.to("cuda:0")
    ids, mask, _ = (x.to("cuda:0") for x in tiny.tokens(lengths, 0, padding))
    ours, theirs = (each(ids, attention_mask=mask) for each in (model, plain))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-3, atol=1e-3)
    sizes = [[layer.keys.shape for layer in each.past_key_values.layers] for each in (ours, theirs)]
    assert sizes[0] == sizes[1]
    if padding == "left" or len(set(lengths)) == 1:
        settings = dict(attention_mask=mask, **tiny.QUIET)
        assert torch.equal(model.generate(ids, **settings), plain.generate(ids, **settings))
