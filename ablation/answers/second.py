"""The second study of answers, one process a line, on one card; processes wait for the files that they need.

    python -m ablation.answers.second lessons                       # what retrieval heads look at, once
    python -m ablation.answers.second writer                        # questions that a model writes, and the same
    python -m ablation.answers.second scorers s24 c16               # scorers, one after the other
    python -m ablation.answers.second row plain-0                   # train a row
    python -m ablation.answers.second judge plain-0 validation bm25-all dial:s24   # one plan, kind after kind
    python -m ablation.answers.second kept s16-also.0 16            # needles that a dial leaves, so many a depth

Environment: DATA, the data; WORK, a folder for weights; GIVEN, one with weights that were made before; RESULTS, a
folder for records, one JSON object a line, as they come; DEADLINE, when the machine goes, in seconds since 1970;
SCORER, in place of a row's own, where that was not kept. TINY=1: a rehearsal on a tiny random model; TINY=2: on a few
samples by the real one.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from ablation.answers import controls, judge, model, school, teach, writer
from ablation.answers.data import Data, Sample
from ablation.answers.school import School
from ablation.answers.train import Dial, Row, fit

PLAIN = School(bm25=False, sentences=False, chunk=16)
SCORERS = {
    "c16": PLAIN,
    "c16-bm25": School(sentences=False, chunk=16),
    "s16": School(chunk=16),
    "s24": School(chunk=24),
    "s32": School(chunk=32),
    "s24-plain": School(chunk=24, bm25=False),
    "s24-words": School(chunk=24, width=0),
    "s24-drop": School(chunk=24, drop_asks=0.1, drop_words=0.15),
    "s24-dropout": School(chunk=24, dropout=0.3),
    "s24-sciq": School(chunk=24, also=("sciq",)),
    "s24-boolq": School(chunk=24, also=("sciq", "boolq")),
    "s24-wide": School(chunk=24, width=256, heads=8),
    "s24-heads": School(chunk=24, heads=8),
    "s24-gold": School(chunk=24, gold=3.0),
    "s24-told": School(chunk=24, gold=0.3),
    "s24-slow": School(chunk=24, rate=4e-4, steps=1500),
    "s24-decay": School(chunk=24, decay=0.5),
    "s24-narrow": School(chunk=24, width=64),
    "s16-drop": School(chunk=16, drop_asks=0.1, drop_words=0.15),
    # What the lease of these told on validation, put together: short sentences, more heads, more questions, no BM25.
    "s16-also": School(chunk=16, bm25=False, heads=8, also=("sciq", "boolq"), steps=1500),
    "s16-written": School(chunk=16, bm25=False, heads=8, also=("sciq", "boolq", "written"), steps=2000),
}
SHIPPED = "s16-also"  # the scorer of the rows
STEPS = {"conventional": 380, "with": 150, "drawn": 450}  # "more" of a conventional row: as "with"; "more4": "drawn"
SEEDS = (0, 1, 2)
RIVAL = ("bm25-all", "bm25-all", "bm25", "bm25-all-line")  # half of one, a quarter of each other


def rows_of(seed: int) -> list[Row]:
    """plain: conventional tuning. From there, as many steps again: more of it; or with a short pass in each step, of
    the dial's own choice or of prompts that rivals cut."""
    on = {"seed": seed, "rank": 8, "start": f"plain-{seed}", "rate": 2e-4}
    return [
        Row(f"plain-{seed}", "conventional", seed=seed, rank=8),
        Row(f"more-{seed}", "conventional", **on),
        Row(f"dial-{seed}", "with dial", "once", f"{SHIPPED}.{seed}", **on),
        Row(f"cuts-{seed}", "with cuts", **on),
        # The third study: one pass a step, short ones five times of six, so that there are more steps for the time. The
        # higher rate was better on validation.
        Row(f"tuned-{seed}", "drawn dial", "once", f"{SHIPPED}.{seed}", **on),
        Row(f"tuned4-{seed}", "drawn dial", "once", f"{SHIPPED}.{seed}", **on | {"rate": 4e-4}),
        Row(f"chunks4-{seed}", "drawn dial", "once", f"c16.{seed}", **on | {"rate": 4e-4}),
        Row(f"more4-{seed}", "conventional", **on | {"rate": 4e-4}),  # as many steps as these, all at alpha = 1
        Row(f"rival-{seed}", "drawn cuts", cuts=RIVAL, **on),
        Row(f"rival4-{seed}", "drawn cuts", cuts=RIVAL, **on | {"rate": 4e-4}),
        Row(f"lexical4-{seed}", "drawn cuts", cuts=("lexical-all", "lexical-16"), **on | {"rate": 4e-4}),
        Row(f"last4-{seed}", "drawn cuts", cuts=("last",), **on | {"rate": 4e-4}),
    ]


ROWS = {row.name: row for seed in SEEDS for row in rows_of(seed)}
ALL, FEW = judge.REDUCTIONS, (3.0, 5.0, 11.0)
# split, passages, questions at most, reductions
PLANS = {
    "whole": [("validation", (1, 3), 400, (1.0,))],
    "validation": [("validation", (1, 3), 400, ALL)],
    "test": [("test", (1, 3), 1000, ALL)],
    "test-1": [("test", (1,), 1000, ALL)],
    "test-3": [("test", (3,), 1000, ALL)],
    "transfer": [("squad", (1, 3), 983, FEW), ("drop", (1, 3), 978, FEW)],
    "papers": [("qasper", (1,), 147, FEW)],
    "long": [("test", (2, 4, 8, 16), 400, FEW)],
    "needles": [("needles", (1024, 2048, 4096, 7680), 240, FEW)],
}
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
LIMIT = 10  # seconds that a record may take beyond the deadline


class Work:
    def __init__(self):
        self.folder, self.results = Path(os.environ["WORK"]), Path(os.environ["RESULTS"])
        self.data, self.tiny = Data(os.environ["DATA"]), os.environ.get("TINY", "")
        self.until = float(os.environ.get("DEADLINE", "inf"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.began = time.time()
        if self.tiny == "1":
            self.data.shorten(60)
        for folder in (self.folder, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(2)

    def model(self):
        if self.tiny == "1":
            return model.load("tiny", self.device)
        from zsaa.models import load_model

        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        return load_model("smollm2-135m", dtype=dtype, device=self.device)[0].eval().requires_grad_(False)

    def tuned(self, name: str):
        """The model of a row, its adapters merged; "base": as it came."""
        lm = self.model()
        if name != "base":
            model.adapt(lm, rank=ROWS[name].rank)
            saved = torch.load(self.wait(f"adapter-{name}.pt"), map_location=self.device)
            lm.load_state_dict({k: v.float() for k, v in saved.items()}, strict=False)
            model.merge(lm)
        return lm

    def wait(self, name: str) -> Path:
        """A file that was brought along, or that another process writes."""
        given = Path(os.environ.get("GIVEN", "."), name)
        if given.exists():
            return given
        while not (self.folder / name).exists():
            if time.time() > self.until:
                raise SystemExit(f"{name} did not come in time.")
            time.sleep(0.5)
        return self.folder / name

    def save(self, value, name: str) -> None:
        target = self.folder / name
        torch.save(value, target.with_suffix(".tmp"))
        target.with_suffix(".tmp").rename(target)

    def log(self, file: str, **record) -> None:
        with open(self.results / f"answers-{file}.jsonl", "a") as out:
            out.write(json.dumps({"time": round(time.time()), **record}) + "\n")
        print(round(time.time() - self.began), file, {k: v for k, v in record.items() if k not in ("ems", "f1s")},
              flush=True)  # fmt: skip

    def scorer(self, name: str):
        path = self.wait(f"scorer-{name}.pt")
        return scorer_of(path, self.data, 32 if self.tiny == "1" else 576, self.device)


def scorer_of(path: Path, data: Data, states: int, device):
    """A scorer from its file, scorer-NAME.pt."""
    scorer = how_of(path.stem.split("scorer-", 1)[1]).build(data, states, device)
    saved = torch.load(path, map_location=device)
    found = scorer.load_state_dict({k: v.float() for k, v in saved.items()}, strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"canon", "idf", "marks"}:
        raise ValueError(f"{path} is of another school: {found}.")
    return scorer.eval().requires_grad_(False)


def how_of(name: str) -> School:
    """A scorer's school; NAME.2 is that of NAME with seed 2."""
    plain, _, seed = name.partition(".")
    return replace(SCORERS[plain], seed=int(seed or 0))


def lessons(work: Work) -> None:
    lm, data = work.model(), work.data
    heads = teach.find_heads(lm, data, "answer", work.device, 4 if work.tiny else 256)
    work.save(heads, "lessons-heads.pt")
    for split in ("train", "sciq", "boolq"):
        turns = data.questions(split)[: 8 if work.tiny else None]
        found = school.shares(lm, data, turns, heads, work.device)
        work.save(found, f"lessons-{split}.pt")
        work.log("lessons", split=split, turns=len(found), heads=str(heads), seconds=round(time.time() - work.began))


def written(work: Work) -> None:
    """Questions behind passages that have none, or others; and what retrieval heads look at then."""
    lm, data = work.model(), work.data
    writer.learn(lm, data, work.device, lambda **r: work.log("writer", **r), 2 if work.tiny else 160)
    model.merge(lm)
    most = 4 if work.tiny else 3000
    stories = [i for split in ("boolq", "lambada", "sciq") for i in data.pools[split][:most]]
    found = writer.write(lm, data, stories, work.device)
    some = [data.text(t["line"]) + data.text(t["answer"]) for t in found[:: max(1, len(found) // 30)]]
    work.log("writer", turns=len(found), seconds=round(time.time() - work.began), some=some)
    work.save(found, "written.pt")
    del lm
    heads = torch.load(work.wait("lessons-heads.pt"))
    first = len(data.turns)
    data.turns += found
    shares = school.shares(work.model(), data, [*range(first, len(data.turns))], heads, work.device)
    work.save(shares, "lessons-written.pt")
    work.log("writer", lessons=len(shares), seconds=round(time.time() - work.began))


def scorers(work: Work, names: list[str]) -> None:
    lm, data = work.model(), work.data
    embed = lm.model.embed_tokens
    parts = {k: judge.samples_of(data, "validation", k, 4 if work.tiny else None) for k in (1, 3)}
    more = False
    for name in names:
        if time.time() > work.until - 40:
            return
        how, began = how_of(name), time.time()
        how = replace(how, steps=3, size=4) if work.tiny else how
        found = {}
        for split in ("train", *how.also):
            found |= torch.load(work.wait(f"lessons-{split}.pt"))
            if split == "written" and not more:
                more = True
                data.turns += torch.load(work.wait("written.pt"))
        torch.manual_seed(how.seed)
        scorer = how.build(data, lm.config.hidden_size, work.device)

        def held(scorer) -> dict:
            dial = Dial(Row("", "dial", "once"), scorer, lm.config)
            return {k: judge.held(lm, dial, part, work.device) for k, part in parts.items()}

        def judged(scorer) -> float:
            return round(float(np.mean([v for shares in held(scorer).values() for v in shares.values()])), 3)

        def log(name=name, **record):
            work.log("scorers", name=name, **record)

        worth = school.run(scorer, embed, data, found, how, work.device, log, judged)
        small = {k: v.half().cpu() for k, v in scorer.state_dict().items() if k not in ("canon", "idf", "marks")}
        work.save(small, f"scorer-{name}.pt")
        torch.save(small, work.results / f"answers-scorer-{name}.pt")
        log(school=asdict(how), best=worth, held=held(scorer), seconds=round(time.time() - began),
            lessons=len(found), macs_of_1000=scorer.macs(960, 40))  # fmt: skip


def row(work: Work, name: str) -> None:
    row, lm = ROWS[name], work.model()
    row = replace(row, scorer=os.environ.get("SCORER", row.scorer)) if row.scorer else row
    scorer = work.scorer(row.scorer) if row.scorer else None
    begin = torch.load(work.wait(f"adapter-{row.start}.pt"), map_location=work.device) if row.start else None
    tag = os.environ.get("TAG", "")  # of a trial
    kind = row.method.partition(" ")[0]
    again = "drawn" if name.startswith("more4") else "with"
    steps = int(os.environ.get("STEPS", STEPS[again if row.start and kind == "conventional" else kind]))
    seconds = min(float(os.environ.get("SECONDS_AT_MOST", "inf")), work.until - time.time() - 30)
    row = replace(row, size=4) if work.tiny else row
    done = fit(row, lm, scorer, work.data, work.device, lambda **r: work.log(f"row-{name}{tag}", **r), seconds,
               2 if work.tiny else steps, begin=begin)  # fmt: skip
    saved = model.adapters(lm)
    work.save(saved, f"adapter-{name}{tag}.pt")
    work.log(f"row-{name}{tag}", done=done, steps=steps, row=asdict(row), seconds=round(time.time() - work.began))
    if name in os.environ.get("SHIP", "").split():
        torch.save(saved, work.results / f"answers-adapter-{name}.pt")
    if tag:
        whole(work, lm, name + tag)


def whole(work: Work, lm, name: str) -> None:
    """A trial's validation at alpha = 1, while the adapters are still beside the layers."""
    for k in (1, 3):
        part = judge.samples_of(work.data, "validation", k, 2 if work.tiny else 400)
        work.log(f"row-{name}", split="validation", passages=k, reduction=1.0,
                 **judge.judged(lm, part, work.data, work.device))  # fmt: skip


def needle(data: Data, number: int, tokens: int, depth: float) -> Sample:
    """A needle at a depth of so many tokens of test stories, between two sentences."""
    rng, want = random.Random(f"needle-{number}-{tokens}-{depth}"), data.needles[number % len(data.needles)]
    stories, body = rng.sample(data.pools["test"], len(data.pools["test"])), []
    for story in stories:
        room = tokens - len(body) - len(want["says"])
        if room <= 0:
            break
        body += (data.pre + data.stories[story] + data.sep)[:room]
    bounds = [0, *(b for _, b in controls.sentences(body, data))]
    at = min(bounds[1:-1] or bounds, key=lambda b: abs(b - depth * len(body)))
    gold = (at, at + len(want["says"]) - 1)
    return Sample((*body[:at], *want["says"], *body[at:]), (), (), tuple(want["line"]), (), gold,
                  tuple(want["references"]))  # fmt: skip


def samples_of(data: Data, split: str, passages: int, limit: int) -> list[Sample]:
    """passages: of needles, the tokens of the prompt without its question."""
    if split == "needles":
        each = range(max(1, limit // len(DEPTHS)))
        return [needle(data, n, passages, depth) for depth in DEPTHS for n in each]
    return judge.samples_of(data, split, passages, limit)


def judge_kinds(work: Work, name: str, plan: str, kinds: list[str]) -> None:
    """Kinds: "whole", those of controls.WAYS, "dial:SCORER", or "dial:close:SCORER", numbered anew."""
    lm = work.tuned(name)
    for kind in kinds:
        dial, close = None, kind.startswith("dial:close:")
        if kind.startswith("dial:"):
            scorer = work.scorer(kind.rsplit(":", 1)[1])
            dial = Dial(Row("", "dial", "once"), scorer, lm.config, close)
        for split, passages, limit, reductions in PLANS[plan]:
            for k in passages[: 1 if work.tiny else None]:
                samples, ready = samples_of(work.data, split, k, 2 if work.tiny else limit), None
                for reduction in (1.0,) if kind == "whole" else reductions[: 1 if work.tiny else None]:
                    if time.time() > work.until - LIMIT:
                        return
                    if dial is None and kind != "whole" and ready is None:
                        ready = prepared(work, lm, samples, kind, f"{split}-{k}")
                    if ready is not None:
                        record = judge.shortened(lm, ready[0], work.data, work.device, reduction, ready[1])
                    else:
                        record = judge.judged(lm, samples, work.data, work.device, dial, reduction)
                    work.log(f"{name}.{kind.replace(':', '-')}", model=name, kind=kind, split=split, passages=k,
                             reduction=reduction, **record)  # fmt: skip


def kept(work: Work, name: str, each: int) -> None:
    """How many of so many needles a depth a dial leaves in the prompt; the model is not asked."""
    lm = work.model()
    dial = Dial(Row("", "dial", "once"), work.scorer(name), lm.config)
    for _, lengths, limit, _ in PLANS["needles"]:
        for tokens in lengths[: 1 if work.tiny else None]:
            samples, all_ = samples_of(work.data, "needles", tokens, limit), limit // len(DEPTHS)
            for number, depth in enumerate(DEPTHS):
                some = samples[number * all_ : number * all_ + each]
                found = judge.held(lm, dial, some, work.device, ALL, tokens=16_000)
                work.log("kept", scorer=name, tokens=tokens, depth=depth, n=len(some), held=found)


def prepared(work: Work, lm, samples: list[Sample], kind: str, cell: str):
    """The order in which a control picks, and what choosing costs in each sample."""
    worth, prices = None, None
    plain = kind.removesuffix("-free")
    if plain == "minilm":
        given = np.load(os.environ["MINILM"])
        sizes = [len(controls.sentences(s.body + s.older + s.last, work.data)) for s in samples]
        flat = given[cell].astype(float)
        worth = [part.tolist() for part in np.split(flat[: sum(sizes)], np.cumsum(sizes)[:-1])]
        prices = given[f"{cell}-macs"].tolist()[: len(samples)] if plain == kind else None
    elif plain == "perplexity":
        worth = surprise(lm, samples, work.device)
    return judge.picked(samples, plain, work.data, worth), prices


@torch.no_grad()
def surprise(lm, samples: list[Sample], device) -> list[list[float]]:
    """Of each token of the region: how little this very model expected it. A pass of the model costs what there is to
    save, so it is not counted: a favour."""
    out: list[list[float]] = [[] for _ in samples]
    for lot in judge.lots(samples, 16_000, 64):
        b = judge.batch([samples[i] for i in lot], device, answers=False)
        with teach.mixed(device):
            x = judge.read(lm, b).x
            for row, i in enumerate(lot):
                n = int(b.region[row])
                logs = lm.lm_head(x[row, : n - 1]).float().log_softmax(-1)
                seen = -logs.gather(1, b.ids[row, 1:n, None])[:, 0]
                out[i] = [99.0, *seen.tolist()]
    return out


def main() -> None:
    from zsaa.measure.origin import provenance

    what, rest, work = sys.argv[1], sys.argv[2:], Work()
    work.log("origin", command=sys.argv[1:], provenance=provenance())
    if what == "lessons":
        lessons(work)
    elif what == "writer":
        written(work)
    elif what == "scorers":
        scorers(work, rest)
    elif what == "row":
        row(work, rest[0])
    elif what == "judge":
        judge_kinds(work, rest[0], rest[1], rest[2:])
    elif what == "kept":
        kept(work, rest[0], int(rest[1]))
    else:
        raise SystemExit(f"{what!r} is none of lessons, writer, scorers, row, judge, kept.")


if __name__ == "__main__":
    main()
