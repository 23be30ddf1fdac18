"""Accuracy of a classifier along the dial, and of its controls at equal compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ablation.forward import forward
from ablation.scorers import Evidence
from ablation.training import ON_CUTS, Training
from ablation.variants import Variant, alpha_for, total_macs
from zsaa.budget import truncation_for
from zsaa.cost import attention_widths, layer_weights
from zsaa.data.batching import pad
from zsaa.evaluation.accuracy import tally
from zsaa.evaluation.controls import cut
from zsaa.families import find_decoder


def first_layers(config, n: int, layer: int) -> int:
    """MACs of n tokens up to the attention output of a layer (0: the first)."""
    entering, kept = layer_weights(config)
    attention = n * entering + 2 * n * n * attention_widths(config)[0]
    return (layer + 1) * attention + layer * n * kept


def logits_of(
    model: nn.Module, ids: Tensor, lengths: Sequence[int], alpha: float, variant: Variant, **more
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """float32 [batch, classes]: the task head on each sample's last token; that token's final state; and what each
    layer passed on."""
    hidden, trail = forward(model, ids, lengths, alpha, variant, **more)
    last = (trail[-1] >= 0).sum(1) - 1
    state = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return model.score(state).float(), state.float(), trail


@torch.no_grad()
def accuracy(
    model: nn.Module, samples: Sequence, labels: Sequence[int], alpha: float, variant: Variant, probe, batch_size: int,
    votes_of: int | None = None,
) -> dict:  # fmt: skip
    """The tally of one setting (see `zsaa.evaluation.accuracy.tally`); votes_of: of the votes in this layer alone."""
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    right = [0] * len(samples)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, _ = pad([samples[i] for i in batch], 0, device)
        more = {"scorer": probe} if probe is not None else {}
        logits, *_ = logits_of(model, ids, [len(samples[i]) for i in batch], alpha, variant, **more)
        found = (logits if votes_of is None else probe.together[votes_of]).argmax(-1)
        for i, answer in zip(batch, found.tolist()):
            right[i] = int(answer == labels[i])
    return tally(right)


def curve(
    model: nn.Module, samples: Sequence, labels: Sequence[int], variant: Variant, training: Training, probe, targets,
    batch_size: int = 192, sides: Sequence[str] = (),
) -> list[dict]:  # fmt: skip
    """Accuracy at each target MAC reduction; for the dial, and for inputs cut by each of `sides` at alpha = 1. Targets
    out of reach are left out."""
    config = find_decoder(model)[0].config
    lengths = [len(s) for s in samples]
    counted = Counter(lengths)
    whole = total_macs(config, counted, 1.0, variant)
    rows = []
    if isinstance(probe, Evidence) and probe.deciding:
        # What the votes know by themselves, at the price of what they look at in the first scored layer.
        layer = min(map(int, probe.heads))
        found = accuracy(model, samples, labels, 1.0, variant, probe, batch_size, votes_of=layer)
        looked_at = 0 if variant.ahead else 1
        only = sum(first_layers(config, n, layer) * looked_at + n * variant.scorer_macs[0] for n in lengths)
        rows.append({"control": "scorer", "target": None, "mac_reduction": whole / only, **found})
    for target in targets:
        if training.sampling not in ON_CUTS:
            try:
                alpha = alpha_for(config, lengths, target, variant)
            except ValueError:
                continue
            reached = whole / total_macs(config, counted, alpha, variant)
            found = accuracy(model, samples, labels, alpha, variant, probe, batch_size)
            rows.append({"control": "alpha", "target": target, "alpha": alpha, "mac_reduction": reached, **found})
        k = truncation_for(config, lengths, target)
        for side in sides if target > 1 or training.sampling in ON_CUTS else ():
            shorter = [cut(s, k, side) for s in samples]
            reached = whole / total_macs(config, Counter(map(len, shorter)), 1.0, variant)
            found = accuracy(model, shorter, labels, 1.0, variant, None, batch_size)
            rows.append({"control": side, "target": target, "keep_tokens": k, "mac_reduction": reached, **found})
            if target == 1:
                break
    return rows
