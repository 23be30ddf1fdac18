"""A bag of words answers where it is sure, and the whole model, or its first layers, the rest: the plain rival of
texts that leave when a model is sure of them.

python -m ablation.words_first --choose      (who is asked, and from which confidence on, by the validation part)
python -m ablation.words_first               (and what that is worth on the test part)

Two ways: the rest goes to a model without a dial (all layers, or the first of them, distilled), or to the model that
was trained for both dials, of fewer tokens. Which of these, and from which confidence on the bag counts, is chosen on
the validation part for each budget in MACs; then the test part says what that is worth, once, and the reading is
noted. Nothing is trained but the bag, on a CPU; what the models say of each review is in their committed results, and
of the model itself only the configuration and the tokenizer are asked.
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
from zsaa.kit.store import RESULTS
from zsaa.measure import cached, provenance
from zsaa.models import load_model

TASK, NAME = "imdb_films", "words-first"
BUDGETS = (2.0, 3.0, 5.0, 7.0, 9.0, 11.0)
PLAIN = ("lora-conventional-crops-epochs1.5", "lora-conventional-crops-epochs3", "lora-cut-ends-epochs3",
         "layers-15-taught", "layers-10-taught", "layers-6-taught")  # fmt: skip
DIALS = ("exits-first-seconds520",)  # results/depth/films; at each of its reductions
Answers = dict[
    tuple[str, float], tuple[np.ndarray, np.ndarray]
]  # (result, reduction) -> (right?, MACs), of each review


def seeds_of(name: str) -> list[str]:
    """A result and those of its other seeds that were read."""
    stem, dash, seconds = name.partition("-seconds")
    names = [name, *(f"{stem}-seed{seed}{dash}{seconds}" for seed in (1, 2))]
    return [one for one in names if _path(one, "test").is_file()]


def _path(name: str, part: str) -> Path:
    folder = RESULTS / "depth" / "films" if name.startswith("exits") else RESULTS / "ablation" / TASK
    return folder / ("" if part == "validation" else part) / f"{name}.json"


def answers(names: list[str], part: str, config, tokenizer) -> Answers:
    """What models say of whole reviews, and under the dial of tokens at each of its reductions."""
    lengths = [len(ids) for ids in tokenize(films.side(part)[0], tokenizer, 512)["input_ids"]]

    def macs(alpha: float, rule: Variant) -> np.ndarray:
        one = {n: total_macs(config, Counter([n]), alpha, rule) for n in set(lengths)}
        return np.array([one[n] for n in lengths], dtype=float)

    found, whole = {}, macs(1.0, Variant())
    for name in names:
        result = json.loads(_path(name, part).read_text(encoding="utf-8"))
        rule = Variant(**result["variant"])
        for row in result["rows"]:
            if name.startswith("exits") and row["control"] == "alpha":
                found[name, float(row["target"])] = right(row), macs(row["alpha"], rule)
            elif not name.startswith("exits") and (row["control"] == "layers" or row["mac_reduction"] == 1):
                found[name, 1.0] = right(row), whole * row.get("layers", 30) / 30
    return {**found, ("all layers", 1.0): (np.ones(len(lengths)), whole)}


def together(bag, texts: list[str], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(how sure the bag is of each text, .5 to 1; whether it is right)"""
    said = bag.predict_proba(texts)
    return said.max(1), said.argmax(1) == labels


def at(sure: float, confidence, easy, hard, costs, whole) -> tuple[np.ndarray, float]:
    """(which reviews are right, the reduction of MACs) where a model gets the texts that the bag is less sure of."""
    asked = confidence < sure
    return np.where(asked, hard, easy).astype(int), whole.sum() / max(1.0, costs[asked].sum())


def choose(budget: float, confidence, easy, models: Answers) -> tuple[tuple[str, float], float, float]:
    """(model, confidence, accuracy) that are best on these texts among those that save `budget`, by the mean of a
    model's seeds."""
    found, (_, whole) = [], models["all layers", 1.0]
    for name, tokens in models:
        if name in (*PLAIN, *DIALS):
            for sure in np.quantile(confidence, np.linspace(0, 1, 401)):
                each = [at(sure, confidence, easy, *models[one, tokens], whole) for one in seeds_of(name)]
                if min(reduction for _, reduction in each) >= budget:
                    found.append((np.mean([correct.mean() for correct, _ in each]), (name, tokens), float(sure)))
    accuracy, key, sure = max(found)
    return key, sure, 100 * float(accuracy)


def ways(bag, held: tuple[list[str], list[int]], config, tokenizer) -> dict[tuple[str, float], tuple]:
    """Of each way to go on and each budget the choice on the validation part `held`: see `choose`."""
    known, found = together(bag, held[0], np.array(held[1])), {}
    for control, names in (("words-first", PLAIN), ("words-first-dial", DIALS)):
        models = answers([one for name in names for one in seeds_of(name)], "validation", config, tokenizer)
        found |= {(control, budget): choose(budget, *known, models) for budget in BUDGETS}
    return found


def prepared() -> tuple:
    """(the bag, training texts, validation texts, configuration and tokenizer of the model)"""
    strength = json.loads(_path("bag", "test").read_text(encoding="utf-8"))["training"]["strength"]
    train, held, _ = bags.texts_of(TASK, run.load_config()["tasks"][TASK])
    model, tokenizer = load_model("smollm2-135m", kind="sequence-classification", num_labels=2)
    return bags.fit(*train, strength), train, held, model.config, tokenizer


def measure(folder: Path) -> dict:
    unit = {"row": NAME, "task": TASK, "budgets": BUDGETS, "models": [*PLAIN, *DIALS],
            "ablation": run._code("words_first", "bags", "films")}  # fmt: skip

    def compute() -> dict:
        began = time.perf_counter()
        bag, train, held, *asked = prepared()
        taken = ways(bag, held, *asked)
        _, other, source = bags.texts_of(TASK, run.load_config()["tasks"][TASK], "test")
        chosen = {
            f"{way} {budget:g}x: {key[0]}": round(accuracy, 2) for (way, budget), (key, _, accuracy) in taken.items()
        }
        entry = {"name": NAME, "row": NAME, "seed": None, "samples": len(other[0]), "chosen_from": chosen,
                 **{k: provenance()[k] for k in ("date", "commit")}}  # fmt: skip
        entry = {"reading": reading.note(folder / TASK, entry, again=False)}
        (confidence, easy), rows = together(bag, other[0], np.array(other[1])), []
        models = answers(sorted({one for key, *_ in taken.values() for one in seeds_of(key[0])}), "test", *asked)
        for (control, budget), ((name, reduction), sure, accuracy) in taken.items():
            for one in seeds_of(name):
                correct, saved = at(sure, confidence, easy, *models[one, reduction], models["all layers", 1.0][1])
                rows.append({"control": control, "target": budget, "asked": one, "tokens": reduction,
                             "sure": round(sure, 5), "on_validation": round(accuracy, 2),
                             "mac_reduction": round(float(saved), 4), **tally(correct.tolist())})  # fmt: skip
        return {
            "name": f"{TASK}-{NAME}", "kind": "ablation", "row": NAME,
            "about": "a bag of words where it is sure, and else a model",
            "model": {"name": "bag of words, smollm2-135m"}, "variant": {}, "training": {"strength": bag[-1].C},
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
    parser.add_argument("--choose", action="store_true", help="choose on the validation part, and read no other")
    options = parser.parse_args(arguments)
    if options.choose:
        bag, _, held, *asked = prepared()
        for (control, budget), ((name, tokens), sure, accuracy) in ways(bag, held, *asked).items():
            print(f"{control}, {budget:g}x: {accuracy:.2f}% on validation, below {sure:.5f} by {name} at {tokens:g}x")
        return 0
    for row in measure(options.output_dir)["rows"]:
        print(f"{row['target']:g}x, {row['mac_reduction']:.2f}x: {row['accuracy']}% (validation "
              f"{row['on_validation']}%), the rest by {row['asked']} at {row['tokens']:g}x")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
