"""The Triton kernels against plain PyTorch in float64, with garbage wherever nothing may be read.

Without a GPU they run in Triton's interpreter, in small sizes; with one, compiled, in real ones. The error allowed is
twice PyTorch's own in the same precision, plus a few units in the last place of float32.
"""

from types import SimpleNamespace

import pytest
import torch

GPU = torch.cuda.is_available()
pytest.importorskip("triton")

from zsaa.kernels import attention, naive  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
if not GPU:  # Triton 3.6 turns one-element arrays into loop bounds by int(), which NumPy 2.4 refuses
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_item(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_once(kernel, stock=interpreter._patch_lang, patched=set()):  # noqa: B006 - and not at each call of a helper
        if id(kernel.__globals__) not in patched:
            stock(kernel)
            patched.add(id(kernel.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang_tensor, interpreter._patch_lang = with_item, patch_once
HALF = torch.float16
NAN = float("nan")

# batch, heads, kv heads, rows, head size
SHAPES = [(2, 2, 1, 37, 16), (1, 1, 1, 66, 24), (1, 1, 1, 1, 16)]
if GPU:
    SHAPES += [
        (2, 8, 2, 1000, 64),
        (1, 8, 8, 2048, 128),
        (3, 4, 4, 777, 80),
        (1, 4, 2, 1500, 256),
        (2, 12, 4, 4096, 64),
    ]
VARIANTS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "window": {"window": 9},
    "softcap-window": {"softcap": 3.0, "window": 30},
    "ragged": {"ragged": True},
    "ragged-window": {"ragged": True, "window": 20},
}
BLOCKS = (32, 32, 4, 2) if not GPU else None
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def inputs(shape, softcap=None, window=None, ragged=False, dtype=HALF, seed=0):
    """q, k, v on the device, and the settings. Positions skip, as after pruning; padding is NaN."""
    batch, heads, kv_heads, rows, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, rows, dim, generator=generator) * 1.5 for h in (heads, kv_heads, kv_heads))
    settings = {"scale": dim**-0.5, "softcap": softcap, "window": window}
    if window is not None:
        settings["positions"] = torch.randint(1, 4, (batch, rows), generator=generator).cumsum(dim=1).to(DEVICE)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    if ragged:
        lengths = torch.randint(1, rows + 1, (batch,), generator=generator)
        lengths[0] = rows // 2 + 1
        for sample, length in enumerate(lengths.tolist()):
            for x in (q, k, v):
                x[sample, :, length:] = NAN
        settings["lengths"] = lengths.to(DEVICE)
    return (q, k, v), settings


def reference(tensors, settings, dtype=torch.float64):
    """Sample by sample: several tests at a time are to fit on one GPU."""
    samples = []
    for i in range(tensors[0].shape[0]):
        own = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in settings.items()}
        samples.append(naive.attention_and_column_sums(*(x[i : i + 1].to(dtype) for x in tensors), **own))
    return [torch.cat(parts) for parts in zip(*samples)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory that a kernel is to write holds NaN before."""

    def poisoned(make):
        def made(*args, **kwargs):
            memory = make(*args, **kwargs)
            with torch.no_grad():  # checkpointing makes an empty leaf
                return memory.fill_(NAN if memory.is_floating_point() else -1)

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


def assert_as_good_as_torch(ours, torchs, exact, floor):
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    allowed = 2 * worst(torchs, exact) + floor
    assert worst(ours, exact) <= allowed, f"{worst(ours, exact)} > {allowed}"


@each_shape
@each_variant
def test_against_pytorch(shape, variant):
    tensors, settings = inputs(shape, **VARIANTS[variant])
    exact, exact_lse, exact_sums = reference(tensors, settings)
    half, half_lse, half_sums = reference(tensors, settings, HALF)
    out, lse = attention.attention(*tensors, **settings, blocks=BLOCKS)
    assert (out.dtype, lse.dtype) == (HALF, torch.float32)
    assert_as_good_as_torch(out, half, exact, floor=1e-6)
    assert_as_good_as_torch(lse, half_lse, exact_lse, floor=1e-6)
    sums = attention.column_sums(*tensors[:2], exact_lse.float(), **settings, blocks=BLOCKS)
    assert sums.dtype == torch.float32
    assert_as_good_as_torch(sums, half_sums, exact_sums, floor=1e-5)
    queries = settings["lengths"].sum().item() if "lengths" in settings else shape[0] * shape[3]
    assert sums.sum().item() == pytest.approx(queries * shape[1], rel=1e-4)  # a head and query give one vote


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_samples_may_share_their_positions(softcap):
    """As before the first drop, where all samples of a batch without padding have one row of positions."""
    tensors, settings = inputs(SHAPES[0], softcap=softcap, window=9)
    rows = tensors[0].shape[2]
    noise = torch.arange(2 * rows, 0, -1, device=DEVICE)  # what a sample's own row would read if there was one
    noise[:rows] = torch.arange(rows)
    shared = {**settings, "positions": noise[:rows].expand(len(tensors[0]), -1)}
    own = {**settings, "positions": shared["positions"].contiguous()}
    (out, lse), (want, want_lse) = (attention.attention(*tensors, **s, blocks=BLOCKS) for s in (shared, own))
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    sums, wanted = (attention.column_sums(*tensors[:2], lse, **s, blocks=BLOCKS) for s in (shared, own))
    assert torch.equal(sums, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_precisions(dtype):
    if dtype == torch.bfloat16 and not GPU:
        pytest.skip("Triton's interpreter has no products in bfloat16")
    tensors, settings = inputs((1, 2, 1, 50, 16), dtype=dtype)
    exact, _, exact_sums = reference(tensors, settings)
    plain, _, plain_sums = reference(tensors, settings, dtype)
    out, lse = attention.attention(*tensors, **settings, blocks=BLOCKS)
    assert_as_good_as_torch(out, plain, exact, floor=2e-6)
    sums = attention.column_sums(*tensors[:2], lse, **settings, blocks=BLOCKS)
    assert_as_good_as_torch(sums, plain_sums, exact_sums, floor=1e-5)


def test_strided_inputs_and_an_uneven_choice_of_blocks():
    """Heads beside each other in one row, as projections leave them; blocks that do not divide one another."""
    (q, k, v), settings = inputs((1, 2, 1, 45, 16))
    exact, exact_lse, exact_sums = reference((q, k, v), settings)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    for blocks in ((16, 32, 4, 2), (64, 16, 4, 2)):
        out, lse = attention.attention(q, k, v, **settings, blocks=blocks)
        sums = attention.column_sums(q, k, lse, **settings, blocks=blocks)
        assert worst(out, exact) < 2e-3
        assert worst(lse, exact_lse) < 1e-5
        assert worst(sums, exact_sums) < 1e-4
        wide = torch.full((1, 2, 64), NAN, device=DEVICE)  # rows cut off a wider one
        wide[:, :, :45] = lse
        cut = wide[:, :, :45]
        assert torch.equal(attention.column_sums(q, k, cut, **settings, blocks=blocks), sums)


def test_repeats_are_equal_bit_for_bit():
    tensors, settings = inputs(SHAPES[-1] if GPU else (1, 1, 1, 40, 16))
    results = []
    for _ in range(50 if GPU else 2):
        out, lse = attention.attention(*tensors, **settings, blocks=BLOCKS)
        results.append((out, lse, attention.column_sums(*tensors[:2], lse, **settings, blocks=BLOCKS)))
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0]))


def test_a_sample_does_not_depend_on_its_batch_mates():
    tensors, settings = inputs((2, 2, 1, 40, 16), ragged=True)
    out, lse = attention.attention(*tensors, **settings, blocks=BLOCKS)
    sums = attention.column_sums(*tensors[:2], lse, **settings, blocks=BLOCKS)
    for sample, length in enumerate(settings["lengths"].tolist()):
        alone = [x[sample : sample + 1, :, :length] for x in tensors]
        out_alone, lse_alone = attention.attention(*alone, scale=settings["scale"], blocks=BLOCKS)
        sums_alone = attention.column_sums(*alone[:2], lse_alone, scale=settings["scale"], blocks=BLOCKS)
        assert torch.equal(out[sample, :, :length], out_alone[0])
        assert torch.equal(sums[sample, :length], sums_alone[0])


def test_large_logits_neither_overflow_nor_vanish():
    for softcap in (None, 50.0):
        (q, k, v), settings = inputs((1, 1, 1, 40, 16), softcap=softcap)
        q = q * 100
        exact, exact_lse, exact_sums = reference((q, k, v), settings)
        out, lse = attention.attention(q, k, v, **settings, blocks=BLOCKS)
        sums = attention.column_sums(q, k, lse, **settings, blocks=BLOCKS)
        assert worst(out, exact) < 5e-3
        assert worst(sums, exact_sums) < 5e-3
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused():
    (q, k, v), settings = inputs((1, 2, 2, 8, 16))
    lse = torch.zeros(1, 2, 8, device=DEVICE)
    with pytest.raises(ValueError, match="positions"):
        attention.column_sums(q, k, lse, scale=1.0, window=4)
    with pytest.raises(ValueError, match="do not fit"):
        attention.column_sums(q[:, :1], k, lse, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attention.attention(q.mT.contiguous().mT, k, v, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attention.attention(q, k, v.mT.contiguous().mT, scale=1.0)
    with pytest.raises(ValueError, match="k's shape"):
        attention.attention(q, k, v[:, :, :4], scale=1.0)
    with pytest.raises(ValueError, match="head size 320"):
        big = torch.zeros(1, 1, 4, 320, device=DEVICE)
        attention.attention(big, big, big, scale=1.0)


@pytest.mark.skipif(not GPU, reason="PyTorch's flash attention gives its log-sum-exp on GPUs only")
@each_shape
def test_sums_from_the_log_sum_exp_of_pytorch(shape):
    if shape[-1] % 8:
        pytest.skip("flash attention needs a multiple of 8")
    (q, k, v), settings = inputs(shape)
    _, _, exact = reference((q, k, v), settings)
    _, _, half = reference((q, k, v), settings, q.dtype)
    _, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=settings["scale"])
    assert_as_good_as_torch(attention.column_sums(q, k, lse, **settings), half, exact, floor=1e-5)


@pytest.mark.skipif(not GPU, reason="cuDNN's attention runs on GPUs only")
@pytest.mark.parametrize("rows", [512, 700, 1024, 1500])
@pytest.mark.parametrize("dim", [64, 128])
@torch.no_grad()
def test_rows_are_rounded_up_for_cudnn_and_cut_off_again(rows, dim, monkeypatch):
    """The same as flash, though cuDNN only sees rows in steps of 128; a shorter sample's padding is harmless."""
    from zsaa.attention import Rows, attend_and_score
    from zsaa.fast import attention as path

    (q, k, v), settings = inputs((2, 4, 2, rows, dim))
    real = torch.arange(rows, device=DEVICE) < torch.tensor([[rows], [rows // 2]], device=DEVICE)
    if not path._takes_cudnn(q, k):
        pytest.skip("cuDNN is not the faster one here")
    assert path._cudnn(q, k, v, rows, settings["scale"]) is not None
    for mask in (None, real):
        with_cudnn = attend_and_score(q, k, v, scale=settings["scale"], rows=Rows(real=mask))
        with monkeypatch.context() as patch:
            patch.setattr(path, "_takes_cudnn", lambda *args: False)
            with_flash = attend_and_score(q, k, v, scale=settings["scale"], rows=Rows(real=mask))
        zeros = (0, 0, 0, path.padded_rows(q, k) - rows)
        padded = (torch.nn.functional.pad(x, zeros) for x in (q, k, v))
        given = attend_and_score(*padded, scale=settings["scale"], rows=Rows(rows, mask))
        for a, b in zip(given, with_cudnn):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        seen = (real if mask is not None else torch.ones_like(real))[:, None, :, None]
        assert with_cudnn[0].shape == with_flash[0].shape
        assert worst(with_cudnn[0] * seen, with_flash[0] * seen) < 4e-3
        torch.testing.assert_close(with_cudnn[1], with_flash[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("error", "refused"), [(RuntimeError, True), (torch.cuda.OutOfMemoryError, False)])
def test_cudnn_is_given_up_where_it_refuses_not_where_memory_ran_out(error, refused, monkeypatch):
    from zsaa.fast import attention as path

    def raising(*args, **kwargs):
        raise error("no")

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", raising, raising=False)
    monkeypatch.setattr(path, "_without_cudnn", set())
    q, k, v = (torch.zeros(1, heads, 512, 16, device=DEVICE) for heads in (2, 1, 1))
    assert path._cudnn(q, k, v, 512, 1.0) is None
    assert (path._kind(q, k) in path._without_cudnn) == refused


@pytest.mark.parametrize(
    ("capability", "bytes_"), [((8, 0), 163), ((8, 6), 99), ((8, 9), 99), ((9, 0), 227), ((12, 0), 99), ((12, 1), 99)]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_fit_into_shared_memory(capability, bytes_, dim, monkeypatch):
    """KB of a block at most, as the CUDA programming guide lists them; one tensor and `stages` of the others' tiles."""
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    q = SimpleNamespace(is_cuda=True, device=None, shape=(1, 1, 1, dim))
    for table, streamed in ((attention.SCORE_BLOCKS, 1), (attention.ATTENTION_BLOCKS, 2)):
        own, other, _, stages = attention._blocks(table, q, None)
        assert 2 * dim * (own + streamed * stages * other) <= bytes_ * 1024


def test_buckets_are_few():
    from zsaa.fast.attention import _bucket

    assert [_bucket(rows) for rows in (512, 513, 4097, 8192, 8193)] == [512, 640, 4224, 8192, 8448]
    assert len({_bucket(rows) for rows in range(512, 8193)}) == 61
