"""One model, any depth: a classifier that answers behind every layer, and its curves.

Behind each layer the last token's state goes through the final norm and the head, so one pass holds the answers of
every depth, and training them all costs little more than training one (zsaa/finetune/exits.py).
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ablation import cascade
from ablation.cascade import Pass, costs_of
from ablation.curves import logits_of
from ablation.training import Training
from ablation.variants import Variant, alpha_for, total_macs
from zsaa.data.batching import pad
from zsaa.evaluation.accuracy import tally
from zsaa.families import find_decoder
from zsaa.finetune.exits import drawn, final_norm, loss, shallowest

BETWEEN = (1.5, 2.5, 4.0)  # reductions by fewer tokens that ways may take beside the targets
__all__ = ["answers", "asked", "by_confidence", "chosen_ways", "curve", "drawn", "loss", "skipped"]
SURE = (
    0.6,
    0.7,
    0.75,
    0.8,
    0.85,
    0.9,
    0.93,
    0.95,
    0.97,
    0.98,
    0.99,
    0.995,
    0.999,
)  # confidences at which a text leaves
STRONG = 5.0  # the most tokens are reduced by where a row is kept for each confidence


def skipped(share: float, layers: int, draw: random.Random) -> frozenset[int]:
    """Layers that a step leaves out: layer l with a probability that rises from 0, the first, to `share`, the last, as
    exp(l log 2 / (layers - 1)) - 1 does (LayerSkip, Eq. 1)."""
    if not share:
        return frozenset()
    return frozenset(at for at in range(1, layers) if draw.random() < share * (2 ** (at / (layers - 1)) - 1))


def answers(model: nn.Module, entered: dict[int, Tensor], trail: Sequence[Tensor], depths: Sequence[int]) -> Tensor:
    """float32 [depths, batch, classes]: what the head says behind each of these depths. entered: the states that enter
    each layer; trail: which rows each layer passed on."""
    norm, found = final_norm(find_decoder(model)[0]), []
    for depth in depths:
        hidden, last = entered[depth], (trail[depth - 1] >= 0).sum(1) - 1
        found.append(hidden[torch.arange(len(hidden), device=hidden.device), last])
    return model.score(norm(torch.stack(found))).float()


@torch.no_grad()
def asked(
    model: nn.Module, samples: Sequence, alpha: float, variant: Variant, probe, depths: Sequence[int], batch_size=192
) -> Tensor:
    """float32 [depths, samples, classes] on the CPU: the answers behind each of these depths, in one pass at `alpha`
    that ends behind the deepest."""
    device, layers = next(model.parameters()).device, find_decoder(model)[0].config.num_hidden_layers
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    found = torch.empty(len(depths), len(samples), model.config.num_labels)
    more = {"scorer": probe} if probe is not None else {}
    for start in range(0, len(order), batch_size):
        batch, entered = order[start : start + batch_size], {}
        ids, _ = pad([samples[i] for i in batch], 0, device)
        lengths = [len(samples[i]) for i in batch]
        last, _, trail = logits_of(model, ids, lengths, alpha, variant, entered=entered, depth=max(depths), **more)
        below = [depth for depth in depths if depth < max(depths)]
        said = answers(model, entered, trail, below) if below else last[:0, None]
        place = {depth: at for at, depth in enumerate(below)}
        for at, depth in enumerate(depths):
            found[at, batch] = (said[place[depth]] if depth in place else last).cpu()
    assert max(depths) <= layers
    return found


def curve(
    model: nn.Module, samples: Sequence, labels: Sequence[int], variant: Variant, training: Training, probe, targets,
    ways: Sequence[dict] | None = None, raw: Path | None = None,
) -> list[dict]:  # fmt: skip
    """Accuracy by depth, by confidence and, if the model was trained for fewer tokens, by tokens and by both; and of
    each kind of leaving when sure (ablation/cascade.py) the way that is best at each budget. ways: rows that were
    chosen on other texts before, to be judged in their place. raw: a file for what the model said."""
    config = find_decoder(model)[0].config
    layers, right, lengths = config.num_hidden_layers, torch.tensor(labels), [len(text) for text in samples]
    depths, rows = tuple(range(shallowest(layers), layers + 1)), []
    whole = total_macs(config, Counter(lengths), 1.0, variant)
    passes, alphas = {}, {1.0: 1.0}
    if training.sampling == "ladder":
        alphas |= reached(config, lengths, variant, sorted({*targets, *BETWEEN}))
    for target, alpha in alphas.items():
        said = asked(model, samples, alpha, variant, probe, depths)
        passes[target] = Pass(said, costs_of(config, lengths, alpha, variant, depths), depths)
    for depth, answer in zip(depths, passes[1.0].said):
        found = tally((answer.argmax(-1) == right).int().tolist())
        rows.append({"control": "layers", "target": layers / depth, "layers": depth,
                     "mac_reduction": layers / depth, **found})  # fmt: skip
    for target, one in passes.items():
        kind = {"control": "confidence"} if target == 1 else {"control": "both-confidence", "tokens": target}
        for sure in SURE if target <= STRONG else ():
            row = by_confidence(one.said, one.costs, right, sure, whole)
            rows.append({**row, "alpha": alphas[target], **kind})
        if training.sampling == "ladder" and target in targets:
            found = tally((one.said[-1].argmax(-1) == right).int().tolist())
            rows.append({"control": "alpha", "target": target, "layers": layers, "alpha": alphas[target],
                         "mac_reduction": whole / float(one.costs[-1].sum()), **found})  # fmt: skip
    if raw is not None:
        cascade.save(raw, passes, right)
    # By how often a way says what the whole model says: ways that differ from it where labels happen to favour them are
    # not better on other texts (in halves of the validation part: 92.4 and 91.9% at 2x).
    chosen = cascade.solve(passes, passes[1.0].said[-1].argmax(-1), whole) if ways is None else ways
    return rows + [cascade.judged(row, passes, right, whole) for row in chosen]


def reached(config, lengths: Sequence[int], variant: Variant, targets: Sequence[float]) -> dict[float, float]:
    """The alpha that gives each of these reductions by fewer tokens; those out of reach are left out."""
    found = {}
    for target in targets:
        with contextlib.suppress(ValueError):
            found[float(target)] = alpha_for(config, lengths, target, variant)
    return found


def by_confidence(said: Tensor, costs: Tensor, right: Tensor, sure: float, whole: int) -> dict:
    """The row of texts that each leave behind the first depth that is so sure of its answer [depths, samples, classes].
    costs: multiply-accumulates of each text up to each depth [depths, samples]; whole: of all texts in the whole model.
    The head's own, a thousandth of a layer's, are left out."""
    leaves = said.softmax(-1).amax(-1) >= sure
    leaves[-1] = True
    at = leaves.int().argmax(0)
    texts = torch.arange(len(right))
    found = tally((said[at, texts].argmax(-1) == right).int().tolist())
    reduction = whole / float(costs[at, texts].sum())
    return {"control": "confidence", "target": None, "sure": sure, "mac_reduction": reduction, **found}


def chosen_ways(rows: Sequence[dict]) -> list[dict]:
    """Of a result's rows the ways that were chosen, without what they came to."""
    return [{k: row[k] for k in ("control", "target", "stages")} for row in rows if "stages" in row]
