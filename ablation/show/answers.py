"""Answers along the dial and from cut prompts."""

from __future__ import annotations

from zsaa.kit.figures.style import REFERENCE, STYLE, legend, multiples, panels

CONVENTIONAL, LADDER = "conventional (LoRA)", "ladder (LoRA)"
LINES = {  # (training, method): name, colour, marker, dashes
    (LADDER, "dial once, chunks of 16"): ("dial, ladder steps", "#0072B2", "o", "-"),
    (CONVENTIONAL, "dial once, chunks of 32"): ("dial", "#56B4E9", "s", "-"),
    (CONVENTIONAL, "BM25 sentences"): ("BM25 sentences", "#D55E00", "D", "--"),
    (CONVENTIONAL, "lexical chunks, earlier turns too"): ("lexical chunks", "#E69F00", "^", "--"),
    (CONVENTIONAL, "last tokens only"): ("last tokens", "#009E73", "v", "--"),
    (CONVENTIONAL, "oracle chunks"): ("oracle", "#555555", "P", ":"),
}
PASSAGES = {"coqa-1": "one passage", "coqa-3": "three passages"}


def answers_figure(points):
    """points: those of results/answers. F1 of the test stories' answers against the reduction of the prompt's MACs, a
    panel for each number of passages; dotted: the conventionally tuned model on whole prompts."""
    import matplotlib.pyplot as plt

    found = points[points["split"].str.endswith("test stories") & (points["metric"] == "f1")]
    with plt.rc_context(STYLE):
        figure, axes = panels(2.75, 1, 2, sharey=True)
        for axis, (task, title) in zip(axes, PASSAGES.items()):
            here = found[found["task"] == task]
            whole = here[(here["method"] == "stock") & here["recipe"].str.startswith(CONVENTIONAL)]
            axis.axhline(whole["value"].iloc[0], **REFERENCE)
            for (training, method), look in LINES.items():
                mine = here["recipe"].str.startswith(training) & here["method"].isin([method, "stock"])
                if training == LADDER:  # rows of other scorers have an alpha = 1 of their own
                    mine &= here["file"].isin(here.loc[mine & (here["method"] == method), "file"])
                _line(axis, here[mine].sort_values("mac_reduction"), look)
            axis.set(title=title, xlabel="MAC reduction", xscale="log")
            multiples(axis, (1, 2, 3, 5, 7, 11))
        axes[0].set(ylabel="F1 (%)", ylim=(15, 75))
        legend(figure, columns=3)
    n, model = int(found["n"].max()), found["model"].iloc[0]
    figure.set_label(
        f"Answers of {model}, tuned by LoRA, to {n} questions on CoQA's held-out stories: F1 against the reduction of "
        "the prompt's MACs, the scorer's included. Dial: one drop, before layer 0, of the chunks that say least to the "
        "question: on the conventionally tuned model (chunks of 32), or on one trained for it in ladder steps (chunks "
        "of 16; a third of the steps). The other lines are that conventionally tuned model's, on prompts cut at equal "
        "MACs; BM25 and the oracle keep earlier turns whole, which at 11x on one passage leaves them at 9.7x. Oracle: "
        "chunks that hold the answer come first. Bands: 95%, stories resampled. Dotted: whole prompts."
    )
    return figure


def _line(axis, mine, look: tuple[str, str, str, str]) -> None:
    name, colour, marker, dashes = look
    x, y = mine["mac_reduction"], mine["value"]
    axis.plot(x, y, label=name, color=colour, marker=marker, linestyle=dashes)
    axis.fill_between(x, mine["low"], mine["high"], color=colour, alpha=0.08, linewidth=0)
