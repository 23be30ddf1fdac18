"""Models that answer in batches, each row at its own alpha; no queue, no clock, no network.

Nothing in a batch depends on a batch-mate: prompts are padded and masked, alpha, length, stop strings, temperature and
the generator of random numbers are each row's own. What remains is floating point: sums over other shapes may differ
in their last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, StoppingCriteria

import zsaa
from zsaa.data.batching import pad

PRICES = 4096  # of prefills that are remembered
REPLACEMENT = "�"  # what the bytes of half a character are decoded to


@dataclass(frozen=True)
class Wish:
    """One completion. ids: the prompt's tokens. temperature: 0 takes the likeliest token. seed: of this row's own
    draws.
    stop: strings before which the text ends."""

    ids: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Row:
    """A completion under way. reason: None, "stop" or "length", as OpenAI calls them."""

    wish: Wish
    draws: torch.Generator
    tokens: list[int] = field(default_factory=list)
    sent: int = 0  # characters that were handed on
    reason: str | None = None

    def choose(self, scores: Tensor) -> int:
        """The next token by this row's rules. scores: logits [words]."""
        if self.wish.temperature == 0:
            return int(scores.argmax())
        p, words = torch.softmax(scores.double().cpu() / self.wish.temperature, -1).sort(descending=True, stable=True)
        p[p.cumsum(0) - p >= self.wish.top_p] = 0  # the likeliest words that hold top_p together, one of them at least
        return int(words[torch.multinomial(p, 1, generator=self.draws)])

    def spelled(self, text: str, ended: bool) -> str:
        """The part of `text`, all that was written so far, that can be handed on now; ends the row at a stop string."""
        found = [at for stop in self.wish.stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.reason, ended = text[: min(found)], "stop", True
        safe = len(text) if ended else _certain(text, self.wish.stop)
        piece = text[self.sent : safe]
        self.sent = max(self.sent, safe)
        return piece


def _certain(text: str, stops: Sequence[str]) -> int:
    """How many characters no later token can take back: neither half a character nor the beginning of a stop string."""
    end = len(text.rstrip(REPLACEMENT))
    begun = (k for stop in stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
    return min(end, len(text) - max(begun, default=0))


class _Choice(LogitsProcessor):
    """Each row's own next token; all others are ruled out, so that generate, which decodes greedily, takes it."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.tensor([row.choose(s) for row, s in zip(self.rows, scores)], device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class _Progress(StoppingCriteria):
    """Told after each token: hands pieces of text on, and says which rows are done."""

    def __init__(self, rows: list[Row], told: Callable[[int, str, str | None], None], gone: Callable[[int], bool], tok):
        self.rows, self.told, self.gone = rows, told, gone
        self.decode, self.eos = tok.decode, tok.eos_token_id

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        for index, (row, token) in enumerate(zip(self.rows, input_ids[:, -1].tolist())):
            if row.reason is None:
                self._took(index, row, token)
        return torch.tensor([row.reason is not None for row in self.rows], device=input_ids.device)

    def _took(self, index: int, row: Row, token: int) -> None:
        row.tokens.append(token)
        if self.gone(index) or token == self.eos:
            row.reason = "stop"
        elif len(row.tokens) == row.wish.max_tokens:
            row.reason = "length"
        text = self.decode(row.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        piece = row.spelled(text, row.reason is not None)
        if piece or row.reason:
            self.told(index, piece, row.reason)


class Engine:
    """A model with its tokenizer and the dial on. max_tokens: of a prompt and its completion together."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int | None = None):
        self.model, self.tokenizer = zsaa.enable(model).eval(), tokenizer
        self.dial = zsaa.settings(model)
        self.config = model.config
        positions = getattr(self.config, "max_position_embeddings", None) or 1024
        self.max_tokens = min(positions, max_tokens or positions)
        self.device = next(model.parameters()).device
        self._prices: dict[tuple[int, float], tuple[float, float]] = {}

    @property
    def rule(self) -> dict:
        return {name: self.dial[name] for name in ("tau", "score", "schedule")}

    def encode(self, text: str) -> list[int]:
        """The text's tokens. By a tokenizer in Rust without the interpreter, so that a server's threads do it at once;
        what transformers makes of its answer takes as long again as all else here."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        if fast is None or fast.truncation or fast.padding:
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        return fast.encode_batch_fast([text])[0].ids

    def chat(self, messages: Sequence[dict]) -> list[int]:
        """The tokens of a conversation by the model's own template, up to where its answer begins."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])

    def spent(self, n: int, alpha: float) -> tuple[float, float]:
        """Multiply-accumulates of the prefill of `n` tokens: at `alpha`, and at alpha = 1."""
        if (n, alpha) not in self._prices:
            if len(self._prices) >= PRICES:  # a client may ask for any alpha
                self._prices.clear()
            self._prices[n, alpha] = zsaa.macs(self.config, n, alpha, **self.rule), zsaa.macs(self.config, n)
        return self._prices[n, alpha]


def _one_or_each(alphas: Sequence[float]) -> float | list[float]:
    """A single alpha where all rows have the same: at 1 that runs the stock code."""
    return alphas[0] if len(set(alphas)) == 1 else list(alphas)


class Completer(Engine):
    """Writes on. The prompt is pruned; what is written goes through all layers."""

    @torch.inference_mode()
    def run(
        self,
        wishes: Sequence[Wish],
        alphas: Sequence[float],
        told: Callable[[int, str, str | None], None] = lambda index, piece, reason: None,
        gone: Callable[[int], bool] = lambda index: False,
    ) -> list[Row]:
        """All completions of one batch. told: called with (row, new text, reason) as they grow, the last time of a row
        with its reason. gone: asked after every token whether a row is wanted no more."""
        rows = [Row(wish, torch.Generator().manual_seed(wish.seed)) for wish in wishes]
        ids, mask = pad([wish.ids for wish in wishes], self.tokenizer.pad_token_id, self.device, side="left")
        self.model.generate(
            ids,
            attention_mask=mask,
            alpha=_one_or_each(alphas),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(wish.max_tokens for wish in wishes),
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=[_Choice(rows)],
            stopping_criteria=[_Progress(rows, told, gone, self.tokenizer)],
        )
        return rows


class Classifier(Engine):
    """Says which class a text is of. labels: their names, in the order of the logits."""

    def __init__(self, model: nn.Module, tokenizer: Any, max_tokens: int | None = None, labels: Sequence[str] = ()):
        super().__init__(model, tokenizer, max_tokens)
        # Texts and batches have ever other shapes, and to record one as a CUDA graph stops the queue.
        zsaa.enable(model, graphs=False)
        known = [str(self.config.id2label.get(i, i)) for i in range(self.config.num_labels)]
        if labels and len(labels) != len(known):
            raise ValueError(f"labels has {len(labels)} names, this model {len(known)} classes: give one for each.")
        self.labels = list(labels) or known

    @torch.inference_mode()
    def run(self, samples: Sequence[Sequence[int]], alphas: Sequence[float]) -> list[list[float]]:
        """Logits of each sample, as floats [samples][classes]."""
        ids, mask = pad(samples, self.tokenizer.pad_token_id, self.device)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, alpha=_one_or_each(alphas))
        return output.logits.float().tolist()
