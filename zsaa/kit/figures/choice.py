"""Table 3's scores: MMLU and its substitute along the dial."""

from __future__ import annotations

import textwrap

import pandas as pd

from zsaa.kit.figures.accuracy import curves, draw
from zsaa.kit.figures.style import COLOURS, REFERENCE, STYLE, grid, legend, multiples
from zsaa.kit.labels import METHODS
from zsaa.kit.tables.table3 import CHANCE

LOOKS = {
    "dial": ("dial", COLOURS["alpha"], "o", "-"),
    "dial at the printed alpha": ("dial at the paper's printed alphas", COLOURS["paper"], "s", ":"),
    METHODS["last"]: ("last tokens", COLOURS["last"], "v", "--"),
    METHODS["random"]: ("random tokens", COLOURS["conventional"], "x", "-."),
}


def choice_figure(points):
    """Score of a four-way choice, MMLU or its substitute, against the MAC reduction of the prefill, from points of
    results of kind "choice": a panel for each task, model and training, the dial, its controls, and chance."""
    import matplotlib.pyplot as plt

    found = curves(points)
    groups = list(found.groupby(["task", "model", "recipe"], sort=False))
    one_task = len({task.split(", ")[0] for task in found["task"]}) == 1
    with plt.rc_context(STYLE):
        figure, axes = grid(len(groups), 1.6, "MAC reduction", "score (%)", sharex=True, sharey=True)
        for axis, ((task, model, recipe), mine) in zip(axes, groups):
            whole = mine[(mine["method"] == "dial") & (mine["target"] == 1)]
            for method, (name, *style) in LOOKS.items():
                part = mine[mine["method"] == method]
                part = part if method == "dial" else pd.concat([whole, part]).sort_values("mac_reduction")
                if len(part) > 1 or (method == "dial" and len(part)):
                    draw(axis, part, style, name, band=name in ("dial", "last tokens"))
            axis.axhline(CHANCE, **REFERENCE)
            title = ", ".join((*task.split(", ")[one_task:], model, recipe.split(" fine-tuning")[0]))
            axis.set_title(textwrap.fill(title, 26) + f"\nn = {whole['n'].iloc[0]:,}", fontsize=6.5)
        multiples(axes[0], sorted(set(found[found["method"] == "dial"]["target"])))
        axes[0].set(ylim=(min(18, axes[0].get_ylim()[0]), None))
        legend(figure, columns=2)
    figure.set_label(_caption(found))
    return figure


def _caption(found) -> str:
    tasks = ", ".join(dict.fromkeys(task.split(", ")[0] for task in found["task"]))
    recipes = "; ".join(
        f"{row.model}, {row.recipe}" for row in found[["model", "recipe"]].drop_duplicates().itertuples()
    )
    return (
        f"Score on {tasks} ({'; '.join(found['split'].unique())}) against the reduction of MACs. Bands are 95% "
        f"intervals; the dotted line is chance, {CHANCE}%. Models: {recipes}."
    )
