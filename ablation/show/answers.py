"""Answers along the dial and from cut prompts."""

from __future__ import annotations

from zsaa.kit.figures.style import REFERENCE, STYLE, legend, multiples, panels

CONVENTIONAL = "conventional (LoRA)"
LINES = {  # method: name, colour, marker, dashes
    "dial once, scorer s16-also": ("dial, sentences", "#0072B2", "o", "-"),
    "dial once, scorer c16": ("dial, chunks of 16", "#56B4E9", "s", "-"),
    "BM25 sentences": ("BM25 sentences", "#D55E00", "D", "--"),
    "sentence embeddings": ("sentence embeddings", "#CC79A7", "X", "--"),
    "lexical chunks": ("lexical chunks", "#E69F00", "^", "--"),
}
PASSAGES = {"coqa-1": "one passage", "coqa-3": "three passages"}


def answers_figure(points):
    """points: those of results/answers/second. F1 of the test stories' answers against the reduction of the prompt's
    MACs, a panel for each number of passages; dotted: the conventionally tuned models on whole prompts."""
    import matplotlib.pyplot as plt

    found = points[points["split"].str.endswith("test stories") & (points["metric"] == "f1")]
    found = found[found["task"].isin(PASSAGES)]
    with plt.rc_context(STYLE):
        figure, axes = panels(2.75, 1, 2, sharey=True)
        for axis, (task, title) in zip(axes, PASSAGES.items()):
            here = found[found["task"] == task]
            whole = here[(here["method"] == "stock") & here["recipe"].str.startswith(CONVENTIONAL)]
            axis.axhline(whole["value"].mean(), **REFERENCE)
            for method, look in LINES.items():
                mine = here[here["recipe"].str.startswith(CONVENTIONAL) & here["method"].isin([method, "stock"])]
                own = mine[mine["file"].isin(mine.loc[mine["method"] == method, "file"])]  # seeds that were run
                _line(axis, own.groupby("mac_reduction", as_index=False)[["value", "low", "high"]].mean(), look)
            axis.set(title=title, xlabel="MAC reduction", xscale="log")
            multiples(axis, (1, 2, 3, 5, 7, 11))
        axes[0].set(ylabel="F1 (%)", ylim=(15, 75))
        legend(figure, columns=3)
    n, model = int(found["n"].max()), found["model"].iloc[0]
    figure.set_label(
        f"Answers of {model}, tuned by LoRA, to {n} questions on CoQA's held-out stories: F1 against the reduction of "
        "the prompt's MACs, the scorer's included, meaned over the seeds that were run (three to one). Dial: one drop, "
        "before layer 0, of what says least to the question, sentences of at most 16 tokens or chunks of 16; no model "
        "was trained for it. The other lines are the same models', on prompts cut at equal MACs; what the embedding "
        "model costs is counted, and leaves it nothing from 7x on with one passage. Bands: 95%, stories "
        "resampled, of a seed. Dotted: whole prompts."
    )
    return figure


def _line(axis, mine, look: tuple[str, str, str, str]) -> None:
    name, colour, marker, dashes = look
    x, y = mine["mac_reduction"], mine["value"]
    axis.plot(x, y, label=name, color=colour, marker=marker, linestyle=dashes)
    axis.fill_between(x, mine["low"], mine["high"], color=colour, alpha=0.08, linewidth=0)
