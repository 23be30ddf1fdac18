"""Scorers taught for longer on more: what retrieval heads look at, token by token, on passages drawn anew at each step.

The heads' shares are taken once, of each question on its own passage alone, while the model writes the answer
(teach.py); beside other passages, these get nothing. So chunks may be of any kind, and no prompt comes twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ablation.answers import teach
from ablation.answers.data import Data, Sample
from ablation.answers.reader import batch, read
from zsaa.learned.asked import Scorer, Shape, marks

PASSAGES = (1, 1, 1, 2, 3, 3, 3, 5)  # of a prompt, drawn evenly


@dataclass(frozen=True)
class School:
    """How a scorer is built, and how it is taught. drop_asks, drop_words: the share of the tokens that ask, and of the
    body's words, that a step hides; told, gold: weights of the heads' shares and of the answer's place."""

    chunk: int = 24
    sentences: bool = True
    bm25: bool = True
    width: int = 128
    heads: int = 4
    dropout: float = 0.1
    also: tuple[str, ...] = ()  # data sets beside CoQA's training stories
    drop_asks: float = 0.0
    drop_words: float = 0.0
    told: float = 1.0
    gold: float = 1.0
    decay: float = 0.05
    ema: float = 0.99
    rate: float = 1e-3
    size: int = 64
    steps: int = 1000
    seed: int = 0

    def build(self, data: Data, states: int, device) -> Scorer:
        idf = torch.full((len(data.pieces),), 5.0)
        for word, value in data.idf.items():
            idf[word] = value
        shape = Shape(states, self.width, heads=self.heads, chunk=self.chunk, dropout=self.dropout,
                      sentences=self.sentences, bm25=self.bm25)  # fmt: skip
        kinds = marks(data.pieces) if self.sentences else None
        return Scorer(shape, torch.tensor(data.canon), idf, kinds).to(device)


@torch.no_grad()
def shares(lm, data: Data, turns: list[int], heads: dict[int, list[int]], device, size: int = 64) -> dict[int, Tensor]:
    """Of each turn: the heads' shares of its own passage's tokens and of the turns before it, in half precision."""
    samples = {i: data.sample(i, 1, random.Random(0)) for i in turns}
    order, found = sorted(turns, key=lambda i: len(samples[i].body)), {}
    for j in range(0, len(order), size):
        part = order[j : j + size]
        b = batch([samples[i] for i in part], device)
        watch = teach.Watch(b, "answer", heads, by_token=True)
        with teach.mixed(device):
            read(lm, b, watch=watch, layers=max(heads) + 1)
        for i, row, n in zip(part, watch.mean().half().cpu(), b.region.tolist()):
            found[i] = row[:n].clone()
    return found


def target(sample: Sample, share: Tensor, width: int) -> Tensor:
    """[width] of the region's tokens: the shares where its own passage and its turns stand."""
    out, before = torch.zeros(width), len(sample.older) + len(sample.last)
    own = len(share) - before
    out[sample.own : sample.own + own] = share[:own].float()
    out[len(sample.body) : len(sample.body) + before] = share[own:].float()
    return out


def lesson(scorer: Scorer, embed, data: Data, found: Mapping[int, Tensor], part: list[int], how: School, rng, device):
    """The losses of one batch: cross entropy with the heads' shares, and with the answer's place where it is known."""
    samples = [data.sample(i, rng.choice(PASSAGES), rng) for i in part]
    b = batch(samples, device, answers=False)
    width = int(b.region.max())
    wanted = torch.stack([target(s, found[i], width) for s, i in zip(samples, part)]).to(device)
    place = torch.zeros(len(samples), width)
    for row, s in zip(place, samples):
        if s.gold is not None:
            row[s.gold[0] : s.gold[1] + 1] = 1
    ids, asks = b.ids, b.part
    x = embed(ids)
    if how.drop_asks:
        b.part = asks * (torch.rand(asks.shape, device=device) >= how.drop_asks)
        b.part[:, -1] = asks[:, -1]
    unit = teach.units(scorer, b)
    if how.drop_words:  # what the words are is hidden, not what they mean
        none = torch.rand(ids[:, :width].shape, device=device) < how.drop_words
        shown = b.ids.clone()
        shown[:, :width] = shown[:, :width].masked_fill(none & ~scorer_stops(scorer, ids[:, :width]), 0)
        b.ids = shown
    logs = teach.look(scorer, x, b).log_softmax(1)
    if how.drop_words and scorer.shape.sentences and logs.shape[1] != int(unit.max()) + 1:
        raise RuntimeError("hiding words moved the bounds of sentences")
    right = torch.zeros_like(logs).scatter_reduce(1, unit, place.to(device), "amax") > 0
    wanted = torch.zeros_like(logs).scatter_add(1, unit, wanted)
    wanted = wanted / wanted.sum(1, keepdim=True).clamp(min=1e-6)
    known = right.any(1)
    listwise = -(wanted * logs.clamp(min=-30)).sum(1).mean()
    placed = -logs.masked_fill(~right, -1e4).logsumexp(1)[known].sum() / len(part)
    return listwise, placed


def scorer_stops(scorer: Scorer, ids: Tensor) -> Tensor:
    """Tokens that bound sentences, or stand next to a bound."""
    if not scorer.shape.sentences:
        return torch.zeros_like(ids, dtype=torch.bool)
    bounds = (scorer.marks[ids] & ~4) > 0
    return bounds | F.pad(bounds, (1, 0))[:, :-1]


def run(scorer: Scorer, embed, data: Data, found: Mapping[int, Tensor], how: School, device, log: Callable,
        judged: Callable, every: int = 250) -> float:  # fmt: skip
    """Teach; the scorer ends on the running mean of its weights that `judged` (higher is better) liked best, and that
    is returned."""
    rng, order = random.Random(how.seed), []
    mean = AveragedModel(scorer, multi_avg_fn=get_ema_multi_avg_fn(how.ema))
    opt = torch.optim.AdamW(scorer.parameters(), lr=how.rate, weight_decay=how.decay)
    best: tuple[float, dict] = (-1.0, {})
    for step in range(how.steps):
        for group in opt.param_groups:
            group["lr"] = how.rate * min(1, (step + 1) / 50) * max(0.02, 1 - step / how.steps)
        if len(order) < how.size:
            order = rng.sample(sorted(found), len(found))
        part, order = order[: how.size], order[how.size :]
        scorer.train()
        listwise, placed = lesson(scorer, embed, data, found, part, how, rng, device)
        opt.zero_grad(set_to_none=True)
        (how.told * listwise + how.gold * placed).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.step()
        mean.update_parameters(scorer)
        if step % every == every - 1 or step == how.steps - 1:
            worth = judged(mean.module.eval())
            log(step=step + 1, listwise=round(listwise.item(), 4), placed=round(placed.item(), 4), judged=worth)
            if worth > best[0]:
                best = worth, {k: v.clone() for k, v in mean.module.state_dict().items()}
    scorer.load_state_dict(best[1])
    scorer.eval()
    return best[0]
