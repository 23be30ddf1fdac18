"""Reads the test part of imdb_films: once per model, and each reading is noted before it begins.

python -m ablation.reading lora-crops-epochs5 lora-crops-seed1-epochs5 --weights /tmp/weights
python -m ablation.reading --best-of layers-6-rate0.0001 layers-6 layers-6-rate0.0004 --weights /tmp/weights

The names are those of result files of ablation.run --task imdb_films, which were judged on the validation part; their
models must lie where --weights left them. --best-of reads only the one of the results that is best there, in the mean
over its budgets, and says in the log which it was chosen from.

Results go to results/ablation/imdb_films/test/, and a line per reading to results/ablation/imdb_films/readings.jsonl:
when, which commit, which model, the how-manieth reading of it, and what it was chosen from. A model that was read
before is refused, unless --again says that it is to be read once more, and then the log says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
from pathlib import Path

import torch

from ablation import kept, run
from ablation.exits import chosen_ways
from zsaa.measure import provenance, write_json

TASK, LOG = "imdb_films", "readings.jsonl"


def readings(folder: str | Path) -> list[dict]:
    """The lines of a folder's log, the first reading first."""
    path = Path(folder) / LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def note(folder: str | Path, entry: dict, again: bool) -> dict:
    """The entry with "reading", the how-manieth of its name; written behind the log's last line."""
    before = sum(line["name"] == entry["name"] for line in readings(folder))
    if before and not again:
        raise ValueError(
            f"{entry['name']} was read {'once' if before == 1 else f'{before} times'} before "
            f"({Path(folder) / LOG}): its numbers on the test part are there. --again reads it once more, and the log "
            "will say so."
        )
    entry = {**entry, "reading": before + 1}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / LOG, "a", encoding="utf-8") as file:  # one write, so that two processes do not mix
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def on_validation(result: dict) -> float:
    """What a result is chosen by: its accuracy in the mean over its budgets (controls of the same model apart)."""
    if result["task"].get("split") != "validation":
        raise ValueError(f"{result['name']} was not judged on the validation part; run it with --task {TASK}.")
    controls = [r["control"] for r in result["rows"]]
    own = next(c for c in ("layers", "alpha", *controls) if c in controls)
    return statistics.mean(r["accuracy"] for r in result["rows"] if r["control"] == own)


def best_of(names: list[str], folder: str | Path) -> str:
    """The name of the result that is best on the validation part; of equals the first."""
    results = {name: json.loads((Path(folder) / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    return max(results, key=lambda name: on_validation(results[name]))


def read(name: str, options: argparse.Namespace, chosen_from: list[str]) -> dict:
    """One reading: the log's line first, then the result."""
    folder = Path(options.output_dir) / TASK
    result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    on_validation(result)
    file = Path(options.weights) / f"{name}.pt"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.enable_cudnn_sdp(False)
    model, tokenizer, probe, rule, training = kept.read(options.weights, name, result, device)
    settings = {**run.load_config()["tasks"][TASK], "films": "test", "train": 1, "test": options.test}
    _, (samples, labels), source = run._data(TASK, settings, tokenizer, {"train": 1, "test": options.test})
    rivals = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in chosen_from}
    entry = {
        "name": name, "row": result["row"], "seed": training.seed, "samples": len(samples),
        "chosen_from": {rival: round(on_validation(judged), 3) for rival, judged in rivals.items()},
        "weights_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **{key: provenance()[key] for key in ("date", "commit")},
    }  # fmt: skip
    entry = note(folder, entry, options.again)
    asked = result["unit"]["settings"]
    more = (
        {"ways": chosen_ways(result["rows"]), "raw": file.with_name(f"{name}-said-test.npz")} if training.exits else {}
    )
    rows = run.judge(model, samples, labels, rule, training, probe, asked["targets"], asked["sides"], **more)
    for row in rows:
        print(f"  {name} {row['control']} {row['mac_reduction']:.2f}x: {row['accuracy']}%", flush=True)
    same = ("name", "kind", "row", "about", "model", "variant", "training", "log")
    content = {
        **{key: result[key] for key in same},
        "task": {**result["task"], "source": source, "split": "test"}, "reading": entry, "rows": rows,
        "provenance": provenance(
            seed=training.seed, train_samples=result["provenance"]["train_samples"], eval_samples=len(samples)
        ),
    }  # fmt: skip
    count = "" if entry["reading"] == 1 else f"-reading{entry['reading']}"
    write_json(folder / "test" / f"{name}{count}.json", content)
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.reading", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="RESULT", help="to be read, by the result file's name")
    add("--best-of", nargs="+", default=[], metavar="RESULT", help="read the one of them that validation prefers")
    add("--weights", required=True, help="the folder that ablation.run --weights filled")
    add("--output-dir", default=str(run.RESULTS))
    add("--again", action="store_true", help="read once more what was read before")
    add("--test", type=int, default=4828, help="so many reviews of the test part (for a rehearsal)")
    options = parser.parse_args(arguments)
    if not options.names and not options.best_of:
        parser.error("nothing to read: give result names, or --best-of")
    for name in options.names:
        read(name, options, [])
    if options.best_of:
        read(best_of(options.best_of, Path(options.output_dir) / TASK), options, options.best_of)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
