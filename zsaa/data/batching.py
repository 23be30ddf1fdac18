"""Texts of several lengths as one batch."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence

import torch


def pad(
    samples: Sequence[Sequence[int]], pad_id: int, device, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [batch, longest], int64, padded on the "right" or "left"."""
    width = max(map(len, samples))

    def filled(row: Sequence[int], padding: int) -> list[int]:
        rest = [padding] * (width - len(row))
        return [*row, *rest] if side == "right" else [*rest, *row]

    ids = torch.tensor([filled(s, pad_id) for s in samples], dtype=torch.int64, device=device)
    mask = torch.tensor([filled([1] * len(s), 0) for s in samples], dtype=torch.int64, device=device)
    return ids, mask


def own_seeds(samples: Iterable[Sequence[int]]) -> list[int]:
    """A seed of each sample's own, for the score "random": of its tokens, so that neither order nor batch matters."""
    return [zlib.crc32(array("q", sample).tobytes()) for sample in samples]


def positions(mask: torch.Tensor, new: int) -> torch.Tensor:
    """Positions int64 [batch, new] of the last `new` tokens of a mask [batch, cached + new]: real tokens count."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - new :]
