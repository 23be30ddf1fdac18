"""Every number of the result files as a tidy table, results/points.csv: a row per number, and pandas to read it.

    python -m zsaa.kit.points      writes results/points.csv (part of make figures)

    points = pd.read_csv("results/points.csv")
    imdb = points[(points.task == "imdb") & (points.metric == "accuracy") & (points.method == "first tokens only")]
    imdb.plot("mac_reduction", "value", style="o-")

task           what was done: a data set, with the protocol where a task has several, or what was timed
model          its name, quantization or number format, "random weights" where these decide nothing
method         how compute is saved: "stock", "dial" by Eq. 2 with the paper's score and tau = 5 (what differs stands in
               brackets), inputs cut to their first or last tokens or both ends, "random tokens" on the dial's schedule,
               "first layers only" of the model
recipe         how the model was trained; "" for random weights
seed           of the training, or of what was drawn
mac_reduction  stock multiply-accumulates over these, as reached; empty where none were counted
metric, value  a field of the result file and its number. Settings are among them, so that a row can be found again:
               "target" (the reduction asked for), "alpha", "tokens", "batch", ...
low, high      the 95% interval; of latency_ms the quartiles, of idle_s and loaded_s the range
n              samples behind the number
split          where the inputs come from
hardware, commit, file: what it ran on, the source that it was measured by, and the result file
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from zsaa.kit.files import write_text
from zsaa.kit.labels import device_of, method_of, model_of, recipe_of, split_of, task_of, timed_task
from zsaa.kit.store import RESULTS, all_results

WORDS = ("task", "model", "method", "recipe", "metric", "split", "hardware", "commit", "file")
NUMBERS = ("seed", "mac_reduction", "value", "low", "high", "n")
COLUMNS = (
    *("task", "model", "method", "recipe", "seed", "mac_reduction", "metric", "value", "low", "high", "n"),
    *("split", "hardware", "commit", "file"),
)
WHAT = tuple(name for name in COLUMNS if name not in ("metric", "value", "low", "high", "n"))
INTERVALS = {  # field -> that of its interval
    "accuracy": "ci95",
    "f1": "ci95",  # then it is not the accuracy's, nor the perplexity's
    "exact_match": "exact_match_ci95",
    "perplexity": "ci95",
    "word_perplexity": "word_ci95",
    "ratio": "ratio_ci95",
    "latency_ms": "latency_ms_quartiles",
    "latency_ratio": "latency_ratio_ci95",
    "hit_rate": "hit_rate_ci95",
    "idle_s": "idle_range_s",
    "loaded_s": "loaded_range_s",
}
SETTINGS = (
    "target",
    "alpha",
    "threshold",
    "keep_tokens",
    "batch",
    "tokens",
    "new",
    "layer",
    "removed",
    "dim",
    "heads",
    "kv_heads",
    "low",
    "high",
)
# Counts that stand behind other numbers, and those that have a column of their own.
LEFT_OUT = ("n", "seed", "correct", "nll_sum", "words", "choices", "mac_reduction", "latency_mac_reduction")
TIMED = {"latency_ms": "latency_ms", "latency_ms_quartiles": "latency_ms_quartiles", "speedup": "speedup",
         "latency_batch": "batch", "latency_tokens": "tokens"}  # fmt: skip
DERIVED = ("audit", "architectures", "preservation", "serve-simulated")  # kinds without a measured number


def _points(file: str, result: dict) -> Iterator[dict]:
    """The points of a result file, as dicts with COLUMNS."""
    if result.get("kind") in DERIVED or not result.get("rows"):
        return
    facts, rows = result["provenance"], result["rows"]
    if result["kind"] == "card":  # a number a row; what was not measured is none
        rows = [
            {"task": row["phase"], **{name: result[name] for name in ("batch", "new")}, "tokens": result["n"],
             "alpha": row["alpha"], f"{row['metric']}, {row['unit']}": row["value"]}
            for row in rows if row["value"] is not None
        ]  # fmt: skip
    rows = rows + [
        {"schedule": "one layer alone", "layer": layer, "divergence": cost}
        for layer, cost in enumerate(result.get("sensitivity", ()), start=1)
    ]
    shared = {
        "recipe": recipe_of(result),
        "seed": result.get("recipe", {}).get("seed", facts.get("seed")),
        "split": split_of(result),
        "hardware": device_of(result),
        "commit": (facts["commit"] or "")[:10],
        "file": file,
    }
    for row in rows:
        what = {**shared, "model": model_of(result, row), "method": method_of(result, row)}
        what |= {"split": row.get("split", shared["split"])}  # questions of several data sets share a file
        rest, timed = row, {}
        if (
            "latency_mac_reduction" in row
        ):  # a forward pass that was timed at the setting, on a batch with MACs of its own
            rest = {field: value for field, value in row.items() if field not in TIMED}
            timed = {name: row[field] for field, name in TIMED.items() if field in row}
            timed |= {name: row[name] for name in ("target", "alpha")}
        if not timed or "accuracy" in row:
            task = row.get("task") or task_of(result)
            yield from _numbers({**what, "task": task, "mac_reduction": row.get("mac_reduction")}, rest)
        if timed:
            there = {"task": timed_task(result), "mac_reduction": row["latency_mac_reduction"]}
            yield from _numbers({**what, **there}, timed)
    if "epochs_of_compute" in result.get("log", {}):
        what |= {"task": task_of(result), "method": "training", "mac_reduction": None}
        yield from _numbers(what, {"epochs_of_compute": result["log"]["epochs_of_compute"]})


def _numbers(what: dict, row: dict) -> Iterator[dict]:
    """A point for each number of a row, whose own seed goes before the file's."""
    what = {**what, "seed": row.get("seed", what["seed"])}
    for field, value in row.items():
        if field in LEFT_OUT or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        own = field not in ("accuracy", "perplexity") or "f1" not in row
        low, high = (own and row.get(INTERVALS.get(field))) or (None, None)
        n = None if field in SETTINGS else row.get("n")
        yield {**what, "metric": field, "value": value, "low": low, "high": high, "n": n}


def text(results: Iterable[tuple[str, dict]]) -> str:
    """The points of (file name, content) pairs as CSV."""
    written = io.StringIO()
    writer = csv.DictWriter(written, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(point for file, result in results for point in _points(file, result))
    return written.getvalue()


def read(source=RESULTS / "points.csv"):
    """A file of points (a path, or a text stream) as a DataFrame, by default the committed ones."""
    import pandas as pd

    types = dict.fromkeys(WORDS, str)
    exact = dict.fromkeys(NUMBERS, lambda number: float(number or "nan"))  # pandas' own reading may be off by a hair
    return pd.read_csv(source, dtype=types, keep_default_na=False, converters=exact)


def of(results: Iterable[dict]):
    """The points of results as a DataFrame, as `read` gives them."""
    named = ((result.get("name", f"{result['kind']}-{i}"), result) for i, result in enumerate(results))
    return read(io.StringIO(text(named)))


def settings(points):
    """A row for each setting that was measured, in the order of the points: the columns that say what it is, and
    <metric>, <metric>_low, <metric>_high and <metric>_n for each of its metrics."""
    import pandas as pd

    rows: list[dict] = []
    before = None
    for point in points.to_dict("records"):
        what = {name: point[name] for name in WHAT}
        if repr(what) != before or point["metric"] in rows[-1]:  # repr: no number is not equal to itself
            rows.append(what)
            before = repr(what)
        rows[-1] |= {point["metric"]: point["value"]}
        rows[-1] |= {f"{point['metric']}_{end}": point[end] for end in ("low", "high", "n")}
    return pd.DataFrame(rows)


def write(folder: str | Path = RESULTS) -> Path:
    """Write `folder`/points.csv of the result files in the folder and below; returns its path."""
    return write_text(Path(folder) / "points.csv", text(all_results(folder)))


if __name__ == "__main__":
    print(write())
