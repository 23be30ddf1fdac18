"""Language models that answer questions about documents: what they learn from, and their training steps.

A step computes just what `generate` does later: the prompt is read, and shortened if alpha says so; the answer follows
on its cache, or, where nothing is shortened, in the same pass, and it alone has a loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

import zsaa
from zsaa.data.questions import Asked
from zsaa.finetune.sampling import draw_alpha
from zsaa.finetune.trainer import LadderTrainer
from zsaa.heads.texts import find
from zsaa.learned.asked import QUESTION

PLAIN = "{document}\n\nQuestion: {question}\nAnswer:"  # of a tokenizer without a chat template
BODY, ASKS, STAYS = 0, QUESTION, -1  # of a prompt's tokens: the document, the question, all else


def written(tokenizer: Any, document: str, question: str) -> tuple[str, bool]:
    """A prompt as text: by the tokenizer's chat template, if it has one, else by PLAIN; and whether the tokenizer is to
    add its special tokens, which a template has already."""
    if not tokenizer.chat_template:
        return PLAIN.format(document=document, question=question), True
    chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), False


def prompt_of(tokenizer: Any, document: str, question: str) -> list[int]:
    """Token ids of a prompt."""
    text, special = written(tokenizer, document, question)
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def parts_of(tokenizer: Any, prompt: Sequence[int], document: str, question: str) -> list[int]:
    """What each token of a prompt is: BODY, ASKS or STAYS. ValueError for a prompt that does not hold the texts."""
    part = [STAYS] * len(prompt)
    for kind, text in ((BODY, document), (ASKS, question)):
        place = find(tokenizer, prompt, text)
        if place is None:
            raise ValueError(f"the prompt does not hold this as its tokens read: {text!r:.60}. Change the text.")
        part[place.start : place.stop] = [kind] * len(place)
    return part


def encode(rows: Sequence[Asked], tokenizer: Any, max_length: int) -> Dataset:
    """Samples for `fine_tune` and `teach`: input_ids of prompt and answer, labels (-100 in the prompt), and part, what
    each token of the prompt is (BODY, ASKS or STAYS). Those longer than max_length are left out, with a warning;
    ValueError if none is left."""
    samples, end = [], [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for row in rows:
        prompt = prompt_of(tokenizer, row.document, row.question)
        said = row.answers[0] if tokenizer.chat_template else " " + row.answers[0]
        answer = tokenizer(said, add_special_tokens=False)["input_ids"] + end
        if len(prompt) + len(answer) > max_length:
            continue
        part = parts_of(tokenizer, prompt, row.document, row.question)
        samples.append({"input_ids": prompt + answer, "attention_mask": [1] * len(prompt + answer),
                        "labels": [-100] * len(prompt) + answer, "part": part + [STAYS] * len(answer)})  # fmt: skip
    if not samples:
        raise ValueError(f"all {len(rows)} rows are longer than max_length={max_length} tokens: give a larger one.")
    if len(samples) < len(rows):
        long = len(rows) - len(samples)
        warnings.warn(f"{long} of {len(rows)} rows are longer than {max_length} tokens, and left out.", stacklevel=2)
    return Dataset.from_list(samples)


def collate(samples: Sequence[dict]) -> dict[str, Tensor]:
    """A batch: prompt and part [batch, longest prompt], padded on the left, and answer [batch, longest answer], on the
    right; mask and said tell which tokens are real."""
    split = [sum(label == -100 for label in sample["labels"]) for sample in samples]
    lists = {
        "prompt": [sample["input_ids"][:n] for sample, n in zip(samples, split)],
        "part": [sample["part"][:n] for sample, n in zip(samples, split)],
        "answer": [sample["input_ids"][n:] for sample, n in zip(samples, split)],
    }

    def padded(rows: list[list[int]], left: bool, fill: int = 0) -> Tensor:
        width = max(map(len, rows))
        pads = ([fill] * (width - len(row)) for row in rows)
        return torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads)])

    ones = {name: [[1] * len(row) for row in lists[name]] for name in ("prompt", "answer")}
    return {
        "prompt": padded(lists["prompt"], True),
        "mask": padded(ones["prompt"], True),
        "part": padded(lists["part"], True, STAYS),
        "answer": padded(lists["answer"], False),
        "said": padded(ones["answer"], False),
    }


def answer_logits(model: nn.Module, batch: dict[str, Tensor], asked: bool = True) -> Tensor:
    """Logits [batch, longest answer, vocabulary] where each token of the answers is foretold. asked: does the dial's
    score read who asks? All but the document stays under every score."""
    if zsaa.settings(model)["alpha"] == 1:
        return _whole(model, batch)
    real, part, answer = batch["mask"], batch["part"], batch["answer"]
    masks = {"exempt": (part != BODY) & (real == 1), **({"question": part == ASKS} if asked else {})}
    places = (real.cumsum(1) - 1).clamp(min=0)
    read = model(
        input_ids=batch["prompt"], attention_mask=real, position_ids=places, use_cache=True, logits_to_keep=1, **masks
    )
    if answer.shape[1] == 1:
        return read.logits[:, -1:]
    rest = model(
        input_ids=answer[:, :-1],
        attention_mask=torch.cat([real, batch["said"][:, :-1]], dim=1),
        position_ids=places[:, -1:] + 1 + torch.arange(answer.shape[1] - 1, device=places.device),
        past_key_values=read.past_key_values,
        use_cache=True,
    )
    return torch.cat([read.logits[:, -1:], rest.logits], dim=1)


def _whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """At alpha = 1: prompt and answer in one pass, all padding behind them, where causal attention needs no mask.
    Before a prompt, padding makes rows that may look at nothing: there a kernel may have no numbers to give (stock
    Gemma 2 has none), and what these touch learns none."""
    real = torch.cat([batch["mask"], batch["said"]], dim=1) == 1
    order = (~real).int().argsort(dim=1, stable=True)[:, : int(real.sum(dim=1).max())]
    ids = torch.cat([batch["prompt"], batch["answer"]], dim=1).gather(1, order)
    index = torch.arange(batch["answer"].shape[1], device=ids.device)
    foretells = (batch["mask"].sum(dim=1)[:, None] - 1 + index).clamp(max=ids.shape[1] - 1)
    columns, place = foretells.unique(return_inverse=True)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=columns).logits
    return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))


class AnswerTrainer(LadderTrainer):
    """A Trainer of language models that answer: in ladder steps, at one drawn alpha each (Eq. 3), or at alpha = 1."""

    def __init__(self, model: nn.Module, recipe, drawn_from: tuple[float, float], **kwargs):
        super().__init__(model=model, recipe=recipe, **kwargs)
        self.drawn_from = drawn_from

    def alphas(self, inputs: dict) -> list[float]:
        if self.recipe.sampling != "ladder":
            low, high = self.drawn_from
            return [1.0 if low == high == 1 else draw_alpha(low, high, self.recipe.seed, self.state.global_step)]
        return super().alphas({"attention_mask": inputs["mask"]})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = answer_logits(model, inputs, self.recipe.score == "asked")
        real = inputs["said"] == 1
        found = logits[real].float()
        loss = F.cross_entropy(found, inputs["answer"][real])
        distill = self.recipe.distill
        if distill and self.teacher is None:
            self.teacher = found.detach().softmax(-1)
        elif distill:
            told = F.kl_div(found.log_softmax(-1), self.teacher, reduction="batchmean")
            loss = (1 - distill) * loss + distill * told
        loss = self.share * loss
        return (loss, {"logits": logits}) if return_outputs else loss
