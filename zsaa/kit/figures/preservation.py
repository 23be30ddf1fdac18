"""Figure 3: which tokens each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.figures.style import STYLE, legend, panels

KEPT, COUNT = "#4C8BC0", "#C8102E"
WORDS = 48  # as many tokens can be read beside a figure


def preservation_figure(kept: dict[float, list[list[int]]], tokens: Sequence[str]):
    """Which tokens each layer keeps, a panel per alpha, the first layer at the top.

    kept: alpha -> per layer the kept positions; tokens: the text, one string per position. Blue: kept; white: dropped
    (here or below). The red line counts the kept tokens of each layer, on the same axis as the positions. A short text
    (WORDS tokens) stands beside its panels, from top to bottom.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    n, layers, read = len(tokens), len(next(iter(kept.values()))), len(tokens) <= WORDS
    columns = min(2, len(kept))
    rows = -(-len(kept) // columns)
    with plt.rc_context({**STYLE, "axes.grid": False}):
        height = (0.11 * n + 0.7) if read else 1.3
        figure, axes = panels(height * rows + 0.35, rows, columns, squeeze=False, sharex=True, sharey=True)
        for axis in axes.flat[len(kept) :]:
            axis.remove()
        for axis, (alpha, per_layer) in zip(axes.flat, kept.items()):
            grid = np.zeros((layers, n))
            for layer, positions in enumerate(per_layer):
                grid[layer, positions] = 1
            counts = [len(positions) for positions in per_layer]
            share = sum(counts) / (layers * n)
            said = f"{share:.0%} kept,\n{counts[-1]} of {n} at the top"
            axis.set_title(rf"$\alpha$ = {alpha:g}: " + said, fontsize=6.5)
            _cells(axis, grid.T if read else grid)
            places = np.arange(layers) + 0.5
            axis.plot(*((places, counts) if read else (counts, places)), color=COUNT, linewidth=1.2)
        _axes(axes, tokens, layers, read)
        legend(figure, _handles())
    figure.set_label(
        f"Which of {n} tokens each of {layers} layers keeps, at {len(kept)} settings of alpha. Blue tokens are kept, "
        "white ones are gone, here or in a layer below. The red line counts what is kept."
    )
    return figure


def _cells(axis, grid) -> None:
    import seaborn
    from matplotlib.colors import ListedColormap

    look = {"cmap": ListedColormap(["white", KEPT]), "vmin": 0, "vmax": 1, "cbar": False, "rasterized": True}
    lines = {"linewidths": 0.2, "linecolor": "#E5E5E5"} if grid.size < 2000 else {}
    seaborn.heatmap(grid, ax=axis, xticklabels=False, yticklabels=False, **look, **lines)
    for spine in axis.spines.values():
        spine.set(visible=True, color="#888888", linewidth=0.6)


def _axes(axes, tokens: Sequence[str], layers: int, read: bool) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    marks = [0, *range(4, layers, 5)] if layers > 12 else list(range(layers))
    first = axes.flat[0]
    if read:
        first.set_yticks([i + 0.5 for i in range(len(tokens))], [t.strip() or repr(t) for t in tokens], fontsize=6)
        first.set_ylim(len(tokens), 0)
        first.set_xticks([m + 0.5 for m in marks], [m + 1 for m in marks])
        for axis in axes[-1]:
            axis.set_xlabel("layer")
    else:
        first.set_yticks([m + 0.5 for m in marks], [m + 1 for m in marks])
        first.set(xlim=(0, len(tokens)), ylim=(layers, 0))
        first.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        first.xaxis.set_major_formatter(ScalarFormatter())
        for axis in axes[:, 0]:
            axis.set_ylabel("layer")
        for axis in axes[-1]:
            axis.set_xlabel("token position")


def _handles() -> list:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    return [
        Rectangle((0, 0), 1, 1, color=KEPT, label="kept"),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", label="dropped"),
        Line2D([], [], color=COUNT, label="number kept"),
    ]
