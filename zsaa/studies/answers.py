"""The objective "answers": a language model answers questions about documents along the dial, as it is or after a
recipe, on rows of your own.

    python -m zsaa.run --objective answers --data mine.jsonl --recipe zsaa+ --changes.tuning lora --output outputs/mine

Rows are JSON objects, one a line: document, question, answer (zsaa.data.questions); or --data squad or hotpotqa, of the
hub or of a --source folder. Documents of a file are dealt to training and test, so that none is in both. With a recipe
a scorer is taught first, then the model is tuned; both lie in output/NAME/model, for `zsaa.finetune.load`. Without one
chunks go by the words that they share with the question, or by the scorer that the model was saved with.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict
from pathlib import Path

import zsaa
from zsaa.data import questions
from zsaa.data.questions import Asked
from zsaa.dial import rule
from zsaa.evaluation.answers import curve
from zsaa.finetune import SETTINGS_FILE, load, teach
from zsaa.finetune.questions import encode
from zsaa.learned import asked as by_question
from zsaa.learned import salience
from zsaa.measure import output_folder, provenance
from zsaa.models import load_model
from zsaa.studies.job import Job
from zsaa.studies.records import device, model_record, once, result_file
from zsaa.studies.training import tuned

KIND = "causal-lm"


def measure(job: Job) -> dict:
    """Write job.output/results/NAME.json of a job with one seed; returns its content. A finished file is found again,
    and so is a training. AssetError or ValueError for rows that cannot be had or learned from."""
    asked, output = job.settings, output_folder(job.output)
    if job.data in questions.HUB:
        train, test, source = questions.load(job.data, job.source)
    else:
        train, test = dealt(questions.read(job.data), asked.held_out)
        source = f"a file of the user's: {Path(job.data).name}"
    train, test = train[: job.train], test[: job.test]
    trained = f"-{job.recipe.method}-{job.recipe.tuning}" if job.recipe else ""
    name = job.named(f"answers-{Path(job.data).stem}-{Path(job.model).name}{trained}")
    decides = {"model": model_record(job.model), "seed": job.seed, "settings": asdict(asked)}
    decides |= {"train": fingerprint(train), "test": fingerprint(test), "recipe": job.recipe and asdict(job.recipe)}

    def compute() -> dict:
        net, tokenizer, described, log = _prepared(job, train, output / name, decides)
        size = asked.batch_size or (64 if device() == "cuda" else 8)
        rows = curve(net, tokenizer, test, asked.targets, asked.controls, asked.new_tokens, size, job.progress)
        task = {"name": Path(job.data).stem, "source": source}
        return {
            "name": name,
            "kind": "questions",
            "command": job.command,
            "model": decides["model"],
            "task": {**task, "substitute": False, "fingerprint": fingerprint(test)},
            "recipe": described,
            **({"train": log} if log else {}),
            "provenance": provenance(seed=job.seed, train_samples=len(train) if log else 0, eval_samples=len(test)),
            "rows": rows,
        }

    return once(result_file(job, name), decides, compute)


def dealt(rows: list[Asked], held_out: float) -> tuple[list[Asked], list[Asked]]:
    """Training and test: about the share `held_out` of the documents, with all their questions, is for the test. Which,
    a document's own text decides, whatever else is there."""

    def drawn(row: Asked) -> float:
        return random.Random(hashlib.sha256(row.document.encode("utf-8", "surrogatepass")).hexdigest()).random()

    parts = [row for row in rows if drawn(row) >= held_out], [row for row in rows if drawn(row) < held_out]
    if not all(parts):
        documents = len({row.document for row in rows})
        raise ValueError(
            f"held_out={held_out} of {documents} documents leaves none for {'training' if not parts[0] else 'the test'}"
            ": give more documents, or another share."
        )
    return parts


def fingerprint(rows: list[Asked]) -> str:
    """sha256 (hex) of rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.document, row.question, row.answers)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _prepared(job: Job, train: list[Asked], folder: Path, decides: dict) -> tuple:
    """(model, tokenizer, recipe record, log of the training or None); the dial is asked by questions."""
    asked = job.settings
    if job.recipe is None:
        if (Path(job.model) / SETTINGS_FILE).is_file():
            net, tokenizer = load(job.model, kind=KIND, device=device())
        else:
            net, tokenizer = load_model(job.model, kind=KIND, device=device())
        if not hasattr(net.get_decoder(), by_question.CHILD):
            salience.attach(net, by_question.by_words(net, tokenizer, dict.fromkeys(row.document for row in train)))
            zsaa.enable(net, alpha=1.0, tau=1, score="asked", schedule="entry")
        return net, tokenizer, {"method": "stock", **rule(net)}, None
    taught: dict = {}

    def samples(net, tokenizer):
        found = encode(train, tokenizer, job.recipe.max_length)
        if job.recipe.score == "asked":
            options = {"chunk": asked.chunk, "seed": job.seed, "progress": job.progress}
            taught.update(teach(net, tokenizer, found, steps=asked.scorer_steps, **options)[1])
        return found

    # What is asked of the model later decides nothing: other questions or reductions are read from the same training.
    decides = {k: v for k, v in decides.items() if k != "test"}
    decides["settings"] = {name: getattr(asked, name) for name in ("held_out", "scorer_steps", "chunk")}
    done = tuned(job, folder, decides, lambda: load_model(job.model, kind=KIND, device=device()), samples, kind=KIND)
    return done.model, done.tokenizer, done.recipe, {**done.log, **({"scorer": taught} if taught else {})}
