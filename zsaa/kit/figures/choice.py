"""Table 3's scores: MMLU and its substitute along the dial."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.figures.style import COLOURS, STYLE, line
from zsaa.kit.labels import choice_subject
from zsaa.kit.store import rows_of
from zsaa.kit.tables.table3 import CHANCE


def choice_figure(results: Sequence[dict], columns: int = 2):
    """Score of a four-way choice, MMLU or its substitute, against the MAC reduction of the prefill: a panel for each
    result (kind "choice"), the dial, its controls, and chance."""
    import matplotlib.pyplot as plt

    looks = {
        "alpha": ("dial", COLOURS["alpha"], "o", "-"),
        "printed": ("dial at the paper's printed alphas", COLOURS["paper"], "s", ":"),
        "last": ("last tokens only", COLOURS["last"], "v", "--"),
        "random": ("dial, tokens kept by lot", COLOURS["conventional"], "x", "-."),
    }
    with plt.rc_context(STYLE):
        shared = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
        rows, columns = -(-len(results) // columns), min(columns, len(results))
        figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns + 0.3, 2.6 * rows + 0.7), **shared)
        for axis in axes.flat[len(results) :]:
            axis.set_visible(False)
        handles = {}
        for axis, result in zip(axes.flat, results):
            whole = rows_of(result, "alpha")[:1]
            for control, (name, colour, marker, dashes) in looks.items():
                rows = rows_of(result, control)
                rows = rows if control == "alpha" else sorted(whole + rows, key=lambda r: r["mac_reduction"])
                if len(rows) > 1 or (control == "alpha" and rows):
                    line(axis, rows, (colour, marker, dashes), name, interval=control in ("alpha", "last"))
            for handle, name in zip(*axis.get_legend_handles_labels()):
                handles.setdefault(name, handle)
            axis.axhline(CHANCE, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
            axis.annotate(  # beside the panel, as some results lie on that line
                "chance", (1, CHANCE), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
                fontsize=7, color="#777777", va="center",
            )  # fmt: skip
            task = result["task"]
            how = {"letters": "letters", "text": "answers' own words"}[task["form"]]
            shown = f"{how}, {task['shots']} shots, n = {whole[0]['n']}"
            about = task["name"] + " (a substitute)" * task["substitute"]
            axis.set_title("\n".join((*choice_subject(result).split("; "), about, shown)), fontsize=8)
            axis.set_xlabel("MAC reduction")
            axis.tick_params(labelbottom=True)
        ticks = sorted({r["target"] for result in results for r in rows_of(result, "alpha")})
        axes.flat[0].set_xticks(ticks, [f"{t}x" for t in ticks])
        axes.flat[0].set(ylabel="score (%), bands: 95%", ylim=(min(18, axes.flat[0].get_ylim()[0]), None))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2, fontsize=8)
    return figure
