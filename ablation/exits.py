"""One model, any depth: a classifier that answers behind every layer, and its curves.

Behind each layer the last token's state goes through the final norm and the head, so one pass holds the answers of
every depth, and training them all costs little more than training one: the losses of exits (LayerSkip,
arXiv 2404.16710), with the last layer's answer as their teacher, as a ladder's alpha = 1 pass is for fewer tokens.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ablation.curves import logits_of
from ablation.forward import final_norm
from ablation.training import Training
from ablation.variants import Variant, alpha_for, total_macs
from zsaa.data.batching import pad
from zsaa.evaluation.accuracy import tally
from zsaa.families import find_decoder

SHALLOWEST = 3  # layers; fewer are no exit
DEPTHS = (3, 5, 6, 8, 10, 12, 15, 18, 20, 22, 25, 27)  # of 30: what is tried beside all, where tokens are fewer, too
SURE = (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # confidences at which a text leaves


def drawn(count: int, layers: int, draw: random.Random) -> list[int]:
    """`count` depths below all, or as many as there are: one from each of so many equal parts of the range."""
    there = list(range(SHALLOWEST, layers))
    if count >= len(there):
        return there
    edges = [round(i * len(there) / count) for i in range(count + 1)]
    return [draw.choice(there[low:high]) for low, high in pairwise(edges)]


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


def loss(said: Tensor, wanted: Tensor, teacher: Tensor, distill: float) -> Tensor:
    """Of exits' answers [depths, batch, classes], in the mean: the labels', and the divergence from the teacher's
    verdict [batch, classes]."""
    depths, batch, classes = said.shape
    hard = F.cross_entropy(said.flatten(0, 1), wanted.repeat(depths))
    if not distill:
        return hard
    soft = F.kl_div(said.log_softmax(-1).flatten(0, 1), teacher.repeat(depths, 1), reduction="batchmean")
    return (1 - distill) * hard + distill * soft


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
    splits: dict[float, int] | None = None,
) -> list[dict]:  # fmt: skip
    """Accuracy by depth, by confidence and, if the model was trained for fewer tokens, by tokens and by both, each at
    equal MACs. splits: the depth to try at each target beside all layers; None: every one of DEPTHS."""
    config = find_decoder(model)[0].config
    layers, right = config.num_hidden_layers, torch.tensor(labels)
    lengths = Counter(map(len, samples))
    whole, rows = total_macs(config, lengths, 1.0, variant), []
    depths = list(range(SHALLOWEST, layers + 1))
    said = asked(model, samples, 1.0, variant, probe, depths)
    for depth, answer in zip(depths, said):
        found = tally((answer.argmax(-1) == right).int().tolist())
        rows.append({"control": "layers", "target": layers / depth, "layers": depth,
                     "mac_reduction": layers / depth, **found})  # fmt: skip
    rows += [by_confidence(said, depths, right, sure) for sure in SURE]
    if training.sampling != "ladder":
        return rows
    for target in targets:
        chosen = [d for d in DEPTHS if d < layers] if splits is None else [splits[target]] if target in splits else []
        for depth in dict.fromkeys([*chosen, layers]):
            try:
                alpha = alpha_for(config, list(lengths.elements()), target, variant, depth)
            except ValueError:
                continue
            if layers / depth > target * 1.001:
                continue
            reached = whole / total_macs(config, lengths, alpha, variant, depth)
            answer = asked(model, samples, alpha, variant, probe, [depth])[0]
            found = tally((answer.argmax(-1) == right).int().tolist())
            control = "alpha" if depth == layers else "both"
            rows.append({"control": control, "target": target, "layers": depth, "alpha": alpha,
                         "mac_reduction": reached, **found})  # fmt: skip
    return rows


def by_confidence(said: Tensor, depths: Sequence[int], right: Tensor, sure: float) -> dict:
    """The row of texts that leave behind the first depth that is so sure of its answer [depths, samples, classes], with
    the mean depth that this comes to; the head's own cost is not counted, a thousandth of a layer's."""
    leaves = said.softmax(-1).amax(-1) >= sure
    leaves[-1] = True
    at = leaves.int().argmax(0)
    answer = said[at, torch.arange(len(right))].argmax(-1)
    mean = torch.tensor(depths, dtype=torch.float64)[at].mean().item()
    found = tally((answer == right).int().tolist())
    reduction = max(depths) / mean
    return {"control": "confidence", "target": None, "sure": sure, "mean_layers": round(mean, 3),
            "mac_reduction": reduction, **found}  # fmt: skip


def best_splits(rows: Sequence[dict]) -> dict[float, int]:
    """Of each target the depth below all at which fewer tokens, too, were most accurate; of equals the deepest."""
    both = [row for row in rows if row["control"] == "both"]
    return {
        target: max((r["accuracy"], r["layers"]) for r in both if r["target"] == target)[1]
        for target in dict.fromkeys(row["target"] for row in both)
    }
