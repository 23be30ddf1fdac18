"""Answers along the dial and from cut prompts."""

from __future__ import annotations

from zsaa.kit.figures.style import REFERENCE, STYLE, legend, multiples, panels

FILES = ("answers/third/", "answers/fourth/")
PLAIN, DIAL, CUTS = "conventional", "continued at reductions", "continued on BM25's cuts"
LINES = {  # how the model was tuned, method: name, colour, marker, dashes
    (DIAL, "dial once, scorer s16-also"): ("dial, tuned at reductions", "#0072B2", "o", "-"),
    (PLAIN, "dial once, scorer s16-also"): ("dial, tuned at alpha = 1", "#56B4E9", "s", "-"),
    (CUTS, "BM25 sentences"): ("BM25 sentences, tuned on them", "#D55E00", "D", "--"),
    (PLAIN, "BM25 sentences"): ("BM25 sentences, tuned at alpha = 1", "#E69F00", "^", "--"),
    (CUTS, "sentence embeddings"): ("sentence embeddings, tuned on BM25's", "#CC79A7", "X", "--"),
}
PASSAGES = {"coqa-1": "one passage", "coqa-3": "three passages"}


def answers_figure(points):
    """points: those of FILES. F1 of the test stories' answers against the reduction of the prompt's MACs, a panel for
    each number of passages; dotted: the conventionally tuned models on whole prompts."""
    import matplotlib.pyplot as plt

    found = points[points["split"].str.endswith("test stories") & (points["metric"] == "f1")]
    found = found[found["task"].isin(PASSAGES)]
    later = found["file"].str.startswith(FILES[1]) & found["recipe"].str.contains(" steps")  # trained anew
    found = found[~found["file"].isin(found.loc[later, "file"].str.replace(FILES[1], FILES[0]))]
    recipes, reached = found["recipe"].str.partition(" (LoRA)")[0], found["mac_reduction"].round(1)
    found = found.assign(recipe=recipes, mac_reduction=reached)
    with plt.rc_context(STYLE):
        figure, axes = panels(2.75, 1, 2, sharey=True)
        for axis, (task, title) in zip(axes, PASSAGES.items()):
            here = found[found["task"] == task]
            whole = here[(here["method"] == "stock") & (here["recipe"] == PLAIN)]
            axis.axhline(whole["value"].mean(), **REFERENCE)
            for (recipe, method), look in LINES.items():
                mine = here[(here["recipe"] == recipe) & here["method"].isin([method, "stock"])]
                own = mine[mine["file"].isin(mine.loc[mine["method"] == method, "file"])]  # seeds that were run
                _line(axis, own.groupby("mac_reduction", as_index=False)[["value", "low", "high"]].mean(), look)
            axis.set(title=title, xlabel="MAC reduction", xscale="log")
            multiples(axis, (1, 2, 3, 5, 7, 11))
        axes[0].set(ylabel="F1 (%)", ylim=(15, 75))
        legend(figure, columns=2)
    n, model = int(found["n"].max()), found["model"].iloc[0]
    figure.set_label(
        f"Answers of {model}, tuned by LoRA, to {n} questions on CoQA's held-out stories: F1 against the reduction of "
        "the prompt's MACs, the scorer's included, meaned over the seeds that were run. Dial: one drop, before layer "
        "0, of the sentences of at most 16 tokens that say least to the question, by models that went on learning at "
        "such reductions, or never met one. The other lines: prompts cut at equal MACs, by models that went on learning"
        " on what BM25 leaves, or never met it; what the embedding model costs is counted, and leaves it nothing from "
        "7x on with one passage. Bands: 95%, stories resampled, of a seed. Dotted: whole prompts, by models that "
        "learned at alpha = 1 alone."
    )
    return figure


def _line(axis, mine, look: tuple[str, str, str, str]) -> None:
    name, colour, marker, dashes = look
    x, y = mine["mac_reduction"], mine["value"]
    axis.plot(x, y, label=name, color=colour, marker=marker, linestyle=dashes)
    axis.fill_between(x, mine["low"], mine["high"], color=colour, alpha=0.08, linewidth=0)
