"""Perplexity along the dial, and its controls at equal compute (the paper's Table 2).

    python -m zsaa.perplexity --model gpt2 --corpus wikitext-103 --source hub --protocol prefix

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

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

import zsaa
from zsaa.data.batching import own_seeds, pad
from zsaa.data.corpora import CORPORA, Corpus, load_corpus
from zsaa.dial import current_settings, rule, settings
from zsaa.evaluation.accuracy import CONTROLS, CUTS, _precision, applied, check_targets, cut, plan
from zsaa.experiment import add_recipe, command_of, exit_code, model_record, recipe_of, targets_of, task_record
from zsaa.families import find_decoder, only_last_logits
from zsaa.finetune import Recipe, describe, fine_tune, load
from zsaa.measure import alternate, cached, hash_of, output_folder, provenance
from zsaa.measure.checks import check_whole
from zsaa.rule import PLAIN, RULE, check_schedule, check_tau
from zsaa.score import seeded

TARGETS = (1, 2, 3)  # the speed-ups of the paper's Table 2
PROTOCOLS = ("prefix", "last-word", "carry-through")
SCORED = ("column_sum", "column_mean")
DRAWS = 2000  # of the bootstrap


# -------------------------------------------------------------------------------------------------- windows


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


def _bos(tokenizer) -> list[int]:
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
    found, bos = [], _bos(tokenizer)
    step = stride if stride and protocol == "prefix" else prefix + continuation
    encoded = tokenizer(corpus.texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    stream = len(corpus.texts) == 1
    for unit, (text, ids, offsets) in enumerate(
        zip(corpus.texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        if corpus.last_word:
            before = tokenizer(text.rpartition(" ")[0], add_special_tokens=False).input_ids
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


# -------------------------------------------------------------------------------------------------- scoring


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
    model.eval()
    dial = settings(model)
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i][0]), -samples[i][1]))
    scored: list = [None] * len(samples)
    for begin in range(0, len(order), batch_size):
        batch = [samples[i] for i in order[begin : begin + batch_size]]
        texts, starts = [list(ids) for ids, _ in batch], [start for _, start in batch]
        with _precision(model, precision):
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
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, mask.shape[1] - ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **kwargs)


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


# ------------------------------------------------------------------------------------------------ intervals


def bootstrap(nll: np.ndarray, counts: np.ndarray, units: Sequence[int], seed: int = 0, draws: int = DRAWS):
    """Log-perplexities [draws] of resampled documents: sum of `nll` over sum of `counts` [windows]. The same seed and
    units draw the same documents, so that differences between two settings are paired."""
    names, place = np.unique(np.asarray(units), return_inverse=True)
    sums, sizes = np.bincount(place, nll), np.bincount(place, counts)
    random = np.random.RandomState(seed)  # a stream that is promised never to change
    found = np.empty(draws)
    for draw in range(draws):
        times = np.bincount(random.randint(0, len(names), len(names)), minlength=len(names))
        found[draw] = (times @ sums) / (times @ sizes)
    return found


def _interval(logs: np.ndarray) -> list[float]:
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
    """A row per setting: the plan's fields (see `evaluate.plan`), "score" (None for cuts) and

    nll_sum, tokens, words, n: nats, scored tokens and words, windows. perplexity, word_perplexity, with ci95 and
    word_ci95. ratio, ratio_ci95: over alpha = 1, paired. agreement: percent of the scored tokens where the most likely
    next token is that of alpha = 1; agreement_first: of the first scored tokens alone, right after what was pruned.
    nll: the windows' sums, packed.
    """
    unknown = [s for s in scores if s not in PLAIN] or [c for c in controls if c not in CONTROLS]
    if unknown:
        raise ValueError(f"unknown score or control {unknown[0]!r}; known: {', '.join((*PLAIN, *CONTROLS))}")
    rows = []
    lengths, wanted = _pruned(found, carry), _controls(controls, carry)
    check_targets(find_decoder(model)[0].config, lengths, targets, wanted, **rule(model))
    for row in plan(model, lengths, sorted({1, *targets}), ["alpha", *wanted]):
        many = scores if row["control"] == "alpha" and row["target"] > 1 else (None,)
        for name in many:
            shown = "random" if row["control"] == "random" else name
            rows.append({"control": row["control"], "score": shown, **row})
    stock = next(row for row in rows if row["target"] == 1)
    units, counts = [w.unit for w in found], np.array([len(w.ids) - w.start for w in found])
    words = np.array([w.words for w in found])
    # One bar for all settings, moved at most every 10 s: executed notebooks keep a line of each move.
    bar = tqdm(total=len(rows) * len(found), unit="window", disable=not progress, mininterval=10.0)
    base = None
    for row in [stock, *(r for r in rows if r is not stock)]:
        k, side = row["keep_tokens"], row["control"]
        prefixes = [cut(w.ids[: w.start], k, side, tokenizer.bos_token_id) for w in found]
        samples = [(p + w.ids[w.start :], len(p)) for p, w in zip(prefixes, found)]
        bar.set_description(f"{row['score'] or side} at {row['mac_reduction']:.1f}x", refresh=False)
        with _set(model, row):
            scored = score(model, samples, batch_size, precision, bar, carry)
        nll = np.array([float(n.sum()) for n, _ in scored])
        logs, word_logs = bootstrap(nll, counts, units, seed), bootstrap(nll, words, units, seed)
        base = base or (nll.sum(), logs, [likely for _, likely in scored])
        same = [likely == stock_likely for (_, likely), stock_likely in zip(scored, base[2])]
        row.update(
            mac_reduction=round(row["mac_reduction"], 4),
            nll_sum=round(float(nll.sum()), 4),
            tokens=int(counts.sum()),
            words=int(words.sum()),
            n=len(found),
            perplexity=round(float(np.exp(nll.sum() / counts.sum())), 4),
            ci95=_interval(logs),
            word_perplexity=round(float(np.exp(nll.sum() / words.sum())), 4),
            word_ci95=_interval(word_logs),
            ratio=round(float(np.exp((nll.sum() - base[0]) / counts.sum())), 4),
            ratio_ci95=_interval(logs - base[1]),
            agreement=round(100 * float(torch.cat(same).double().mean()), 2),
            agreement_first=round(100 * float(np.mean([bool(s[0]) for s in same])), 2),
            nll=pack(nll),
        )
    bar.close()
    return [r for r in rows if r["target"] in targets and r["control"] in wanted]


def _pruned(found: Sequence[Window], carry: bool) -> list[int]:
    """How many tokens of each window are pruned."""
    return [len(w.ids) if carry else w.start for w in found]


def _controls(controls: Sequence[str], carry: bool) -> list[str]:
    """Those that there are: carry-through has no cuts."""
    return [c for c in controls if not (carry and c in CUTS)]


@contextmanager
def _set(model: nn.Module, row: dict) -> Iterator[None]:
    """`model` with dial and score as `row` has them."""
    before = settings(model)["score"]
    zsaa.enable(model, score=row["score"])
    try:
        with applied(model, row):
            yield
    finally:
        zsaa.enable(model, score=before)


@torch.inference_mode()
def add_latency(
    model: nn.Module, rows: list[dict], tokenizer, prefix: Sequence[int], repeats: int, precision: str = "fp32"
) -> list[dict]:
    """Time to first token: one prefill of `prefix` (ids) with the last token's logits and the cache, at every row's
    setting in turn with the stock model. Adds "latency_ms" (median), "latency_ms_quartiles", "speedup" (over stock),
    "latency_batch" and "latency_tokens". Rows of the control "random" are not timed: they compute what the dial does.
    """

    def runner(row):
        ids, mask = pad([cut(prefix, row["keep_tokens"], row["control"], tokenizer.bos_token_id)], 0, _device(model))

        def run():
            with _set(model, row), _precision(model, precision):
                model(input_ids=ids, attention_mask=mask, use_cache=True, **only_last_logits(model))

        return run

    stock = {"keep_tokens": None, "control": "alpha", "alpha": 1.0, "score": None}
    chosen = {"stock" if row["alpha"] == 1 else str(i): row for i, row in enumerate(rows) if row["control"] != "random"}
    timed = alternate({"stock": runner(stock), **{i: runner(row) for i, row in chosen.items()}}, repeats)
    for i, row in chosen.items():
        row.update(timed[i], latency_batch=1, latency_tokens=len(prefix))
    return rows


# ----------------------------------------------------------------------------------------------- experiments


def run(
    *,
    model: str = "smollm2-135m",
    corpus: str = "wikitext-103",
    source: str = "auto",
    protocol: str = "prefix",
    prefix: int = 224,
    continuation: int = 32,
    stride: int | None = None,
    count: int | None = None,
    targets=TARGETS,
    scores=SCORED,
    controls=CONTROLS,
    recipe: Recipe | None = None,
    train: int | None = 2000,
    tau: int | None = None,
    schedule: str | None = None,
    seed: int = 0,
    batch_size: int = 8,
    precision: str = "fp32",
    latency_repeats: int = 15,
    output_dir: str | Path = "outputs/perplexity",
    name: str | None = None,
    progress: bool = True,
    command: str | None = None,
) -> dict:
    """Evaluate one model on one corpus under one protocol; write output_dir/results/<name>.json and return its content.
    What is there already, for the same settings and code, is not done again.

    recipe: how to fine-tune first, on `train` rows of the corpus' train split (windows as long as those scored, labels
        at every token, a dropped one scored on the state that it left with); None: the model as it is.
    tau, schedule: as in `zsaa.enable`; None takes the recipe's, and of a model as it is what it was saved with.
    batch_size, precision: of the evaluation. latency_repeats: 0 leaves the clock out. The rest: `windows` and `curve`.
    """
    output_dir = output_folder(output_dir)
    if schedule is not None:  # before a training, which can take hours
        check_schedule(schedule)
    if tau is not None:
        check_tau(tau)
    check_whole("batch_size", batch_size)
    check_whole("latency_repeats", latency_repeats, least=0)
    if recipe:
        check_whole("train", train, also={None: "all rows"})
    data = load_corpus(corpus, source, train if recipe else 0, seed)
    protocol = protocol_for(data, protocol)
    text = f"{data.name}-substitute" if data.substitute else data.name
    name = name or "-".join((text, protocol, Path(model).name, recipe.method if recipe else "untuned"))
    carry = protocol == "carry-through"

    def cut_windows(net, tokenizer, **rule) -> list[Window]:
        found = windows(data, tokenizer, protocol, prefix, continuation, stride, count, seed)
        check_targets(find_decoder(net)[0].config, _pruned(found, carry), targets, _controls(controls, carry), **rule)
        return found

    length = prefix + continuation
    net, tokenizer, described, log = _prepared(model, data, recipe, length, output_dir, progress, cut_windows)
    zsaa.enable(net, 1.0, tau, schedule=schedule)
    dial = settings(net)
    found = cut_windows(net, tokenizer, **rule(net))
    cut_into = {"prefix": prefix, "continuation": continuation, "stride": None if carry else stride}
    header = {
        "name": name,
        "kind": "perplexity",
        "command": command,
        "model": {**model_record(model), "name": Path(model).name if Path(model).is_dir() else model},
        "task": {**task_record(data), "title": data.title},
        "recipe": {**described, "tau": dial["tau"], "schedule": dial["schedule"]},
        "train": log,
        "protocol": {
            "name": protocol,
            **{key: None if data.last_word else value for key, value in cut_into.items()},
            "windows": len(found),
            "documents": len({w.unit for w in found}),
            "reads_future": carry,
            "normalisation": "word" if data.last_word else "token",
            "bootstrap": {"draws": DRAWS, "seed": seed, "of": "windows" if len(data.texts) == 1 else "documents"},
        },
        "windows": {
            "tokens": pack([len(w.ids) - w.start for w in found]),
            "words": pack([w.words for w in found]),
            "units": pack([w.unit for w in found]),
        },
        "evaluation": {"precision": precision, "batch_size": batch_size},
    }

    def evaluate() -> dict:
        started = time.perf_counter()
        options = (targets, scores, controls, batch_size, precision, seed, progress)
        rows = curve(net, tokenizer, found, carry, *options)
        if latency_repeats:
            pruned = max((w.ids if carry else w.ids[: w.start] for w in found), key=len)
            add_latency(net, rows, tokenizer, pruned, latency_repeats, precision)
        facts = {"seed": seed, "eval_samples": len(found), "seconds": round(time.perf_counter() - started, 1)}
        return {
            **header,
            "provenance": provenance(**facts, **({"train_samples": log["windows"]} if log else {})),
            "rows": rows,
        }

    # "command" is how the file was asked for, not what is in it.
    asked = {"targets": list(targets), "scores": list(scores), "controls": list(controls)}
    asked |= {"latency_repeats": latency_repeats, "text": hash_of([w.ids for w in found])}
    asked |= {key: value for key, value in header.items() if key not in ("command", "train", "windows")}
    return cached(output_dir / "results" / f"{name}.json", asked, evaluate)


def _prepared(model: str, data: Corpus, recipe: Recipe | None, length: int, output_dir: Path, progress: bool, check):
    """(model, tokenizer, recipe as recorded, training log): as it is, or fine-tuned on the corpus' train texts in
    windows of `length` tokens. A training that is done is taken up; one cut short goes on from its last checkpoint.
    check: called with model, tokenizer and rule before a training, which can take hours."""
    from zsaa.models import load_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net, tokenizer = load_model(model, device=device)
    most = find_decoder(net)[0].config.max_position_embeddings
    if length > most:
        raise ValueError(
            f"windows of {length} tokens are too long for a model with {most} positions: shorten the prefix"
        )
    if recipe is None:
        ranged = current_settings(find_decoder(net)[0])["alpha_range"]  # a saved model knows what it was trained for
        return (
            net,
            tokenizer,
            {"method": "saved" if ranged else "untuned", "tuning": "none", "alpha_range": ranged},
            None,
        )
    trained = {"model": model_record(model), "train": hash_of(data.train), "length": length, "recipe": asdict(recipe)}
    folder = output_dir / "trained" / f"{data.name}-{Path(model).name}-{hash_of(trained)[:8]}"
    fresh = []

    def learn() -> dict:
        check(net, tokenizer, **{name: getattr(recipe, name) for name in RULE})
        described = describe(recipe, net)
        pieces, bos = [], _bos(tokenizer)
        body = length - len(bos)
        for ids in tokenizer(data.train, add_special_tokens=False, verbose=False).input_ids:
            pieces += [bos + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
        if not pieces:
            raise ValueError(
                f"no text of the train split has {length} tokens: read more rows of it, or shorten the window"
            )
        columns = {"input_ids": pieces, "attention_mask": [[1] * length] * len(pieces), "labels": pieces}
        tuned, log = fine_tune(
            net, tokenizer, Dataset.from_dict(columns), recipe, folder, save_steps=500, progress=progress
        )
        fresh.append(tuned)
        return {"recipe": described, "train": {**log, "windows": len(pieces)}}

    if not (folder / "model").is_dir():
        (folder / "train.json").unlink(missing_ok=True)
    learned = cached(folder / "train.json", trained, learn)
    if fresh:
        return fresh[0], tokenizer, learned["recipe"], learned["train"]
    return *load(folder / "model", device=device), learned["recipe"], learned["train"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.perplexity", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="wikitext-103", choices=CORPORA)
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, or a folder in the hub's layout")
    parser.add_argument("--protocol", default="prefix", choices=PROTOCOLS)
    parser.add_argument("--prefix", type=int, default=224, help="tokens that are pruned")
    parser.add_argument("--continuation", type=int, default=32, help="tokens that are scored")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: prefix + continuation)")
    parser.add_argument("--windows", dest="count", type=int, help="number of windows at most (default: all)")
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="MAC reductions")
    parser.add_argument("--scores", nargs="+", default=list(SCORED), choices=PLAIN)
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS)
    parser.add_argument("--fine-tune", action="store_true", help="first, by the recipe below")
    parser.add_argument("--train", type=int, default=2000, help="rows of the train split, for --fine-tune")
    parser.add_argument("--eval-batch-size", type=int, default=8)
    parser.add_argument("--eval-precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--latency-repeats", type=int, default=15, help="0 leaves the clock out")
    parser.add_argument("--output-dir", default="outputs/perplexity")
    parser.add_argument("--name")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    add_recipe(parser)
    chosen = parser.parse_args(arguments)
    recipe = recipe_of(chosen, parser)
    passed = (
        "model",
        "corpus",
        "source",
        "protocol",
        "prefix",
        "continuation",
        "stride",
        "count",
        "scores",
        "controls",
    )
    passed += ("train", "latency_repeats", "output_dir", "name", "progress")
    result = run(
        **{key: getattr(chosen, key) for key in passed},
        targets=targets_of(chosen.targets, parser),
        recipe=recipe if chosen.fine_tune else None,
        tau=getattr(chosen, "tau", None),
        schedule=getattr(chosen, "schedule", None),
        seed=recipe.seed,
        batch_size=chosen.eval_batch_size,
        precision=chosen.eval_precision,
        command=command_of("zsaa.perplexity", sys.argv[1:] if arguments is None else arguments),
    )
    for row in result["rows"]:
        print(
            f"{row['control']:>6} {row['score'] or '-':>11} {row['mac_reduction']:6.2f}x  perplexity"
            f" {row['perplexity']:.2f} [{row['ci95'][0]:.2f}, {row['ci95'][1]:.2f}]  x{row['ratio']:.3f} of stock"
            f"  agreement {row['agreement']:.1f}%  TTFT {row.get('speedup', 'not run')}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.perplexity"))
