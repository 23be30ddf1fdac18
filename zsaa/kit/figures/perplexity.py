"""Perplexity over stock along the dial: a figure per text and protocol."""

from __future__ import annotations

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, REFERENCE, STYLE, grid, legend, multiples
from zsaa.kit.points import settings

LOOKS = {
    "dial": ("score: column sum", "#0072B2", "o", "-"),
    "dial (score column_mean)": ("score: column mean", "#56B4E9", "s", "-"),
    "last tokens only": ("last tokens", COLOURS["last"], "v", "--"),
    "both ends only": ("both ends", "#CC79A7", "D", "--"),
    "first tokens only": ("first tokens", COLOURS["first"], "^", "--"),
    "random tokens": ("random tokens", "#D55E00", "P", ":"),
}
CORPORA = {"held-out IMDB reviews": "WikiText-103", "held-out Rotten Tomatoes sentences": "1BW"}  # what they stand for


def perplexity_figure(points):
    """Perplexity per token over the stock model's (log scale) against MAC reduction, for one text and protocol (task):
    a panel per model and training, with the dial by score, its controls, 95% intervals of the paired ratio, and the
    paper's own ratios on its corpus, against its speed-up."""
    import matplotlib.pyplot as plt

    found = settings(points)
    (task,) = found["task"].unique()
    groups = list(found.groupby(["model", "recipe"], sort=False))
    with plt.rc_context(STYLE):
        figure, axes = grid(len(groups), 1.5, "MAC reduction", "perplexity / stock's", sharex=True)
        named = {}
        for axis, ((model, recipe), mine) in zip(axes, groups):
            named |= _panel(axis, mine, _ratios(task))
            axis.set_title(f"{model},\n{_training(recipe)}", fontsize=6)
        legend(figure, list(named.values()), list(named))
    figure.set_label(_caption(found, task))
    return figure


def _training(recipe: str) -> str:
    """ "alpha-sampled, 600 steps" of the recipe's whole text."""
    method, _, rest = recipe.partition(" fine-tuning; ")
    return f"{method}, {rest.split(', ')[0].split(' of ')[0]}" if rest else recipe


def _ratios(task: str) -> dict[float, float]:
    """The paper's perplexities on the corpus that the text is, or stands for, over the one at 1x."""
    title = task.split("; ")[0]
    column = CORPORA.get(title, title.split(",")[0])
    if column not in paper.TABLE_2_COLUMNS:
        return {}
    return {target: row[column] / paper.TABLE_2[1][column] for target, row in paper.TABLE_2.items()}


def _panel(axis, mine, printed: dict[float, float]) -> dict:
    """Draws a panel; returns its lines by name."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    named = {}
    for method, (name, colour, marker, dashes) in LOOKS.items():
        rows = mine[mine["method"].isin((method, "stock"))]
        if len(rows) < 2:
            continue
        # A percentile interval may leave the estimate out by a hair.
        error = [(rows["ratio"] - rows["ratio_low"]).clip(lower=0), (rows["ratio_high"] - rows["ratio"]).clip(lower=0)]
        named[name] = axis.errorbar(
            rows["mac_reduction"], rows["ratio"], yerr=error, color=colour, marker=marker, linewidth=1.1, capsize=1.5,
            elinewidth=0.7, linestyle=dashes, markersize=3,
        )  # fmt: skip
    if printed:
        style = {"color": COLOURS["paper"], "marker": "x", "linewidth": 0.9, "linestyle": "-."}
        (named["paper, its corpus"],) = axis.plot(list(printed), list(printed.values()), **style)
    axis.axhline(1, **REFERENCE)
    axis.set(yscale="log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    low, high = axis.get_ylim()
    tens = [10.0**e for e in range(-3, 40, 1 if high < 1e5 * low else 3)]  # untuned, carry-through blows up
    steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
    axis.set_yticks([ten * step for ten in tens for step in steps if low <= ten * step <= high])
    multiples(axis, sorted({*mine["target"], *printed}))
    return named


def _caption(found, task: str) -> str:
    whole = found[found["method"] == "stock"]
    stock = "; ".join(f"{row.model}, {row.recipe}: {row.perplexity:.1f}" for row in whole.itertuples())
    n = " to ".join(f"{n:,.0f}" for n in sorted({found["ratio_n"].min(), found["ratio_n"].max()}))
    future = " WHAT IS KEPT READS THE FUTURE." if "READS THE FUTURE" in task else ""
    corpus = (
        f" The paper's {paper.TABLE_2_MODEL} stands against its own speed-up of the first token."
        if _ratios(task)
        else ""
    )
    return (
        f"Perplexity per token over the stock model's, against the reduction of MACs ({task.split('; WHAT')[0]}; "
        f"{found['split'].iloc[0]}).{future} Bars are 95% intervals of the paired ratio, n = {n}.{corpus} "
        f"Stock perplexities: {stock}."
    )


def perplexity_figures(points) -> dict:
    """A figure per text and protocol, by a short name: "reviews", "reviews_carry", "lambada", ..."""
    names = {"held-out IMDB reviews": "reviews", "held-out Rotten Tomatoes sentences": "sentences"}
    found = {}
    along = [set(points[points["metric"] == metric]["file"]) for metric in ("ratio", "target")]  # layers have no target
    for task, mine in points[points["file"].isin(set.intersection(*along))].groupby("task", sort=False):
        title, protocol = task.split("; ")[:2]
        name = names.get(title, title.split(",")[0].lower().replace(" ", "_"))
        found[name + "_carry" * protocol.startswith("carry-through")] = perplexity_figure(mine)
    return found
