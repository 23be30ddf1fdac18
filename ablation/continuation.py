"""Untuned: how a pruned prompt changes what a language model says next. One row of the ablation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ablation.forward import forward
from ablation.variants import Variant, alpha_for, macs
from zsaa.budget import truncation_for


@torch.inference_mode()
def _score(
    model: nn.Module, ids: Tensor, alpha: float, variant: Variant, scored: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """ids [windows, prompt + scored]. Returns the most likely next token after each prompt [windows] and the negative
    log-likelihood of the scored tokens [windows, scored], decoded behind the pruned prompt (causal)."""
    first, losses = [], []
    for part in ids.split(batch_size):
        hidden, _ = forward(model.model, part, [part.shape[1]] * len(part), alpha, variant, tail=scored)
        logits = model.lm_head(hidden[:, -scored - 1 : -1]).float()
        first.append(logits[:, 0].argmax(-1))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, -scored:].flatten(), reduction="none"))
    return torch.cat(first), torch.cat(losses).unflatten(0, (-1, scored))


def windows(texts: Sequence[Sequence[int]], prompt: int, scored: int, count: int) -> Tensor:
    """The first prompt + scored tokens of the first `count` texts that have so many, int64 [count, prompt + scored]."""
    found = [text[: prompt + scored] for text in texts if len(text) >= prompt + scored][:count]
    if len(found) < count:
        raise ValueError(f"only {len(found)} texts have {prompt + scored} tokens; {count} were asked for.")
    return torch.tensor(found)


def curve(
    model: nn.Module, ids: Tensor, scored: int, variants: dict[str, Variant], targets: Sequence[float], batch_size=32
) -> list[dict]:
    """One dict per variant and target MAC reduction of the prompt, and for each target one of the prompt's last tokens
    alone ("truncation"): agreement with alpha = 1 on the next token (percent), perplexity, and for a paired test the
    mean negative log-likelihood of each window ("nll")."""
    config, prompt = model.config, ids.shape[1] - scored
    stock_first, stock = _score(model, ids, 1.0, Variant(), scored, batch_size)

    def row(name: str, target: float, reached: float, found: tuple[Tensor, Tensor], **more) -> dict:
        first, losses = found
        return {
            "variant": name, "target": target, "mac_reduction": round(reached, 4), **more,
            "agreement": round(100 * (first == stock_first).float().mean().item(), 2),
            "perplexity": round(losses.mean().exp().item(), 4),
            "nll": [round(x, 5) for x in losses.mean(1).tolist()], "n": len(ids),
        }  # fmt: skip

    rows = [row("stock", 1, 1.0, (stock_first, stock))]
    bar = tqdm(total=len(targets) * (len(variants) + 1), mininterval=5)
    for target in targets:
        k = truncation_for(config, prompt, target)
        reached = macs(config, prompt, 1.0, Variant()) / macs(config, k, 1.0, Variant())
        found = _score(model, ids[:, prompt - k :], 1.0, Variant(), scored, batch_size)
        rows.append(row("truncation", target, reached, found, keep_tokens=k))
        bar.update()
        for name, variant in variants.items():
            bar.update()
            try:
                alpha = alpha_for(config, [prompt], target, variant)
            except ValueError:
                continue
            reached = macs(config, prompt, 1.0, variant) / macs(config, prompt, alpha, variant)
            rows.append(row(name, target, reached, _score(model, ids, alpha, variant, scored, batch_size), alpha=alpha))
    bar.close()
    return rows
