"""Fused norms and activations against plain PyTorch in float64: at most twice PyTorch's own error, no row touched by
another, garbage around them unread; and models through them."""

import pytest
import test_kernels as base  # sets Triton's interpreter up
import tiny
import torch
from torch import nn
from zsaa.kernels import layer as kernels
from zsaa.kernels import naive

import zsaa
from zsaa.fast import dispatch, fused

DEVICE, GPU = base.DEVICE, base.GPU
HALVES = [torch.float16] + ([torch.bfloat16] if GPU else [])  # Triton's interpreter cuts bfloat16 off
SIZES = [(1, 1, 16), (2, 7, 96), (1, 5, 576)] + ([(3, 777, 768), (2, 1000, 4096), (1, 9, 16384)] if GPU else [])


@pytest.fixture(autouse=True)
def fresh():
    dispatch._without_triton.cache_clear()
    yield
    dispatch._without_triton.cache_clear()


def inputs(size, dtype, seed=0):
    """Two tensors of `size`, the second cut out of NaN, and two of its last dimension."""
    generator = torch.Generator().manual_seed(seed)
    batch, n, dim = size
    x = torch.randn(size, generator=generator) * torch.logspace(-2, 2, n)[:, None]
    other = torch.full((batch, n, dim + 8), float("nan"))
    other[..., :dim] = torch.randn(size, generator=generator) + 1
    weight, bias = (torch.randn(dim, generator=generator) for _ in range(2))
    x, other, weight, bias = (t.to(DEVICE, dtype) for t in (x, other, weight, bias))
    return x, other[..., :dim], weight, bias


def check(ours, theirs, exact):
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert base.worst(a, c) <= 2 * base.worst(b, c) + 1e-6


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_add_norm(size, dtype, add, centre):
    x, other, weight, bias = inputs(size, dtype)
    given = (x, other if add else None, weight, bias if centre else None)
    ours = kernels.add_norm(*given, 1e-5)
    wide = [None if t is None else t.double() for t in given]
    if add:  # the norm is that of the sum as it is stored
        assert torch.equal(ours[0], x + other)
        wide[:2] = ours[0].double(), None
    check(ours[1:], naive.add_norm(*given, 1e-5)[1:], naive.add_norm(*wide, 1e-5)[1:])
    assert add or ours[0] is x
    alone = kernels.add_norm(x[-1:, -1:], other[-1:, -1:] if add else None, *given[2:], 1e-5)
    assert torch.equal(alone[1], ours[1][-1:, -1:])


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_silu_mul(size, dtype):
    gate, up, _, _ = inputs(size, dtype)
    up = up.contiguous()
    gate.view(-1)[0] = -100  # exp(100) overflows
    ours = kernels.silu_mul(gate, up)
    check([ours], [naive.silu_mul(gate, up)], [naive.silu_mul(gate.double(), up.double())])
    assert kernels.silu_mul(gate, up, inplace=True) is gate and torch.equal(gate, ours)


def test_refusals():
    x = torch.zeros(1, 2, 32, device=DEVICE, dtype=torch.float16)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.silu_mul(x[..., :16], x[..., 16:])
    with pytest.raises(ValueError, match="contiguous rows"):
        kernels.add_norm(x.transpose(1, 2), None, x[0, 0], None, 1e-5)


def run(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits.float()


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f == "gpt2" else pytest.mark.full) for f in tiny.FAMILIES],
)
def test_a_model_through_them_is_the_model(family, monkeypatch):
    model = zsaa.enable(tiny.make(family, dtype=torch.float32, layers=2), alpha=1 - 1e-9, tau=3, graphs=False)
    model = model.to(DEVICE, torch.float16)
    exact = zsaa.enable(tiny.make(family, dtype=torch.float32, layers=2), alpha=1 - 1e-9, tau=3, graphs=False)
    ids = tiny.tokens([14, 14])[0]
    calls = []
    dispatch._layers_agree(torch.empty(0, device=DEVICE).device)  # its own calls do not count
    for name in ("add_norm", "silu_mul"):
        stock = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _f=stock, _n=name, **k: calls.append(_n) or _f(*a, **k))
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    ours = run(model, ids.to(DEVICE))
    layers = model.config.num_hidden_layers
    gemma = family.startswith("gemma")
    assert calls.count("add_norm") == (0 if gemma else 2 * layers)
    assert calls.count("silu_mul") == (0 if gemma or family == "gpt2" else layers)
    calls.clear()
    monkeypatch.setattr(dispatch, "_fused", False)
    theirs = run(model, ids.to(DEVICE))
    assert not calls
    true = run(exact, ids).to(DEVICE)
    assert (ours - true).norm() <= 2 * (theirs - true).norm() + 1e-4


def test_what_is_hooked_subclassed_or_trained_runs_itself(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    model = tiny.make("llama", dtype=torch.float32).to(DEVICE, torch.float16)
    norm, module = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    x = torch.randn(1, 3, model.config.hidden_size, device=DEVICE).half()
    seen = []

    class Other(type(norm)):
        def forward(self, x):
            seen.append("subclass")
            return super().forward(x)

    other = Other(x.shape[-1]).to(DEVICE, torch.float16)
    with torch.no_grad():
        fused.add_norm(x, x, other)
        for part, call in ((norm, lambda: fused.add_norm(x, x, norm)), (module, lambda: fused.mlp(module, x))):
            handle = part.register_forward_hook(lambda *_: seen.append("hook"))
            call()
            handle.remove()
        assert seen == ["subclass", "hook", "hook"]
        monkeypatch.setattr(norm, "forward", lambda x: seen.append("instance") or x)
        fused.add_norm(x, None, norm)
        assert seen[-1] == "instance"
    assert fused.mlp(module, x.requires_grad_()).grad_fn is not None
    layer_norm = nn.LayerNorm(x.shape[-1], bias=False, device=DEVICE, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(fused.add_norm(x, None, layer_norm)[1], layer_norm(x))


@torch.no_grad()
def test_hooks_on_an_activation_and_on_all_modules_run(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    model = tiny.make("llama", dtype=torch.float32).to(DEVICE, torch.float16)
    norm, module = model.model.layers[0].input_layernorm, model.model.layers[0].mlp
    x, seen = torch.randn(1, 3, model.config.hidden_size, device=DEVICE).half(), []
    handle = module.act_fn.register_forward_hook(lambda *_: seen.append("activation"))
    fused.mlp(module, x)
    handle.remove()
    assert seen == ["activation"]
    handle = module.gate_proj.register_forward_hook(lambda m, given, out: seen.append((out, out.clone())))
    fused.mlp(module, x)
    handle.remove()
    assert torch.equal(*seen.pop()), "what a hook has seen is not written"
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        fused.mlp(module, x), fused.add_norm(x, None, norm)
    finally:
        handle.remove()
    assert {module, module.act_fn, norm} <= {*seen[1:]}


@pytest.mark.parametrize("broken", [None, "add_norm", "silu_mul"])
def test_they_are_asked_once_whether_they_agree_with_pytorch(broken, monkeypatch):
    ask, device = dispatch._layers_agree.__wrapped__, torch.device(DEVICE)
    if broken is None:
        assert ask(device)
        return
    real = getattr(kernels, broken)
    wrong = {"add_norm": lambda *a: tuple(x.flip(1) for x in real(*a)), "silu_mul": lambda *a: real(*a).flip(1)}
    monkeypatch.setattr(kernels, broken, wrong[broken])
    with pytest.warns(UserWarning, match=f"do not agree with PyTorch on .*{broken}"):
        assert not ask(device)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_gradients_through_pytorchs_fused_operations(family, monkeypatch):
    ids, grads, calls = tiny.tokens([14, 14])[0], [], []
    for name in ("rms_norm", "gelu"):
        stock = getattr(nn.functional, name)
        monkeypatch.setattr(nn.functional, name, lambda *a, _f=stock, **k: calls.append(1) or _f(*a, **k))
    for on in (False, True):
        assert not calls
        monkeypatch.setattr(dispatch, "fuses_training", lambda x, on=on: on)
        model = zsaa.enable(tiny.make(family, dtype=torch.float32), alpha=0.7, tau=3)
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert len(calls) == model.config.num_hidden_layers * (1 if family == "gpt2" else 2)
    for a, b in zip(*grads):
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_under_autocast_states_are_cast_once_for_all_products(monkeypatch):
    """The same loss bit for bit; gradients differ by how three of them are added up."""
    ids, found = tiny.tokens([200, 200])[0].cuda(), []
    for once in (fused._once, lambda normed: normed):
        monkeypatch.setattr(fused, "_once", once)
        model = zsaa.enable(tiny.make("llama", dtype=torch.float32).cuda(), alpha=0.7, tau=3)
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1]):
        assert (a - b).norm() <= 2e-2 * b.norm() + 1e-7


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_training_takes_them_on_a_gpu():
    x = torch.zeros(1, device=DEVICE)
    assert dispatch.fuses_training(x)
    with torch.no_grad():
        assert not dispatch.fuses_training(x)
