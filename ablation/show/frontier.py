"""Accuracy on the test part of imdb_films against the MAC reduction: the dial, and what a user could have instead."""

from __future__ import annotations

from pathlib import Path

from ablation.show.films import interval
from zsaa.kit.figures.style import COLOURS, REFERENCE, STYLE, legend, multiples, panels
from zsaa.kit.points import settings

FOLDER = "ablation/imdb_films/test"
DIAL, FAILED = "the dial, seed 0", "the dial, seed 1: a failed training"
# name -> recipes (rows and epochs), method, seeds, colour, marker, dashes
LINES = {
    DIAL: (("lora-crops, 3 epochs",), "dial", (0,), "#000000", "o", "-"),
    FAILED: (("lora-crops, 3 epochs",), "dial", (1,), "#000000", "x", ":"),
    "text cut to both ends": (("lora-cut-ends, 3 epochs",), "both ends only", (0, 1), COLOURS["random"], "D", "--"),
    "first layers": (
        tuple(f"layers-{count}, 3 epochs" for count in (15, 10, 6, 3)),
        *("first layers only", (0, 1, 2), COLOURS["first"], "^", "--"),
    ),
    "first layers, distilled": (
        tuple(f"layers-{count}-taught, 3 epochs" for count in (15, 10, 6, 3)),
        *("first layers only", (0, 1, 2), COLOURS["last"], "v", "--"),
    ),
    "the paper's recipe": (("paper, 5 epochs",), "dial", (0,), COLOURS["alpha"], "s", "-"),
}
CHOSEN = f"{FOLDER}/paper-epochs5-rate0.0002.json"  # of two learning rates, by validation


def frontier_figure(points):
    """The points of the test part: means over seeds with their range, of the dial each seed by itself."""
    import matplotlib.pyplot as plt

    tested = points[points["file"].str.startswith(FOLDER) & points["metric"].isin(("accuracy", "target"))]
    tested = tested[(tested["recipe"] != "paper, 5 epochs") | (tested["file"] == CHOSEN)]
    bag = tested[tested["method"] == "bag of words"]
    with plt.rc_context(STYLE):
        figure, axis = panels(3.7)
        for name, line in LINES.items():
            _draw(axis, name, tested, line)
        axis.axhline(
            bag["value"].iloc[0], **REFERENCE | {"color": "#555555", "linestyle": "-."}, label="TF-IDF, on a CPU"
        )
        axis.set(xscale="log", xlabel="MAC reduction (log scale)", ylabel="accuracy (%)", xlim=(0.95, 11.6))
        multiples(axis, (1, 2, 3, 5, 7, 9, 11))
        axis.minorticks_off()
        legend(figure, columns=2)
    figure.set_label(_caption(tested, bag["value"].iloc[0]))
    return figure


def _draw(axis, name: str, tested, line: tuple) -> None:
    recipes, method, seeds, colour, marker, dashes = line
    mine = tested[tested["recipe"].isin(recipes) & tested["method"].str.startswith(method) & tested["seed"].isin(seeds)]
    rows = settings(mine)
    cells = rows.groupby(rows["mac_reduction"].round(1))
    x, y = cells["mac_reduction"].mean(), cells["accuracy"].mean()
    axis.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=name, zorder=4)
    if len(seeds) > 1:
        ends = (cells["accuracy"].min(), cells["accuracy"].max())
    else:
        ends = zip(*(interval(Path(row.file).stem, "alpha", row.target) for row in rows.itertuples()))
    axis.fill_between(x, *ends, color=colour, alpha=0.13, linewidth=0)


def _caption(tested, bag: float) -> str:
    return (
        f"IMDB, {tested['n'].max():,.0f} reviews of films that no training text is about, read once: accuracy of "
        "SmolLM2-135M against the reduction of MACs by the dial (zsaa+ by adapters, each seed by itself; the second "
        "training failed), by texts cut to both ends for adapters trained on such (two seeds), by the first 15, 10, 6 "
        "or 3 layers alone (three seeds; bands: the range of several seeds, "
        "else 95% intervals, films together) and by the paper's recipe "
        f"at the learning rate that validation chose; and of TF-IDF with a logistic regression ({bag:.1f}%)."
    )
