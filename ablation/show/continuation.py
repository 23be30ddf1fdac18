"""Untuned continuation behind a pruned prompt."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from ablation.show.panels import apart
from zsaa.kit.figures.style import STYLE, multiples, panels
from zsaa.measure.stats import half_width, interval


def continuation_table(result: dict):
    """Per variant and MAC reduction: agreement, perplexity, and how much worse (+) than truncation on the same windows:
    mean difference in nats per token with its standard error."""
    import pandas as pd

    lines, stock = [], next(r for r in result["rows"] if r["variant"] == "stock")
    for row in result["rows"]:
        rival = next((r for r in result["rows"] if r["variant"] == "truncation" and r["target"] == row["target"]), None)
        apart = "-"
        if rival is not None and rival is not row:
            differences = [a - b for a, b in zip(row["nll"], rival["nll"])]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            apart = f"{statistics.fmean(differences):+.3f} ± {error:.3f}"
        lines.append(
            {"variant": row["variant"], "MACs": f"{row['mac_reduction']:.2f}x", "agreement (%)": row["agreement"],
             "perplexity": round(row["perplexity"], 1), "over stock": f"{row['perplexity'] / stock['perplexity']:.3f}x",
             "nats over truncation": apart, "n": row["n"]}
        )  # fmt: skip
    return pd.DataFrame(lines)


GREY = "#9A9A9A"

CONTINUED = {  # colour, marker, dashes
    "truncation": ("#000000", "o", "--"),
    "column sum (paper)": ("#D55E00", "s", "-"),
    "column mean": ("#E69F00", "^", "-"),
    "hybrid": ("#0072B2", "D", "-"),
    "recent, once": ("#009E73", "v", "-"),
    "random": ("#CC79A7", "x", "-"),
}


def continuation_figure(result: dict, worst: float = 2.2):
    """Behind a pruned prompt, against its MAC reduction: how often the next token is the stock model's, and perplexity
    over stock (log scale, up to `worst`). `CONTINUED` are in colour, with 95% bands (of the ratio: paired over the
    windows, Student's t); the rest is grey. The caption says which leave the scale, and how far they go."""
    import matplotlib.pyplot as plt

    stock = next(r for r in result["rows"] if r["variant"] == "stock")
    lines: dict[str, list] = {}
    for row in result["rows"]:
        if row["variant"] != "stock":
            lines.setdefault(row["variant"], []).append(row)
    ratio = {name: [row["perplexity"] / stock["perplexity"] for row in rows] for name, rows in lines.items()}
    beyond = {name: values for name, values in ratio.items() if max(values) > worst}
    with plt.rc_context(STYLE):
        figure, (above, below) = panels(5.4, 2, 1, sharex=True, height_ratios=(1, 1.25))
        ends, most = {above: [], below: []}, max(r["mac_reduction"] for r in result["rows"])
        for name, rows in lines.items():
            if min(ratio[name]) > worst:
                continue
            colour, marker, dashes = CONTINUED.get(name, (GREY, None, "-"))
            strong = name in CONTINUED
            look = {"color": colour, "marker": marker, "linewidth": 1.4 if strong else 0.6, "linestyle": dashes}
            x = [1.0, *(row["mac_reduction"] for row in rows)]
            for axis, y in ((above, [100.0, *(r["agreement"] for r in rows)]), (below, [1.0, *ratio[name]])):
                axis.plot(x, y, **look, zorder=4 if strong else 2)
                if (x[-1] > 0.95 * most or strong) and (axis is above or y[-1] <= worst):
                    ends[axis].append((x[-1], y[-1], name, colour, strong))
            if strong:
                _bands(above, below, x, rows, stock, colour)
        beside = 1.07 * most
        _names(above, ends[above], beside, 6.0, 2, 100)
        _names(below, ends[below], beside, 0.048 * math.log(worst), 0.0, math.log(worst), (math.log, math.exp))
        above.set(ylabel="next token as stock's (%)", ylim=(0, 102), xscale="log")
        below.set(xlabel="MAC reduction of the prompt", ylabel="perplexity over stock", yscale="log")
        below.set(ylim=(0.985, worst), xlim=(0.98, most * 3))
        multiples(below, [t for t in (1, 1.1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3) if t <= worst], "y")
        multiples(below, sorted({1, *(row["target"] for row in result["rows"])}))
        for axis in (above, below):
            axis.minorticks_off()
    figure.set_label(_caption(result, stock, beyond, worst))
    return figure


def _bands(above, below, x: list[float], rows: list[dict], stock: dict, colour: str) -> None:
    around = [interval(round(row["agreement"] * row["n"] / 100), row["n"]) for row in rows]
    above.fill_between(x, *zip((100, 100), *around), color=colour, alpha=0.13, linewidth=0)
    edges = [(1.0, 1.0)]
    for row in rows:
        differences = [a - b for a, b in zip(row["nll"], stock["nll"])]
        error = half_width(differences)
        edges.append(tuple(math.exp(statistics.fmean(differences) + s * error) for s in (-1, 1)))
    below.fill_between(x, *zip(*edges), color=colour, alpha=0.13, linewidth=0)


def _names(axis, ends: Sequence[tuple], x: float, gap: float, low: float, high: float, scale=(float, float)) -> None:
    """Names beside the lines' ends, ends: (x, y, name, colour, strong), in a column at `x`, none over another. scale:
    into the measure in which `gap`, `low` and `high` are given, and back."""
    there, back = scale
    for (at, y, name, colour, strong), place in zip(ends, apart([there(end[1]) for end in ends], gap, low, high)):
        colour = colour if strong else "#6A6A6A"
        axis.plot([at * 1.01, x * 0.99], [y, back(place)], color=colour, linewidth=0.5, alpha=0.6, clip_on=False)
        weight = "bold" if strong else "normal"
        axis.text(x, back(place), name, color=colour, va="center", fontsize=6, fontweight=weight)


def _caption(result: dict, stock: dict, beyond: dict[str, list[float]], worst: float) -> str:
    text = (
        f"Untuned {result['model']['name']} behind a pruned prompt, {stock['n']} held-out reviews: how often the next "
        "token is the stock model's, and perplexity over stock, against the reduction of the prompt's MACs. Bands are "
        "95% intervals; grey: variants without a colour of their own."
    )
    if not beyond:
        return text
    reach = {name: [f"{v:,.0f}" if v > 99 else f"{v:.1f}" for v in (min(vs), max(vs))] for name, vs in beyond.items()}
    listed = "; ".join(f"{name} ({' to '.join(dict.fromkeys(ends))}x)" for name, ends in reach.items())
    return f"{text} Beyond {worst:g}x, and not drawn there: {listed}."
