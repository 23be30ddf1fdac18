"""The Triton kernels that choose and move rows, against plain PyTorch: bit for bit where nothing is computed.

Without a GPU they run in Triton's interpreter, in small sizes.
"""

import pytest
import test_kernels as base  # sets Triton's interpreter up
import tiny
import torch
from test_salience import model_of
from zsaa.kernels import rows as kernels

import zsaa
from zsaa.attention import rotate
from zsaa.fast import dispatch
from zsaa.score import select

DEVICE, GPU = base.DEVICE, base.GPU
SIZES = [(1, 37), (3, 128), (2, 200)] + ([(32, 512), (1, 8192), (4, 20000)] if GPU else [])
poison = base.poison


def small(family, head="causal-lm"):
    """As few layers as drop rows twice, where they are interpreted."""
    return tiny.make(family, head, dtype=torch.float32, layers=None if GPU else 2)


def scores_of(kind, batch, n, generator):
    x = torch.rand(batch, n, generator=generator)
    if kind == "ties":
        x = (x * 4).floor()
    elif kind == "signs":
        x = (x - 0.5) * 1e-3
        x[:, ::3] = -0.0
        x[:, 1::3] = 0.0
    elif kind == "not finite":
        x[:, ::5], x[:, 1::7], x[:, 2::11] = float("nan"), float("inf"), -float("nan")
    elif kind == "equal":
        x[:] = 1.0
    return x.to(DEVICE)


@pytest.mark.parametrize("kind", ["plain", "ties", "signs", "not finite", "equal"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("batch", "n"), SIZES)
def test_choose_is_select(kind, ragged, batch, n):
    generator = torch.Generator().manual_seed(n)
    scores = scores_of(kind, batch, n, generator)
    lengths = torch.full((batch,), n)
    if ragged:
        lengths = torch.randint(1, n + 1, (batch,), generator=generator)
        lengths[0] = n // 2
    for share in (0.0, 0.3, 0.9, 1.0):
        counts = (lengths * share).long().clamp(min=1).to(DEVICE)
        sizes, width = lengths.to(DEVICE), int(counts.max())
        rows = torch.randint(0, 10**6, (batch, n), generator=generator).to(DEVICE)
        kept, places, passed = kernels.choose(scores, sizes, counts, width, rows)
        # On the CPU, where every NaN sorts as the highest: on a GPU PyTorch puts those with a minus sign last.
        want = select(scores.cpu().clone(), lengths, counts.cpu(), width, ragged)[0].to(DEVICE)
        assert torch.equal(kept, want)
        assert torch.equal(passed, rows.gather(1, want))
        for b, count in enumerate(counts.tolist()):
            expected = torch.full((n,), -1, dtype=torch.int32, device=DEVICE)
            expected[want[b, :count]] = torch.arange(count, dtype=torch.int32, device=DEVICE)
            assert torch.equal(places[b], expected)


def test_choose_refuses_more_than_it_holds():
    with pytest.raises(ValueError, match="40000 rows"):
        kernels.choose(torch.zeros(1, 40000, device=DEVICE), None, None, 1, None)


def chosen(batch, n, ragged, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, n + 1, (batch,), generator=generator) if ragged else torch.full((batch,), n)
    counts = (lengths // 2).to(DEVICE)
    lengths, rows = lengths.to(DEVICE), torch.arange(n, device=DEVICE).expand(batch, -1)
    scores = torch.rand(batch, n, generator=generator).to(DEVICE)
    return lengths, counts, rows, *kernels.choose(scores, lengths, counts, int(counts.max()), rows)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "sizes", [(2, 20, 24, 40), (1, 33, 100, 64)] + ([(4, 700, 4096, 5000)] if GPU else []), ids=str
)
def test_move_moves_rows(sizes, ragged):
    batch, n, size, out_size = sizes
    lengths, counts, rows, kept, places, passed = chosen(batch, n, ragged)
    hidden = torch.randn(batch, n, size, device=DEVICE, dtype=torch.float16)
    output = torch.randn(batch, n + 5, out_size, device=DEVICE, dtype=torch.float16)[:, :n]  # cut off a longer one
    final = torch.zeros(batch, n + 3, size, device=DEVICE, dtype=torch.float16)
    *results, same = kernels.move(hidden, output, kept, places, lengths, rows, final)
    assert same is final
    for x, y in zip((hidden, output), results):
        assert torch.equal(y, x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))
    for b in range(batch):
        gone = [i for i in range(int(lengths[b])) if places[b, i] < 0]
        assert len(gone) == int(lengths[b] - counts[b])
        expected = torch.zeros_like(final[b])
        expected[gone] = hidden[b, gone]
        assert torch.equal(final[b], expected)


@pytest.mark.parametrize("ragged", [False, True])
def test_move_has_the_gradient_of_indexing(ragged):
    lengths, counts, rows, kept, places, passed = chosen(2, 20, ragged)
    hidden = torch.randn(2, 20, 24, device=DEVICE, requires_grad=True)
    output = torch.randn(2, 20, 40, device=DEVICE, requires_grad=True)
    real = (torch.arange(kept.shape[1], device=DEVICE) < counts[:, None])[..., None]
    weights = [torch.randn(2, kept.shape[1], x.shape[2], device=DEVICE) * real for x in (hidden, output)]
    want = [x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])) for x in (hidden, output)]
    for final in (None, torch.zeros(2, 23, 24, device=DEVICE)):
        *ours, final = kernels.move(hidden, output, kept, places, lengths, rows, final)
        grads = []
        for x, y in zip(want, ours):
            assert torch.equal(x * real, y * real)
        for pair in (want, ours):
            loss = sum((x * w).sum() for x, w in zip(pair, weights))
            if final is not None:  # dropped rows leave by there
                gone = (places < 0) & (rows < lengths[:, None])
                left = torch.arange(23, device=DEVICE, dtype=torch.float32)[:, None]
                loss = loss + ((final * left).sum() if pair is ours else (hidden * left[:20])[gone].sum())
            grads.append(torch.autograd.grad(loss, (hidden, output), retain_graph=True))
        for a, b in zip(*grads):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (9, 3, 24)] + ([(32, 8, 128)] if GPU else []))
@pytest.mark.parametrize("per_sample", [False, True])
def test_rotate_is_closer_to_the_exact_rotation(heads, kv_heads, dim, per_sample):
    generator = torch.Generator().manual_seed(dim)
    batch, n, width, padded = (2, 30, 50, 40) if GPU else (2, 11, 19, 14)
    q, k, v = (
        torch.randn(batch, n, h, dim, generator=generator).to(DEVICE, torch.float16).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    angles = torch.rand(batch if per_sample else 1, width, dim, generator=generator).to(DEVICE) * 6
    cos, sin = angles.cos().half(), angles.sin().half()
    rows = torch.stack([torch.randperm(width, generator=generator)[:n].sort().values for _ in range(batch)]).to(DEVICE)
    got = kernels.rotate(q, k, v, cos, sin, rows, padded)
    at = [table.expand(batch, -1, -1).gather(1, rows[..., None].expand(-1, -1, dim)) for table in (cos, sin)]
    exact = rotate(q.double(), k.double(), *(table.double() for table in at))
    plain = rotate(q, k, *at)
    for ours, theirs, true in zip(got, plain, exact):
        assert ours.shape == (batch, true.shape[1], padded, dim)
        assert base.worst(ours[:, :, :n], true) <= base.worst(theirs, true) + 1e-6
    assert torch.equal(got[2][:, :, :n], v)
    assert kernels.rotate(q, k, v, cos, sin, rows, n)[2] is v
    assert all(bool((x[:, :, n:] == 0).all()) for x in got)


def test_rotate_has_the_gradient_of_the_rotation():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 12, 16, generator=generator).to(DEVICE).requires_grad_() for h in (4, 2, 2))
    cos, sin = (torch.randn(1, 12, 16, generator=generator).to(DEVICE) for _ in range(2))  # no halves alike
    weights = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in (q, k)]
    ours = kernels.rotate(q, k, v, cos, sin, torch.arange(12, device=DEVICE).expand(2, -1), 12)
    assert ours[2] is v
    grads = []
    for pair in (ours[:2], rotate(q, k, cos, sin)):
        loss = sum((x * w).sum() for x, w in zip(pair, weights))
        grads.append(torch.autograd.grad(loss, (q, k)))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="padded"):
        kernels.rotate(q, k, v, cos, sin, torch.arange(12, device=DEVICE).expand(2, -1), 16)


MODELS = [
    ("llama", [18, 9], "causal-lm"),
    ("gpt2", [18, 18], "sequence-classification"),
    pytest.param("qwen3", [9, 14], "causal-lm", marks=pytest.mark.full),
]
if GPU:
    MODELS += [(f, [200, 90, 250], "causal-lm") for f in tiny.FAMILIES]


@pytest.mark.parametrize(("family", "lengths", "head"), MODELS, ids=str)
def test_a_model_through_the_kernels_is_the_model(family, lengths, head, monkeypatch):
    """The same choices and states as through plain PyTorch, with and without gradient, to the precision of float16."""
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    dispatch._without_triton.cache_clear()
    model = zsaa.enable(small(family, head), alpha=0.7, tau=3, graphs=False)
    model = model.to(DEVICE, torch.float16)
    ids, mask, positions = (x.to(DEVICE) for x in tiny.tokens(lengths, padding="left"))
    given = dict(attention_mask=mask, position_ids=positions)
    calls = []
    for name in ("choose", "move", "rotate"):
        stock = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _f=stock, _n=name, **k: calls.append(_n) or _f(*a, **k))

    def run(grad):
        with torch.set_grad_enabled(grad), zsaa.trace(model) as t:
            logits = model(**given, input_ids=ids, use_cache=not grad).logits
        grads = []
        if grad:
            model.zero_grad()
            logits.float().square().mean().backward()
            grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
        return logits.float(), [k.tolist() for layer in t.kept for k in layer], grads

    try:
        for grad in (False, True):
            calls.clear()
            monkeypatch.setattr(dispatch, "_chosen", "auto")
            logits, kept, grads = run(grad)
            assert set(calls) == {"choose", "move", *(["rotate"] if family != "gpt2" else [])}
            monkeypatch.setattr(dispatch, "_chosen", "torch")
            want, want_kept, want_grads = run(grad)
            if kept == want_kept:  # a near tie may fall either way in half precision
                torch.testing.assert_close(logits, want, rtol=3e-2, atol=3e-2 * want.abs().max().item())
                for a, b in zip(grads, want_grads):
                    assert (a - b).norm() <= 0.05 * b.norm() + 1e-3
            for a, b in zip(kept, want_kept):
                assert len(a) == len(b)
                assert len({*a} & {*b}) >= 0.8 * len(a) - 1, (a, b)
    finally:
        dispatch._without_triton.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("lengths", [[40, 23]], ids=str)
@torch.no_grad()
def test_more_rows_than_choose_holds_are_moved_all_the_same(lengths, monkeypatch):
    """Or what leaves each layer would be kept to the end; ragged ones are."""
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    model = zsaa.enable(small("llama"), alpha=0.7, tau=3, graphs=False)
    model = model.to(DEVICE, torch.float16)
    ids, mask, _ = (x.to(DEVICE) for x in tiny.tokens(lengths))
    calls = []
    for name in ("choose", "move"):
        stock = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _f=stock, _n=name, **k: calls.append(_n) or _f(*a, **k))
    try:
        want = model.model(ids, attention_mask=mask).last_hidden_state
        assert {*calls} == {"choose", "move"}
        calls.clear()
        monkeypatch.setattr(kernels, "CHOOSE_LIMIT", 8)
        assert torch.equal(model.model(ids, attention_mask=mask).last_hidden_state, want)
        ragged = len({*lengths}) > 1
        assert calls == [] if ragged else {*calls} == {"move"}
    finally:
        dispatch._without_triton.cache_clear()


@pytest.mark.parametrize("lengths", [[18, 18], [18, 9]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("chosen", ["auto", "torch"])
def test_autocast_to_another_half_precision_than_the_weights(lengths, grad, chosen, monkeypatch):
    """States are float32 from the first layer on, those that it drops bfloat16: both come out, as at alpha = 1."""
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", chosen)
    model = zsaa.enable(small("llama", "base"), alpha=0.7, tau=3, graphs=False)
    model = model.to(DEVICE, torch.bfloat16)
    ids, mask, _ = (x.to(DEVICE) for x in tiny.tokens(lengths))
    entered = []
    model.layers[0].register_forward_pre_hook(lambda layer, args: entered.append(args[0]))
    try:
        with torch.set_grad_enabled(grad), torch.autocast(DEVICE, torch.float16), zsaa.trace(model) as t:
            states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            if grad:
                states.square().mean().backward()
    finally:
        dispatch._without_triton.cache_clear()
    assert states.dtype == torch.float32 and states.isfinite().all()
    for sample, n in enumerate(lengths):
        gone = sorted({*range(n)} - {*t.kept[0][sample].tolist()})
        normed = model.norm(entered[0][sample, gone].float())
        assert gone and torch.equal(states[sample, gone], normed)
    assert not grad or all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_embeddings_may_lie_in_any_way(family, batch, monkeypatch):
    """As a convolution leaves them: [batch, size, n], transposed. In the prefill, and in what continues its cache."""
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    model = zsaa.enable(small(family, "base"), alpha=0.7, tau=3, graphs=False)
    model = model.to(DEVICE, torch.float16)
    states = torch.randn(batch, 32, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    results = []
    try:
        for x in (states.mT, states.mT.contiguous()):
            cache = model(inputs_embeds=x).past_key_values
            results.append(model(inputs_embeds=x[:, :4], past_key_values=cache).last_hidden_state)
            results.append(model(inputs_embeds=x, use_cache=False).last_hidden_state)
    finally:
        dispatch._without_triton.cache_clear()
    for a, b in zip(results[:2], results[2:]):
        torch.testing.assert_close(a, b, rtol=3e-2, atol=3e-2 * b.abs().max().item())


@pytest.mark.parametrize(
    "broken", [None, *(pytest.param(k, marks=pytest.mark.full) for k in ("choose", "move", "rotate"))]
)
def test_kernels_are_asked_once_whether_they_agree_with_pytorch(broken, monkeypatch):
    device = torch.device(DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    if broken:
        real = getattr(kernels, broken)

        def wrong(*args):
            first, *rest = real(*args)
            return first.flip(1), *rest

        monkeypatch.setattr(kernels, broken, wrong)
    ask = dispatch._rows_agree.__wrapped__
    if broken is None:
        assert ask(device, 40)
    else:
        with pytest.warns(UserWarning, match=f"do not agree with PyTorch on a GPU .({broken}|IndexError)"):
            assert not ask(device, 40)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.filterwarnings("error:.*do not agree")
def test_defaults_of_type_and_device_decide_nothing(dtype, monkeypatch):
    """What was set by torch.set_default_dtype and set_default_device, when the kernels are first asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    device, before = torch.device(DEVICE), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert dispatch._rows_agree.__wrapped__(device, 40)
            assert dispatch._layers_agree.__wrapped__(device)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.full)])
@pytest.mark.parametrize("lengths", [[18, 18], [18, 9]], ids=str)
def test_recomputing_has_the_same_gradients(family, lengths, monkeypatch):
    """Where layers run again for the backward pass, dropped rows leave another way."""
    dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", "auto")
    ids, mask, _ = (x.to(DEVICE) for x in tiny.tokens(lengths))
    grads, finals = [], []
    move = kernels.move
    monkeypatch.setattr(kernels, "move", lambda *a: finals.append(a[-1] is not None) or move(*a))
    try:
        for again in (False, True):
            model = zsaa.enable(small(family, "base"), alpha=0.7, tau=3, graphs=False)
            model = model.to(DEVICE, torch.float16).train()
            if again:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            finals.clear()
            states = model(ids, attention_mask=mask, use_cache=False).last_hidden_state
            (states.float() * torch.linspace(-1, 1, 18, device=DEVICE)[:, None]).mean().backward()
            assert finals and set(finals) == {not again}
            grads.append([p.grad.float() for p in model.parameters() if p.grad is not None])
    finally:
        dispatch._without_triton.cache_clear()
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= (5e-3 if GPU else 1e-3) * b.norm() + 1e-6  # flash's backward pass repeats inexactly


@pytest.mark.parametrize("lengths", [[24, 24], [24, 15, 9]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_learned_scores_go_through_the_kernels(lengths, grad, monkeypatch):
    """In float16 through Triton (without a GPU, its interpreter) and through plain PyTorch."""
    if not GPU:
        monkeypatch.setattr(base.attention, "_blocks", lambda *args: (32, 32, 4, 2))
    dispatch._without_triton.cache_clear()
    model = model_of(dtype=torch.float32, alpha=0.06).to(DEVICE, torch.float16)
    zsaa.enable(model, graphs=False)
    ids, mask, _ = (x.to(DEVICE) for x in tiny.tokens(lengths, padding="left"))
    found = {}
    try:
        for name in ("auto", "torch"):
            monkeypatch.setattr(dispatch, "_chosen", name)
            with torch.set_grad_enabled(grad), zsaa.trace(model) as t:
                logits = model(ids, attention_mask=mask, use_cache=not grad).logits
            found[name] = logits.float(), [k.tolist() for layer in t.kept for k in layer]
    finally:
        dispatch._without_triton.cache_clear()
    assert len(found["torch"][1][0]) < 40
    for a, b in zip(found["auto"][1], found["torch"][1]):  # a near tie may fall either way
        assert len(a) == len(b) and len({*a} & {*b}) >= 0.8 * len(a) - 1
    if found["auto"][1] == found["torch"][1]:
        torch.testing.assert_close(found["auto"][0], found["torch"][0], rtol=3e-2, atol=3e-2)
