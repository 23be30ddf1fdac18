"""A task for lm-evaluation-harness, made offline: which sentence comes next in a film review, one of four?

    python examples/endings.py FOLDER     # then: zsaa-eval --include_path FOLDER --tasks endings_letters ...

In MMLU's layout (question, choices, answer; 5 shots from a split of their own) and in lm-eval's own two MMLU formats:
endings_letters scores the letters A to D, endings_text the sentences themselves. The reviews are held out from IMDB's
train split; the wrong sentences are what comes third in three other reviews.
"""

import json
import random
import re
import sys
from pathlib import Path

import lm_eval
import yaml

from zsaa.data.tasks import load_task

SHOTS, QUESTIONS = 5, 40


def sentences(text):
    return re.split(r"(?<=[.!?])\s+", " ".join(re.sub(r"<br\s*/?>", " ", text).split()))


def main(folder):
    reviews = [sentences(text) for text in load_task("imdb").test["text"]]
    reviews = [s for s in reviews if len(s) > 3 and all(5 <= len(one.split()) <= 15 for one in s[:3])]
    rng = random.Random(0)
    rows = []
    for first, second, third, *_ in reviews[: SHOTS + QUESTIONS]:
        choices = [third, *(other[2] for other in rng.sample(reviews[SHOTS + QUESTIONS :], 3))]
        rng.shuffle(choices)
        rows.append({"question": f"{first} {second}", "choices": choices, "answer": choices.index(third)})

    folder.mkdir(parents=True, exist_ok=True)
    files = {split: str((folder / f"{split}.jsonl").resolve()) for split in ("dev", "test")}
    for split, part in (("dev", rows[:SHOTS]), ("test", rows[SHOTS:])):
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    templates = Path(lm_eval.__file__).parent / "tasks" / "mmlu"
    for name, template in (("letters", "default"), ("text", "continuation")):
        task = {
            "include": str(templates / template / f"_{template}_template_yaml"),
            "task": f"endings_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "description": "Which sentence comes next in the film review?\n\n",
            "num_fewshot": SHOTS,
        }
        (folder / f"endings_{name}.yaml").write_text(yaml.safe_dump(task))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/endings.py FOLDER")
    main(Path(sys.argv[1]))
