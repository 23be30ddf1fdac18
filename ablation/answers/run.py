"""The rows of the study, one process each, on one card.

    python -m ablation.answers.run convert model.gguf WORK     # the model's weights, once
    python -m ablation.answers.run teach WORK DATA d0 words    # scorers, one after the other
    python -m ablation.answers.run row WORK DATA once          # train a row and judge it
    python -m ablation.answers.run controls WORK DATA reference lexical bm25

Records go to WORK/results as they come, one JSON object a line; processes wait for the files that they need.
TINY=1: a rehearsal on a tiny random model. UNTIL: when the machine goes, in seconds since 1970; TRAIN_SECONDS: the
longest that a row may train.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ablation.answers import judge, teach
from ablation.answers.data import Data
from ablation.answers.model import adapt, adapters, convert, load, merge
from ablation.answers.train import Dial, Row, fit

# name: (layers below, width of its learned part, chunk, target, weight of the target, of the answer's place)
SCORERS = {
    "d0": (0, 128, 32, "answer", 1.0, 1.0),
    "d2": (2, 128, 32, "answer", 1.0, 1.0),
    "words": (0, 0, 32, "answer", 1.0, 1.0),
    "c16": (0, 128, 16, "answer", 1.0, 1.0),
    "d0-place": (0, 128, 32, "answer", 0.0, 1.0),
    "d0-line": (0, 128, 32, "line", 1.0, 0.0),
    "d0-answer": (0, 128, 32, "answer", 1.0, 0.0),
    "d0-gradient": (0, 128, 32, "gradient", 1.0, 0.0),
}
ROWS = [
    Row("reference", "conventional"),
    Row("cuts", "cuts"),
    Row("once", "dial", "once", "d0"),
    Row("rising", "dial", "rising", "d0"),
    Row("once-c16", "dial", "once", "c16"),
    Row("once2", "dial", "once2", "d2"),
    Row("once-words", "dial", "once", "words"),
    Row("once-whole", "dial", "once", "d0", whole=True),
    Row("leave", "dial", "leave", "d0"),
    Row("once-seed1", "dial", "once", "d0", seed=1),
    Row("rising-seed1", "dial", "rising", "d0", seed=1),
]
PASSAGES = (3, 1)
JUDGING, SHORTEST = 150, 150  # seconds left for judging a row, and worth starting to train in


class Work:
    """A folder for weights, scorers, adapters and results; and what a rehearsal makes smaller."""

    def __init__(self, folder: str, data: str):
        self.folder, self.data = Path(folder), Data(data)
        self.tiny = os.environ.get("TINY") == "1"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.until = float(os.environ.get("UNTIL", "inf"))  # when the machine goes, in seconds since 1970
        if self.tiny:
            self.data.shorten(60)
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(2)

    def model(self):
        return load("tiny", self.device) if self.tiny else load(self.wait("model", "done").parent, self.device)

    def wait(self, *path: str) -> Path:
        """A file that another process writes."""
        while not self.folder.joinpath(*path).exists():
            if time.time() > self.until:
                raise SystemExit(f"{Path(*path)} did not come in time.")
            time.sleep(0.5)
        return self.folder.joinpath(*path)

    def log(self, name: str, **record) -> None:
        with open(self.folder / "results" / f"{name}.jsonl", "a") as file:
            file.write(json.dumps({"name": name, "time": round(time.time()), **record}) + "\n")
        print(name, {k: v for k, v in record.items() if k not in ("ems", "f1s")}, flush=True)

    def save(self, value, *path: str) -> None:
        target = self.folder.joinpath(*path)
        torch.save(value, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").rename(target)

    def scorer(self, name: str, states: int):
        _, width, chunk, *_ = SCORERS[name]
        scorer = teach.build(self.data, states, width, chunk, self.device)
        scorer.load_state_dict(torch.load(self.wait(f"scorer-{name}.pt"), map_location=self.device))
        return scorer.eval()


def run_teach(work: Work, names: list[str]) -> None:
    """Scorers by name; the lessons of a target are computed once, by whoever comes first in this process."""
    lm, data, pupils = work.model().requires_grad_(False), work.data, {}
    turns = data.questions("train")[: 4 if work.tiny else None]
    for name in names:
        depth, width, chunk, target, told, gold = SCORERS[name]
        if target not in pupils:
            began = time.time()
            asked = "answer" if target == "gradient" else target
            heads = teach.find_heads(lm, data, asked, work.device, 4 if work.tiny else 256)
            draws = ((3, 1), (3, 2), (1, 3))  # passages, seed
            lots = [teach.lessons(lm, data, target, turns, k, s, work.device, heads) for k, s in draws]
            pupils[target] = [p for lot in lots for p in lot]
            work.log(f"scorer-{name}", heads=str(heads), lessons=len(pupils[target]), seconds=time.time() - began)
        torch.manual_seed(0)
        scorer = teach.build(data, lm.config.hidden_size, width, chunk, work.device)
        report(work, lm, name, scorer, "before")
        steps = 3 if work.tiny else 1500
        limit = 4 if work.tiny else 400

        def judged(s, depth=depth, limit=limit):
            found = [teach.recall(s, lm, depth, data, "validation", k, work.device, limit) for k in PASSAGES]
            return sum(sum(r[str(f)] for f in teach.FACTORS) for r in found) / 2 / len(teach.FACTORS)

        teach.teach(scorer, lm, depth, pupils[target], steps, work.device,
                    lambda name=name, **r: work.log(f"scorer-{name}", **r), gold, told, judged)  # fmt: skip
        work.save(scorer.state_dict(), f"scorer-{name}.pt")
        report(work, lm, name, scorer, "after")


def report(work: Work, lm, name: str, scorer, when: str) -> None:
    for passages in PASSAGES:
        for split in ("validation",) if when == "before" else ("train", "validation", "test", "squad"):
            limit = 4 if work.tiny else 400
            found = teach.recall(scorer, lm, SCORERS[name][0], work.data, split, passages, work.device, limit)
            work.log(f"scorer-{name}", when=when, split=split, passages=passages, recall=found)


def run_row(work: Work, name: str) -> None:
    row = next(r for r in ROWS if r.name == name)
    lm = work.model()
    scorer = work.scorer(row.scorer, lm.config.hidden_size) if row.scorer else None
    seconds = min(float(os.environ.get("TRAIN_SECONDS", "400")), work.until - time.time() - JUDGING)
    if seconds < SHORTEST:
        return work.log(name, skipped=f"{seconds:.0f} s are left to train in")
    row = replace(row, size=4) if work.tiny else row
    fit(row, lm, scorer, work.data, work.device, lambda **r: work.log(name, **r), seconds, 2 if work.tiny else None)
    work.save({"adapters": adapters(lm), "row": name, "scorer": row.scorer}, f"adapter-{name}.pt")
    merge(lm)
    dial = Dial(row, scorer, lm.config) if scorer is not None else None
    for split, limit in (("validation", 200), ("test", 600)):
        sweep(work, lm, name, split, limit, dial)
    for split in ("squad", "drop"):
        sweep(work, lm, name, split, 300, dial, (1.0, 3.0, 5.0))


def sweep(work: Work, lm, name: str, split: str, limit: int, dial, reductions=(1.0, *judge.REDUCTIONS)) -> None:
    for passages in PASSAGES:
        samples = judge.samples_of(work.data, split, passages, 2 if work.tiny else limit)
        for reduction in reductions if dial else (1.0,):
            if time.time() > work.until:
                return
            record = judge.judged(lm, samples, work.data, work.device, dial, reduction, bool(dial and dial.row.whole))
            work.log(name, split=split, passages=passages, reduction=reduction, what="dial", **record)


def run_controls(work: Work, name: str, kinds: list[str]) -> None:
    """Prompts cut on a trained row's model. Kinds as in controls.KINDS, "learned", and "dial:ROW": that row's dial,
    for which this model was not trained."""
    lm = work.model()
    saved = torch.load(work.wait(f"adapter-{name}.pt"), map_location=work.device)["adapters"]
    adapt(lm)
    lm.load_state_dict({k: v.float() for k, v in saved.items()}, strict=False)
    merge(lm)
    plan = [("test", 600, judge.REDUCTIONS), ("squad", 300, (3.0, 5.0)), ("drop", 300, (3.0, 5.0))]
    for split, limit, reductions in plan:
        for kind in kinds:
            for passages in PASSAGES:
                samples = judge.samples_of(work.data, split, passages, 2 if work.tiny else limit)
                for reduction in reductions:
                    if time.time() > work.until:
                        return
                    record = one(work, lm, samples, kind, reduction)
                    work.log(f"{name}-{kind.replace(':', '-')}", split=split, passages=passages,
                             reduction=reduction, what=kind, **record)  # fmt: skip


def one(work: Work, lm, samples, kind: str, reduction: float) -> dict:
    if kind.startswith("dial:"):
        row = next(r for r in ROWS if r.name == kind[5:])
        dial = Dial(row, work.scorer(row.scorer, lm.config.hidden_size), lm.config)
        return judge.judged(lm, samples, work.data, work.device, dial, reduction, row.whole)
    if kind != "learned":
        return judge.shortened(lm, judge.picked(samples, kind, work.data), work.data, work.device, reduction)
    scorer = work.scorer("d0", lm.config.hidden_size)
    plan = judge.picked(
        samples, kind, work.data, judge.chunk_scores(lm, scorer, samples, work.device), scorer.shape.chunk
    )
    prices = [scorer.macs(len(s.body + s.older + s.last), judge.length(s) - len(s.body)) for s in samples]
    return judge.shortened(lm, plan, work.data, work.device, reduction, prices)


def main() -> None:
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "convert":
        convert(rest[0], Path(rest[1], "model"))
        Path(rest[1], "model", "done").touch()
        return
    work, rest = Work(rest[0], rest[1]), rest[2:]
    if what == "teach":
        run_teach(work, rest)
    elif what == "row":
        run_row(work, rest[0])
    elif what == "controls":
        run_controls(work, rest[0], rest[1:])
    else:
        raise SystemExit(f"{what!r} is none of convert, teach, row, controls.")


if __name__ == "__main__":
    main()
