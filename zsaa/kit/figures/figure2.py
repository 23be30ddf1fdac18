"""Figure 2: accuracy, preserved activations and alpha against the speed-up."""

from __future__ import annotations

import pandas as pd

from zsaa.kit import paper
from zsaa.kit.figures.accuracy import curves, dial, short
from zsaa.kit.figures.style import COLUMN, CUTS, DATA_SETS, STYLE, legend, multiples
from zsaa.kit.labels import METHODS
from zsaa.kit.points import settings
from zsaa.kit.store import STUDIES

LORA = (0, (8, 1.5))
DASHES = {"first": (0, (1, 1)), "last": (0, (4, 1.5)), "ends": (0, (4, 1, 1, 1)), "random": (0, (1, 3))}
NAMES = {**{side: f"{name} only" for side, (_, name) in CUTS.items()}, "random": "random tokens"}
OTHER_LAYERS = (0, (4, 1.5))


def figure_2(points):
    """Figure 2 against the speed-up: A, accuracy or F1 of the dial, of its controls at equal MACs, and of the paper's
    GPT-2; B, the share of hidden activations preserved; C, the alpha that gives it. Ours in MACs, the paper's by the
    clock. The caption says what stands in for what, and what was not run.

    points: of result files of the kinds "curve" and "lengths". Drawn are the dial and random tokens after alpha-sampled
    fine-tuning, inputs cut for the conventional model where there is one, and lengths under Eq. 2."""
    import matplotlib.pyplot as plt

    points = points[~points["file"].str.startswith(STUDIES)]
    found = curves(points[points["task"].isin(DATA_SETS)])
    lengths = settings(points[points["file"].isin(points[points["metric"] == "preserved"]["file"])])
    lengths = lengths[lengths["method"] == "dial"] if len(lengths) else lengths
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(COLUMN, 5.0), layout="constrained")
        axes = figure.subplot_mosaic("AA;BC", height_ratios=(1.4, 1))
        used = _accuracies(axes["A"], found)
        _lengths(axes["B"], axes["C"], lengths)
        axes["A"].set(ylabel="accuracy or F1 (%)")
        axes["B"].set(ylabel="activations preserved", ylim=(0, 1.02))
        axes["C"].set(ylabel=r"$\alpha$", ylim=(0, 1.02))
        for name, axis in axes.items():
            axis.set_title(name, loc="left", fontweight="bold")
            axis.set(xlabel="speed-up")
            multiples(axis, [t for t in paper.TABLE_1 if name == "A" or t in (1, 3, 5, 7, 9, 11)])
        _legends(figure, used, set(lengths["model"]) if len(lengths) else set())
    figure.set_label(_caption(found, lengths))
    return figure


def _accuracies(axis, found) -> set:
    """Draws A; returns which kinds of lines are in it."""
    used = set()
    for task, (column, colour, marker) in DATA_SETS.items():
        mark = {"color": colour, "marker": marker}
        published = [(t, row[column]) for t, row in paper.TABLE_1.items() if row.get(column) is not None]
        if published:
            axis.plot(*zip(*published), **mark, linewidth=0.6, markerfacecolor="white", alpha=0.55)
        mine = found[found["task"] == task] if len(found) else found
        sampled = mine[mine["recipe"].str.startswith("alpha-sampled")] if len(mine) else mine
        dialled = sampled[sampled["method"].map(dial)] if len(sampled) else sampled
        for recipe, rows in dialled.groupby("recipe", sort=False) if len(dialled) else ():
            tuning = "lora" if "LoRA" in short(recipe) else "full"
            used.add(tuning)
            dash = LORA if tuning == "lora" else "-"
            axis.plot(rows["mac_reduction"], rows["value"], **mark, linewidth=1.4, linestyle=dash)
            axis.fill_between(rows["mac_reduction"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
        for control, dash in DASHES.items() if len(mine) else ():
            method = "alpha-sampled" if control == "random" else "conventional"
            there = mine[mine["recipe"].str.startswith(method)]
            for _, rows in (there if len(there) else mine).groupby("recipe", sort=False):
                cut = rows[rows["method"] == METHODS[control]]
                whole = rows[rows["method"].map(dial) & (rows["target"] == 1)]
                if len(cut):
                    drawn = pd.concat([whole, cut])
                    axis.plot(drawn["mac_reduction"], drawn["value"], color=colour, linestyle=dash, linewidth=1.1)
                    used.add(control)
    return used


def _lengths(preserved, alpha, lengths) -> None:
    for (task, model), rows in lengths.groupby(["task", "model"], sort=False) if len(lengths) else ():
        _, colour, marker = DATA_SETS[task]
        dash = OTHER_LAYERS if "layers of" in model else "-"
        coarse = rows[rows["target"].isin(paper.TABLE_1)]
        for axis, field in ((preserved, "preserved"), (alpha, "alpha")):
            axis.plot(rows["mac_reduction"], rows[field], color=colour, linestyle=dash, linewidth=1.2)
            axis.plot(coarse["mac_reduction"], coarse[field], color=colour, marker=marker, linestyle="none")


def _legends(figure, used: set, models: set) -> None:
    from matplotlib.lines import Line2D

    sets = [Line2D([], [], color=colour, marker=marker, label=name) for name, colour, marker in DATA_SETS.values()]
    legend(figure, sets, columns=5)
    grey = {"color": "#444444", "linewidth": 1.2}
    trained = {"full": ("-", "A: dial, ours"), "lora": (LORA, "A: dial, ours (LoRA)")}
    kinds = [
        Line2D([], [], **grey, marker="o", linestyle=d, label=name) for t, (d, name) in trained.items() if t in used
    ]
    kinds.append(Line2D([], [], color="#999999", linewidth=0.6, marker="o", markerfacecolor="white",
                        label="A: dial, the paper's GPT-2"))  # fmt: skip
    kinds += [Line2D([], [], **grey, linestyle=DASHES[c], label=f"A: {NAMES[c]}") for c in DASHES if c in used]
    if any("layers of" not in model for model in models):
        kinds.append(Line2D([], [], **grey, label="B, C: our model"))
    if others := sorted(model.split("layers of ")[1] for model in models if "layers of" in model):
        kinds.append(Line2D([], [], **grey, linestyle=OTHER_LAYERS, label=f"B, C: layers of {', '.join(others)}"))
    legend(figure, kinds, where="outside upper center")


def _caption(found, lengths) -> str:
    def missing(there) -> str:
        tasks = set(there["task"]) if len(there) else set()
        return ", ".join(name for task, (name, *_) in DATA_SETS.items() if task not in tasks) or "none"

    def texts(there) -> str:
        kinds = there[["task", "model", "split"]].drop_duplicates() if len(there) else there
        return "; ".join(f"{row.task} ({row.split}), {row.model}" for row in kinds.itertuples()) or "none"

    sampled = found[found["recipe"].str.startswith("alpha-sampled")] if len(found) else found
    return (
        "Figure 2. Ours against the reduction of MACs, solved for each data set, the paper's against its speed-up by "
        f"the clock. Bands are 95% intervals. A: {texts(sampled)}; not run: {missing(sampled)}. B and C follow from "
        f"the lengths of texts alone: {texts(lengths)}; not run: {missing(lengths)}."
    )
