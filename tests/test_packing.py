"""Copies of what a recording left: equal, elsewhere, and nothing beside them written."""

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def outputs(batch, n, kv_heads=2, dim=16, dtype=torch.float16):
    """Last states, then keys, values and positions laid out as the families lay them out."""

    def randn(*size):
        return torch.randn(size, device=DEVICE).to(dtype)

    fused = randn(batch, n, 3 * kv_heads * dim).chunk(3, dim=-1)
    padded = randn(batch, n + 7, kv_heads, dim)
    positions = torch.randint(0, 99, (batch, n), device=DEVICE)
    return [
        randn(batch, n, 40),
        *(x.unflatten(-1, (kv_heads, dim)).transpose(1, 2) for x in fused[1:]),
        torch.arange(n, device=DEVICE).expand(batch, -1),
        padded.transpose(1, 2)[:, :, :n],
        randn(batch, kv_heads, n, dim),
        positions,
        randn(batch, 1, n, dim),
        randn(batch, n, 1, dim).transpose(1, 2),
        positions[:, :3],
    ]


@pytest.fixture(params=["kernel", "plain"])
def packing(request, monkeypatch):
    from zsaa.fast import dispatch, packing

    if request.param == "kernel":
        pytest.importorskip("triton")
        import test_kernels  # noqa: F401  sets Triton's interpreter up

        dispatch._without_triton.cache_clear()
    monkeypatch.setattr(dispatch, "_chosen", "auto" if request.param == "kernel" else "torch")
    monkeypatch.setattr(packing, "LIMIT", 5000)  # several groups
    packing.kernel = request.param == "kernel"
    yield packing
    dispatch._without_triton.cache_clear()


@pytest.mark.parametrize(("batch", "n"), [(1, 9), (3, 33), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_copies_are_equal_and_elsewhere(packing, batch, n, dtype):
    tensors = outputs(batch, n, dtype=dtype)
    packed = packing.Packing(tensors)
    assert bool(packed.packs) == packing.kernel
    first = packed.copies()
    kept = [x.clone() for x in first]
    for a, b in zip(first, tensors, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
        assert a.data_ptr() % 64 == 0
        like = torch.empty_like(b).stride()
        assert 1 in b.shape or a.stride() == like
    for x in tensors:
        if x.stride(0):
            x.zero_()
    second = packed.copies()
    assert all(torch.equal(a, b) for a, b in zip(first, kept))  # what was handed out is not written again
    assert all(torch.equal(a, b) for a, b in zip(second, tensors))
    assert first[0].untyped_storage().data_ptr() != first[1].untyped_storage().data_ptr()


def test_what_is_not_in_whole_words_is_copied_by_pytorch(packing):
    tensors = [torch.randn(1, 3, 5, device=DEVICE).half(), torch.randn(2, 3, device=DEVICE).half()[:, 1:]]
    packed = packing.Packing(tensors)
    assert not packed.packs
    assert all(torch.equal(a, b) for a, b in zip(packed.copies(), tensors))


@pytest.mark.filterwarnings("error")
def test_nan_is_copied_like_any_other_number(packing):
    tensors = outputs(2, 9)
    for x in tensors:
        if x.is_floating_point():
            x[0, 0] = float("nan")
    packed = packing.Packing(tensors)
    assert bool(packed.packs) == packing.kernel
    assert all(packing.alike(a, b) for a, b in zip(packed.copies(), tensors))
    assert not packing.alike(tensors[0], torch.zeros_like(tensors[0]))
    assert not packing.alike(tensors[0].isnan().float(), tensors[0].float())


def test_a_kernel_that_copies_something_else_is_not_used(packing, monkeypatch):
    if not packing.kernel:
        pytest.skip("of the kernel")
    from zsaa.kernels import pack

    real = pack.Pack.__call__
    monkeypatch.setattr(pack.Pack, "__call__", lambda self: real(self).flip(0))
    tensors = outputs(1, 9)
    with pytest.warns(UserWarning, match="is not used: it copies something else"):
        packed = packing.Packing(tensors)
    assert not packed.packs
    assert all(torch.equal(a, b) for a, b in zip(packed.copies(), tensors))


def test_memory_is_seen_by_who_does_not_hold_it():
    from zsaa.fast.packing import unheld

    held = torch.arange(24.0, device=DEVICE).view(2, 3, 4).transpose(0, 2)[1:]
    seen = unheld(held)
    assert (seen.shape, seen.stride(), seen.data_ptr()) == (held.shape, held.stride(), held.data_ptr())
    held.mul_(2)
    assert torch.equal(seen, held) and seen.dtype == held.dtype
    assert seen.untyped_storage()._cdata != held.untyped_storage()._cdata, "a storage of its own"
