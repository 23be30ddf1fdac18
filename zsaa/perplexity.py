"""Perplexity along the dial, and its controls at equal compute (the paper's Table 2): one model on one corpus.

    python -m zsaa.perplexity --model gpt2 --corpus wikitext-103 --source hub --protocol prefix

`zsaa.evaluation.language` says what the protocols are, and how numbers are normalised and their intervals drawn.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset

import zsaa
from zsaa.data.corpora import CORPORA, Corpus, load_corpus
from zsaa.dial import current_settings, rule, settings
from zsaa.evaluation.accuracy import CONTROLS, check_targets
from zsaa.evaluation.language import (
    DRAWS,
    PROTOCOLS,
    SCORED,
    TARGETS,
    Window,
    bos_of,
    controls_of,
    curve,
    pack,
    protocol_for,
    pruned,
    windows,
)
from zsaa.evaluation.latency import time_first_token
from zsaa.experiment import add_recipe, command_of, exit_code, model_record, recipe_of, targets_of, task_record
from zsaa.families import find_decoder
from zsaa.finetune import Recipe, describe, fine_tune, load
from zsaa.measure import cached, hash_of, output_folder, provenance
from zsaa.measure.checks import check_whole
from zsaa.rule import PLAIN, RULE, check_schedule, check_tau


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
        check_targets(find_decoder(net)[0].config, pruned(found, carry), targets, controls_of(controls, carry), **rule)
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
            longest = max((w.ids if carry else w.ids[: w.start] for w in found), key=len)
            time_first_token(net, rows, tokenizer, longest, latency_repeats, precision)
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
        pieces, bos = [], bos_of(tokenizer)
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
