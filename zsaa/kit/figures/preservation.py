"""Figure 3: which tokens each layer keeps."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.figures.style import STYLE


def preservation_figure(kept: dict[float, list[list[int]]], tokens: Sequence[str], columns: int = 2):
    """Figure 3: which tokens each layer keeps, one panel per alpha.

    kept: alpha -> per layer the kept positions; tokens: the text, one string per position. Blue: kept; white: dropped
    (here or below). The red line counts the kept tokens of each layer, on the same axis as the positions.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    import seaborn as sns
    from matplotlib.colors import ListedColormap

    n, layers = len(tokens), len(next(iter(kept.values())))
    rows = -(-len(kept) // columns)
    labels = n <= 64
    with plt.rc_context({**STYLE, "axes.grid": False}):
        panel = (0.15 * n + 0.6, 0.11 * layers + 1.3) if labels else (5.2, 2.6)
        figure, axes = plt.subplots(
            rows, columns, figsize=(panel[0] * columns, panel[1] * rows), squeeze=False, layout="constrained"
        )
        for axis, (alpha, per_layer) in zip(axes.flat, kept.items()):
            grid = np.zeros((layers, n))
            for layer, positions in enumerate(per_layer):
                grid[layer, positions] = 1
            sns.heatmap(
                grid, ax=axis, cmap=ListedColormap(["white", "#4C8BC0"]), cbar=False, vmin=0, vmax=1,
                rasterized=True, linewidths=0.3 if labels else 0, linecolor="#E5E5E5",
                xticklabels=False, yticklabels=False,
            )  # fmt: skip
            counts = [len(positions) for positions in per_layer]
            axis.plot(counts, np.arange(layers) + 0.5, color="#C8102E", linewidth=1.6)
            share = sum(counts) / (layers * n)
            axis.set_title(rf"$\alpha$ = {alpha:g}: {share:.0%} of token-layers kept, {counts[-1]} of {n} at the top")
            axis.set_ylabel("layer")
            ticks = [0, *range(4, layers, 5)] if layers > 12 else range(layers)
            axis.set_yticks([t + 0.5 for t in ticks], [t + 1 for t in ticks], rotation=0)
            if labels:
                axis.set_xticks(np.arange(n) + 0.5, [t.strip() or repr(t) for t in tokens], rotation=90, fontsize=6.5)
            else:
                places = np.linspace(0, n - 1, 6, dtype=int)
                axis.set_xticks(places + 0.5, places, rotation=0)
                axis.set_xlabel("token position")
            for spine in axis.spines.values():
                spine.set(visible=True, color="#888888", linewidth=0.6)
        for axis in axes.flat[len(kept) :]:
            axis.set_visible(False)
        figure.legend(
            handles=[
                plt.Rectangle((0, 0), 1, 1, color="#4C8BC0", label="kept"),
                plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor="#888888", label="dropped"),
                plt.Line2D([], [], color="#C8102E", label="number of kept tokens"),
            ],
            loc="outside lower center", ncols=3,
        )  # fmt: skip
    return figure
