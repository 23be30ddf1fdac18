"""Memory of a prefill: by length, and Table 3's footprint."""

from __future__ import annotations

from zsaa.kit import paper
from zsaa.kit.figures.style import COLOURS, MARKERS, PALETTE, STYLE, legend, multiples, panels
from zsaa.kit.points import settings

PRINTED = "dial at the printed alpha"
SHAPES = {"llama3-8b": "LLaMA-3-8B-4bit", "gemma2-2b": "Gemma-2-2B-4bit"}  # -> their names in Table 3


def memory_figure(points):
    """Peak memory of a prefill on top of the weights (kind "bench-memory"), and in it the cache, against the length."""
    import matplotlib.pyplot as plt

    found = settings(points)
    lines = list(found.sort_values(["model", "alpha"], ascending=[True, False]).groupby(["model", "alpha"], sort=False))
    with plt.rc_context(STYLE):
        figure, axis = panels(2.7)
        for ((_, alpha), rows), colour, marker in zip(lines, ("#555555", "#0072B2", "#D55E00", "#009E73"), "so^v"):
            rows, name = rows.sort_values("tokens"), "stock" if alpha == 1 else rf"$\alpha$ = {alpha:g}"
            look = {"color": colour, "marker": marker}
            axis.plot(rows["tokens"], rows["peak_bytes"] / 1e9, **look, label=f"{name}: peak")
            axis.plot(rows["tokens"], rows["kv_bytes"] / 1e9, **look, linestyle=":", label=f"{name}: cache in it")
        axis.set(xscale="log", yscale="log", xlabel="tokens of the prompt", ylabel="GB on top of the weights")
        ticks = sorted(set(found["tokens"]))
        axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.legend()
    figure.set_label(
        f"Memory of a prefill on top of the weights, by the length of the prompt: {'; '.join(found['model'].unique())}"
        f", {', '.join(found['hardware'].unique())}. Dotted: the key/value cache in it."
    )
    return figure


def footprint_figure(points, storage: str = "nf4"):
    """Table 3's footprint (kind "footprint"): by how much a prefill's peak memory on top of the weights shrinks,
    against the MAC reduction, a panel per model and stock attention, a line per prompt length; hollow where alpha is as
    the paper prints it, filled where Eq. 2 gives the paper's reduction. Grey squares: the paper's. Dotted: the cache
    alone, at the longest. Where `storage` was not measured, the first that was. None without peaks."""
    import matplotlib.pyplot as plt

    found = settings(points) if len(points) else points
    if not len(found) or "footprint_reduction" not in found:
        return None
    found = found[found["footprint_reduction"].notna() & found["method"].isin(("stock", "dial", PRINTED))]
    held = found["model"].str.rsplit(", ", n=1).str[-1]
    storage = storage if storage in set(held) else held.iloc[0]
    found = found[held == storage]
    models = list(found.groupby("model", sort=False))
    lengths = sorted({*zip(found["tokens"], found["batch"])})
    with plt.rc_context(STYLE):
        figure, axes = panels(2.9, 1, len(models), sharey=True, squeeze=False)
        named = {}
        for axis, (model, mine) in zip(axes.flat, models):
            for number, shape in enumerate(lengths):
                rows = mine[(mine[["tokens", "batch"]] == list(shape)).all(axis=1)]
                named |= _footprint_line(axis, rows.sort_values("mac_reduction", kind="stable"), number)
            named |= _cache_line(axis, mine)
            name, *how = model.split(", ")[:-2]  # and "eager attention" of the stock model
            if name in SHAPES:
                printed = {target: row["GPU footprint"] for target, row in paper.TABLE_3[SHAPES[name]].items()}
                style = {"color": COLOURS["paper"], "linewidth": 0.9}
                (named["printed in Table 3"],) = axis.plot(list(printed), list(printed.values()), "s--", **style)
            axis.set(title="\n".join([f"{name}, {storage}", *(how or ["sdpa attention"])]), xlabel="MAC reduction")
            multiples(axis, [1.5, 2.5, 3.5])
        axes.flat[0].set_ylabel("footprint reduction")
        axes.flat[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        legend(figure, list(named.values()), list(named))
    figure.set_label(
        "Table 3's footprint: peak memory of a prefill on top of the weights, stock over dial, at the models' true "
        f"shapes with random weights, {storage}, {', '.join(found['hardware'].unique())}. Hollow: alpha as the paper "
        "prints it; filled: as Eq. 2 needs it for 1.5x, 2.5x and 3.5x. The paper gives no prompt length."
    )
    return figure


def _footprint_line(axis, rows, number: int) -> dict:
    if not len(rows):
        return {}
    tokens, batch = rows["tokens"].iloc[0], rows["batch"].iloc[0]
    look = {"color": (*PALETTE[5:6], *PALETTE[:5])[number % 6], "marker": MARKERS[number % 6]}
    (line,) = axis.plot(rows["mac_reduction"], rows["footprint_reduction"], **look, linewidth=1.1)
    hollow = rows[rows["method"] == PRINTED]
    axis.plot(hollow["mac_reduction"], hollow["footprint_reduction"], **look, linestyle="none", markerfacecolor="white")
    return {f"{tokens:g} tokens" + (f", batch {batch:g}" if batch > 1 else ""): line}


def _cache_line(axis, mine) -> dict:
    longest = mine[mine["tokens"] == mine["tokens"].max()]
    longest = longest[longest["batch"] == longest["batch"].max()].sort_values("mac_reduction", kind="stable")
    reduction = longest["kv_bytes"].max() / longest["kv_bytes"]
    (line,) = axis.plot(longest["mac_reduction"], reduction, color="#000000", linestyle=":", linewidth=0.9)
    return {f"cache alone, {longest['tokens'].iloc[0]:g} tokens": line}
