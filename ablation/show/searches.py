"""How much each way was trained and searched for, on the films and before: what a sceptic asks of fair rivals.

python -m ablation.show.searches      prints the tables, as docs/findings/films.md has them
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from ablation import films
from ablation.reading import on_validation
from ablation.show.films import held, markdown, points
from ablation.show.rows import seed_of
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import over_runs, sure

FOLDER = RESULTS / "ablation"
FILMS = FOLDER / "imdb_films"
UNDONE = {  # choices of the dial that were made before the films -> the row without it
    "at least five tokens in each layer, not two": "steady-tau5",
    "the schedule of Eq. 2, not one that rises": "steady-geometric",
    "scores without a hidden layer": "steady-linear",
    "texts are read whole, not half of them in part": "steady-uncropped",
}
WAYS = {  # name -> the rows that are trainings of it
    "the dial": ("lora-crops", "steady", *UNDONE.values()),
    "text cut to both ends": ("lora-cut-ends", "steady-cut-ends"),
    "text cut to the last tokens": ("lora-cut-last", "steady-cut-last"),
    **{f"the first {n} layers": (f"layers-{n}",) for n in (15, 10, 6, 3)},
    **{f"the first {n} layers, distilled": (f"layers-{n}-taught", f"layers-{n}-tutored") for n in (15, 10, 6, 3)},
    "whole texts, by adapters": ("lora-conventional-crops",),
    "the paper's recipe": ("paper",),
    "the paper's recipe by LoRA": ("paper-lora",),
    "the paper's recipe on 12 layers": ("paper-12",),
}
JUDGED_AT = (2, 3, 5, 7)  # MAC reductions
BEFORE = ("imdb", "imdb_anew", "rotten_tomatoes", "depth")  # tasks on which recipes were compared before the films


def kind_of(result: dict) -> str:
    """Which way a result of the ablation is a training of."""
    training = result["training"]
    if training.get("layers") and training["sampling"] == "conventional":
        return "fewer layers"
    if training.get("exits"):
        return "exits"
    if result["row"].startswith("paper") and training["sampling"] == "alpha":
        return "the paper's recipe"
    return {"conventional": "whole texts", "truncated": "cut texts", "cuts": "cut texts"}.get(
        training["sampling"], "the dial"
    )


def trained(folder: Path) -> dict[str, dict]:
    """Result files of one task that hold a training, by name."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: r for name, r in found.items() if r.get("training", {}).get("sampling") and r["log"].get("steps")}


def spent(result: dict) -> float:
    """Training compute in passes of the whole model over the texts; of fewer layers by their share of all."""
    whole = 30 / (result["training"]["layers"] or 30)
    return result["log"]["epochs_of_compute"] / whole


def epochs(result: dict) -> float:
    return result["log"]["samples"] / result["provenance"]["train_samples"]


def search_table(folder: Path = FILMS):
    """A line per way: what validation said of each learning rate and number of epochs, in the mean over settings and
    seeds, and of what was read on the test part the seeds, the epochs and the compute."""
    import pandas as pd

    results, lines = trained(folder), []
    for way, rows in WAYS.items():
        mine = {name: r for name, r in results.items() if r["row"] in rows}
        read = [r for name, r in mine.items() if (folder / "test" / f"{name}.json").is_file()]
        tried: dict[tuple[float, float], list[float]] = {}
        for r in mine.values():
            if r["row"] not in UNDONE.values() and at_all_settings(r):
                tried.setdefault((r["training"]["learning_rate"], round(epochs(r), 1)), []).append(judged(r))
        said = [f"{_rate(rate)}, {e:g}: {sum(v) / len(v):.1f}" for (rate, e), v in sorted(tried.items())]
        lines.append(
            {
                "way": way,
                "trainings": len(mine),
                "validation, by rate and epochs": "; ".join(said),
                "seeds read": len({seed_of(r) for r in read}),
                "epochs": _span([epochs(r) for r in read]),
                "compute": _span([spent(r) for r in read]),
            }
        )
    return pd.DataFrame(lines)


def at_all_settings(result: dict) -> bool:
    """Was it judged as far as 11x, or has it one setting? Means over fewer settings would not compare."""
    targets = {row["target"] for row in result["rows"]}
    return len(targets) == 1 or 11 in targets


def judged(result: dict) -> float:
    """What a result was chosen by; of whole texts, trained without a dial, the accuracy on these."""
    if kind_of(result) == "whole texts":
        return next(row["accuracy"] for row in result["rows"] if row["target"] == 1)
    return on_validation(result)


def _rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _span(found: list[float]) -> str:
    low, high = (f"{x:.1f}" for x in (min(found), max(found))) if found else ("", "")
    return low if low == high else f"{low} to {high}"


def before_table(folder: Path = FOLDER):
    """A line per way: trainings of each task on which recipes were compared before."""
    import pandas as pd

    counted = {task: Counter(map(kind_of, trained(folder / task).values())) for task in BEFORE}
    kinds = dict.fromkeys(kind for task in counted.values() for kind in sorted(task))
    return pd.DataFrame([{"trainings before": k, **{t: counted[t][k] for t in BEFORE}} for k in sorted(kinds)])


def undone_table(folder: Path = FILMS):
    """A line per choice that was made before the films: on their validation part, after half an epoch, the mean over
    JUDGED_AT without it, and by how much the dial is ahead of that, with 95% intervals, films together."""
    import pandas as pd

    def mean_held(row: str) -> np.ndarray:
        return np.mean([held(f"{row}-epochs0.5", "alpha", t, folder) for t in JUDGED_AT], axis=0)

    ours, together = mean_held("steady"), films.runs("validation")
    theirs = {choice: mean_held(row) for choice, row in UNDONE.items() if (folder / f"{row}-epochs0.5.json").is_file()}
    leads = {choice: over_runs([ours], [found], together) for choice, found in theirs.items()}
    name, lead = "after half an epoch, on validation", "the dial is ahead by"
    lines = [{name: "the dial", "mean of 2x to 7x": f"{100 * ours.mean():.1f}", lead: ""}]
    for choice, found in theirs.items():
        said = points(leads[choice]) + "*" * (choice in sure(leads))
        lines.append({name: choice, "mean of 2x to 7x": f"{100 * found.mean():.1f}", lead: said})
    return pd.DataFrame(lines)


def main() -> int:
    for table in (search_table(), before_table(), undone_table()):
        print(markdown(table), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
