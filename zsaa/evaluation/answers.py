"""Are answers right? Exact match and F1 by the rules of SQuAD, along the dial and its plain rivals."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from zsaa import dial
from zsaa.budget import alpha_for, truncation_for
from zsaa.cost import macs
from zsaa.data.questions import Asked
from zsaa.evaluation.prompts import WAYS, shortened
from zsaa.families import find_decoder
from zsaa.finetune.questions import prompt_of
from zsaa.finetune.sampling import LEAST_ALPHA
from zsaa.rule import ASKED, ENTRY

CONTROLS = ("alpha", *WAYS)


def plain(text: str) -> list[str]:
    """Words without case, punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def judge(said: str, right: Iterable[str]) -> tuple[float, float]:
    """Exact match (0 or 1) and F1 (0 to 1) with the right answer that fits best."""
    ours, best = plain(said), (0.0, 0.0)
    for theirs in map(plain, right):
        same = sum((Counter(ours) & Counter(theirs)).values())
        f1 = 2 * same / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs)
        best = max(best[0], float(ours == theirs)), max(best[1], f1)
    return best


def curve(
    model: nn.Module,
    tokenizer,
    rows: Sequence[Asked],
    targets: Sequence[float],
    controls: Sequence[str] = CONTROLS,
    new_tokens: int = 32,
    batch_size: int = 8,
    progress: bool = True,
) -> list[dict]:
    """How well `model`, its dial asked by questions, answers `rows`: a row for each control and target (the first is
    the whole prompt, once). "alpha": the dial, whose alpha is solved for each prompt; "bm25" and "last": the prompt's
    document is cut to as much. Answers are greedy, `batch_size` at a time, which changes none of them.

    exact_match and f1 in percent, "f1s" those of each question; mac_reduction: of the prompts together, the scorer
    counted, as reached.
    """
    config, asked = model.config, [(control, target) for target in targets for control in controls]
    asked = [pair for pair in asked if pair[1] > 1 or pair[0] == controls[0]]
    prompts = [prompt_of(tokenizer, row.document, row.question) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # alike ones together: less padding
    found: dict[tuple, dict[int, tuple]] = {pair: {} for pair in asked}
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, "answers", disable=not progress, leave=False):
        numbers = order[start : start + batch_size]
        for control, target in asked:
            how = _dialled if control == "alpha" or target == 1 else _cut
            given = [rows[i] for i in numbers], [prompts[i] for i in numbers]
            for i, (said, *spent) in zip(numbers, how(model, tokenizer, *given, control, target, new_tokens)):
                found[control, target][i] = (*judge(said, rows[i].answers), *spent)
    stock, made = sum(macs(config, len(prompt)) for prompt in prompts), []
    for (control, target), values in found.items():
        exact, f1s, alphas, reads, spent = zip(*(values[i] for i in range(len(rows))))
        made.append({"control": control, "target": target, "alpha": sum(alphas) / len(rows),
                     "tokens": sum(reads) / len(rows), "mac_reduction": round(stock / sum(spent), 3), "n": len(rows),
                     "exact_match": round(100 * sum(exact) / len(rows), 2), "f1": round(100 * sum(f1s) / len(rows), 2),
                     "f1s": [round(100 * f1, 1) for f1 in f1s]})  # fmt: skip
    return made


def _said(model: nn.Module, words, prompts: Sequence[Sequence[int]], new_tokens: int, **options) -> list[str]:
    """What the model says after each prompt. words: the tokenizer; options: of `generate`."""
    width, device = max(map(len, prompts)), next(model.parameters()).device
    pad = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    greedy = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
    out = model.generate(ids, attention_mask=mask, **greedy, **options)
    return [text.strip() for text in words.batch_decode(out[:, width:], skip_special_tokens=True)]


def _dialled(model, tokenizer, rows: Sequence[Asked], prompts, control: str, target: float, new_tokens: int):
    """Of each row what is said, its alpha, the tokens that are kept, and the MACs that are spent."""
    lengths, rule = [len(prompt) for prompt in prompts], dial.rule(model)
    told, scoring = {"document": [row.document for row in rows], "tokenizer": tokenizer}, [0] * len(rows)
    if rule["score"] == ASKED:
        told["question"] = [row.question for row in rows]
        asking = [len(tokenizer(row.question, add_special_tokens=False)["input_ids"]) for row in rows]
        scorer = find_decoder(model)[0].asked  # which may not be a usual one
        scoring = [scorer.macs(n - asks, asks) for n, asks in zip(lengths, asking)]
    alphas = [1.0 if target == 1 else _alpha(model.config, n, target, rule, s) for n, s in zip(lengths, scoring)]
    with dial.trace(model) as trace:
        said = _said(model, tokenizer, prompts, new_tokens, alpha=alphas, **told)
    spent = [macs(model.config, n, alpha, **rule) for n, alpha in zip(lengths, alphas)]
    kept = trace.counts[-1]
    if rule["schedule"] == ENTRY:
        spent = [macs(model.config, k) + (s if k < n else 0) for k, n, s in zip(kept, lengths, scoring)]
    return zip(said, alphas, kept, spent)


def _alpha(config, n: int, target: float, rule: dict, scoring: int) -> float:
    """That divides the MACs of a prompt of `n` tokens by `target`, or comes as near as what must stay lets it."""
    if rule["schedule"] == ENTRY:
        left = macs(config, n) / target - scoring
        return truncation_for(config, n, macs(config, n) / left) / n if left >= macs(config, 1) else LEAST_ALPHA
    try:
        return alpha_for(config, n, target, **rule)
    except ValueError:
        return LEAST_ALPHA


def _cut(model, tokenizer, rows: Sequence[Asked], prompts, control: str, target: float, new_tokens: int):
    """As `_dialled`, of prompts whose document is cut."""
    short = []
    for row, prompt in zip(rows, prompts):
        size = len(tokenizer(row.document, add_special_tokens=False)["input_ids"])
        left = max(0, truncation_for(model.config, len(prompt), target) - (len(prompt) - size))
        text = shortened(row.document, row.question, left, tokenizer, control)
        short.append(prompt_of(tokenizer, text, row.question))
    said, lengths = _said(model, tokenizer, short, new_tokens, alpha=1.0), [len(prompt) for prompt in short]
    return zip(said, [1.0] * len(rows), lengths, [macs(model.config, n) for n in lengths])
