"""What removing layers costs, untuned: perplexity without 10 to 50% of the layers, chosen in three ways.

    python -m zsaa.depth --model smollm2-135m --windows 200

Layers are compared on texts to train on, and judged on windows of held-out ones, those of Table 2's protocol `prefix`
(zsaa.evaluation.language): so many tokens are read, the next are scored. That is a line beside the dial's in the same
windows.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import zsaa
from zsaa.data.corpora import load_corpus
from zsaa.depth.remove import remove_layers
from zsaa.depth.similarity import Similarity, similarity
from zsaa.evaluation.language import Window, bootstrap, interval, pack, score, windows
from zsaa.measure import cached, output_folder, provenance
from zsaa.models import load_model

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
WAYS = {
    "block": "without a block of layers, by angular distance",
    "influence": "without the layers of least influence",
    "last": "first layers only",
}
PREFIX, CONTINUATION = 224, 32


def chosen(found: Similarity, way: str, n: int) -> list[int]:
    """Which n layers `way` removes. block: the best block by angular distance, the last layer spared; influence: those
    of least block influence; last: the top ones, which leaves the first layers only."""
    if way == "block":
        return found.block(n)
    if way == "influence":
        return found.least_influential(n)
    if way == "last":
        return list(range(found.num_layers - n, found.num_layers))
    raise ValueError(f"unknown way {way!r} to choose layers; these are known: {', '.join(WAYS)}")


def calibration(tokenizer, texts: Sequence[str], count: int, length: int, seed: int = 0) -> list[dict]:
    """`count` texts of at least `length` tokens, cut to `length`, as batches of one."""
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    found: list[dict] = []
    for place in order:
        ids = tokenizer(texts[place], truncation=True, max_length=length, return_tensors="pt").input_ids
        if ids.shape[1] == length:
            found.append({"input_ids": ids})
        if len(found) == count:
            return found
    raise ValueError(f"only {len(found)} texts have {length} tokens: ask for fewer than {count}, or for shorter ones.")


def without(model: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A model that shares the weights of `model`, without these layers; `model` stays whole."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    return remove_layers(twin, layers) if layers else twin


def curve(model: nn.Module, found: Similarity, samples: Sequence[Window], shares=SHARES, ways=WAYS, **options) -> list:
    """A row per set of layers: way, removed (how many), layers (which), mac_reduction (of the decoder's layers),
    perplexity and ratio (over the whole model, paired) with their 95% intervals over documents, n (windows), nll."""
    units, counts = [w.unit for w in samples], np.array([len(w.ids) - w.start for w in samples])
    total, rows, base = found.num_layers, [], None
    numbers = sorted({max(1, round(share * total)) for share in shares})
    for way, n in [("none", 0), *((way, n) for n in numbers for way in ways)]:
        layers = chosen(found, way, n) if n else []
        smaller = zsaa.enable(without(model, layers), alpha=1.0)  # the stock model, as `score` wants it
        scored = score(smaller, [(w.ids, w.start) for w in samples], **options)
        nll = np.array([float(values.sum()) for values, _ in scored])
        logs = bootstrap(nll, counts, units)
        base = base or (nll.sum(), logs)
        rows.append(
            {
                "variant": WAYS.get(way, "stock"),
                "way": way,
                "removed": n,
                "layers": layers,
                "mac_reduction": round(total / (total - n), 4),
                "perplexity": round(float(np.exp(nll.sum() / counts.sum())), 4),
                "ci95": interval(logs),
                "ratio": round(float(np.exp((nll.sum() - base[0]) / counts.sum())), 4),
                "ratio_ci95": interval(logs - base[1]),
                "n": len(samples),
                "nll": pack(nll),
            }
        )
        print(f"{way:9} {n:2} layers fewer: perplexity {rows[-1]['perplexity']:.1f}", flush=True)
    return rows


def run(model: str, corpus: str, source: str, texts: int, count: int, output_dir: str | Path, command: str) -> dict:
    """Compare layers on `texts` training texts, remove them, score `count` windows; written once."""
    out = output_folder(output_dir)
    data = load_corpus(corpus, source, train=None)
    net, tokenizer = load_model(model, device="cuda" if torch.cuda.is_available() else "cpu")
    device = next(net.parameters()).device
    samples = windows(data, tokenizer, "prefix", PREFIX, CONTINUATION, count=count)
    title = {"name": corpus, "source": data.source, "substitute": data.substitute, "title": data.title}
    name = f"depth-{Path(model).name}"
    asked = {"model": model, "task": {**title, "fingerprint": data.fingerprint}, "texts": texts, "windows": count}

    def measure() -> dict:
        batches = calibration(tokenizer, data.train, texts, length=PREFIX + CONTINUATION)
        found = similarity(net, [{k: v.to(device) for k, v in batch.items()} for batch in batches])
        alike = {
            "angular": [pack(row[i:].tolist()) for i, row in enumerate(found.angular)],
            "influence": pack(found.influence.tolist()),
            "texts": found.texts,
            "tokens": found.tokens,
        }
        return {
            "name": name,
            "kind": "depth",
            "command": command,
            "model": {"name": Path(model).name},
            "task": asked["task"],
            "recipe": {"method": "untuned"},
            "protocol": {"name": "whole", "prefix": PREFIX, "continuation": CONTINUATION},
            "similarity": alike,
            "rows": curve(net, found, samples),
            "provenance": provenance(device, seed=0, eval_samples=len(samples)),
        }

    return cached(out / "results" / f"{name}.json", asked, measure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as in zsaa.models.load_model")
    parser.add_argument("--corpus", default="wikitext-103", help="of zsaa.data.corpora")
    parser.add_argument("--source", default="auto", help="auto, packaged, hub or a folder")
    parser.add_argument("--texts", type=int, default=64, help="texts on which layers are compared")
    parser.add_argument("--windows", type=int, default=200, help="windows of 224 + 32 tokens that are scored")
    parser.add_argument("--output-dir", default="outputs/depth")
    given = parser.parse_args(arguments)
    command = f"python -m zsaa.depth --model {given.model} --texts {given.texts} --windows {given.windows}"
    for name in ("corpus", "source"):
        if getattr(given, name) != parser.get_default(name):
            command += f" --{name} {getattr(given, name)}"
    run(given.model, given.corpus, given.source, given.texts, given.windows, given.output_dir, command)
    return 0
