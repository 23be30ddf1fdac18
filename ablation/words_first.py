"""A bag of words answers where it is sure, and the whole model, or its first layers, the rest: the plain rival of texts that
leave when a model is sure of them.

python -m ablation.words_first

Whom the rest is given to, and from which confidence on the bag's word counts, is chosen on the validation part for each
budget in MACs; then the test part says what that is worth, once, and the reading is noted. Nothing is trained but the
bag, on a CPU; what the models say of each review is in their committed results.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ablation import bags, films, reading, run
from ablation.variants import Variant, total_macs
from zsaa.data.tasks import tokenize
from zsaa.evaluation.accuracy import tally
from zsaa.kit.equal import right
from zsaa.measure import cached, provenance
from zsaa.models import load_model

TASK, NAME = "imdb_films", "words-first"
BUDGETS = (2.0, 3.0, 5.0, 7.0, 9.0, 11.0)
WHOLE = ("lora-conventional-crops-epochs1.5", "lora-conventional-crops-epochs3", "lora-cut-ends-epochs3")
LAYERS = tuple(f"layers-{n}-taught{seed}" for n in (15, 10, 6) for seed in ("", "-seed1", "-seed2"))


def answers(name: str, part: str, folder: Path) -> tuple[np.ndarray, float]:
    """(which reviews a model has right on whole texts, the share of all layers' MACs that it takes)"""
    path = folder / TASK / ("" if part == "validation" else part) / f"{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    row = next(
        r for r in rows if r["control"] in ("alpha", "layers") and (r["control"] == "layers" or r["target"] == 1)
    )
    return right(row), row.get("layers", 30) / 30


def macs(part: str) -> np.ndarray:
    """Of each review, by the whole model."""
    model, tokenizer = load_model("smollm2-135m", kind="sequence-classification", num_labels=2)
    lengths = [len(ids) for ids in tokenize(films.side(part)[0], tokenizer, 512)["input_ids"]]
    one = {n: total_macs(model.config, Counter([n]), 1.0, Variant()) for n in set(lengths)}
    return np.array([one[n] for n in lengths], dtype=float)


def together(bag, texts: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how sure the bag is of each text, .5 to 1; whether it is right)"""
    said = bag.predict_proba(texts)
    return said.max(1), said.argmax(1) == labels


def at(sure: float, confidence, easy, hard, share: float, costs) -> tuple[np.ndarray, float]:
    """(which reviews are right, the reduction of MACs) where texts that the bag is less than `sure` of go to a model."""
    asked = confidence < sure
    return np.where(asked, hard, easy).astype(int), costs.sum() / max(1.0, share * costs[asked].sum())


def choose(budget: float, confidence, easy, models: dict, costs) -> tuple[str, float, float]:
    """(model, confidence, accuracy) that are best on these texts among those that save `budget`."""
    found = []
    for name, (hard, share) in models.items():
        for sure in np.quantile(confidence, np.linspace(0, 1, 401)):
            correct, reduction = at(sure, confidence, easy, hard, share, costs)
            if reduction >= budget:
                found.append((correct.mean(), reduction, name, float(sure)))
    accuracy, _, name, sure = max(found)
    return name, sure, 100 * float(accuracy)


def measure(folder: Path) -> dict:
    unit = {"row": NAME, "task": TASK, "budgets": BUDGETS, "models": [*WHOLE, *LAYERS],
            "ablation": run._code("words_first", "bags", "films")}  # fmt: skip

    def compute() -> dict:
        began, settings = time.perf_counter(), run.load_config()["tasks"][TASK]
        strength = json.loads((folder / TASK / "test" / "bag.json").read_text())["training"]["strength"]
        train, held, _ = bags.texts_of(TASK, settings)
        bag = bags.fit(*train, strength)
        seen = together(bag, held[0], np.array(held[1])), macs("validation")
        models = {name: answers(name, "validation", folder) for name in (*WHOLE, *LAYERS)}
        ways = {budget: choose(budget, *seen[0], models, seen[1]) for budget in BUDGETS}
        _, other, source = bags.texts_of(TASK, settings, "test")
        chosen = {f"{b:g}x: {name}": round(accuracy, 2) for b, (name, _, accuracy) in ways.items()}
        entry = {"name": NAME, "row": NAME, "seed": None, "samples": len(other[0]), "chosen_from": chosen,
                 **{k: provenance()[k] for k in ("date", "commit")}}  # fmt: skip
        entry = {"reading": reading.note(folder / TASK, entry, again=False)}
        (confidence, easy), costs, rows = together(bag, other[0], np.array(other[1])), macs("test"), []
        for budget, (name, sure, accuracy) in ways.items():
            # every seed of the model that was chosen, by the confidence that was
            stem = name.split("-seed")[0]
            for one in [n for n in (*WHOLE, *LAYERS) if n.split("-seed")[0] == stem]:
                correct, reduction = at(sure, confidence, easy, *answers(one, "test", folder), costs)
                rows.append({"control": NAME, "target": budget, "asked": one, "sure": round(sure, 5),
                             "on_validation": round(accuracy, 2), "mac_reduction": round(float(reduction), 4),
                             **tally(correct.tolist())})  # fmt: skip
        return {
            "name": f"{TASK}-{NAME}", "kind": "ablation", "row": NAME,
            "about": "a bag of words where it is sure, else the model, or its first layers, distilled",
            "model": {"name": "bag of words, smollm2-135m"}, "variant": {}, "training": {"strength": strength},
            "task": {"name": TASK, "source": source, "substitute": True, "split": "test"}, **entry,
            "log": {"seconds": round(time.perf_counter() - began, 1)}, "rows": rows,
            "provenance": provenance(
                torch.device("cpu"), seed=None, train_samples=len(train[0]), eval_samples=len(other[0])
            ),
        }  # fmt: skip

    return cached(folder / TASK / "test" / f"{NAME}.json", unit, compute)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.words_first", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=run.RESULTS)
    for row in measure(parser.parse_args(arguments).output_dir)["rows"]:
        print(f"{row['target']:g}x, {row['mac_reduction']:.2f}x: {row['accuracy']}% (validation "
              f"{row['on_validation']}%), the rest by {row['asked']}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
