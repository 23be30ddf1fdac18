"""Exact match and F1 of greedy answers along the dial, and of cut prompts at equal MACs."""

from __future__ import annotations

import random
import time

import torch

from ablation.answers import cost
from ablation.answers.controls import cut
from ablation.answers.data import Data, judge
from ablation.answers.reader import answer, batch, read
from ablation.answers.teach import look, mixed
from ablation.answers.train import Dial

REDUCTIONS = (2.0, 3.0, 5.0, 7.0, 11.0)


def samples_of(data: Data, split: str, passages: int, limit: int | None):
    """The same questions on the same passages for every row."""
    turns, rng = data.questions(split), random.Random(11)
    turns = turns if limit is None or limit >= len(turns) else sorted(rng.sample(turns, limit))
    return [data.sample(i, passages, random.Random(f"judge-{i}")) for i in turns]


def judged(lm, samples, data: Data, device, dial: Dial | None = None, reduction: float = 1.0, history=False, size=128):
    """A record: mean EM and F1, each question's, and the reduction of MACs that was reached."""
    began, em, f1, reached = time.time(), [0.0] * len(samples), [0.0] * len(samples), []
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].body))
    for j in range(0, len(order), size):
        index = order[j : j + size]
        b = batch([samples[i] for i in index], device, answers=False, history=history)
        with mixed(device):
            said = answer(lm, b, data.newline, **(dial.how(b, reduction) if dial else {}))
        reached += dial.reached(b, reduction) if dial and reduction > 1 else []
        for i, ids in zip(index, said):
            em[i], f1[i] = judge(data.text(ids), samples[i].references)
    n = len(samples)
    record = {"n": n, "em": round(100 * sum(em) / n, 2), "f1": round(100 * sum(f1) / n, 2)}
    record |= {"ems": "".join(str(int(e)) for e in em), "f1s": [round(100 * f) for f in f1]}
    record["seconds"] = round(time.time() - began, 1)
    return record | ({"reached": round(sum(reached) / len(reached), 3)} if reached else {})


def shortened(lm, samples, data: Data, device, kind: str, reduction: float, scorer=None):
    """A record for a control; or for prompts cut to the chunks that a scorer of the embeddings likes best
    ("learned"), its cost counted."""
    shape, rng, cuts, reached = cost.shape_of(lm.config), random.Random(5), [], []
    worth = chunk_scores(lm, scorer, samples, device) if kind == "learned" else [None] * len(samples)
    for s, w in zip(samples, worth):
        n, price = length(s), scorer.macs(len(s.body + s.older + s.last), length(s) - len(s.body)) if w else 0
        may = cost.whole(shape, n, 1 / (1 / reduction - price / cost.macs(shape, n)))
        cuts.append(cut(s, may, kind, data, rng, w, *([scorer.shape.chunk] if w else [])))
        reached.append(cost.macs(shape, n) / (cost.macs(shape, length(cuts[-1])) + price))
    return judged(lm, cuts, data, device) | {"reached": round(sum(reached) / len(reached), 3)}


def length(s) -> int:
    return len(s.body + s.older + s.last + s.line)


@torch.no_grad()
def chunk_scores(lm, scorer, samples, device, size: int = 64) -> list[list[float]]:
    out = []
    for j in range(0, len(samples), size):
        b = batch(samples[j : j + size], device, answers=False)
        with mixed(device):
            out += look(scorer, read(lm, b, layers=0).x, b).tolist()
    return out
