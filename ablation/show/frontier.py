"""Accuracy on the test part of imdb_films against MACs and the clock: the dial, and what a user could have instead."""

from __future__ import annotations

import json
from pathlib import Path

from ablation.show import exits
from ablation.show.films import interval
from zsaa.kit.figures.style import COLOURS, REFERENCE, STYLE, legend, multiples, panels
from zsaa.kit.points import settings
from zsaa.kit.store import RESULTS

FOLDER = "ablation/imdb_films/test"
TAUGHT = ("layers-6-taught, 3 epochs at 0.0002", "layers-3-taught, 3 epochs at 0.0002")
CONTROLS = {"dial": "alpha", "first layers only": "layers", "both ends only": "last"}  # of a method that is timed
DIAL, FAILED, PAPER = "the dial", "one training before: failed", "the paper's recipe, by LoRA"
# name -> recipes (rows, epochs and rates, which validation chose), method, seeds, colour, marker, dashes
LINES = {
    DIAL: (("steady, 3 epochs or 660 s at 0.001",), "dial", (0, 1, 2, 3, 4), "#000000", "o", "-"),
    FAILED: (("lora-crops, 3 epochs at 0.001",), "dial", (1,), "#000000", "x", ":"),
    "text cut to both ends": (
        ("lora-cut-ends, 3 epochs at 0.001",),
        "both ends only",
        (0, 1),
        COLOURS["random"],
        "D",
        "--",
    ),
    "first layers": (
        tuple(f"layers-{n}, 3 epochs at {rate}" for n, rate in ((15, 1e-4), (10, 2e-4), (6, 1e-4), (3, 2e-4))),
        *("first layers only", (0, 1, 2), COLOURS["first"], "^", "--"),
    ),
    "first layers, distilled": (
        ("layers-15-taught, 3 epochs at 0.0002", "layers-10-tutored, 3 epochs at 0.0002", *TAUGHT),
        *("first layers only", (0, 1, 2, 3, 4), COLOURS["last"], "v", "--"),
    ),
    PAPER: (("paper-lora, 5 epochs or 400 s at 0.001",), "dial", (0,), COLOURS["alpha"], "s", "-"),
}
UNTIMED = (FAILED, PAPER)
# result file -> texts at once, tokens of each, the axis' name and ticks
CLOCKS = {
    "speed/h200/rivals-smollm2-135m.json": (32, 256, "ms a text, H200", (0.05, 0.1, 0.2, 0.3)),
    "speed/cpu/rivals-smollm2-135m.json": (1, 256, "ms a text, two CPU cores", (100, 200, 400)),
}
BOTH, WORDS = "both dials, texts leave when sure", "TF-IDF when sure, else a model"
WHEN_SURE = {BOTH: ("#D55E00", "*", "-"), WORDS: ("#555555", "P", "-.")}  # against MACs alone: they were not timed


def milliseconds(name: str = next(iter(CLOCKS))) -> dict[tuple[str, float], float]:
    """(control, MAC reduction that was asked for; of layers the one that they have) -> milliseconds a text, by a result
    file of CLOCKS; on the GPU all ways are recorded as CUDA graphs. Cuts to both ends take the time of the last tokens,
    which are as many."""
    batch, tokens, *_ = CLOCKS[name]
    rows = json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if (row["batch"], row["tokens"]) == (batch, tokens)]
    depth = max(row["layers"] for row in rows)
    asked = {("layers", depth / row["layers"]): row for row in rows if row["control"] == "layers"}
    asked |= {(row["control"], row["target"]): row for row in rows if row["control"] != "layers"}
    asked["last", 1] = asked["alpha", 1]
    return {key: row["latency_ms"] / row["batch"] for key, row in asked.items()}


def frontier_figure(points):
    """The points of the test part, against MACs and against each clock: means over seeds with their range."""
    import matplotlib.pyplot as plt

    tested = points[points["file"].str.startswith(FOLDER) & points["metric"].isin(("accuracy", "target"))]
    bag = tested[tested["method"] == "bag of words"]["value"].iloc[0]
    with plt.rc_context(STYLE):
        figure, _ = panels(4.6)
        figure.clear()
        axes = list(figure.subplot_mosaic([["macs"] * len(CLOCKS), [*CLOCKS]], sharey=True).values())
        for axis, clock in zip(axes, (None, *map(milliseconds, CLOCKS))):
            for name, line in LINES.items():
                if clock is None or name not in UNTIMED:
                    _draw(axis, name, tested, line, clock)
            for name in WHEN_SURE if clock is None else ():
                _draw_when_sure(axis, name)
            axis.axhline(bag, **REFERENCE | {"color": "#555555", "linestyle": "-."}, label="TF-IDF, on a CPU")
            axis.set(xscale="log")
        axes[0].set(xlabel="MAC reduction (log scale)", xlim=(0.9, 12.5))
        figure.supylabel("accuracy (%)", size="medium")
        multiples(axes[0], (1, 2, 3, 5, 7, 11))
        for axis, (*_, label, ticks) in zip(axes[1:], CLOCKS.values()):
            axis.set(xlabel=label)
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        for axis in axes:
            axis.minorticks_off()
        legend(figure, columns=2)
    figure.set_label(_caption(tested, bag))
    return figure


def _draw(axis, name: str, tested, line: tuple, clock: dict | None) -> None:
    recipes, method, seeds, colour, marker, dashes = line
    mine = tested[tested["recipe"].isin(recipes) & tested["method"].str.startswith(method) & tested["seed"].isin(seeds)]
    rows = settings(mine)
    cells = rows.groupby("target")
    if clock is not None:  # settings that were not timed are left out
        rows = rows[[(CONTROLS[method], target) in clock for target in rows["target"]]]
        cells = rows.groupby("target")
    x, y = cells["mac_reduction"].mean(), cells["accuracy"].mean()
    if clock is not None:
        x = [clock[CONTROLS[method], target] for target in x.index]
    axis.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=name, zorder=4)
    if len(seeds) > 1:
        ends = (cells["accuracy"].min(), cells["accuracy"].max())
    else:
        ends = zip(*(interval(Path(row.file).stem, "alpha", row.target) for row in rows.itertuples()))
    axis.fill_between(x, *ends, color=colour, alpha=0.13, linewidth=0)


def when_sure(name: str) -> dict[float, list[dict]]:
    """Of each budget the rows of the test part, one for each training."""
    if name == WORDS:
        rows = [row for row in exits.rows("words-first", "test") if row["control"] == "words-first"]
        return {budget: [r for r in rows if r["target"] == budget] for budget in sorted({r["target"] for r in rows})}
    names, controls = exits.ways()[exits.BOTH]
    return {budget: exits.cells(names, controls, budget) for budget in exits.BUDGETS}


def _draw_when_sure(axis, name: str) -> None:
    colour, marker, dashes = WHEN_SURE[name]
    found = [[(r["mac_reduction"], r["accuracy"]) for r in rows] for rows in when_sure(name).values()]
    x = [sum(saved for saved, _ in cell) / len(cell) for cell in found]
    y = [[accuracy for _, accuracy in cell] for cell in found]
    style = {"color": colour, "marker": marker, "linestyle": dashes, "linewidth": 1.8, "markersize": 7}
    axis.plot(x, [sum(a) / len(a) for a in y], label=name, zorder=5, **style)
    axis.fill_between(x, [min(a) for a in y], [max(a) for a in y], color=colour, alpha=0.13, linewidth=0)


def _caption(tested, bag: float) -> str:
    return (
        f"IMDB, {tested['n'].max():,.0f} reviews of films that no training text is about, read once: accuracy of "
        "SmolLM2-135M-Instruct (Q4_1) against the reduction of MACs, and against milliseconds (random weights, texts "
        "of 256 tokens) on an H200 (32 at once; every way as a CUDA graph) and on two CPU cores (one at a time; those "
        "settings that were timed): by the dial (zsaa+ by adapters, five seeds, about two "
        "epochs), by texts cut to both ends for adapters trained on such (two seeds), by the first 15, 10, 6 or 3 "
        "layers alone (three seeds, of 15 one; distilled three, at 10 layers by a better teacher five), and by the "
        "paper's recipe, by LoRA at 1e-3, as validation chose; and "
        f"of TF-IDF with a logistic regression ({bag:.1f}%). Texts that leave when sure: of the model trained for "
        "both dials (three seeds, 520 s), and by TF-IDF, with a model for the rest; chosen on validation, not timed. "
        "Bands: the range of several seeds, else 95% intervals, "
        "films together. One training of the dial before these, with a shorter warm-up, failed. The paper's recipe was "
        "not timed."
    )
