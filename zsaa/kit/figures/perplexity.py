"""Perplexity over stock along the dial."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, STYLE
from zsaa.kit.labels import by_eq_2, perplexity_protocol, perplexity_subject, perplexity_way, step_size
from zsaa.kit.store import rows_of


def perplexity_figure(results: Sequence[dict], columns: int = 2):
    """Perplexity per token over the stock model's (log scale) against MAC reduction, a panel per result: the dial by
    score, its controls, with 95% intervals of the paired ratio; and the paper's own ratios, against its speed-up."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = -(-len(results) // columns)
    styles = {
        "dial, column_sum": ("#0072B2", "o", "-"),
        "dial, column_mean": ("#56B4E9", "s", "-"),
        "last tokens only": (COLOURS["last"], "v", "--"),
        "both ends only": ("#CC79A7", "D", "--"),
        "first tokens only": (COLOURS["first"], "^", "--"),
        "random tokens": ("#D55E00", "P", ":"),
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, min(columns, len(results)), figsize=(5.2 if len(results) == 1 else 3.6 * columns, 2.9 * rows + 0.6),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis in axes.flat[len(results) :]:
            axis.set_visible(False)
        named = {}
        for axis, result in zip(axes.flat, results):
            for name, (colour, marker, dashes) in styles.items():
                drawn = [r for r in result["rows"] if r["target"] == 1 or perplexity_way(r) == name]
                if len(drawn) < 2:
                    continue
                x, y = [r["mac_reduction"] for r in drawn], [r["ratio"] for r in drawn]
                low, high = zip(*(r["ratio_ci95"] for r in drawn))
                # A percentile interval may leave the estimate out by a hair.
                error = [[max(0, a - b) for a, b in zip(y, low)], [max(0, b - a) for a, b in zip(y, high)]]
                named[name] = axis.errorbar(
                    x, y, yerr=error, color=colour, marker=marker, markersize=4, linewidth=1.4, capsize=2,
                    elinewidth=0.8, linestyle=dashes,
                )  # fmt: skip
            column = result["task"]["paper_column"]
            ratios = [row[column] / paper.TABLE_2[1][column] for row in paper.TABLE_2.values()]
            named[f"paper, {paper.TABLE_2_MODEL}, on its corpus (its TTFT speed-up)"] = axis.plot(
                list(paper.TABLE_2),
                ratios,
                color=COLOURS["paper"],
                marker="x",
                linewidth=1,
                linestyle="-.",
                markersize=5,
            )[0]
            axis.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
            measured, *text = perplexity_subject(result).split("; ")
            counted = f"{measured}, n = {result['rows'][0]['n']}"
            whole = next(r["perplexity"] for r in rows_of(result, "alpha") if r["target"] == 1)
            lines = counted, *text, *perplexity_protocol(result).split("; "), f"stock: {whole:.1f}"
            axis.set_title("\n".join(lines), fontsize=8)
            axis.set(yscale="log", xlabel="MAC reduction")
            axis.set_ylabel("perplexity per token / stock\n(bars: 95%)", fontsize=7.5)
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            low, high = axis.get_ylim()
            tens = [10.0**e for e in range(-3, 40, 1 if high < 1e5 * low else 3)]  # untuned, carry-through blows up
            steps = (1, 1.2, 1.5, 2, 3, 5, 7) if high < 6 * low else (1, 2, 5) if high < 100 * low else (1,)
            axis.set_yticks([t * s for t in tens for s in steps if low <= t * s <= high])
            axis.set_xticks(ticks := sorted({r["target"] for r in result["rows"]} | set(paper.TABLE_2)))
            axis.set_xticklabels([f"{t:g}x" for t in ticks])
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, fontsize=7.5)
    return figure


def longest(results: Sequence[dict]) -> list[dict]:
    """Of results of the kind "perplexity" whose trainings differ in their length alone, the one that saw most."""
    found: dict[tuple, dict] = {}
    for result in results:
        recipe, protocol = result["recipe"], result["protocol"]["name"]
        trained = recipe["method"], recipe["tuning"], recipe.get("seed"), by_eq_2(result)
        key = (result["model"]["name"], result["task"]["name"], protocol, *trained)
        if key not in found or _seen(result) > _seen(found[key]):
            found[key] = result
    return list(found.values())


def _seen(result: dict) -> int:
    """Samples that a training took, each as often as it came."""
    return result["train"]["steps"] * step_size(result) if result.get("train") else 0
