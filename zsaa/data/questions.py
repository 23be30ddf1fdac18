"""Questions about documents: rows of your own, one JSON object a line, or SQuAD and HotpotQA from the Hugging Face hub.

    {"document": "...", "question": "Who left?", "answer": "Mara"}

`answers`, a list, may stand in place of `answer`: the first is learned, all are right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from zsaa.data.hub import splits_of
from zsaa.data.specs import Spec
from zsaa.models import AssetError

# Text columns first, then the one that is no text: SQuAD's answers, and HotpotQA's ten paragraphs, two of which matter.
HUB = {
    "squad": (Spec("rajpurkar/squad", "plain_text", ("context", "question"), (), None), "answers"),
    "hotpotqa": (Spec("hotpotqa/hotpot_qa", "distractor", ("question", "answer"), (), None), "context"),
}


@dataclass(frozen=True)
class Asked:
    """A question, the document that it is about, and the answers that are right, the first of which is learned."""

    document: str
    question: str
    answers: tuple[str, ...]


def read(path: str | Path, limit: int | None = None) -> list[Asked]:
    """The first `limit` rows of a file of JSON lines, or all. AssetError names file, line, what is wrong and what to
    do."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise AssetError(f"there is no file {path}. Give one JSON object a line: document, question and answer.")
    found: list[Asked] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(found) == limit:
                break
            if line.strip():
                try:
                    found.append(asked(json.loads(line)))
                except ValueError as error:  # json's own are ValueErrors, too
                    raise AssetError(f"{path}, line {number}: {error}. Mend or remove it.") from None
    if not found:
        raise AssetError(f"{path} holds no row. Give one JSON object a line: document, question and answer.")
    return found


def load(name: str, source: str = "hub") -> tuple[list[Asked], list[Asked], str]:
    """Training and validation rows of a data set in HUB, and where they came from. source: "hub" ("auto" is that, too)
    or a folder in its repository's layout. Questions without an answer are left out. AssetError without the data."""
    spec, last = HUB[name]
    sides, origin = splits_of(name, spec, "hub" if source == "auto" else source, ("train", "validation"), last)

    def of(row: dict) -> Asked:
        if name == "squad":
            return Asked(row["text"].strip(), row["text_pair"].strip(), tuple(dict.fromkeys(row[last]["text"])))
        parts = zip(row[last]["title"], row[last]["sentences"])
        document = "\n\n".join(f"{title}: {''.join(sentences).strip()}" for title, sentences in parts)
        return Asked(document, row["text"].strip(), (row["text_pair"].strip(),))

    train, test = ([row for row in map(of, side) if row.answers] for side in sides)
    return train, test, origin


def asked(row: object) -> Asked:
    """A row as a question. ValueError for one that lacks something."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with document, question and answer, got {row!r:.60}")
    answers = row.get("answers", [row["answer"]] if "answer" in row else None)
    answers = answers if isinstance(answers, list) and answers else [None]
    texts = [(name, row.get(name)) for name in ("document", "question")] + [("answer", answer) for answer in answers]
    for name, text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must be a text that is not empty, got {text!r:.60}")
    return Asked(row["document"].strip(), row["question"].strip(), tuple(answer.strip() for answer in answers))
