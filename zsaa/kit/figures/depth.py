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
    import numpy as np

    with plt.rc_context(STYLE):
        figure, (heat, cost) = panels(4.2, 2, 1, height_ratios=[1.15, 1])
        angular = [
            [float(v) for v in row.split()] for row in result["similarity"]["angular"]
        ]  # row l: from l to l, l + 1, ...
        layers = len(angular) - 1
        grid = np.full((layers, layers), np.nan)  # [block size - 1, first layer]
        for first, row in enumerate(angular):
            for n, distance in enumerate(row[1:], start=1):
                grid[n - 1, first] = distance
        low, high = np.nanmin(grid, axis=1, keepdims=True), np.nanmax(grid, axis=1, keepdims=True)
        scaled = (grid - low) / np.where(high > low, high - low, 1)
        image = heat.pcolormesh(np.arange(layers + 1), np.arange(1, layers + 2) - 0.5, scaled, cmap="viridis_r")
        image.set_rasterized(True)
        heat.set(xlabel="first layer of the block", ylabel="layers in the block", xlim=(0, layers))
        heat.grid(False)
        figure.colorbar(image, ax=heat, label="angular distance,\nleast to largest of a row", shrink=0.8)
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
