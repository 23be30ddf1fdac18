"""Notebook 11: what the dial keeps of a document for a question, and what the first token of the answer takes."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.figures.style import COLOURS, MARKERS, STYLE, legend, panels

WAYS = {
    "the dial": COLOURS["alpha"],
    "BM25 sentences": COLOURS["first"],
    "last tokens": COLOURS["last"],
}


def passages_figure(shares: dict[float, Sequence[float]], names: Sequence[str]):
    """Of each passage of a document the share of its tokens that stays at each alpha, as a grid. shares: by alpha, one
    for each of the `names`."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = panels(0.16 * len(names) + 0.7)
        rows = [[found[i] for found in shares.values()] for i in range(len(names))]
        image = axis.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(shares)), [f"{alpha:g}" for alpha in shares])
        axis.set_yticks(range(len(names)), [name if len(name) < 34 else f"{name[:32]} ..." for name in names])
        axis.tick_params(axis="y", labelsize=6)
        axis.set_xlabel(r"$\alpha$")
        figure.colorbar(image, ax=axis, label="share of its tokens kept", fraction=0.05)
    figure.set_label(
        "What the question keeps of each passage, from its first words on: white, none of its tokens; dark, all."
    )
    return figure


def first_token_figure(rows: Sequence[dict]):
    """Milliseconds to the first token against the tokens that the model reads, a line for each way to shorten the
    prompt. rows: of "way" (of WAYS), "tokens" and "first token, ms"."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = panels(2.2)
        for (way, colour), marker in zip(WAYS.items(), MARKERS):
            mine = sorted((row["tokens"], row["first token, ms"]) for row in rows if row["way"] == way)
            axis.plot(*zip(*mine), color=colour, marker=marker, label=way)
        axis.set(xlabel="tokens of the prompt that enter the model", ylabel="ms to the first token, here")
        axis.set(xlim=(0, None), ylim=(0, None))
        legend(figure)
    figure.set_label(
        "The time to the first token on this machine, choosing included. The whole prompt is the dial at alpha = 1."
    )
    return figure
