"""What the kernels compute, in plain PyTorch: slow, attention quadratic in the rows, and easy to check by eye."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_and_column_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention in the inputs' own precision: output [batch, heads, rows, dim], natural log-sum-exp [batch,
    heads, rows], and the sums of the soft-score over heads and real queries [batch, rows]. Padding rows are zero."""
    batch, heads, rows, _ = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    index = torch.arange(rows, device=q.device)
    real = index < (rows if lengths is None else lengths[:, None, None])  # [.., rows]
    seen = (index[None, :] <= index[:, None]) & real.expand(batch, 1, rows)[:, :, None] & torch.ones_like(index).bool()
    if window is not None:
        seen = seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    logits = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    voters = real.expand(batch, 1, rows)
    # The products of padding may hold anything, NaN included: replaced, not multiplied away.
    logits = logits.masked_fill(~(seen & voters[..., None]), float("-inf"))
    lse = logits.logsumexp(dim=-1)
    p = logits.softmax(dim=-1).masked_fill(~voters[..., None], 0.0)
    output = p @ v.masked_fill(~voters.mT.reshape(batch, 1, rows, 1), 0.0)
    return output, lse.masked_fill(~voters, 0.0), p.sum(dim=(1, 2))


def add_norm(x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and its RMSNorm or (with a bias) LayerNorm, as the models' own modules round them."""
    x = x if other is None else x + other
    if bias is not None:
        return x, torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x if x.dtype == torch.float64 else x.float()
    return x, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up
