"""Attention on a CPU, whose blocks share one piece of memory, beside the plain one."""

import pytest
import torch

from zsaa.attention import Rows, attend_and_score
from zsaa.fast import attention, dispatch


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("long", [70, 1000])
@pytest.mark.parametrize("wide", [1, 30])
@torch.no_grad()
def test_attention_in_one_piece_of_memory_is_the_plain_one(monkeypatch, ragged, window, long, wide):
    """Of several blocks, beside float64 in zsaa.attention's own way; without sums, by PyTorch's attention, too; logits
    so `wide` that their exponents leave float32."""
    for name in ("ONE_PIECE", "FEW"):
        monkeypatch.setattr(attention, name, 1)
    monkeypatch.setattr(attention, "LONG", long)
    torch.manual_seed(0)
    q, k, v = wide * torch.randn(2, 6, 75, 16), *torch.randn(2, 2, 2, 75, 16)
    positions = torch.arange(75).mul(2).expand(2, -1)
    real = positions < torch.tensor([[150], [80]]) if ragged else None
    rows = Rows(73, None if real is None else real[:, :73], positions[:, :73], window)
    took, one_piece, over_own, far = [], attention._in_one_piece, attention._over_own, []
    monkeypatch.setattr(attention, "_over_own", lambda *args: far.append(over_own(*args)) or far[-1])
    monkeypatch.setattr(attention, "_in_one_piece", lambda *args: took.append(1) or one_piece(*args))
    seen = slice(None) if real is None else real[:, :73][:, None, :, None].expand(2, 6, 73, 16)
    near = {"rtol": 1e-5, "atol": 1e-6} if wide == 1 else {"rtol": 1e-3, "atol": 1e-4}
    for score in (True, False):
        output, sums = attend_and_score(q, k, v, scale=0.25, rows=rows, score=score)
        exact = attend_and_score(q.double(), k.double(), v.double(), scale=0.25, rows=rows, score=score)
        torch.testing.assert_close(output[seen].double(), exact[0][seen], **near)
        assert (sums is None) == (not score)
        if score:
            torch.testing.assert_close(sums.double(), exact[1], **near)
    assert len(took) == 2
    assert [done is None for done in far] == ([] if long > 75 or window else [wide > 1])
    dispatch.use_backend("torch")
    try:
        attend_and_score(q, k, v, scale=0.25, rows=rows)
    finally:
        dispatch.use_backend("auto")
    assert len(took) == 2


@pytest.mark.parametrize("long", [10, 1000])
@torch.no_grad()
def test_bfloat16_is_computed_in_float32(monkeypatch, long):
    monkeypatch.setattr(attention, "LONG", long)
    torch.manual_seed(0)
    q, k, v = (x.bfloat16() for x in (torch.randn(2, 6, 75, 16), *torch.randn(2, 2, 2, 75, 16)))
    output, sums = attend_and_score(q, k, v, scale=0.25)
    wide, wanted = attend_and_score(q.float(), k.float(), v.float(), scale=0.25)
    assert torch.equal(output, wide.bfloat16()) and torch.equal(sums, wanted)
