"""results/README.md: what each result file is, by question, from results/notes.yaml and from the files themselves.

python -m zsaa.kit.catalogue                                    (part of make figures)
python -m zsaa.kit.catalogue ablation/imdb/plus-seed1.json      prints the command that makes a file again
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import yaml

from zsaa.kit.files import write_text
from zsaa.kit.labels import device_of
from zsaa.kit.report.write import render
from zsaa.kit.store import QUESTIONS, RESULTS, all_results

ROWS = 16384  # of a training pass, where none were asked for
# What ablation.run and ablation.folds add to a row's name, for options that were given.
OPTIONS = re.compile(
    r"(-seed(?P<seeds>\d+))?(?P<compute>-compute)?(-epochs(?P<epochs>[\d.]+))?(-rate(?P<learning_rate>[\de.-]+?))?"
    r"(-seconds(?P<seconds>[\d.]+))?"
)


def command_of(name: str, result: dict) -> str | None:
    """The command that makes the result file `name` (in results/) again: its own, or, of rows of the ablation, the one
    that its name, task and model tell. FOLDER is where rows leave their models (--weights): readings and taught rows
    find those there. None where a file tells none (results/notes.yaml says more)."""
    if result.get("command") or result["kind"] != "ablation" or "training" not in result:
        return result.get("command")
    path, row, task = PurePosixPath(name), result["row"], result["task"]["name"]
    if row == "bag":
        crossed = path.stem == f"{task}-folds"
        return f"python -m ablation.folds {task}" if crossed else f"python -m ablation.bags --task {task}"
    if path.parent.name == "test":
        return f"python -m ablation.reading {path.stem} --weights FOLDER"
    folds = path.parent.name == "folds"
    found = OPTIONS.fullmatch(path.stem.removeprefix(f"{task}-" * folds).removeprefix(row))
    if found is None:
        return None
    given = {key: value for key, value in found.groupdict().items() if value}
    given |= {"compute": f"{result['training']['compute']:g}"} if "compute" in given else {}
    given |= {"model": result["model"]["name"]} if result["model"]["name"] != "smollm2-135m" else {}
    rows = result["training"].get("rows", ROWS)
    given |= {"pass_rows": rows} if rows != ROWS else {}
    given |= {"weights": "FOLDER"} if result["training"].get("teacher") else {}
    program = f"ablation.folds {task}" if folds else f"ablation.run --task {task}"
    options = (f" --{key.replace('_', '-')} {value}" for key, value in given.items())
    return f"python -m {program} --rows {row}{''.join(options)}"


def catalogue(folder: str | Path = RESULTS) -> str:
    """The page, in Markdown. ValueError: a result file that no note matches, or a note that matches no file."""
    folder = Path(folder)
    if loose := sorted(path.name for path in folder.glob("*.json")):
        raise ValueError(
            f"result files lie loose in results/: {loose}. Move them to a question's folder, such as {QUESTIONS}."
        )
    questions = yaml.safe_load((folder / "notes.yaml").read_text(encoding="utf-8"))
    held = dict(all_results(folder))
    others = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    mine: dict[int, list[str]] = {}
    notes = [note for question in questions for note in question["notes"]]
    for name in others:
        found = next((note for note in notes if any(fnmatch(name, pattern) for pattern in note["files"])), None)
        if found is not None:
            mine.setdefault(id(found), []).append(name)
        elif name in held:
            raise ValueError(
                f"results/notes.yaml says nothing of {name}: add a note, under the question that it answers."
            )
    if empty := [note["files"] for note in notes if id(note) not in mine]:
        raise ValueError(f"results/notes.yaml has notes of files that are not there: {empty}. Remove them.")
    sections = [
        {
            "question": question["question"],
            "rows": [{**note, **_facts([held[n] for n in mine[id(note)] if n in held])} for note in question["notes"]],
        }
        for question in questions
    ]
    return render("results.md", {"sections": sections, "count": len(held)})


def _facts(results: Sequence[dict]) -> dict:
    """How many files, on how many samples, on what, and when; "-" where files do not say."""
    facts = [result["provenance"] for result in results]
    samples = sorted({fact["eval_samples"] for fact in facts if fact.get("eval_samples")})
    dates = sorted({fact["date"][:10] for fact in facts if fact.get("date")})
    devices = sorted({device_of(result) for result in results if "device" in result["provenance"].get("hardware", {})})
    return {
        "runs": len(results),
        "n": " to ".join(f"{n:,}" for n in dict.fromkeys((samples[0], samples[-1]))) if samples else "-",
        "on": ", ".join(devices) or "-",
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "-",
    }


def write(folder: str | Path = RESULTS) -> Path:
    return write_text(Path(folder) / "README.md", catalogue(folder))


if __name__ == "__main__":
    held = dict(all_results(RESULTS)) if sys.argv[1:] else {}
    for name in sys.argv[1:]:
        print(command_of(name, held[name]) or f"{name} tells no command; see results/notes.yaml")
    if not held:
        print(write())
