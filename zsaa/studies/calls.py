"""Jobs by the names that notebooks, scripts and the flags of older commands use."""

from __future__ import annotations

from dataclasses import fields

from zsaa.studies.job import SETTINGS, Job

# What older commands and calls say, where a job has another name for it.
RENAMED = {
    "task": "data",
    "corpus": "data",
    "output_dir": "output",
    "count": "test",
    "limit": "test",
    "eval_batch_size": "batch_size",
    "eval_precision": "precision",
}


def job(objective: str, **given) -> Job:
    """A job of fields and settings in one list of keyword arguments, by their own or by older names. Without `seeds`
    the recipe's seed is taken, without one 0."""
    given = {RENAMED.get(name, name): value for name, value in given.items()}
    own = {field.name for field in fields(SETTINGS[objective])}
    settings = SETTINGS[objective](**{name: value for name, value in given.items() if name in own})
    rest = {name: value for name, value in given.items() if name not in own}
    if "seed" in rest:
        rest["seeds"] = (rest.pop("seed"),)
    if "seeds" not in rest and rest.get("recipe"):
        rest["seeds"] = (rest["recipe"].seed,)
    return Job(objective=objective, settings=settings, **rest)
