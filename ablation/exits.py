"""One model, any depth: a classifier that answers behind every layer, and its curves.

Behind each layer the last token's state goes through the final norm and the head, so one pass holds the answers of
every depth, and training them all costs little more than training one (zsaa/finetune/exits.py).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ablation.curves import logits_of
from ablation.training import Training
from ablation.variants import Variant, alpha_for, macs, total_macs
from zsaa.data.batching import pad
from zsaa.evaluation.accuracy import tally
from zsaa.families import find_decoder
from zsaa.finetune.exits import drawn, final_norm, loss, shallowest

DEPTHS = (3, 5, 6, 8, 10, 12, 15, 18, 20, 22, 25, 27)  # of 30: what is tried beside all, where tokens are fewer, too
__all__ = ["answers", "asked", "best_splits", "by_confidence", "curve", "drawn", "loss", "skipped"]
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
STRONG = 5.0  # the most tokens are reduced where texts leave by confidence, too


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
    splits: dict[float, int] | None = None,
) -> list[dict]:  # fmt: skip
    """Accuracy by depth, by confidence and, if the model was trained for fewer tokens, by tokens and by both, each at
    equal MACs. splits: the depth to try at each target beside all layers; None: every one of DEPTHS."""
    config = find_decoder(model)[0].config
    layers, right = config.num_hidden_layers, torch.tensor(labels)
    lengths = Counter(map(len, samples))
    whole, rows = total_macs(config, lengths, 1.0, variant), []
    depths = list(range(shallowest(layers), layers + 1))
    said = asked(model, samples, 1.0, variant, probe, depths)

    def sure_rows(answered: Tensor, alpha: float) -> list[dict]:
        cost = {n: [macs(config, n, alpha, variant, depth) for depth in depths] for n in lengths}
        costs = torch.tensor([cost[len(text)] for text in samples], dtype=torch.float64).T
        rows = [by_confidence(answered, costs, right, sure, whole) for sure in SURE]
        return [{**row, "alpha": alpha} for row in rows]

    for depth, answer in zip(depths, said):
        found = tally((answer.argmax(-1) == right).int().tolist())
        rows.append({"control": "layers", "target": layers / depth, "layers": depth,
                     "mac_reduction": layers / depth, **found})  # fmt: skip
    rows += sure_rows(said, 1.0)
    if training.sampling != "ladder":
        return rows
    for target in (t for t in targets if 1 < t <= STRONG):  # the same with fewer tokens
        alpha = alpha_for(config, list(lengths.elements()), target, variant)
        answered = asked(model, samples, alpha, variant, probe, depths)
        rows += [{**row, "control": "both-confidence", "tokens": target} for row in sure_rows(answered, alpha)]
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


def best_splits(rows: Sequence[dict]) -> dict[float, int]:
    """Of each target the depth below all at which fewer tokens, too, were most accurate; of equals the deepest."""
    both = [row for row in rows if row["control"] == "both"]
    return {
        target: max((r["accuracy"], r["layers"]) for r in both if r["target"] == target)[1]
        for target in dict.fromkeys(row["target"] for row in both)
    }
