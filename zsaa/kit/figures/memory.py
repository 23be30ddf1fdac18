"""Memory: of a prefill, by length; Table 3's footprint; and training steps."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, STYLE


def memory_and_training_figure(memory: Sequence[dict], training: Sequence[dict]):
    """Left (kind "bench-memory"): peak memory of a prefill on top of the weights, and in it the cache, against the
    length. Right (kind "bench-train"): a training step with alpha drawn from its range, over one at alpha = 1; the tick
    is what the MACs promise."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (held, steps) = plt.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained", width_ratios=(1.1, 1))
        measured = [row for result in memory for row in result["rows"]]
        lines = sorted({(row["model"], row["alpha"]) for row in measured}, key=lambda line: (line[0], -line[1]))
        for (model, alpha), colour, marker in zip(lines, ("#555555", "#0072B2", "#D55E00", "#009E73"), "so^v"):
            rows = sorted(
                (r for r in measured if (r["model"], r["alpha"]) == (model, alpha)), key=lambda r: r["tokens"]
            )
            x, name = [r["tokens"] for r in rows], "stock" if alpha == 1 else rf"$\alpha$ = {alpha:g}"
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            held.plot(x, [r["peak_bytes"] / 1e9 for r in rows], **style, label=f"{name}: peak")
            held.plot(x, [r["kv_bytes"] / 1e9 for r in rows], **style, linestyle=":", label=f"{name}: cache in it")
        held.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="GB on top of the weights")
        ticks = sorted({row["tokens"] for row in measured})
        held.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7.5)
        held.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        held.minorticks_off()
        held.set(title=f"memory, {', '.join(dict.fromkeys(model for model, _ in lines))}")
        held.legend(fontsize=7.5)
        rows = [row for result in training for row in result["rows"]][::-1]
        for y, row in enumerate(rows):
            ratio = row["sampled_over_conventional"]
            colour = "#0072B2" if ratio < 1 else "#E69F00"
            steps.barh(y, ratio, height=0.55, color=colour)
            steps.plot([row["ideal"]] * 2, [y - 0.38, y + 0.38], color="#000000", linewidth=2)
            steps.text(0.55, y, f"{ratio:.2f}", va="center", ha="center", fontsize=9, fontweight="bold", color="white")
        steps.axvline(1, color="#555555", linewidth=0.9, linestyle="--")
        names = [f"{row['model']}\n{row['batch']} x {row['tokens']}" for row in rows]
        steps.set_yticks(range(len(rows)), names, fontsize=8)
        steps.grid(axis="y", visible=False)
        drawn = ", ".join(dict.fromkeys(rf"$\alpha$ ~ U({row['low']:g}, {row['high']:g})" for row in rows))
        steps.set(title=f"training step, {drawn}", xlabel=r"time / step at $\alpha$ = 1 (tick: MACs)", xlim=(0, 1.3))
    return figure


def footprint_figure(results: Sequence[dict], storage: str = "nf4"):
    """Table 3's footprint (kind "footprint"): by how much a prefill's peak memory on top of the weights shrinks,
    against the MAC reduction, a panel per model and a line per prompt length; hollow where alpha is as the paper prints
    it, filled where Eq. 2 gives the paper's reduction. Grey squares: the paper's. Dotted: the cache alone, at the
    longest. Where `storage` was not measured, the first that was. Returns figure and caption, or None without peaks."""
    import matplotlib.pyplot as plt

    measured = [row for result in results for row in result["rows"] if row["peak_bytes"] and row["control"] != "all"]
    if not measured:
        return None
    held = list(dict.fromkeys(row["storage"] for row in measured))
    storage = storage if storage in held else held[0]
    measured = [row for row in measured if row["storage"] == storage]
    names = {"llama3-8b": "LLaMA-3-8B-4bit", "gemma2-2b": "Gemma-2-2B-4bit"}
    models = list(dict.fromkeys(row["model"] for row in measured))
    lengths = sorted({(row["tokens"], row["batch"]) for row in measured})
    palette, markers = ("#56B4E9", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00"), "os^vDP"
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(3.4 * len(models), 3.3), layout="constrained", sharey=True, squeeze=False
        )
        named = {}
        for axis, model in zip(axes.flat, models):
            for number, (tokens, batch) in enumerate(lengths):
                rows = [r for r in measured if (r["model"], r["tokens"], r["batch"]) == (model, tokens, batch)]
                rows.sort(key=lambda row: row["mac_reduction"])
                style = {"color": palette[number % 6], "marker": markers[number % 6], "markersize": 4.5}
                x, y = ([row[key] for row in rows] for key in ("mac_reduction", "footprint_reduction"))
                name = f"{tokens} tokens" + (f", batch {batch}" if batch > 1 else "")
                (named[name],) = axis.plot(x, y, **style, linewidth=1.3)
                hollow = [row for row in rows if row["control"] == "printed"]
                x, y = ([row[key] for row in hollow] for key in ("mac_reduction", "footprint_reduction"))
                axis.plot(x, y, **style, linestyle="none", markerfacecolor="white")
            if rows:
                stock = max(row["kv_bytes"] for row in rows)
                x, y = [row["mac_reduction"] for row in rows], [stock / row["kv_bytes"] for row in rows]
                (named[f"cache alone, {tokens} tokens"],) = axis.plot(x, y, color="#000000", linestyle=":", linewidth=1)
            if model in names:
                printed = paper.TABLE_3[names[model]]
                (named["printed in Table 3"],) = axis.plot(
                    list(printed), [row["GPU footprint"] for row in printed.values()], "s--", color=COLOURS["paper"],
                    markersize=5, linewidth=1,
                )  # fmt: skip
            axis.set(title=f"{model}, {storage}", xlabel="MAC reduction")
            axis.set_xticks([1, 1.5, 2.5, 3.5], ["1x", "1.5x", "2.5x", "3.5x"])
        axes.flat[0].set_ylabel("footprint reduction")
        axes.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=8)
    devices = ", ".join(dict.fromkeys(result["provenance"]["hardware"]["device"] for result in results))
    return figure, (
        f"Table 3's footprint: peak memory of a prefill on top of the weights, stock over dial, at the models' true "
        f"shapes with random weights, {storage}, {devices}. Hollow: alpha as the paper prints it; filled: as Eq. 2 "
        "needs it for 1.5x, 2.5x and 3.5x. The paper gives no prompt length."
    )
