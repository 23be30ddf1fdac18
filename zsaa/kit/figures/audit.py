"""What Eq. 2 says about the paper's numbers, from the result of zsaa.kit.audit: nothing in it was measured."""

from __future__ import annotations

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, STYLE, legend, panels

PRINTED_ERROR = {
    "xerr": 0.005,
    "fmt": "s",
    "color": COLOURS["paper"],
    "markersize": 3.5,
    "capsize": 1.5,
    "linewidth": 0.9,
}


def audit_reductions_figure(audit: dict):
    """Table 3's printed reductions (squares; bars: alpha's rounding) beside what Eq. 2 and alpha^3 make of alpha."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in audit["rows"]))
    with plt.rc_context(STYLE):
        figure, axes = panels(2.7, 1, len(models), sharey=True)
        for axis, model in zip(axes, models):
            curve = [row for row in audit["curves"] if row["model"] == model]
            for key, name, dashes in (("eq2", "Eq. 2", "-"), ("cubed", r"inferred: $\alpha^3$ in every layer", "--")):
                colour = COLOURS["alpha" if key == "eq2" else "conventional"]
                axis.plot([r["alpha"] for r in curve], [r[key] for r in curve], dashes, color=colour, label=name)
            printed = [row for row in audit["rows"] if row["model"] == model]
            axis.errorbar([r["alpha"] for r in printed], [r["reduction"] for r in printed], label="printed in Table 3",
                          **PRINTED_ERROR)  # fmt: skip
            axis.set(title=model, xlabel=r"$\alpha$", ylim=(0.9, 4.5))
            axis.invert_xaxis()
        axes[0].set_ylabel("MAC reduction")
        legend(figure)
    figure.set_label(
        "Table 3's printed reductions of MACs against its alpha (bars: the rounding of alpha), beside what Eq. 2 gives "
        f"for prompts of {audit['tokens']} tokens. Keeping alpha cubed of the tokens in every layer is our inference."
    )
    return figure


def audit_exponents_figure(audit: dict):
    """The k with which alpha^k per layer gives each printed reduction; bars: the rounding of both printed numbers."""
    import matplotlib.pyplot as plt

    rows = audit["exponents"][::-1]
    with plt.rc_context(STYLE):
        figure, axis = panels(2.2)
        for y, row in enumerate(rows):
            colour = COLOURS["alpha" if row["model"].startswith("LLaMA") else "last"]
            axis.plot([row["low"], row["high"]], [y, y], color=colour)
            axis.plot(row["k"], y, "o", color=colour)
        names = [f"{row['model'].removesuffix('-4bit')}: {row['reduction']}x at {row['alpha']}" for row in rows]
        axis.set_yticks(range(len(rows)), names)
        low, high = max(row["low"] for row in rows), min(row["high"] for row in rows)
        if low < high:
            axis.axvspan(low, high, color=COLOURS["conventional"], alpha=0.18, linewidth=0)
            axis.annotate("fits all six", ((low + high) / 2, len(rows) - 0.45), ha="center", fontsize=6.5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.annotate("Eq. 2", (1.08, len(rows) - 0.45), fontsize=6.5)
        axis.set(xlabel=r"k: each layer keeps $\alpha^k$ of its tokens", xlim=(0.5, 7.5), ylim=(-0.6, len(rows)))
    figure.set_label(
        "The exponent k with which keeping alpha to the power of k in every layer gives each printed reduction of "
        "Table 3. Bars cover the rounding of both printed numbers. Eq. 2 says k = 1."
    )
    return figure


def audit_reach_figure(audit: dict):
    """How far Eq. 2 with the paper's tau can reduce GPT-2's MACs, by length of the input, and what the tables' largest
    printed speed-ups need."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = panels(2.5)
        axis.plot([r["tokens"] for r in audit["most"]], [r["reduction"] for r in audit["most"]], color=COLOURS["alpha"])
        places: dict[tuple, list[str]] = {}
        for row in audit["reach"]:
            places.setdefault((row["tokens"], row["speed-up"]), []).append(row["column"])
        for (tokens, times), columns in places.items():
            axis.plot(tokens, times, "o", color=COLOURS["conventional"])
            axis.annotate(f"{times}x: {', '.join(columns)}\nneeds {tokens} tokens", (tokens, times), xytext=(7, -10),
                          textcoords="offset points", fontsize=6)  # fmt: skip
        axis.set(xlabel="tokens of an input", ylabel="largest MAC reduction", xlim=(0, 128), ylim=(0, 15))
    figure.set_label(
        f"The largest reduction of GPT-2's MACs that Eq. 2 with tau = {paper.TAU} allows, by the length of the input, "
        "and what the largest speed-ups of Tables 1 and 2 need."
    )
    return figure
