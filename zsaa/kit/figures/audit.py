"""What Eq. 2 says about the paper's numbers."""

from __future__ import annotations

from zsaa.kit.figures.style import COLOURS, PRINTED_ERROR, STYLE


def audit_reductions_figure(audit: dict):
    """Table 3's printed reductions (squares; bars: alpha's rounding) beside what Eq. 2 and alpha^3 make of alpha."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in audit["rows"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(models), figsize=(6.8, 3.1), layout="constrained", sharey=True)
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
        axes[0].legend(fontsize=8, loc="upper left")
    return figure


def audit_exponents_figure(audit: dict):
    """The k with which alpha^k per layer gives each printed reduction; bars: the rounding of both printed numbers."""
    import matplotlib.pyplot as plt

    rows = audit["exponents"][::-1]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 2.7), layout="constrained")
        for y, row in enumerate(rows):
            style = {"color": COLOURS["alpha" if row["model"].startswith("LLaMA") else "last"], "linewidth": 1.6}
            axis.plot([row["low"], row["high"]], [y, y], **style)
            axis.plot(row["k"], y, "o", markersize=5, color=style["color"])
        names = [f"{row['model'].removesuffix('-4bit')}: {row['reduction']}x at {row['alpha']}" for row in rows]
        axis.set_yticks(range(len(rows)), names)
        low, high = max(row["low"] for row in rows), min(row["high"] for row in rows)
        if low < high:
            axis.axvspan(low, high, color=COLOURS["conventional"], alpha=0.18, linewidth=0)
            axis.annotate("fits all six", ((low + high) / 2, len(rows) - 0.45), ha="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=1)
        axis.annotate("Eq. 2", (1.08, len(rows) - 0.45), fontsize=8)
        axis.set(xlabel=r"k, where each layer keeps $\alpha^k$ of its tokens", xlim=(0.5, 7.5), ylim=(-0.6, len(rows)))
    return figure


def audit_reach_figure(audit: dict):
    """How far Eq. 2 with tau = 5 can reduce GPT-2's MACs, by length of the input, and what the tables' largest printed
    speed-ups need."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.6, 3.3), layout="constrained")
        axis.plot([r["tokens"] for r in audit["most"]], [r["reduction"] for r in audit["most"]], color=COLOURS["alpha"])
        places: dict[tuple, list[str]] = {}
        for row in audit["reach"]:
            places.setdefault((row["tokens"], row["speed-up"]), []).append(row["column"])
        for (tokens, times), columns in places.items():
            axis.plot(tokens, times, "o", color=COLOURS["conventional"], markersize=5)
            axis.annotate(f"{times}x: {', '.join(columns)}\nneeds {tokens} tokens", (tokens, times), xytext=(9, -11),
                          textcoords="offset points", fontsize=7.5)  # fmt: skip
        axis.set(xlabel="tokens of an input", ylabel="largest MAC reduction", xlim=(0, 128), ylim=(0, 15))
    return figure
