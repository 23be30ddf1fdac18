"""A bag of words, the cost of a drop by layer, and how far tokens go."""

from __future__ import annotations

from collections.abc import Sequence

from ablation.show.rows import ROLES, title_of
from zsaa.kit.figures.style import STYLE, grid, legend, multiples, panels

RULES = {
    "salient": ("#0072B2", "o"),
    "last": ("#009E73", "v"),
    "ends": ("#CC79A7", "D"),
    "first": ("#E69F00", "^"),
    "random": ("#555555", "x"),
}


def words_figure(results: Sequence[dict]):
    """Accuracy of a bag of words on the tokens that each rule keeps, a panel per task; dashed: on whole texts."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = grid(len(results), 1.6, "tokens as in truncation to", "accuracy (%)")
        for axis, result in zip(axes, results):
            whole = next(r for r in result["rows"] if r["control"] == "whole")
            axis.axhline(whole["accuracy"], color="#000000", linewidth=0.7, linestyle="--")
            for rule, (colour, marker) in RULES.items():
                rows = [whole, *(r for r in result["rows"] if r["control"] == rule)]
                x, y = [r["target"] for r in rows], [r["accuracy"] for r in rows]
                axis.plot(x, y, color=colour, marker=marker, markersize=3, label=rule)
                low, high = zip(*(r["ci95"] for r in rows))
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            multiples(axis, [t for t in sorted({1, *(r["target"] for r in result["rows"])}) if t != 2])
            axis.set_title(f"{title_of(result['task']['name'])},\nn = {whole['n']:,}", fontsize=6.5)
        legend(figure)
    figure.set_label(
        "Accuracy of a bag of words that sees only the tokens that a rule keeps, as many as truncation to each "
        "reduction of MACs leaves. Dashed: on whole texts. Bands are 95% intervals."
    )
    return figure


def sensitivity_figure(result: dict):
    """What dropping half of the tokens in one layer alone costs, layer by layer, and what schedules cost at equal MACs:
    Eq. 2's, the rising one, and the one solved from the first panel. Divergence of the class probabilities from
    alpha = 1."""
    import matplotlib.pyplot as plt

    costs = [max(cost, 1e-6) for cost in result["sensitivity"]]
    share, n = f"{100 * result['share']:.0f}%", result["provenance"]["eval_samples"]
    looks = {
        "geometric": (ROLES[0][1], "o", "-", "Eq. 2"),
        "rising": (ROLES[1][1], "^", "-.", "rising"),
        "solved": (ROLES[2][1], "s", "--", "solved"),
    }
    with plt.rc_context(STYLE):
        figure, (above, below) = panels(4.0, 2, 1)
        above.bar(range(1, len(costs) + 1), costs, color=ROLES[0][1], width=0.8)
        above.set(yscale="log", xlabel=f"layer that alone keeps {share} of its tokens", ylabel="divergence (nats)")
        for name, (colour, marker, dashes, shown) in looks.items():
            rows = [r for r in result["rows"] if r["schedule"] == name]
            x, y = [r["target"] for r in rows], [r["divergence"] for r in rows]
            below.plot(x, y, color=colour, marker=marker, linestyle=dashes, label=shown)
        below.set(yscale="log", xlabel="MAC reduction, all layers", ylabel="divergence (nats)")
        multiples(below, x)
        below.legend()
    figure.set_label(
        f"Divergence of the class probabilities from alpha = 1, of {result['adapter']} on {n} reviews. Above: one "
        f"layer alone keeps {share} of its tokens. Below: all layers drop, by three schedules at equal MACs."
    )
    return figure


def survival_figure(depths: dict[str, list[float]], words: Sequence[str], title: str):
    """How far each token of a text goes under each score: a column of cells per score (depths: name -> share of the
    layers that each token reaches), the text down the side."""
    import matplotlib.pyplot as plt

    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = panels(0.11 * len(words) + 1.2)
        picture = axis.imshow(list(zip(*depths.values())), aspect="auto", cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(depths)), [name.replace("_", " ").replace(" ", "\n") for name in depths], fontsize=5)
        axis.set_yticks(range(len(words)), [word.strip() or "·" for word in words], fontsize=6)
        axis.set_title(title)
        figure.colorbar(picture, label="share of layers", shrink=0.6, pad=0.02)
    figure.set_label(f"{title}: how far each token goes under each score, as a share of the layers.")
    return figure
