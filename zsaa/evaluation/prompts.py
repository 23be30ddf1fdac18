"""Plain ways to shorten a document that a question is asked about, which a dial has to beat; and what a dial kept."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Sequence, Set

from torch import nn

from zsaa.budget import truncation_for
from zsaa.cost import macs
from zsaa.families import find_decoder
from zsaa.heads.texts import find
from zsaa.measure.checks import check_whole

WAYS = ("bm25", "last")
SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"'”’)\]]*(?=\s|$)|$)", re.DOTALL)


def passages(document: str) -> list[str]:
    """Its parts between blank lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", document) if part.strip()]


def sentences(passage: str) -> list[str]:
    """Ended by ., ! or ?, with what closes behind it."""
    return SENTENCE.findall(passage.strip())


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25(asked: Set[Hashable], texts: Sequence[Sequence[Hashable]], k: float = 1.5, b: float = 0.75) -> list[float]:
    """How much each text answers to what is asked (Robertson's BM25, its usual constants): words, or their numbers."""
    seen = Counter(word for text in texts for word in set(text))
    mean = sum(map(len, texts)) / max(1, len(texts)) or 1
    rare = {w: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for w, n in seen.items()}
    worth = []
    for text in texts:
        times, norm = Counter(text), k * (1 - b + b * len(text) / mean)
        worth.append(sum(rare[w] * times[w] * (k + 1) / (times[w] + norm) for w in asked if times[w]))
    return worth


def shortened(document: str, question: str, tokens: int, tokenizer, how: str = "bm25") -> str:
    """At most so many tokens of `document`, about. how: "bm25", its sentences that answer best to the question, in
    their order, the last one that fits from its beginning; "last", its last tokens."""
    tokens = check_whole("tokens", tokens, least=0)
    if how not in WAYS:
        raise ValueError(f"how must be one of {', '.join(WAYS)}, got {how!r}.")

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if how == "last":
        ids = encode(document)
        return tokenizer.decode(ids[max(0, len(ids) - tokens) :]).strip() if tokens else ""
    parts = [(number, text) for number, passage in enumerate(passages(document)) for text in sentences(passage)]
    worth = bm25({*words(question)}, [words(text) for _, text in parts])
    kept = {}
    for i in sorted(range(len(parts)), key=lambda i: -worth[i]):
        ids = encode(" " + parts[i][1])[:tokens]
        tokens -= len(ids)
        kept[i] = tokenizer.decode(ids).strip()
    whole: dict[int, list[str]] = {}
    for i in sorted(i for i, text in kept.items() if text):
        whole.setdefault(parts[i][0], []).append(kept[i])
    return "\n\n".join(" ".join(texts) for texts in whole.values())


def at_equal_macs(model: nn.Module, prompt: int, kept: int, asking: int) -> int:
    """Tokens of a prompt that the stock model reads for as many multiply-accumulates as a dial with the schedule
    "entry" spends on one of `prompt` tokens of which it keeps `kept`; the scorer of `model`, asked by `asking` tokens,
    is counted."""
    decoder, _ = find_decoder(model)
    spent = macs(model.config, kept) + (decoder.asked.macs(prompt - asking, asking) if kept < prompt else 0)
    return min(prompt, truncation_for(model.config, prompt, macs(model.config, prompt) / spent))


def kept_shares(tokenizer, ids: Sequence[int], texts: Sequence[str], kept: Collection[int]) -> list[float]:
    """Of each text in a prompt the share of its tokens that are among the positions `kept`. ValueError for a text that
    is not there."""
    kept, shares = set(kept), []
    for text in texts:
        place = find(tokenizer, ids, text)
        if place is None:
            raise ValueError(f"{text!r:.60} is not in the prompt, as its tokens read: give a part of it word for word.")
        shares.append(sum(i in kept for i in place) / len(place))
    return shares
