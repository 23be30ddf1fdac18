"""All figures of results/ablation, and of results/answers."""

from __future__ import annotations

import json
from pathlib import Path

from ablation.show.accuracy import accuracy_figure
from ablation.show.answers import FILES, answers_figure
from ablation.show.continuation import continuation_figure
from ablation.show.frontier import frontier_figure
from ablation.show.others import sensitivity_figure, words_figure
from ablation.show.paired import paired_figure
from ablation.show.panels import rows_figures
from ablation.show.rows import load, own_row, title_of
from zsaa.kit import points
from zsaa.kit.figures.style import save_figure
from zsaa.kit.store import RESULTS


def draw_committed(folder: str | Path) -> list[Path]:
    """Draw what results/ablation and results/answers hold into `folder` (figures/); returns the PNGs."""
    names = []
    for name, figure in _figures(RESULTS / "ablation"):  # one after the other: matplotlib keeps what is open in memory
        save_figure(figure, Path(folder) / f"ablation_{name}")
        names.append(name)
    return [Path(folder) / f"ablation_{name}.png" for name in names]


def _figures(held: Path):
    """(name, figure) of each."""
    answers = points.read()
    if not (answers := answers[answers["file"].str.startswith(FILES)]).empty:
        yield "answers", answers_figure(answers)
    if words := [json.loads(path.read_text()) for path in sorted(held.glob("words-*.json"))]:
        yield "words", words_figure(words)
    for name, draw in (("continuation", continuation_figure), ("sensitivity", sensitivity_figure)):
        if (path := held / f"{name}.json").is_file():
            yield name, draw(json.loads(path.read_text()))
    yield "frontier", frontier_figure(points.read())
    for task in sorted(path.name for path in held.glob("*") if path.is_dir()):
        results = load(held, task)
        if own_row(results) is None:  # texts cut anew: a single run, set beside nothing
            continue
        yield task, accuracy_figure(results, title_of(task))
        for number, figure in enumerate(rows_figures(results, title_of(task)), start=1):
            yield f"{task}_rows_{number}", figure
        if paired := paired_figure(results, title_of(task)):
            yield f"paired_{task}", paired
