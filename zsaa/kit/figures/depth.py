"""Fewer layers: how alike the states between layers are, and what it costs to leave some out."""

from __future__ import annotations

import math

from zsaa.kit.figures.style import COLOURS, STYLE, legend, panels

LOOKS = {
    "block": ("block, angular distance", COLOURS["alpha"], "o", "-"),
    "influence": ("least influence", COLOURS["conventional"], "s", "--"),
    "last": ("top layers", COLOURS["last"], "v", ":"),
}
MOST = 20  # ratios above it are drawn at the edge: a broken model is broken


def depth_figure(result: dict):
    """From a result of kind "depth": angular distance of each block of layers, each row over its least and largest, as
    in the paper on optimization strategies (its Figure 5), and the ratio of perplexities without some layers."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (heat, cost) = panels(4.2, 2, 1, height_ratios=[1.15, 1])
        angular = [[float(v) for v in row.split()] for row in result["similarity"]["angular"]]
        _heat(figure, heat, angular)
        _costs(cost, result["rows"])
        legend(figure)
    best = {row["removed"]: row["layers"] for row in result["rows"] if row["way"] == "block"}
    named = "; ".join(f"{n}: layers {block[0]} to {block[-1]}" for n, block in best.items())
    figure.set_label(
        f"Fewer layers of {result['model']['name']}, untuned. Above: the angular distance between the states before "
        f"and after each block of layers, on {result['similarity']['texts']} texts, counted from 0; the best blocks "
        f"are {named}. Below: perplexity without so many layers over the whole model's, {result['task']['title']}, "
        f"n = {result['rows'][0]['n']} windows, 95% intervals; what is above {MOST}x is drawn at the edge."
    )
    return figure


def distances_figure(similarity):
    """The heatmap alone, from `zsaa.depth.similarity`."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, heat = panels(2.4)
        layers = similarity.num_layers
        _heat(figure, heat, [similarity.angular[at, at:].tolist() for at in range(layers)] + [[0.0]])
    figure.set_label(
        "The angular distance between the states before and after each block of layers, each row over its least and "
        f"largest; {similarity.texts} texts. The lightest cell of a row is the block that changes a text's last state "
        "least."
    )
    return figure


def _heat(figure, axis, angular: list[list[float]]) -> None:
    """Distances of every block. angular: row l from l to l, l + 1, ..."""
    import numpy as np

    layers = len(angular) - 1
    grid = np.full((layers, layers), np.nan)  # [block size - 1, first layer]
    for first, row in enumerate(angular):
        for n, distance in enumerate(row[1:], start=1):
            grid[n - 1, first] = distance
    low, high = np.nanmin(grid, axis=1, keepdims=True), np.nanmax(grid, axis=1, keepdims=True)
    scaled = (grid - low) / np.where(high > low, high - low, 1)
    image = axis.pcolormesh(np.arange(layers + 1), np.arange(1, layers + 2) - 0.5, scaled, cmap="viridis_r")
    image.set_rasterized(True)
    axis.set(xlabel="first layer of the block", ylabel="layers in the block", xlim=(0, layers))
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="angular distance,\nleast to largest of a row", shrink=0.8)


WAYS = {  # control -> its line
    "layers": ("first layers, one model", COLOURS["alpha"], "o", "-"),
    "confidence": ("first layers, until sure", COLOURS["conventional"], "s", "-"),
    "alpha": ("fewer tokens", COLOURS["last"], "v", ":"),
    "both-confidence": ("fewer tokens, until sure", COLOURS["random"], "^", "--"),
    "both-sure": ("both, chosen by budget", "black", "D", "none"),
}


def exits_figure(results: list[dict], title: str = "", others: dict[str, list[dict]] | None = None):
    """From results of ablation rows with exits: accuracy against MACs by each way to save them, a line per result, and
    named by its row where there are several. others: more lines by name, as lists of {"mac_reduction", "accuracy"}."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = panels(2.9 + 0.7 * (len(results) > 1))
        for number, result in enumerate(results):
            for control, (name, colour, marker, dash) in WAYS.items():
                rows = [row for row in result["rows"] if row["control"] == control]
                if control == "both-confidence":  # the best of several strengths
                    rows = _frontier(rows)
                rows = sorted(rows, key=lambda row: row["mac_reduction"])
                look = dict(
                    color=colour, marker=marker, linestyle=dash, markersize=2.5, alpha=0.9 - 0.25 * (number > 0)
                )
                label = f"{name} ({result['row']})" if len(results) > 1 else name
                if rows:
                    axis.plot([r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows], label=label, **look)
        for name, rows in (others or {}).items():
            where = [r["mac_reduction"] for r in rows], [r["accuracy"] for r in rows]
            axis.plot(*where, color="black", marker="x", linestyle="none", markersize=4, label=name)
        axis.set(xscale="log", xlabel="MAC reduction", ylabel="accuracy, %")
        axis.set_xticks([1, 2, 3, 5, 7, 10], ["1x", "2x", "3x", "5x", "7x", "10x"])
        axis.set_xlim(0.97, 11)
        axis.minorticks_off()
        legend(figure)
    n = results[0]["rows"][0]["n"]
    figure.set_label(
        f"One model at every depth{title}: accuracy by how many times fewer MACs are spent, n = {n} reviews. "
        "Until sure: a text leaves behind the first layer that is sure of its answer; MACs are means."
    )
    return figure


def _frontier(rows: list[dict]) -> list[dict]:
    """Those that no other row beats in both MACs and accuracy."""
    return [
        row
        for row in rows
        if not any(r["mac_reduction"] >= row["mac_reduction"] and r["accuracy"] > row["accuracy"] for r in rows)
    ]


def _costs(axis, rows: list[dict]) -> None:
    for way, (name, colour, marker, dash) in LOOKS.items():
        mine = [row for row in rows if row["way"] in ("none", way)]
        at = [row["removed"] for row in mine]
        ratio = [min(row["ratio"], MOST) for row in mine]
        axis.plot(at, ratio, color=colour, marker=marker, linestyle=dash, label=name)
        inside = [row for row in mine if row["ratio"] <= MOST]
        ends = [[min(row["ratio_ci95"][i], MOST) for row in inside] for i in (0, 1)]
        axis.fill_between([row["removed"] for row in inside], *ends, color=colour, alpha=0.2, linewidth=0)
    axis.set(yscale="log", xlabel="layers left out", ylabel="perplexity over\nthe whole model's")
    ticks = [tick for tick in (1, 1.5, 2, 3, 5, 10, MOST) if tick <= MOST]
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(0.95, MOST * math.sqrt(1.1))
    axis.set_xticks(sorted({row["removed"] for row in rows}))
