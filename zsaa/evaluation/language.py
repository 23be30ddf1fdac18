"""Perplexity along the dial, and its controls at equal compute (the paper's Table 2).

The paper does not say how a pruned model is scored: a token that was dropped has no logits, and the text decides what
is dropped. These are the protocols, by name; every row of ours says which one it followed.

prefix         A window of text is a prefix and a continuation. The prefix is prefilled with pruning; the continuation
               is then scored through the pruned caches, each token after all before it, as `generate` would meet it.
               Causal: no score depends on what comes later. The one to trust.
last-word      The same for passages, as LAMBADA is scored: the continuation is the last word. Causal.
carry-through  The whole window is pruned in one pass; a dropped token leaves with the state that it had, and its logits
               are taken from there. Every token but the window's first is scored. What is kept follows from the whole
               window, so a score may profit from text that comes after it: THIS READS THE FUTURE. It is what a loss
               over labels computes, and perhaps what the paper did.

Normalisation. "perplexity" is exp(NLL / tokens), as Hugging Face's guide computes it; "word_perplexity" is
exp(NLL / words), as most published numbers are normalised: words are what white space separates in the original text,
counted where they begin (line ends are no words). Of last words, one passage is one word. Models with different
tokenizers can only be compared by word.

Speed-up. alpha is solved so that the multiply-accumulates of the pruned pass over all windows fall k-fold: of the
prefix, which is what time-to-first-token is about, or of the whole window (carry-through). A continuation costs nearly
the same under every setting. Clock times of the same prefill are in the same rows, where they were measured.

Controls. At equal compute: the prefix cut to its "first" or "last" tokens, or half from each of the "ends", for the
stock model; and the dial with tokens kept at "random". carry-through has no cuts: every token must be scored.

Intervals are 95% percentile bootstraps over documents (windows, where a corpus is one stream), with the same draws for
every row, so that "ratio", the perplexity over the stock model's on the same windows, is a paired comparison.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from zsaa.data.batching import own_seeds, pad, positions
from zsaa.data.corpora import Corpus
from zsaa.dial import rule, settings
from zsaa.evaluation.controls import CONTROLS, CUTS, applied, check_targets, cut, plan, precision_of
from zsaa.families import find_decoder
from zsaa.measure.checks import check_whole
from zsaa.measure.mode import evaluating
from zsaa.rule import PLAIN
from zsaa.score import seeded

TARGETS = (1, 2, 3)  # the speed-ups of the paper's Table 2
PROTOCOLS = ("prefix", "last-word", "carry-through")
SCORED = ("column_sum", "column_mean")
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Window:
    """A piece of text to score. ids: tokens; start: the first that is scored; words: that begin in what is scored;
    unit: the document that it comes from (of a stream: the window), which is what the bootstrap draws."""

    ids: list[int]
    start: int
    words: int
    unit: int


def protocol_for(corpus: Corpus, protocol: str) -> str:
    """`protocol` if it fits `corpus`, else ValueError. For last words, "prefix" means "last-word"."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; these are known: {', '.join(PROTOCOLS)}")
    if corpus.last_word:
        if protocol == "carry-through":
            raise ValueError(f"{corpus.name!r} predicts last words, which are never dropped; use protocol='last-word'")
        return "last-word"
    if protocol == "last-word":
        raise ValueError(f"{corpus.name!r} is running text; protocol='last-word' is for lambada")
    return protocol


def bos_of(tokenizer) -> list[int]:
    """What the tokenizer puts before each text: [BOS] or nothing."""
    return [tokenizer.bos_token_id] if tokenizer("a").input_ids[0] == tokenizer.bos_token_id else []


def windows(
    corpus: Corpus,
    tokenizer,
    protocol: str = "prefix",
    prefix: int = 224,
    continuation: int = 32,
    stride: int | None = None,
    count: int | None = None,
    seed: int = 0,
) -> list[Window]:
    """The windows of a corpus, in order.

    prefix, continuation: tokens; a window has both together, also under carry-through, where the split means nothing.
        Passages of last words are taken whole. A tokenizer that begins each text with BOS begins each window with it,
        as a part of the prefix; others put nothing before a window that begins in the middle of a text.
    stride: tokens from one window's beginning to the next one's, in one document; prefix + continuation by default, so
        that they do not overlap; `continuation` scores every token once, but for a document's first `prefix`. Under
        carry-through, which scores whole windows, they never overlap.
    count: how many windows at most, drawn with `seed` from all; None: all. What is shorter than one is left out.
    """
    protocol = protocol_for(corpus, protocol)
    for name, value in (("prefix", prefix), ("continuation", continuation), ("stride", stride), ("count", count)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more")
    found, bos = [], bos_of(tokenizer)
    step = stride if stride and protocol == "prefix" else prefix + continuation
    encoded = tokenizer(corpus.texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    stream, heads = len(corpus.texts) == 1, []
    if corpus.last_word:
        heads = tokenizer([text.rpartition(" ")[0] for text in corpus.texts], add_special_tokens=False).input_ids
    for unit, (text, ids, offsets) in enumerate(
        zip(corpus.texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        if corpus.last_word:
            before = heads[unit]
            # A tokenizer that merges the last word with the text before it would leave no prefix that is its own.
            if 0 < len(before) < len(ids) and ids[: len(before)] == before:
                found.append(Window(bos + ids, len(bos) + len(before), 1, unit))
            continue
        begins = np.array([m.start() for m in re.finditer(r"\S+", text)])
        body, whole = prefix - len(bos), prefix + continuation - len(bos)
        for at in range(0, len(ids) - whole + 1, step):
            start = len(bos) + body if protocol == "prefix" else 1
            scored = offsets[at + start - len(bos) : at + whole]
            words = int(((begins >= scored[0][0]) & (begins < scored[-1][1])).sum())
            found.append(Window(bos + ids[at : at + whole], start, words, len(found) if stream else unit))
    if not found:
        raise ValueError(f"no text of {corpus.source} has {prefix + continuation} tokens: take a shorter prefix")
    if count is not None:
        found = [found[i] for i in np.sort(np.random.RandomState(seed).permutation(len(found))[:count])]
    return found


@torch.inference_mode()
def score(
    model: nn.Module,
    samples: Sequence[tuple[Sequence[int], int]],
    batch_size: int = 8,
    precision: str = "fp32",
    bar: tqdm | None = None,
    carry: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Of each sample (ids, start): negative log-likelihoods of ids[start:] in nats (float64 [scored]), and what the
    model held for most likely there (int64 [scored]), on the CPU.

    The dial of `model` is used as it is set. carry=False: the first `start` tokens are a prefill, which is pruned, the
    others continue its cache, all at once but causally (protocols prefix and last-word). carry=True: one pruned pass
    over everything (carry-through). Results do not depend on the batch, but for rounding. Raises ValueError where the
    model says no numbers.
    """
    check_whole("batch_size", batch_size)
    dial = settings(model)
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i][0]), -samples[i][1]))
    scored: list = [None] * len(samples)
    for begin in range(0, len(order), batch_size):
        batch = [samples[i] for i in order[begin : begin + batch_size]]
        texts, starts = [list(ids) for ids, _ in batch], [start for _, start in batch]
        with evaluating(model), precision_of(model, precision):
            # At alpha = 1 there is nothing to prune, and one pass says the same.
            split = dial["alpha"] != 1 and not carry
            logits = (_continued if split else _at_once)(model, texts, starts)
        for row, i in enumerate(order[begin : begin + batch_size]):
            target = torch.tensor(samples[i][0][samples[i][1] :], device=logits[row].device)
            wide = logits[row].to(torch.promote_types(logits[row].dtype, torch.float32))
            chosen = wide.gather(1, target[:, None])[:, 0]
            nll = (wide.logsumexp(dim=1) - chosen).double().cpu()
            if not nll.isfinite().all():
                raise ValueError(
                    f"the likelihood of sample {i} is no number: the model's weights are spoilt, or too large for "
                    f"{precision}. Train or load it anew, or evaluate in fp32."
                )
            scored[i] = nll, wide.argmax(dim=1).cpu()
        if bar is not None:
            bar.update(len(batch))
    return scored


def _forward(model: nn.Module, ids: Tensor, mask: Tensor, **kwargs):
    """`model` on new tokens [batch, new] with a mask [batch, cached + new]; positions count real tokens."""
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask, ids.shape[1]), **kwargs)


def _at_once(model: nn.Module, texts: list[list[int]], starts: list[int]) -> list[Tensor]:
    """Logits [scored, vocabulary] for each text's tokens from its start on, by one pass over all of it."""
    ids, mask = pad(texts, _pad_id(model), _device(model), "left")
    longest = max(len(t) - s for t, s in zip(texts, starts))
    with seeded(own_seeds(texts)):
        logits = _forward(model, ids, mask, use_cache=False, logits_to_keep=longest + 1).logits
    return [row[longest - (len(t) - s) : -1] for row, t, s in zip(logits, texts, starts)]


def _continued(model: nn.Module, texts: list[list[int]], starts: list[int]) -> list[Tensor]:
    """The same, with the tokens before the start pruned at prefill, and the others continuing its cache."""
    prefixes = [t[:s] for t, s in zip(texts, starts)]
    ids, mask = pad(prefixes, _pad_id(model), _device(model), "left")
    longer = max(len(t) - s for t, s in zip(texts, starts)) > 1
    with seeded(own_seeds(prefixes)):
        output = _forward(model, ids, mask, use_cache=longer, logits_to_keep=1)
    logits = output.logits
    if longer:
        ids, more = pad([t[s:-1] for t, s in zip(texts, starts)], _pad_id(model), _device(model))
        output = _forward(model, ids, torch.cat([mask, more], dim=1), past_key_values=output.past_key_values)
        logits = torch.cat([logits, output.logits], dim=1)
    return [row[: len(t) - s] for row, t, s in zip(logits, texts, starts)]


def _pad_id(model: nn.Module) -> int:
    return find_decoder(model)[0].config.pad_token_id or 0


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def bootstrap(nll: np.ndarray, counts: np.ndarray, units: Sequence[int], seed: int = 0, draws: int = DRAWS):
    """Log-perplexities [draws] of resampled documents: sum of `nll` over sum of `counts` [windows]. The same seed and
    units draw the same documents, so that differences between two settings are paired."""
    names, place = np.unique(np.asarray(units), return_inverse=True)
    sums, sizes = np.bincount(place, nll), np.bincount(place, counts)
    random = np.random.RandomState(seed)  # a stream that is promised never to change
    at_once, found = max(1, 2**20 // len(names)), []
    for first in range(0, draws, at_once):
        drawn = random.randint(0, len(names), (min(at_once, draws - first), len(names)))
        found.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
    return np.concatenate(found)


def interval(logs: np.ndarray) -> list[float]:
    """The 95% interval of perplexities, or of their ratios, from the logarithms that `bootstrap` drew."""
    return [round(float(v), 4) for v in np.exp(np.percentile(logs, (2.5, 97.5)))]


def pack(values: Sequence[float]) -> str:
    """Numbers as one line of text, 4 decimals: a list would take a line of the file for each."""
    return " ".join(f"{v:.4f}".rstrip("0").rstrip(".") for v in values)


def unpack(line: str) -> list[float]:
    return [float(v) for v in line.split()]


def curve(
    model: nn.Module,
    tokenizer,
    found: Sequence[Window],
    carry: bool = False,
    targets=TARGETS,
    scores=SCORED,
    controls=CONTROLS,
    batch_size: int = 8,
    precision: str = "fp32",
    seed: int = 0,
    progress: bool = True,
) -> list[dict]:
    """A row per setting: the plan's fields (see `evaluation.controls.plan`), "score" (None for cuts) and

    nll_sum, tokens, words, n: nats, scored tokens and words, windows. perplexity, word_perplexity, with ci95 and
    word_ci95. ratio, ratio_ci95: over alpha = 1, paired. agreement: percent of the scored tokens where the most likely
    next token is that of alpha = 1; agreement_first: of the first scored tokens alone, right after what was pruned.
    nll: the windows' sums, packed.
    """
    rows = _settings(model, found, carry, targets, scores, controls)
    stock = next(row for row in rows if row["target"] == 1)
    # One bar for all settings, moved at most every 10 s: executed notebooks keep a line of each move.
    bar = tqdm(total=len(rows) * len(found), unit="window", disable=not progress, mininterval=10.0)
    base = None
    for row in [stock, *(r for r in rows if r is not stock)]:
        k, side = row["keep_tokens"], row["control"]
        prefixes = [cut(w.ids[: w.start], k, side, tokenizer.bos_token_id) for w in found]
        samples = [(p + w.ids[w.start :], len(p)) for p, w in zip(prefixes, found)]
        bar.set_description(f"{row['score'] or side} at {row['mac_reduction']:.1f}x", refresh=False)
        with applied(model, row):
            scored = score(model, samples, batch_size, precision, bar, carry)
        base = base or scored
        row.update(mac_reduction=round(row["mac_reduction"], 4), **_figures(found, scored, base, seed))
    bar.close()
    return [r for r in rows if r["target"] in targets and r["control"] in controls_of(controls, carry)]


def _settings(model: nn.Module, found: Sequence[Window], carry: bool, targets, scores, controls) -> list[dict]:
    """A row per setting, of alpha = 1 too: the plan's, under each score."""
    unknown = [s for s in scores if s not in PLAIN] or [c for c in controls if c not in CONTROLS]
    if unknown:
        raise ValueError(f"unknown score or control {unknown[0]!r}; known: {', '.join((*PLAIN, *CONTROLS))}")
    rows = []
    lengths, wanted = pruned(found, carry), controls_of(controls, carry)
    check_targets(find_decoder(model)[0].config, lengths, targets, wanted, **rule(model))
    for row in plan(model, lengths, sorted({1, *targets}), ["alpha", *wanted]):
        many = scores if row["control"] == "alpha" and row["target"] > 1 else (None,)
        for name in many:
            shown = "random" if row["control"] == "random" else name
            rows.append({"control": row["control"], "score": shown, **row})
    return rows


def _figures(found: Sequence[Window], scored: list, stock: list, seed: int) -> dict:
    """What a row says of the windows as `score` has them, beside what it has of them at alpha = 1."""
    counts, words = np.array([len(w.ids) - w.start for w in found]), np.array([w.words for w in found])
    units = [w.unit for w in found]
    nll, base = (np.array([float(n.sum()) for n, _ in some]) for some in (scored, stock))
    logs, word_logs = bootstrap(nll, counts, units, seed), bootstrap(nll, words, units, seed)
    same = [likely == its for (_, likely), (_, its) in zip(scored, stock)]
    return {
        "nll_sum": round(float(nll.sum()), 4),
        "tokens": int(counts.sum()),
        "words": int(words.sum()),
        "n": len(found),
        "perplexity": round(float(np.exp(nll.sum() / counts.sum())), 4),
        "ci95": interval(logs),
        "word_perplexity": round(float(np.exp(nll.sum() / words.sum())), 4),
        "word_ci95": interval(word_logs),
        "ratio": round(float(np.exp((nll.sum() - base.sum()) / counts.sum())), 4),
        "ratio_ci95": interval(logs - bootstrap(base, counts, units, seed)),
        "agreement": round(100 * float(torch.cat(same).double().mean()), 2),
        "agreement_first": round(100 * float(np.mean([bool(s[0]) for s in same])), 2),
        "nll": pack(nll),
    }


def pruned(found: Sequence[Window], carry: bool) -> list[int]:
    """How many tokens of each window are pruned."""
    return [len(w.ids) if carry else w.start for w in found]


def controls_of(controls: Sequence[str], carry: bool) -> list[str]:
    """Those that there are: carry-through has no cuts."""
    return [c for c in controls if not (carry and c in CUTS)]
