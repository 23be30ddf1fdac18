"""oneDNN's product for the linear layers of a pruned pass: the same numbers, and only where nothing is in its way."""

import contextlib

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zsaa
from zsaa.fast import linear

pytestmark = pytest.mark.skipif(linear._onednn() is None, reason="this PyTorch has no oneDNN product, or no x86")


@pytest.fixture
def products(monkeypatch):
    """The shapes of the weights that oneDNN was given."""
    real, shapes = linear._onednn(), []

    def watched(x, weight, *rest):
        shapes.append(tuple(weight.shape))
        return real(x, weight, *rest)

    monkeypatch.setattr(linear, "_onednn", lambda: watched)
    monkeypatch.setattr(linear, "LARGE", 0)  # here all are small
    return shapes


@torch.no_grad()
def test_small_products_are_left_to_the_layer(products, monkeypatch):
    monkeypatch.undo()
    real, seen = linear._onednn(), []
    monkeypatch.setattr(linear, "_onednn", lambda: lambda x, *rest: seen.append(x.shape[0]) or real(x, *rest))
    small, large = nn.Linear(64, 128), nn.Linear(576, 576)
    for rows in (5, 2048):
        for layer in (small, large):
            linear.linear(layer, torch.randn(rows, layer.in_features))
    assert seen == [5, 2048, 2048]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_pruned_passes_in_float32_agree_with_float64(family, products):
    ids, mask, _ = tiny.tokens([23, 9])
    exact = zsaa.enable(tiny.make(family, "sequence-classification"), alpha=0.6, tau=3)
    quick = zsaa.enable(tiny.make(family, "sequence-classification").to(torch.float32), alpha=0.6, tau=3)
    want = exact(ids, attention_mask=mask).logits
    assert not products
    torch.testing.assert_close(quick(ids, attention_mask=mask).logits.double(), want, rtol=1e-3, atol=1e-4)
    assert len(products) == (0 if family == "gpt2" else 4 * 7)  # GPT-2 has no nn.Linear
    products.clear()
    zsaa.set_alpha(quick, 1.0)
    quick(ids, attention_mask=mask)
    assert not products


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gets_what_it_would_compute_itself(bias, products):
    layer, x = nn.Linear(576, 192, bias=bias), torch.randn(2, 5, 576)
    with torch.no_grad():
        got, plain = linear.linear(layer, x), layer(x)
        exact = layer.double()(x.double())
    assert products == [(192, 576)]
    assert (got - exact).norm() <= 4 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_defaults_of_type_and_device_decide_nothing(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert linear._onednn.__wrapped__() is not None
    finally:
        torch.set_default_dtype(before)


class Another(nn.Linear):
    """What adapters and quantized layers are."""


class Packed(nn.Parameter):
    pass


@contextlib.contextmanager
def switched_off():
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


OTHERWISE = {
    "gradient": (torch.enable_grad, None),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), None),
    "a counter of operations": (lambda: FlopCounterMode(display=False), None),
    "oneDNN switched off": (switched_off, None),
    "another class": (contextlib.nullcontext, lambda: Another(8, 8)),
    "float64": (contextlib.nullcontext, lambda: nn.Linear(8, 8, dtype=torch.float64)),
}


@pytest.mark.parametrize("why", OTHERWISE)
@torch.no_grad()
def test_everything_else_calls_the_layer(why, products):
    context, make = OTHERWISE[why]
    layer = make() if make else nn.Linear(8, 8)
    with context():
        linear.linear(layer, torch.randn(3, 8, dtype=layer.weight.dtype))
    assert not products


@torch.no_grad()
def test_a_weight_of_another_kind_and_a_replaced_forward_are_left_alone(products):
    odd, replaced = nn.Linear(8, 8), nn.Linear(8, 8)
    odd.weight = Packed(odd.weight)
    replaced.forward = lambda x: x
    x = torch.randn(3, 8)
    linear.linear(odd, x)
    assert linear.linear(replaced, x) is x
    assert not products


@pytest.mark.parametrize("where", ["mlp", "mlp.down_proj", "self_attn.v_proj"])
@torch.no_grad()
def test_hooks_run_at_every_alpha(where, products):
    model, ids = zsaa.enable(tiny.make("llama").to(torch.float32)), tiny.tokens([23])[0]
    ran = []
    model.model.layers[1].get_submodule(where).register_forward_hook(lambda *_: ran.append(1))
    for alpha in (1.0, 0.6):
        zsaa.set_alpha(model, alpha)
        model(ids)
    assert ran == [1, 1]
    assert len(products) == 4 * 7 - (3 if where == "mlp" else 1)
