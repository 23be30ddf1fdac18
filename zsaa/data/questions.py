"""Questions about documents: rows of your own, one JSON object a line.

    {"document": "...", "question": "Who left?", "answer": "Mara"}

`answers`, a list, may stand in place of `answer`: the first is learned, all are right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from zsaa.models import AssetError


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
