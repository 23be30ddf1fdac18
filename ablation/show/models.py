"""The films' test part by other models than SmolLM2: the dial, and what needs none."""

from __future__ import annotations

from pathlib import Path

from ablation import films
from ablation.show.films import TARGETS, held, points
from zsaa.kit.store import RESULTS
from zsaa.measure.stats import mean_difference, over_runs, sure

FOLDER = RESULTS / "ablation"
GEMMA, QWEN = "Gemma 3 270M, 4 bits", "Qwen2.5-Coder-0.5B-Instruct, 4 bits"
AT = (1, 2, 3, 5, 7, 11)  # where Qwen was read
Ways = dict[str, dict[int, tuple[str, str]]]  # way -> the dial's MAC reduction -> (result, control)


def along(result: str, control: str, targets: tuple[int, ...] = TARGETS) -> dict[int, tuple[str, str]]:
    return dict.fromkeys(targets, (result, control))


# model -> (folder, the ways; the first is the dial)
MODELS: dict[str, tuple[str, Ways]] = {
    GEMMA: (
        "imdb_films_gemma",
        {
            "the dial": along("steady-epochs3-seconds540", "alpha"),
            "whole texts alone": along("lora-conventional-crops-epochs1.5", "alpha"),
            "text cut to both ends": along("steady-cut-ends-epochs1.45", "ends"),
            "half of the layers, distilled": {2: ("layers-9-tutored-rate0.0001", "layers")},
        },
    ),
    QWEN: (
        "imdb_films_qwen",
        {
            "the dial": along("steady-epochs0.5-seconds400", "alpha", AT),
            "whole texts alone": along("lora-conventional-crops-epochs0.5", "alpha", (1, 3)),
            "text cut to both ends": along("steady-cut-ends-epochs0.5-seconds400", "ends", AT),
            "half of the layers, distilled": {2: ("layers-12-briefed-epochs0.5", "layers")},
            "a third of the layers, distilled": {3: ("layers-8-briefed-epochs0.5", "layers")},
        },
    ),
}


def there(ways: Ways, folder: Path) -> Ways:
    """The ways of which all results are there."""
    return {
        name: cells
        for name, cells in ways.items()
        if all((folder / f"{result}.json").is_file() for result, _ in cells.values())
    }


def table(model: str):
    """A line per way, one training each: its accuracy, and by how much the dial, in the first line, is ahead of it,
    with 95% intervals, films together. A star: not 0 by Holm's correction over this table."""
    import pandas as pd

    name, ways = MODELS[model]
    folder = FOLDER / name / "test"
    (first, dial), *rest = there(ways, folder).items()
    ours = {t: held(*cell, t, folder) for t, cell in dial.items()}
    together = films.runs("test")[: len(next(iter(ours.values())))]  # where only the first of the reviews were read
    theirs = {(way, t): held(*cell, t, folder) for way, cells in rest for t, cell in cells.items()}
    leads = {(way, t): over_runs([ours[t]], [found], together) for (way, t), found in theirs.items()}
    stars = sure(leads)
    line = {model: first, **{f"{t}x": "" for t in TARGETS}}
    for t in ours:
        low, high = mean_difference([ours[t]], [0 * ours[t]], clusters=together)[1]
        line[f"{t}x"] = f"{100 * ours[t].mean():.1f} [{low:.1f}, {high:.1f}]"
    lines = [line]
    for way, cells in rest:
        said = {t: f"{100 * theirs[way, t].mean():.1f}: {points(leads[way, t])}" for t in cells}
        said = {t: text + "*" * ((way, t) in stars) for t, text in said.items()}
        lines.append({model: way, **{f"{t}x": said.get(t, "") for t in TARGETS}})
    return pd.DataFrame(lines)


def tables() -> list:
    """Of the models whose dial was read."""
    return [table(model) for model, (name, _) in MODELS.items() if (FOLDER / name / "test").is_dir()]
