"""The four pictures of notebook 00: what the dial is good at, and where it fails."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from zsaa.kit.figures.style import COLOURS, STYLE, legend, multiples, panels
from zsaa.measure.stats import interval

KEPT = "#4C8BC0"
ADAPTER = "ablation/imdb/lora-crops-epochs5.json"  # the committed adapter on 4,900 held-out reviews
# One training, another score: files of results/ablation/imdb, of one seed each.
SCORES = {
    "wide": ("learned (ours)", "zsaa+", "o"),
    "recent": ("the latest tokens", "last", "s"),
    "random": ("drawn by lot", "random", "D"),
    "sum": ("attention received (the paper's)", "alpha", "^"),
}
UNTUNED = {
    "truncation": ("the prompt cut to its last tokens", "last", "s"),
    "column mean": ("the dial, column mean", "ends", "v"),
    "column sum (paper)": ("the dial, column sum (the paper's)", "alpha", "^"),
}


def _line(axis, rows, name: str, colour: str, marker: str, **options) -> None:
    rows = rows.sort_values("mac_reduction")
    look = {"color": COLOURS[colour], "marker": marker, "label": name, **options}
    axis.plot(rows["mac_reduction"], rows["value"], **look)


def reviews_figure(judged: Sequence[dict], points):
    """Seconds per review, and accuracy with its 95% interval, against the MAC reduction. judged: rows of "times",
    "seconds" (per review), "right" and "n"; points: those of results/points.csv, for the adapter's 4,900 reviews."""
    import matplotlib.pyplot as plt

    times, n = [row["times"] for row in judged], judged[0]["n"]
    shares = [100 * row["right"] / row["n"] for row in judged]
    ends = [interval(row["right"], row["n"]) for row in judged]
    spans = [[s - low for s, (low, _) in zip(shares, ends)], [high - s for s, (_, high) in zip(shares, ends)]]
    many = points[(points.file == ADAPTER) & (points.metric == "accuracy") & points.method.str.startswith("dial")]
    with plt.rc_context(STYLE):
        figure, (clock, right) = panels(2.5, 1, 2)
        clock.bar(range(len(times)), [row["seconds"] for row in judged], color=COLOURS["alpha"])
        clock.set_xticks(range(len(times)), [f"{t:g}x" for t in times])
        clock.set(xlabel="MAC reduction", ylabel="seconds per review, here")
        right.errorbar(
            times, shares, yerr=spans, fmt="o", color=COLOURS["alpha"], capsize=2, label=f"{n} reviews, here"
        )
        _line(right, many, f"{many.n.iloc[0]:,.0f} reviews (results/)", "zsaa+", "")
        right.set(
            xlabel="MAC reduction", ylabel="accuracy (%)", ylim=(min(50, *(low for low, _ in ends)), 101), xscale="log"
        )
        multiples(right, times)
        legend(figure, columns=2)
    figure.set_label(
        f"The dial on a classifier trained for it: what a setting takes and what it gets right. {n} held-out reviews, "
        "one at a time, on this machine, with 95% intervals; the line is the same adapter's committed curve."
    )
    return figure


def kept_figure(kept: dict[float, Sequence[int]], n: int, said: dict[float, str]):
    """Which of a prompt's n tokens enter the model at each alpha, a strip each, with the answer above it."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(0.55 * len(kept) + 0.35, len(kept), 1, squeeze=False, sharex=True)
        for axis, (alpha, positions) in zip(axes.flat, kept.items()):
            axis.bar(positions, 1, width=1, align="edge", color=KEPT, linewidth=0)
            head = rf"$\alpha$ = {alpha:g}, {len(positions)} of {n} tokens: "
            axis.set_title(textwrap.shorten(head + said[alpha], 76, placeholder=" ..."), loc="left", fontsize=6.5)
            axis.set(xlim=(0, n), ylim=(0, 1), yticks=[])
        axes.flat[-1].set_xlabel("place in the prompt; the question stands at its end")
    figure.set_label(
        "A question about a document: blue tokens enter the model, the others leave before its first layer. The "
        "question, at the end, always stays."
    )
    return figure


def untuned_figure(points):
    """Next-token agreement with alpha = 1 behind a pruned prompt, of the model as it comes, from committed points."""
    import matplotlib.pyplot as plt

    found = points[(points.task == "imdb, continuation") & (points.metric == "agreement")]
    with plt.rc_context(STYLE):
        figure, axis = panels(2.5)
        for method, look in UNTUNED.items():
            _line(axis, found[found.method == method], *look)
        axis.set(xlabel="MAC reduction", ylabel="next token as at alpha = 1 (%)", ylim=(0, 100))
        multiples(axis, [1.5, 2, 3])
        legend(figure, columns=1)
    figure.set_label(
        f"Without training for it the dial is a poor way to shorten a prompt: {found.n.iloc[0]:.0f} film reviews, "
        "prompts of 224 tokens (committed results)."
    )
    return figure


def scores_figure(points):
    """Accuracy along the dial of trainings that are alike but for the score, from committed points."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = panels(2.6)
        for row, look in SCORES.items():
            mine = points[(points.file == f"ablation/imdb/{row}.json") & (points.metric == "accuracy")]
            _line(axis, mine[mine.method == "dial"], *look)
        axis.set(xlabel="MAC reduction", ylabel="accuracy (%)", xscale="log")
        multiples(axis, sorted({round(t) for t in mine.mac_reduction}))
        legend(figure, columns=2)
    figure.set_label(
        f"Attention received is a poor guide: four trainings, alike but for the score, on {mine.n.iloc[0]:,.0f} "
        "held-out reviews (committed results, one seed each)."
    )
    return figure
