"""Accuracy against the MAC reduction: those that the story is about, in colour."""

from __future__ import annotations

import numpy as np

from ablation.show.rows import curves, is_main, points_of, protagonists, scorer_of, seed_of
from zsaa.kit.equal import right
from zsaa.kit.figures.style import REFERENCE, STYLE, legend, multiples, panels
from zsaa.kit.store import with_interval
from zsaa.measure.stats import mean_difference
from zsaa.rule import TAU


def accuracy_figure(results: dict[str, dict], title: str):
    """Accuracy against MAC reduction. Solid: the dial, dashed: inputs cut. `protagonists` are in colour, the mean of
    their seeds with the 95% band of the chance in the texts, and where there are several each seed hollow; all other
    rows of the same budget are thin, grey and without a name (see `rows_figures`)."""
    import matplotlib.pyplot as plt

    drawn, heroes = [curve for curve in curves(results) if is_main(curve[1])], protagonists(results)
    most, n = 1.0, 0
    with plt.rc_context(STYLE):
        figure, axis = panels(3.5)
        for _, result, control in drawn:
            rows, x, y = points_of(result, control)
            most, n = max(most, *x), rows[0]["n"]
            hero = heroes.get((result["row"], control))
            if hero is None:
                dashes = "-" if control == "alpha" else (0, (3, 1.5))
                axis.plot(x, y, color="#BBBBBB", linewidth=0.5, linestyle=dashes, zorder=2)
                continue
            seeds = [points_of(r, c) for _, r, c in drawn if (r["row"], c) == (result["row"], control)]
            if seed_of(result) == 0:
                _hero(axis, seeds, hero)
        axis.plot([0.95, 1.05 * most], [50, 50], **REFERENCE)
        axis.set(xscale="log", xlabel="MAC reduction (log scale)", ylabel="accuracy (%)", xlim=(0.95, 1.05 * most))
        multiples(axis, [t for t in (1, 2, 3, 5, 7, 11) if t < 1.05 * most])
        axis.minorticks_off()
        legend(figure, columns=2)
    figure.set_label(_caption(results, title, n))
    return figure


def _hero(axis, seeds: list[tuple], hero: tuple) -> None:
    """The mean of the seeds in colour, each of several hollow. Each seed: see `points_of`."""
    name, colour, marker, dashes = hero
    x = seeds[0][1]
    cells = [[rows[i] for rows, *_ in seeds if i < len(rows)] for i in range(len(x))]
    found = [mean_difference([right(row) for row in rows], [np.zeros(rows[0]["n"])]) for rows in cells]
    line = {"color": colour, "linewidth": 1.5, "linestyle": dashes, "zorder": 4, "label": name}
    axis.plot(x, [mean for mean, _ in found], marker="none" if len(seeds) > 1 else marker, **line)
    axis.fill_between(x, *zip(*(ends for _, ends in found)), color=colour, alpha=0.15, linewidth=0, zorder=3)
    for _, x, y in seeds if len(seeds) > 1 else ():
        axis.plot(x, y, color=colour, marker=marker, markerfacecolor="white", linestyle="none", markersize=3, zorder=5)


def _caption(results: dict[str, dict], title: str, n: int) -> str:
    """What the reader must know: what the lines are, what training cost, and what a scorer has by itself."""
    shown = {
        name.removesuffix(", dial"): result
        for (row, _), (name, *_) in protagonists(results).items()
        for result in results.values()
        if result["row"] == row and is_main(result) and not seed_of(result)
    }
    text = (
        f"{title}, n = {n:,}. Solid lines are the dial, dashed ones inputs that were cut; where markers are hollow, "
        "they are seeds and the line their mean; bands 95% intervals of the chance in the texts; grey the other rows "
        "of ablation/config.yaml with the same epochs, named in the figures of all rows."
    )
    cost = "; ".join(f"{name} {result['log']['epochs_of_compute']:.2g}" for name, result in shown.items())
    text += f" Training MACs, in epochs at alpha = 1, on the same samples: {cost}."
    rates: dict[float, list[str]] = {}
    for name, result in shown.items():
        rates.setdefault(result["training"]["learning_rate"], []).append(name)
    most, *others = sorted(rates, key=lambda rate: -len(rates[rate]))
    text += f" Learning rate {most:g}" + "".join(f", of {' and '.join(rates[r])} {r:g}" for r in others) + "."
    floors = {name: result["variant"]["tau"] for name, result in shown.items() if result["variant"]["tau"] != TAU}
    text += "".join(f" {name} keeps at least {tau} tokens (tau), the others {TAU}." for name, tau in floors.items())
    for name, result in shown.items():
        if alone := scorer_of(result):
            text += (
                f" Not drawn, a control: the votes of {name} by themselves, summed in layer 1, without the layers above"
                f", have {with_interval(alone)} at {alone['mac_reduction']:.0f}x. Scores taught by gradients have no "
                "verdict of their own."
            )
    return text
