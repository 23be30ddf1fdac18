"""Exact match and F1 of greedy answers along the dial, and of cut prompts at equal MACs."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import torch

from ablation.answers import cost
from ablation.answers.controls import Picks, picks
from ablation.answers.data import Data, Sample, judge
from ablation.answers.reader import answer, batch, read
from ablation.answers.teach import look, mixed
from ablation.answers.train import Dial

REDUCTIONS = (2.0, 3.0, 5.0, 7.0, 11.0)
TOKENS, MOST = 140_000, 1024  # of a batch, padding included, and samples


def chosen(data: Data, split: str, limit: int | None) -> list[int]:
    """Numbers of the turns that are judged: all, or so many of them."""
    turns, rng = data.questions(split), random.Random(11)
    return turns if limit is None or limit >= len(turns) else sorted(rng.sample(turns, limit))


def samples_of(data: Data, split: str, passages: int, limit: int | None):
    """The same questions on the same passages for every row."""
    return [data.sample(i, passages, random.Random(f"judge-{i}")) for i in chosen(data, split, limit)]


def length(s: Sample) -> int:
    return len(s.body + s.older + s.last + s.line)


def lots(samples: Sequence[Sample], tokens: float = TOKENS, most: int = MOST) -> Iterator[list[int]]:
    """Numbers of samples of about the same length, as many as a batch may hold."""
    lot: list[int] = []
    for i in sorted(range(len(samples)), key=lambda i: length(samples[i])):
        if lot and (len(lot) == most or (len(lot) + 1) * length(samples[i]) > tokens):
            yield lot
            lot = []
        lot.append(i)
    if lot:
        yield lot


def judged(lm, samples, data: Data, device, dial: Dial | None = None, reduction: float = 1.0, history=False):
    """A record: mean EM and F1, each question's, how likely the model held its answers (%), how many tokens these have
    on average, and the reduction of MACs that was reached."""
    began, reached, tokens = time.time(), [], 0
    em, f1, sure = ([0.0] * len(samples) for _ in range(3))
    room = TOKENS * min(reduction, 3.0) if dial else TOKENS  # most tokens leave before the first layer
    for index in lots(samples, room):
        b = batch([samples[i] for i in index], device, answers=False, history=history)
        likely: list[float] = []
        with mixed(device):
            said = answer(lm, b, data.newline, likely=likely, **(dial.how(b, reduction) if dial else {}))
        reached += dial.reached(b, reduction) if dial and reduction > 1 else []
        for i, ids, p in zip(index, said, likely):
            em[i], f1[i] = judge(data.text(ids), samples[i].references)
            sure[i], tokens = 100 * p, tokens + ([*ids, data.newline].index(data.newline) + 1)
    n = len(samples)
    record = {"n": n, "em": round(100 * sum(em) / n, 2), "f1": round(100 * sum(f1) / n, 2)}
    record |= {"ems": "".join(str(int(e)) for e in em), "f1s": [round(100 * f) for f in f1]}
    record |= {"sure": [round(p) for p in sure], "said": round(tokens / n, 2)}
    record["seconds"] = round(time.time() - began, 1)
    return record | ({"reached": round(sum(reached) / len(reached), 3)} if reached else {})


def picked(samples, kind: str, data: Data, worth=None, size: int = 32) -> list[Picks]:
    """What `shortened` cuts by. worth: by sample, where scores come from elsewhere."""
    rng = random.Random(5)
    return [picks(s, kind, data, rng, w, size) for s, w in zip(samples, worth or [None] * len(samples))]


def shortened(lm, plan: Sequence[Picks], data: Data, device, reduction: float, prices: Sequence[int] | None = None):
    """A record for prompts cut at equal MACs, with the share of known answers that are still in them. prices: what
    choosing costs in each sample; where it costs more than there is, nothing but what is exempt stays."""
    shape, cuts, reached = cost.shape_of(lm.config), [], []
    for plan_of, price in zip(plan, prices or [0] * len(plan)):
        n = length(plan_of.sample)
        left = 1 / reduction - price / cost.macs(shape, n)
        cuts.append(plan_of.cut(cost.whole(shape, n, 1 / left) if left > 0 else 1))
        reached.append(cost.macs(shape, n) / (cost.macs(shape, length(cuts[-1])) + price))
    known = [cut.gold is not None for cut, p in zip(cuts, plan) if p.sample.gold is not None]
    record = judged(lm, cuts, data, device) | {"reached": round(sum(reached) / len(reached), 3)}
    return record | {"held": round(100 * sum(known) / max(1, len(known)), 2), "known": len(known)}


@torch.no_grad()
def chunk_scores(lm, scorer, samples, device, size: int = 64) -> list[list[float]]:
    out = []
    for j in range(0, len(samples), size):
        b = batch(samples[j : j + size], device, answers=False)
        with mixed(device):
            out += look(scorer, read(lm, b, layers=0).x, b).tolist()
    return out


@torch.no_grad()
def held(lm, dial: Dial, samples, device, reductions=REDUCTIONS, tokens: int = TOKENS) -> dict[float, float]:
    """Of the samples whose answer is in one place, the share in per cent that still have it, by reduction."""
    samples = [s for s in samples if s.gold is not None]
    hits = dict.fromkeys(reductions, 0)
    for lot in lots(samples, tokens, 128):
        part = [samples[i] for i in lot]
        b = batch(part, device, answers=False, history=dial.row.whole)
        rank = dial.rank(read(lm, b, layers=0).x, b).tolist()
        for r in reductions:
            for s, mine, kept in zip(part, rank, dial.kept(b, r)):
                hits[r] += max(mine[s.gold[0] : s.gold[1] + 1]) < kept[0]
    return {r: round(100 * h / max(1, len(samples)), 2) for r, h in hits.items()}
