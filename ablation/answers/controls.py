"""Plain ways to shorten a prompt to the tokens that equal MACs allow; what a dial has to beat.

Each takes the region (the passages, and the turns before the question unless they are exempt) and picks tokens in
order; the question's line always stays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ablation.answers.data import Data, Sample
from zsaa.evaluation.prompts import bm25

CHUNK = 32  # tokens


PARAGRAPHS = -1
BY = ("random", "words", "bm25", "given", "ends", "last")  # given: scores come from elsewhere; the last two: no units


@dataclass(frozen=True)
class Way:
    """What is picked, the best first. turns: those before the question may go; otherwise they stay whole. units:
    chunks of so many tokens, 0 for sentences, PARAGRAPHS for what
    blank lines part. asks: the last turn asks as well as the question."""

    by: str  # one of BY
    turns: bool = True
    units: int = CHUNK
    asks: bool = True
    knows: bool = False  # where the answer is: no rival

    def __post_init__(self):
        if self.by not in BY:
            raise ValueError(f"by is {self.by!r}: one of {', '.join(BY)}.")


WAYS = {
    "last": Way("last"),
    "ends": Way("ends"),
    "random": Way("random"),
    "lexical": Way("words", turns=False),
    "lexical-all": Way("words"),
    "lexical-16": Way("words", units=16),
    "bm25": Way("bm25", turns=False, units=0),
    "bm25-all": Way("bm25", units=0),
    "bm25-all-line": Way("bm25", units=0, asks=False),
    "bm25-16": Way("bm25", units=16),
    "bm25-16-line": Way("bm25", units=16, asks=False),
    "shots": Way("bm25", units=PARAGRAPHS),
    "minilm": Way("given", units=0),
    "perplexity": Way("given", units=1),
    "oracle": Way("words", turns=False, knows=True),
    "oracle-all": Way("bm25", units=0, knows=True),
}
KINDS = tuple(WAYS)


@dataclass(frozen=True)
class Picks:
    """A sample's region, and its tokens' places in the order in which they are picked, unit by unit."""

    sample: Sample
    turns: bool
    places: tuple[range, ...]

    def cut(self, tokens: int) -> Sample:
        """The prompt at `tokens` tokens in all. A unit that fits in part is taken from its beginning."""
        s = self.sample
        turns = s.older + s.last if self.turns else ()
        region, exempt = s.body + turns, len(s.older + s.last + s.line) - len(turns)
        left = max(0, tokens - exempt)
        if left >= len(region):
            return s
        stay: list[int] = []
        for unit in self.places:
            stay += unit[: left - len(stay)]
            if len(stay) >= left:
                break
        stay.sort()
        found = None
        if s.gold is not None and set(range(s.gold[0], s.gold[1] + 1)) <= set(stay):
            found = (stay.index(s.gold[0]), stay.index(s.gold[1]))
        body = tuple(region[i] for i in stay)
        return replace(s, body=body, gold=found, **({"older": (), "last": ()} if turns else {}))


def picks(sample: Sample, kind: str, data: Data, rng: random.Random, worth=None, size: int = CHUNK) -> Picks:
    """worth: of the region's units, for kinds "given"; of chunks of `size` tokens, for kind "learned"."""
    way = WAYS.get(kind) or Way("given", units=size)
    region = sample.body + (sample.older + sample.last if way.turns else ())
    n = len(region)
    if way.by in ("last", "ends"):
        last = list(range(n - 1, -1, -1))
        both = [i // 2 if i % 2 else n - 1 - i // 2 for i in range(n)]
        return Picks(sample, way.turns, tuple(range(i, i + 1) for i in (last if way.by == "last" else both)))
    if way.units == PARAGRAPHS:
        units = paragraphs(region, data)
    else:
        units = (
            sentences(region, data) if way.units == 0 else [(i, min(n, i + way.units)) for i in range(0, n, way.units)]
        )
    if worth is None:
        worth = _worth(sample, region, units, way, data, rng)
    order = sorted(range(len(units)), key=lambda i: worth[i], reverse=True)
    return Picks(sample, way.turns, tuple(range(*units[i]) for i in order))


def cut(sample: Sample, tokens: int, kind: str, data: Data, rng: random.Random, worth=None, size: int = CHUNK):
    """The prompt at `tokens` tokens in all."""
    return picks(sample, kind, data, rng, worth, size).cut(tokens)


def _worth(sample: Sample, region, units, way: Way, data: Data, rng: random.Random) -> Sequence[float]:
    if way.by == "given":
        raise ValueError("nothing says what each unit is worth: give worth, or one of the kinds " + ", ".join(WAYS))
    if way.by == "random":
        return [rng.random() for _ in units]
    canon, idf = data.canon, data.idf
    asked = {canon[t] for t in sample.line + (sample.last if way.asks else ())}
    words = [[canon[t] for t in region[a:b]] for a, b in units]
    if way.by == "bm25":
        worth = bm25(asked, words)
    else:
        worth = [sum(idf.get(w, 5.0) for w in asked & set(unit)) for unit in words]
    if way.knows and sample.gold:
        first, last = sample.gold
        worth = [w + 1e6 * (a <= last and first < b) for w, (a, b) in zip(worth, units)]
    return worth


def sentences(region, data: Data) -> list[tuple[int, int]]:
    """Bounds of sentences: after ., ! or ?, with closing quotes, and after a line's end."""
    bounds, start = [], 0
    for i, t in enumerate(region):
        if data.pieces[t].rstrip("\"')").endswith((".", "!", "?", "Ċ")):
            bounds.append((start, i + 1))
            start = i + 1
    return bounds + ([(start, len(region))] if start < len(region) else [])


def paragraphs(region, data: Data) -> list[tuple[int, int]]:
    """Bounds of what blank lines part, these at the ends."""
    bounds, start, before = [], 0, ""
    for i, t in enumerate(region):
        piece = data.pieces[t]
        if piece.endswith("ĊĊ") or (piece == "Ċ" and before.endswith("Ċ")):
            bounds.append((start, i + 1))
            start = i + 1
        before = piece
    return bounds + ([(start, len(region))] if start < len(region) else [])
