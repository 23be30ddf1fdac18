"""The plainest rival: counts of words and pairs of words (TF-IDF) and a logistic regression, on a CPU.

python -m ablation.bags --task imdb_films

On imdb_films the strength of the regression is chosen on the validation part, and the test part is read once and noted
(ablation/reading.py); on the other tasks it is chosen on the last tenth of the training texts, and the held-out texts
are those of all rows. Nothing is drawn, so there are no seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from ablation import films, reading, run
from zsaa.data.tasks import load_task
from zsaa.evaluation.accuracy import tally
from zsaa.measure import cached, provenance

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
LEAST = 2  # texts that a word or pair must be in


def texts_of(task: str, settings: dict, part: str = "validation") -> tuple:
    """((training texts, labels), (held-out texts, labels), where from)"""
    if "films" in settings:
        (one, _), (other, source) = films.side("train"), films.side(part)
    elif "cut" in settings:
        data = load_task(settings.get("source", task))
        one, other = run._cut_anew(data, settings["cut"], settings["train"], settings["test"])
        source = f"{data.source}, cut anew"
    else:
        data = load_task(settings.get("source", task), train=settings["train"], test=settings["test"], seed=0)
        one, other, source = data.train, data.test, data.source
    return tuple((run.passages_of(side, settings)) for side in (one, other)) + (source,)


def fit(texts: list[str], labels: list[int], strength: float):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=LEAST, sublinear_tf=True)
    return make_pipeline(words, LogisticRegression(C=strength, max_iter=1000)).fit(texts, labels)


def choose(train: tuple, held_out: tuple) -> tuple[float, dict]:
    """(the best strength, accuracy of each)"""
    found = {c: 100 * fit(*train, c).score(*held_out) for c in STRENGTHS}
    return max(found, key=found.get), {f"{c:g}": round(accuracy, 2) for c, accuracy in found.items()}


def judge(model, texts: list[str], labels: list[int]) -> list[dict]:
    """The one row. macs_per_text: a multiply-accumulate for each word or pair of a text that the model knows; ms: the
    median of single texts, one after another."""
    right = (model.predict(texts) == np.array(labels)).astype(int).tolist()
    known, times = model[0].transform(texts), []
    for text in texts[:200]:
        began = time.perf_counter()
        model.predict([text])
        times.append(1000 * (time.perf_counter() - began))
    cost = {"macs_per_text": known.nnz / len(texts), "ms": round(statistics.median(times), 3)}
    return [{"control": "bag", "target": None, **cost, **tally(right)}]


def measure(task: str, output: Path) -> dict:
    settings = run.load_config()["tasks"][task]
    unit = {
        "row": "bag",
        "task": task,
        "data": settings,
        "strengths": STRENGTHS,
        "ablation": run._code("bags", "films"),
    }

    def compute() -> dict:
        began = time.perf_counter()
        train, held_out, source = texts_of(task, settings)
        clean, tenth = "films" in settings, len(train[0]) // 10
        tuned = (
            (train, held_out)
            if clean
            else tuple(tuple(x[s] for x in train) for s in (slice(-tenth), slice(-tenth, None)))
        )
        strength, tried = choose(*tuned)
        model, entry = fit(*train, strength), {}
        if clean:
            _, held_out, source = texts_of(task, settings, "test")
            weights = hashlib.sha256(model[1].coef_.tobytes()).hexdigest()
            entry = {"name": "bag", "row": "bag", "seed": None, "samples": len(held_out[0]), "chosen_from": tried,
                     "weights_sha256": weights, **{k: provenance()[k] for k in ("date", "commit")}}  # fmt: skip
            entry = {"reading": reading.note(output / task, entry, again=False)}
        return {
            "name": f"{task}-bag", "kind": "ablation", "row": "bag", "about": "TF-IDF, logistic regression",
            "model": {"name": "bag of words"}, "variant": {}, "training": {"strength": strength, "tried": tried},
            "task": {"name": task, "source": source, "substitute": True, "split": "test"}, **entry,
            "log": {"seconds": round(time.perf_counter() - began, 1), "words": len(model[0].vocabulary_)},
            "rows": judge(model, *held_out),
            "provenance": provenance(
                torch.device("cpu"), seed=None, train_samples=len(train[0]), eval_samples=len(held_out[0])
            ),
        }  # fmt: skip

    folder = output / task / "test" if "films" in settings else output / "bags"
    return cached(folder / ("bag.json" if "films" in settings else f"{task}.json"), unit, compute)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.bags", description=__doc__.split("\n")[0])
    parser.add_argument("--task", nargs="+", choices=list(run.load_config()["tasks"]), default=["imdb_films"])
    parser.add_argument("--output-dir", type=Path, default=run.RESULTS)
    options = parser.parse_args(arguments)
    for task in options.task:
        (row,) = measure(task, options.output_dir)["rows"]
        print(f"{task}: {row['accuracy']:.1f}% {row['ci95']}, {row['ms']:.2f} ms a text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
