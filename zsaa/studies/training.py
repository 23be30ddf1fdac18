"""Models that a study fine-tunes first: a training that is done is taken up, one cut short goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from zsaa.finetune import describe, fine_tune, load
from zsaa.studies.job import Job
from zsaa.studies.records import device, once


@dataclass(frozen=True)
class Trained:
    """A fine-tuned model with its tokenizer; recipe and log as result files have them; samples: that it learned from;
    spent: seconds and joules of the training."""

    model: nn.Module
    tokenizer: object
    recipe: dict
    log: dict
    samples: int
    spent: dict


def tuned(
    job: Job,
    folder: Path,
    settings: dict,
    base: Callable[[], tuple],
    samples: Callable,
    around: Callable = contextlib.nullcontext,
    **reload,
) -> Trained:
    """The model of `job` after its recipe, saved in folder/model, with the training's log in folder/train.json.

    settings: all that decides the training (see `measure.cached`). base: gives model and tokenizer. samples(model,
    tokenizer): what is learned, after checks of what will be measured, since a training can take hours.
    around(model): a context to train in. reload: of `load`, where the training is done already.
    """
    fresh = []

    def learn() -> dict:
        net, tokenizer = base()
        learned_from = samples(net, tokenizer)
        described = describe(job.recipe, net)
        with around(net):
            net, log = fine_tune(
                net, tokenizer, learned_from, job.recipe, folder, save_steps=job.save_steps, progress=job.progress
            )
        fresh.extend((net, tokenizer))
        return {"recipe": described, "train": log, "samples": len(learned_from)}

    learned = once(folder / "train.json", settings, learn, folder / "model")
    net, tokenizer = fresh or load(folder / "model", device=device(), **reload)
    spent = learned.get("provenance", {})
    return Trained(net, tokenizer, learned["recipe"], learned["train"], learned["samples"], spent)
