"""What choosing could be worth: a bag of words on the tokens that a rule keeps.

A logistic regression over the presence of tokens knows nothing of order or context. Its weights say how much each
token of the vocabulary tells about the label; keeping the tokens that tell most, against keeping one end of the text,
shows how much of the evidence each rule loses, whatever model reads it afterwards. The same weights serve as a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa.budget import truncation_for
from zsaa.evaluation.accuracy import tally
from zsaa.evaluation.controls import cut

RULES = ("salient", "first", "last", "ends", "random")


class Weights(nn.Module):
    """Log-odds of label 1 per token of the vocabulary, one number each; as a scorer, their size."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.table = nn.EmbeddingBag(vocabulary, 1, mode="sum")
        self.bias = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.table.weight)

    def forward(self, bags: Sequence[Tensor]) -> Tensor:
        """Log-odds [texts] of bags: the tokens of each text, each of them once."""
        starts = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
        return self.table(torch.cat(tuple(bags)), starts)[:, 0] + self.bias

    def salience(self) -> Tensor:
        """float32 [vocabulary]"""
        return self.table.weight.detach()[:, 0].abs()


def fit(texts: Sequence[Tensor], labels: Sequence[int], vocabulary: int, steps: int = 1000, seed: int = 0) -> Weights:
    """Weights for two classes, by Adam with a small L2 penalty on the tokens of each batch."""
    weights, wanted = Weights(vocabulary), torch.tensor(labels, dtype=torch.float32)
    optimizer = torch.optim.Adam(weights.parameters(), lr=3e-3)
    order, bags = torch.Generator().manual_seed(seed), [text.unique() for text in texts]
    for _ in range(steps):
        batch = torch.randperm(len(texts), generator=order)[:128]
        chosen = [bags[i] for i in batch]
        loss = F.binary_cross_entropy_with_logits(weights(chosen), wanted[batch])
        loss = loss + 1e-4 * weights.table.weight[torch.cat(chosen).unique()].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights


def keep(text: Tensor, k: int, rule: str, salience: Tensor) -> Tensor:
    """The k tokens of a text that a rule keeps, in order."""
    if len(text) <= k:
        return text
    if rule in ("first", "last", "ends"):
        return torch.tensor(cut(text.tolist(), k, rule))
    if rule == "random":
        drawn = torch.rand(len(text), generator=torch.Generator().manual_seed(int(text.sum())))
    else:
        drawn = salience[text]
    return text[drawn.topk(k).indices.sort().values]


def curve(
    train: tuple[Sequence, Sequence[int]],
    test: tuple[Sequence, Sequence[int]],
    config,
    targets: Sequence[float],
    steps: int = 1000,
) -> list[dict]:
    """Held-out accuracy per rule, with as many tokens a text as truncation to a MAC reduction leaves a model of this
    `config`. Every rule's bag of words is fitted on texts cut in the same way; salience comes from whole texts."""
    texts, held_out = ([torch.tensor(text) for text in side[0]] for side in (train, test))
    whole = fit(texts, train[1], config.vocab_size, steps)
    answers, lengths, rows = torch.tensor(test[1]), [len(text) for text in held_out], []

    def row(rule: str, target: float, k: int | None, weights: Weights, shown: Sequence[Tensor]) -> dict:
        with torch.inference_mode():
            right = ((weights([text.unique() for text in shown]) > 0).long() == answers).int().tolist()
        return {"control": rule, "target": target, "keep_tokens": k, **tally(right)}

    rows.append(row("whole", 1, None, whole, held_out))
    for target in targets:
        k = truncation_for(config, lengths, target)
        for rule in RULES if target > 1 else ():
            kept, shown = ([keep(text, k, rule, whole.salience()) for text in side] for side in (texts, held_out))
            rows.append(row(rule, target, k, fit(kept, train[1], config.vocab_size, steps), shown))
    return rows
