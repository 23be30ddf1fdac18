"""What all studies need: which model and data a result is about, the device, and files that are made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from zsaa.measure import cached, output_folder, write_json
from zsaa.measure.distributed import on_first, place


def model_record(name: str) -> dict:
    """What a result file says of its model: name, where it came from, revision or hash."""
    from zsaa.models import resolve

    return {"name": name, **{k: str(v) for k, v in resolve(name).items() if k not in ("name", "path")}}


def task_record(data) -> dict:
    """What a result file says of its data set (a `zsaa.data.tasks.Task` or a `zsaa.data.corpora.Corpus`)."""
    fields = ("name", "source", "substitute", "metric", "paper_column", "fingerprint")
    fields += ("training_substitute",) * bool(data.training_substitute)
    return {field: getattr(data, field) for field in fields}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def result_file(job, name: str) -> Path:
    return output_folder(job.output) / "results" / f"{name}.json"


def once(path: Path, settings: dict, compute: Callable[[], dict], needs: Path | None = None) -> dict:
    """`measure.cached`, which counts only if `needs` is there too. Of several processes, which would write over each
    other, the first one writes, and nothing is taken up but a training's checkpoints."""
    if place()[1] == 1:
        if needs is not None and not needs.exists():
            path.unlink(missing_ok=True)
        return cached(path, settings, compute)
    result = compute()
    on_first(partial(write_json, path, result))
    return result
