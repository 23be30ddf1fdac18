"""A four-way choice in MMLU's format, made from reviews: which words go on where a review breaks off?

    rows = questions(texts)                # MMLU's columns: question, choices, answer, subject; and passage
    write("outputs/choice")                # auxiliary_train, dev and test, in the layout of MMLU on the hub

**A substitute for MMLU**, for models that are at chance there: it asks for no knowledge, so its scores say nothing of
MMLU's. What it shares is the shape of the task (four answers, five shots, one letter to predict) and the code that runs
it: `zsaa.mmlu` reads its folder exactly as it reads one of MMLU.

A question is the beginning of a real held-out review. One of the four answers is how that review goes on; the others
are the words in the same place of three other reviews. All are of one length, and each letter is right equally often.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

SUBJECT = "continuations_of_film_reviews"
SHOTS = 5  # rows of the dev split, as in MMLU
WORDS, ENDING = 60, 12


def questions(texts: Sequence[str], seed: int = 0, words: int = WORDS, ending: int = ENDING) -> list[dict]:
    """One question for each of `texts` that is long enough, in order; the same for the same texts and seed.

    words: length of the beginning that is shown; ending: length of each of the four answers, in words.
    Each row is {"question", "passage": the beginning alone, "choices": four texts, "answer": 0 to 3, "subject"}.
    ValueError: a length below 1, or fewer than four texts with words + ending words and different endings.
    """
    if min(words, ending) < 1:
        raise ValueError(f"words and ending must be at least 1, got {words} and {ending}.")
    split = [re.sub(r"<br\s*/?>", " ", text).split() for text in texts]
    whole = [text for text in split if len(text) >= words + ending]
    passages, endings = ([" ".join(text[a:b]) for text in whole] for a, b in ((0, words), (words, words + ending)))
    if len({*endings}) < 4:
        raise ValueError(
            f"a question needs four reviews of at least {words + ending} words, and {len({*endings})} of "
            f"{len(texts)} have them: give more texts, or shorter lengths."
        )
    draw = random.Random(seed)
    answers = [i % 4 for i in range(len(whole))]  # each letter is right equally often
    draw.shuffle(answers)
    rows = []
    for passage, right, answer in zip(passages, endings, answers):
        choices: list[str] = []
        while len(choices) < 3:
            other = draw.choice(endings)
            if other != right and other not in choices:
                choices.append(other)
        choices.insert(answer, right)
        rows.append(
            {"question": f"{passage} ...", "passage": passage, "choices": choices, "answer": answer, "subject": SUBJECT}
        )
    return rows


def write(
    folder: str | Path,
    *,
    test: int = 500,
    train: int = 2000,
    seed: int = 0,
    words: int = WORDS,
    ending: int = ENDING,
    task: str = "imdb",
    source: str = "auto",
) -> Path:
    """Make `folder` with all/auxiliary_train.jsonl and, for the one subject, dev.jsonl and test.jsonl; returns it.

    test and dev come from the held-out part of `task` (see zsaa.data.tasks), no review in both; train, for fine-tuning,
    from its train part. ValueError if there are not so many long reviews; AssetError if the data are not there.
    """
    from zsaa.data.tasks import load_task

    data = load_task(task, source=source)
    held_out = questions(data.test["text"], seed, words, ending)
    shown = questions(data.train["text"], seed + 1, words, ending)
    for what, need, have in (("test", test + SHOTS, held_out), ("train", train, shown)):
        if need > len(have):
            raise ValueError(
                f"{need} {what} questions (shots included) were asked for, but {task} has {len(have)} reviews of "
                f"{words + ending} words there: ask for fewer, or for shorter ones."
            )
    files = {
        f"{SUBJECT}/dev": held_out[:SHOTS],
        f"{SUBJECT}/test": held_out[SHOTS : SHOTS + test],
        "all/auxiliary_train": shown[:train],
    }
    about = {"substitute": "for MMLU", "source": data.source, "seed": seed, "words": words, "ending": ending}
    for name, rows in files.items():
        path = Path(folder) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (Path(folder) / "substitute.json").write_text(json.dumps(about, indent=1) + "\n")
    return Path(folder)
