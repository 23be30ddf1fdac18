"""The objective "perplexity": one model on one corpus under one protocol, as it is or after a recipe (Table 2)."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

import zsaa
from zsaa.data.corpora import Corpus, load_corpus
from zsaa.dial import rule, settings
from zsaa.dials.settings import current_settings
from zsaa.evaluation.controls import check_targets
from zsaa.evaluation.language import DRAWS, Window, bos_of, controls_of, curve, pack, protocol_for, pruned, windows
from zsaa.evaluation.latency import time_first_token
from zsaa.families import find_decoder
from zsaa.measure import hash_of, output_folder, provenance
from zsaa.models import load_model
from zsaa.rule import RULE
from zsaa.studies.job import Job
from zsaa.studies.records import device, model_record, once, result_file, task_record
from zsaa.studies.training import tuned


def measure(job: Job) -> dict:
    """Write job.output/results/NAME.json of a job with one seed; returns its content. What is there already, for the
    same settings and code, is not done again.

    A recipe learns on job.train rows of the corpus' train split: windows as long as those scored, labels at every
    token, a dropped one scored on the state that it left with.
    """
    asked, output = job.settings, output_folder(job.output)
    data = load_corpus(job.data, job.source, job.train if job.recipe else 0, job.seed)
    protocol = protocol_for(data, asked.protocol)
    text = f"{data.name}-substitute" if data.substitute else data.name
    method = job.recipe.method if job.recipe else "untuned"
    name = job.named("-".join((text, protocol, Path(job.model).name, method)))
    carry = protocol == "carry-through"
    net, tokenizer, described, log = _prepared(job, data, protocol, output)
    zsaa.enable(net, 1.0, asked.tau, schedule=asked.schedule)
    found = _windows(job, data, protocol, net, tokenizer, rule(net))
    header = {
        "name": name,
        "kind": "perplexity",
        "command": job.command,
        "model": {**model_record(job.model), "name": Path(job.model).name if Path(job.model).is_dir() else job.model},
        "task": {**task_record(data), "title": data.title},
        "recipe": {**described, **{key: settings(net)[key] for key in ("tau", "schedule")}},
        "train": log,
        "protocol": _protocol(job, data, protocol, found),
        "windows": {
            "tokens": pack([len(w.ids) - w.start for w in found]),
            "words": pack([w.words for w in found]),
            "units": pack([w.unit for w in found]),
        },
        "evaluation": {"precision": asked.precision, "batch_size": asked.batch_size},
    }

    def evaluate() -> dict:
        started, options = time.perf_counter(), (asked.batch_size, asked.precision, job.seed, job.progress)
        rows = curve(net, tokenizer, found, carry, asked.targets, asked.scores, asked.controls, *options)
        if asked.latency_repeats:
            longest = max((w.ids if carry else w.ids[: w.start] for w in found), key=len)
            time_first_token(net, rows, tokenizer, longest, asked.latency_repeats, asked.precision)
        facts = {"seed": job.seed, "eval_samples": len(found), "seconds": round(time.perf_counter() - started, 1)}
        facts |= {"train_samples": log["windows"]} if log else {}
        return {**header, "provenance": provenance(**facts), "rows": rows}

    # "command" is how the file was asked for, not what is in it.
    decides = {"settings": asdict(asked), "text": hash_of([w.ids for w in found])}
    decides |= {key: value for key, value in header.items() if key not in ("command", "train", "windows")}
    return once(result_file(job, name), decides, evaluate)


def _windows(job: Job, data: Corpus, protocol: str, net, tokenizer, given: dict) -> list[Window]:
    """The windows to score, if there is a row to make of them under the rule `given`."""
    asked = job.settings
    found = windows(
        data, tokenizer, protocol, asked.prefix, asked.continuation, asked.stride, count=job.test, seed=job.seed
    )
    carry = protocol == "carry-through"
    wanted = controls_of(asked.controls, carry)
    check_targets(find_decoder(net)[0].config, pruned(found, carry), asked.targets, wanted, **given)
    return found


def _protocol(job: Job, data: Corpus, protocol: str, found: list[Window]) -> dict:
    """What the result says of how it was scored."""
    asked, carry = job.settings, protocol == "carry-through"
    cut_into = {"prefix": asked.prefix, "continuation": asked.continuation, "stride": None if carry else asked.stride}
    drawn = "windows" if len(data.texts) == 1 else "documents"
    return {
        "name": protocol,
        **{key: None if data.last_word else value for key, value in cut_into.items()},
        "windows": len(found),
        "documents": len({w.unit for w in found}),
        "reads_future": carry,
        "normalisation": "word" if data.last_word else "token",
        "bootstrap": {"draws": DRAWS, "seed": job.seed, "of": drawn},
    }


def _prepared(job: Job, data: Corpus, protocol: str, output: Path):
    """(model, tokenizer, recipe as recorded, training log): as it is, or fine-tuned on the corpus' train texts."""
    length = job.settings.prefix + job.settings.continuation

    @functools.cache
    def base():
        net, tokenizer = load_model(job.model, device=device())
        most = find_decoder(net)[0].config.max_position_embeddings
        if length > most:
            raise ValueError(
                f"windows of {length} tokens are too long for a model with {most} positions: shorten the prefix"
            )
        return net, tokenizer

    if job.recipe is None:
        net, tokenizer = base()
        ranged = current_settings(find_decoder(net)[0])["alpha_range"]  # a saved model knows what it was trained for
        described = {"method": "saved" if ranged else "untuned", "tuning": "none", "alpha_range": ranged}
        return net, tokenizer, described, None

    def samples(net, tokenizer) -> Dataset:
        _windows(job, data, protocol, net, tokenizer, {name: getattr(job.recipe, name) for name in RULE})
        return _pieces(data.train, tokenizer, length)

    if model_record(job.model)["revision"] == "None":  # not fetched from the hub yet: what it is, it says then
        base()
    decides = {"model": model_record(job.model), "train": hash_of(data.train), "length": length}
    decides |= {"recipe": asdict(job.recipe)}
    folder = output / "trained" / f"{data.name}-{Path(job.model).name}-{hash_of(decides)[:8]}"
    trained = tuned(job, folder, decides, base, samples)
    return trained.model, trained.tokenizer, trained.recipe, {**trained.log, "windows": trained.samples}


def _pieces(texts: list[str], tokenizer, length: int) -> Dataset:
    """Texts in windows of `length` tokens, each with its own tokens as labels: what does not fill one is left out."""
    pieces, bos = [], bos_of(tokenizer)
    body = length - len(bos)
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids:
        pieces += [bos + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    if not pieces:
        raise ValueError(f"no text of the train split has {length} tokens: read more rows of it, or shorten the window")
    return Dataset.from_dict({"input_ids": pieces, "attention_mask": [[1] * length] * len(pieces), "labels": pieces})
