"""Plain ways to shorten a prompt to the tokens that equal MACs allow; what a dial has to beat.

Each takes the region (the passages, and the turns before the question unless they are exempt) and picks tokens in
order; the question's line always stays.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

from ablation.answers.data import Data, Sample

CHUNK = 32  # tokens

KINDS = ("last", "ends", "random", "lexical", "lexical-all", "bm25", "oracle")
WHOLE = ("lexical", "bm25", "oracle")  # they keep the turns before the question whole, and shorten the passages


def cut(sample: Sample, tokens: int, kind: str, data: Data, rng: random.Random, worth=None, size=CHUNK):
    """The prompt at `tokens` tokens in all. A pick that fits in part is taken from its beginning. worth: of the
    region's chunks of `size` tokens, for kind "learned"."""
    turns = () if kind in WHOLE else sample.older + sample.last
    region = sample.body + turns
    left = max(0, tokens - (len(sample.older + sample.last + sample.line) - len(turns)))
    if left >= len(region):
        return sample
    if kind == "last":
        picked = region[len(region) - left :]
    elif kind == "ends":
        picked = region[: left // 2] + region[len(region) - (left - left // 2) :]
    else:
        units = sentences(region, data) if kind == "bm25" else [(i, i + size) for i in range(0, len(region), size)]
        if worth is None:
            worth = _worth(sample, region, units, kind, data, rng)
        order = sorted(range(len(units)), key=lambda i: worth[i], reverse=True)
        got = {}
        for i in order:
            got[i] = region[units[i][0] : units[i][1]][:left]
            left -= len(got[i])
        picked = tuple(t for i in sorted(got) for t in got[i])
    if turns:
        return replace(sample, body=picked, older=(), last=(), gold=None)
    return replace(sample, body=picked, gold=None)


def _worth(sample: Sample, region, units, kind: str, data: Data, rng: random.Random) -> list[float]:
    if kind == "random":
        return [rng.random() for _ in units]
    canon, idf = data.canon, data.idf
    asked = {canon[t] for t in sample.line + sample.last}
    words = [[canon[t] for t in region[a:b]] for a, b in units]
    if kind == "bm25":
        worth = bm25(asked, words)
    else:
        worth = [sum(idf.get(w, 5.0) for w in asked & set(unit)) for unit in words]
    if kind == "oracle" and sample.gold:
        first, last = sample.gold
        worth = [w + 1e6 * (a <= last and first < b) for w, (a, b) in zip(worth, units)]
    return worth


def bm25(asked: set[int], units: list[list[int]], k: float = 1.5, b: float = 0.75) -> list[float]:
    seen = Counter(w for unit in units for w in set(unit))
    mean = sum(map(len, units)) / len(units)
    rare = {w: math.log(1 + (len(units) - n + 0.5) / (n + 0.5)) for w, n in seen.items()}
    worth = []
    for unit in units:
        times, norm = Counter(unit), k * (1 - b + b * len(unit) / mean)
        worth.append(sum(rare[w] * times[w] * (k + 1) / (times[w] + norm) for w in asked if times[w]))
    return worth


def sentences(region, data: Data) -> list[tuple[int, int]]:
    """Bounds of sentences: after ., ! or ?, with closing quotes, and after a line's end."""
    bounds, start = [], 0
    for i, t in enumerate(region):
        if data.pieces[t].rstrip("\"')").endswith((".", "!", "?", "Ċ")):
            bounds.append((start, i + 1))
            start = i + 1
    return bounds + ([(start, len(region))] if start < len(region) else [])
