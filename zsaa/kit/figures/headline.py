"""The README's figure: what the adapter holds on IMDB, beside the paper's curve, its recipe, and shorter inputs."""

from __future__ import annotations

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, STYLE, legend, multiples, panels
from zsaa.kit.points import settings

SEEDS = "ablation/imdb/{}.json"
LINES = {  # name -> result files, one per seed; method, colour, marker, dashes
    "zsaa+ by adapters (2 seeds)": (
        tuple(SEEDS.format(f"lora-crops{seed}-epochs5") for seed in ("", "-seed1")), "dial", "#000000", "o", "-"),
    "inputs cut to both ends, tuned on such (3)": (
        tuple(SEEDS.format(f"truncated-ends-faster{seed}") for seed in ("", "-seed1", "-seed2")),
        "both ends only", COLOURS["random"], "D", "--"),
    "inputs cut to the last tokens, tuned on such (3)": (
        tuple(SEEDS.format(f"truncated-last-faster{seed}") for seed in ("", "-seed1", "-seed2")),
        "last tokens only", COLOURS["last"], "v", "--"),
    "the paper's recipe, as we ran it (1)": (("accuracy/imdb-alpha-sampled.json",), "dial", COLOURS["alpha"], "s", "-"),
}  # fmt: skip


def headline_figure(points):
    """Accuracy on IMDB against MAC reduction, from the committed points: LINES, and the paper's curve against its
    speed-up."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = panels(3.2)
        printed = [(t, row["IMDB"]) for t, row in paper.TABLE_1.items()]
        style = {"color": COLOURS["paper"], "marker": "x", "linestyle": "-."}
        axis.plot(*zip(*printed), **style, label=f"the paper: {paper.TABLE_1_MODEL}, at this speed-up")
        for name, (files, method, colour, marker, dashes) in LINES.items():
            mine = points[points["file"].isin(files) & points["method"].str.startswith(method)]
            rows = settings(mine[mine["metric"] == "accuracy"])
            seeds = rows.groupby(rows["mac_reduction"].round(1))["accuracy"]
            x = seeds.mean().index
            axis.plot(x, seeds.mean(), color=colour, marker=marker, linestyle=dashes, label=name)
            axis.fill_between(x, seeds.min(), seeds.max(), color=colour, alpha=0.13, linewidth=0)
        axis.set(xlabel="reduction of multiply-accumulates", ylabel="IMDB accuracy (%)")
        multiples(axis, list(paper.TABLE_1))
        legend(figure, columns=1)
    figure.set_label(
        f"IMDB, {rows['accuracy_n'].iloc[0]:,.0f} held-out reviews, SmolLM2-135M-Instruct (Q4_1): accuracy against "
        "the reduction of MACs, means over seeds and their range (the reviews' own 95% intervals reach about a point "
        "to either side). "
        "The paper's GPT-2 stands against its own speed-up, measured by the "
        "clock, on IMDB's test set. The adapter was trained for five epochs, the paper's recipe for 1.5, the others "
        "for one."
    )
    return figure
