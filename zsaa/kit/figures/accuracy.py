"""Accuracy along the dial: a figure per data set."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, CUTS, DATA_SETS, STYLE, dials, line
from zsaa.kit.store import measured, over_seeds, rows_of


def accuracy_figure(results: Sequence[dict], title: str, published: str | None = "IMDB"):
    """Accuracy against MAC reduction for one data set: the recipes and conventional fine-tuning under the dial, the
    conventional one (or what there is without it) on truncated inputs, tokens kept at random, and the paper's curve of
    another model (against its wall-clock speed-up). Where another recipe's dial goes further than the conventional one
    was asked to, its own truncated inputs go on from there, hollow. The title says how many samples the first result
    has."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
        titled = results[0]["provenance"]["eval_samples"]
        conventional = [
            r for r in results if (r["recipe"]["method"], r["recipe"]["tuning"]) == ("conventional", "full")
        ]
        cut_by = conventional or results
        far = max((r["target"] for c in cut_by for side in CUTS for r in rows_of(c, side)), default=0)
        floors = {r["recipe"].get("tau") for r in results}
        for result in results:
            method = result["recipe"]["method"]
            tuning = " (LoRA)" if result["recipe"]["tuning"] == "lora" else ""
            colour = COLOURS["alpha" if method == "alpha-sampled" else method]
            style = (colour, "o", ":" if tuning else "-")
            if result in dials(results):
                floor = f" (tau = {result['recipe']['tau']})" if len(floors) > 1 else ""
                line(axis, rows_of(result, "alpha"), style, f"{method}{tuning}, dial{floor}")
            if rows_of(result, "random"):
                n = rows_of(result, "random")[0]["n"]  # where it is not the title's
                name = f"{method}{tuning}, tokens kept at random" + (f" (n = {n})" if n != titled else "")
                marker = {"zsaa+": "D", "conventional": "P"}.get(method, "s")
                line(axis, rows_of(result, "random"), (COLOURS["random"], marker, (0, (1, 2))), name)
            for side, (marker, how) in CUTS.items():
                name, rows = f"{method}{tuning}, {how} only", rows_of(result, side)
                if result in cut_by and rows:
                    line(axis, rows_of(result, "alpha")[:1] + rows, (COLOURS[side], marker, "--"), name)
                elif rows := [r for r in rows if r["target"] > far]:
                    hollow = {"markersize": 4, "markerfacecolor": "white", "linewidth": 1, "linestyle": ":"}
                    x, y = [r["mac_reduction"] for r in rows], [measured(r) for r in rows]
                    axis.plot(x, y, color=COLOURS[side], marker=marker, label=name, **hollow)
        if published:
            points = [(t, row[published]) for t, row in paper.TABLE_1.items() if row[published] is not None]
            axis.plot(*zip(*points), color=COLOURS["paper"], marker="x", linewidth=1, linestyle="-.", markersize=5,
                      label=f"paper, {paper.TABLE_1_MODEL} (its speed-up)")  # fmt: skip
        axis.axhline(50, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        metric = "F1" if results[0]["task"]["metric"] == "f1" else "accuracy"
        axis.set(xlabel="MAC reduction", ylabel=f"{metric} (%)", title=title)
        reached = max(row["target"] for result in results for row in result["rows"])
        ticks = [t for t in paper.TABLE_1 if t <= reached]
        axis.set_xticks(ticks, [f"{t}x" for t in ticks])
        figure.legend(fontsize=7.5, loc="outside lower center", ncols=2)
    return figure


def accuracy_figures(results: Sequence[dict]) -> dict:
    """One accuracy figure per data set that the results hold, by task name."""
    figures = {}
    for name, (title, *_) in DATA_SETS.items():
        if chosen := [r for r in over_seeds(results) if r["task"]["name"] == name]:
            model, n = chosen[0]["model"]["name"], chosen[0]["provenance"]["eval_samples"]
            title = f"{title}, {model}: {n} held-out samples, 95% intervals"
            if taught := chosen[0]["task"].get("training_substitute"):
                title += "\n" + textwrap.fill(f"trained on a substitute: {taught}", 75, break_on_hyphens=False)
            figures[name] = accuracy_figure(chosen, title, chosen[0]["task"]["paper_column"])
    return figures
