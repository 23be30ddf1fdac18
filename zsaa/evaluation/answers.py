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
    progress: bool = True,
) -> list[dict]:
    """How well `model`, its dial asked by questions, answers `rows`: a row for each control and target (the first is
    the whole prompt, once). "alpha": the dial, whose alpha is solved for each prompt; "bm25" and "last": the prompt's
    document is cut to as much. One question at a time, greedily.

    exact_match and f1 in percent, "f1s" those of each question; mac_reduction: of the prompts together, the scorer
    counted, as reached.
    """
    config, asked = model.config, [(control, target) for target in targets for control in controls]
    asked = [pair for pair in asked if pair[1] > 1 or pair[0] == controls[0]]
    found: dict[tuple, list] = {pair: [] for pair in asked}
    for row in tqdm(rows, "answers", disable=not progress, leave=False):
        prompt = prompt_of(tokenizer, row.document, row.question)
        for control, target in asked:
            how = _dialled if control == "alpha" or target == 1 else _cut
            alpha, read, spent, said = how(model, tokenizer, row, prompt, control, target, new_tokens)
            exact, f1 = judge(said, row.answers)
            found[control, target].append((exact, f1, alpha, read, spent, macs(config, len(prompt))))
    rows_made = []
    for (control, target), values in found.items():
        exact, f1s, alphas, reads, spent, stock = (list(column) for column in zip(*values))
        count = len(values)
        rows_made.append({"control": control, "target": target, "alpha": sum(alphas) / count,
                          "tokens": sum(reads) / count, "mac_reduction": round(sum(stock) / sum(spent), 3), "n": count,
                          "exact_match": round(100 * sum(exact) / count, 2), "f1": round(100 * sum(f1s) / count, 2),
                          "f1s": [round(100 * f1, 1) for f1 in f1s]})  # fmt: skip
    return rows_made


def _said(model: nn.Module, tokenizer, prompt: Sequence[int], alpha: float, new_tokens: int, told: dict) -> str:
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    options = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": pad}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), alpha=alpha, **options, **told)
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def _dialled(model, tokenizer, row: Asked, prompt, control: str, target: float, new_tokens: int):
    n, rule = len(prompt), dial.rule(model)
    told, scoring = {"document": row.document, "tokenizer": tokenizer}, 0
    if rule["score"] == ASKED:
        told["question"] = row.question
        asking = len(tokenizer(row.question, add_special_tokens=False)["input_ids"])
        scoring = find_decoder(model)[0].asked.macs(n - asking, asking)  # of this scorer, which may not be a usual one
    alpha = 1.0 if target == 1 else _alpha(model.config, n, target, rule, scoring)
    with dial.trace(model) as trace:
        said = _said(model, tokenizer, prompt, alpha, new_tokens, told)
    kept, spent = trace.counts[-1][0], macs(model.config, n, alpha, **rule)
    if rule["schedule"] == ENTRY:
        spent = macs(model.config, kept) + (scoring if kept < n else 0)
    return alpha, kept, spent, said


def _alpha(config, n: int, target: float, rule: dict, scoring: int) -> float:
    """That divides the MACs of a prompt of `n` tokens by `target`, or comes as near as what must stay lets it."""
    if rule["schedule"] == ENTRY:
        left = macs(config, n) / target - scoring
        return truncation_for(config, n, macs(config, n) / left) / n if left >= macs(config, 1) else LEAST_ALPHA
    try:
        return alpha_for(config, n, target, **rule)
    except ValueError:
        return LEAST_ALPHA


def _cut(model, tokenizer, row: Asked, prompt, control: str, target: float, new_tokens: int):
    size = len(tokenizer(row.document, add_special_tokens=False)["input_ids"])
    left = max(0, truncation_for(model.config, len(prompt), target) - (len(prompt) - size))
    short = prompt_of(tokenizer, shortened(row.document, row.question, left, tokenizer, control), row.question)
    return 1.0, len(short), macs(model.config, len(short)), _said(model, tokenizer, short, 1.0, new_tokens, {})
