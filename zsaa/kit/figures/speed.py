"""What the clock gives of what the MACs promise, prefills and attention."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.figures.style import STYLE
from zsaa.kit.labels import threads
from zsaa.kit.store import rows_of


def speed_figure(results: Sequence[dict], title: str):
    """Measured speed-up against the MAC reduction of the timed batch, per device and batch size, for the dial; the
    grey diagonal is what the MACs promise."""
    import matplotlib.pyplot as plt

    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
        top, drawn = 1.0, 0
        for result in results:
            rows = [r for r in rows_of(result, "alpha") if r.get("speedup")]
            for batch in sorted({r["latency_batch"] for r in rows}):
                part = [r for r in rows if r["latency_batch"] == batch]
                device = result["provenance"]["hardware"]["device"]
                cores = threads(result["provenance"]["hardware"]["threads"])
                device = f"CPU, {cores}" if device == "cpu" else device.split(" 80GB")[0]
                x, y = [r["latency_mac_reduction"] for r in part], [r["speedup"] for r in part]
                name = f"{device},\nbatch {batch} of {part[0]['latency_tokens']} tokens"
                style = dict(color=palette[drawn % len(palette)], marker="os^vDP"[drawn % 6], markersize=4)
                axis.plot(x, y, label=name, **style)
                top, drawn = max(top, *x), drawn + 1
        axis.plot([1, top], [1, top], color="#999999", linewidth=0.8, linestyle="--", label="what the MACs promise")
        axis.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        axis.set(xlabel="MAC reduction of the timed batch", ylabel="measured speed-up over stock", title=title)
        axis.set(xscale="log", yscale="log")
        ticks = [t for t in (0.5, 1, 2, 3, 5, 7, 10, 15, 20) if t <= top * 1.3]
        axis.set_xticks([t for t in ticks if t >= 1], [f"{t:g}x" for t in ticks if t >= 1])
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.minorticks_off()
        figure.legend(fontsize=7.5, loc="outside right center")
    return figure


def prefill_figure(results: Sequence[dict]):
    """Benchmarks of prefills (kind "bench-prefill"), one line per model, length and batch. Left: speed-up over stock
    against MAC reduction, and the roofline's (dotted: weights must be read, whatever alpha). Middle: the measured
    speed-up as a share of the roofline's. Right: memory of activations, cache and CUDA graphs, over stock's.
    Hollow: the control with PyTorch's own kernels between the products ("fused": false)."""
    import matplotlib.pyplot as plt

    lines: dict[tuple, list[dict]] = {}
    controls: dict[tuple, list[dict]] = {}
    for result in results:
        for row in result["rows"]:
            shape = row["model"], row["tokens"], row["batch"]
            if result.get("fused", True):
                lines.setdefault(shape, []).append(row)
            elif row["alpha"] < 1:
                controls.setdefault(shape, []).append(row)
    top = max(row["mac_reduction"] for rows in lines.values() for row in rows)
    palette = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
    with plt.rc_context(STYLE):
        figure, (speed, realised, memory) = plt.subplots(1, 3, figsize=(10.2, 3.3), layout="constrained")
        for number, ((model, tokens, batch), rows) in enumerate(sorted(lines.items())):
            rows = sorted(rows, key=lambda r: r["mac_reduction"])
            x, stock = [r["mac_reduction"] for r in rows], rows[0]
            style = dict(color=palette[number % 8], marker="os^vDPX*"[number % 8], markersize=4, linewidth=1.3)
            speed.plot(x, [r["speedup"] for r in rows], label=f"{model}, {batch} x {tokens} tokens", **style)
            speed.plot(x, [r["roofline_speedup"] for r in rows], color=style["color"], linewidth=0.9, linestyle=":")
            realised.plot(x, [r["realised"] for r in rows], **style)
            hollow = {**style, "linestyle": "none", "markerfacecolor": "white", "zorder": 3}
            for axis, field in ((speed, "speedup"), (realised, "realised")):
                plain = controls.get((model, tokens, batch), [])
                axis.plot([r["mac_reduction"] for r in plain], [r[field] for r in plain], **hollow)
            if all(r["peak_bytes"] for r in rows):
                held = [r["peak_bytes"] + (r["graph_bytes"] or 0) for r in rows]
                memory.plot(x, [bytes_ / stock["peak_bytes"] for bytes_ in held], **style)
        for axis, name in (
            (speed, "speed-up over stock (dotted: roofline)"),
            (realised, "speed-up, measured / roofline"),
            (memory, "memory without weights, over stock"),
        ):
            ticks = [t for t in (1, 2, 5, 10, 20, 50) if t <= 1.2 * top]
            axis.set(xscale="log", xlabel="MAC reduction", title=name)
            axis.set_xticks(ticks, [f"{t}x" for t in ticks])
            axis.minorticks_off()
        speed.set(yscale="log")
        speed.set_yticks([1, 2, 5, 10], ["1x", "2x", "5x", "10x"])
        realised.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        realised.set(ylim=(0, None))
        memory.axhline(1, color="#999999", linewidth=0.8, linestyle=(0, (1, 3)))
        memory.set(yscale="log")
        memory.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
        memory.minorticks_off()
        if controls:
            plain = {"color": "#555555", "markerfacecolor": "white", "linestyle": "none"}
            speed.plot(
                [], [], marker="o", markersize=4, label="hollow: PyTorch's kernels between the products", **plain
            )
        figure.legend(fontsize=7.5, loc="outside lower center", ncols=3)
    return figure


def attention_figure(results: Sequence[dict]):
    """Benchmarks of attention with scores (kind "bench-attention"): milliseconds in multiples of PyTorch's attention
    alone, a group of bars per shape."""
    import matplotlib.pyplot as plt

    shown = {"attend_and_score": "zsaa: attention and scores", "flash + sums": "flash attention and scores",
             "torch backend": "without kernels"}  # fmt: skip
    groups: dict[str, dict[str, float]] = {}
    for result in results:
        for row in result["rows"]:
            name = f"heads {row['heads']}/{row['kv_heads']}\nof {row['dim']}\n{row['tokens']} tokens"
            groups.setdefault(name, {})[row["variant"]] = row["over_sdpa"]
    with plt.rc_context({**STYLE, "axes.grid.axis": "y"}):
        figure, axis = plt.subplots(figsize=(6.8, 3.2), layout="constrained")
        for number, (variant, name) in enumerate(shown.items()):
            places = [i + 0.27 * (number - 1) for i, g in enumerate(groups.values()) if variant in g]
            heights = [g[variant] for g in groups.values() if variant in g]
            colour, hatch = ("#0072B2", "#E69F00", "#999999")[number], ("", "//", "..")[number]
            bars = axis.bar(places, heights, width=0.25, color=colour, hatch=hatch, edgecolor="white", label=name)
            axis.bar_label(bars, fmt="%.2f" if number < 2 else "%.0f", fontsize=6.5, padding=1)
        axis.axhline(1, color="#000000", linewidth=0.8, linestyle="--")
        axis.set(ylabel="time / PyTorch's attention alone", yscale="log")
        axis.set_yticks([1, 2, 5, 10, 20], ["1x", "2x", "5x", "10x", "20x"])
        axis.minorticks_off()
        axis.set_xticks(range(len(groups)), groups, fontsize=7)
        figure.legend(fontsize=7.5, loc="outside upper center", ncols=3)
    return figure
