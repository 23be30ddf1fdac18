"""What the clock gives of what the MACs promise: forward passes, prefills, attention, training steps."""

from __future__ import annotations

import functools

from zsaa.kit.figures.style import MARKERS, PALETTE, REFERENCE, STYLE, legend, multiples, panels
from zsaa.kit.points import settings

FACTORS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 50)
PLAIN = "dial, PyTorch's kernels"  # the control: no fused kernels between the products


def speed_figure(points):
    """Measured speed-up against the MAC reduction of the timed batch, a line per device, model, length and batch size,
    for the dial, from points of timed forward passes and prefills; the grey diagonal is what the MACs promise."""
    import matplotlib.pyplot as plt

    timed = points["task"].str.endswith(", forward pass") | (points["task"] == "prefill")
    found = settings(points[timed & points["method"].str.startswith("dial")])
    groups = list(found.groupby(["hardware", "model", "tokens", "batch"], sort=False))
    several = found["model"].nunique() > 1
    with plt.rc_context(STYLE):
        figure, axis = panels(3.2)
        for number, (_, rows) in enumerate(groups):
            first = rows.iloc[0]
            name = f"{first['hardware'].split(' 80GB')[0]}, {first['batch']:g} x {first['tokens']:g} tokens"
            name = f"{first['model'].split(', ')[0]}, {name}" if several else name
            look = {"color": PALETTE[number % 8], "marker": MARKERS[number % 8]}
            axis.plot(rows["mac_reduction"], rows["speedup"], label=name, **look)
        top = max(1.0, found["mac_reduction"].max())
        axis.plot([1, top], [1, top], color="#999999", linewidth=0.8, linestyle="--", label="what the MACs promise")
        axis.axhline(1, **REFERENCE)
        axis.set(xlabel="MAC reduction of the timed batch", ylabel="measured speed-up", xscale="log", yscale="log")
        ticks = [t for t in FACTORS if 0.5 <= t <= top * 1.3]
        multiples(axis, [t for t in ticks if t >= 1])
        multiples(axis, ticks, "y")
        axis.minorticks_off()
        legend(figure, columns=2)
    figure.set_label(
        f"Forward passes of {'; '.join(found['model'].unique())}: measured speed-up over the stock model against the "
        "reduction of MACs of the timed batch. On the dashed line the clock gives what the MACs promise."
    )
    return figure


def prefill_figures(points) -> dict:
    """Benchmarks of prefills (kind "bench-prefill"), a line per model, length and batch, against MAC reduction.

    "speed": the speed-up over stock, with the roofline's (dotted: weights must be read, whatever alpha). "roofline":
    the measured speed-up as a share of the roofline's. "memory": of activations, cache and CUDA graphs, over stock's,
    where it was counted. Hollow: the control with PyTorch's own kernels between the products."""
    import matplotlib.pyplot as plt

    found = settings(points)
    controls = found[found["method"] == PLAIN]
    found = found[~found["file"].isin(controls["file"])]
    lines = list(found.groupby(["model", "tokens", "batch"]))
    shown = {
        "speed": ("speedup", "speed-up over stock (dotted: roofline)"),
        "roofline": ("realised", "speed-up, measured / roofline"),
        "memory": (None, "memory without weights / stock's"),
    }
    figures = {}
    with plt.rc_context(STYLE):
        for name, (field, about) in shown.items():
            if field is None and ("peak_bytes" not in found or found["peak_bytes"].isna().all()):
                continue
            figure, axis = panels(3.6)
            for number, (shape, rows) in enumerate(lines):
                look = {"color": PALETTE[number % 8], "marker": MARKERS[number % 8]}
                _prefill_line(axis, field, rows, look, _shape(*shape))
                mine = controls[(controls[["model", "tokens", "batch"]] == list(shape)).all(axis=1)]
                if field and len(mine):
                    hollow = {**look, "linestyle": "none", "markerfacecolor": "white", "zorder": 3}
                    axis.plot(mine["mac_reduction"], mine[field], **hollow)
            _prefill_axis(axis, name, about, found["mac_reduction"].max())
            if field and len(controls):
                axis.plot([], [], "o", color="#555555", markerfacecolor="white", label="hollow: PyTorch's kernels")
            legend(figure, columns=2)
            figure.set_label(_prefill_caption(found, about, bool(field and len(controls))))
            figures[name] = figure
    return figures


def _shape(model: str, tokens: float, batch: float) -> str:
    return f"{model.split(', ')[0]}, {batch:g} x {tokens:g} tokens"


def _prefill_line(axis, field: str | None, rows, look: dict, name: str) -> None:
    rows = rows.sort_values("mac_reduction", kind="stable")
    if field is None:
        if rows["peak_bytes"].isna().any():
            return
        held = [rows[kind] for kind in ("recorded_bytes", "graph_bytes") if kind in rows]  # of all recordings, of one
        graphs = functools.reduce(lambda a, b: a.fillna(b), held).fillna(0) if held else 0
        axis.plot(rows["mac_reduction"], (rows["peak_bytes"] + graphs) / rows["peak_bytes"].iloc[0], label=name, **look)
        return
    axis.plot(rows["mac_reduction"], rows[field], label=name, **look)
    if field == "speedup":
        axis.plot(rows["mac_reduction"], rows["roofline_speedup"], color=look["color"], linewidth=0.8, linestyle=":")


def _prefill_axis(axis, name: str, about: str, top: float) -> None:
    axis.set(xscale="log", xlabel="MAC reduction", ylabel=about)
    multiples(axis, [t for t in (1, 2, 5, 10, 20, 50) if t <= 1.2 * top])
    if name == "roofline":
        axis.set(ylim=(0, None))
    else:
        axis.set(yscale="log")
        low, high = axis.get_ylim()
        multiples(axis, [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= t <= high], "y")
    axis.axhline(1, **REFERENCE)
    axis.minorticks_off()


def _prefill_caption(found, about: str, hollow: bool) -> str:
    where = ", ".join(found["hardware"].unique())
    text = f"Prefills with random weights ({where}): {about}, against the reduction of MACs."
    return text + (" Hollow: the dial with PyTorch's own kernels between the matrix products." if hollow else "")


VARIANTS = {
    "attend_and_score": ("zsaa: attention and scores", "#0072B2", ""),
    "flash + sums": ("flash attention and scores", "#E69F00", "//"),
    "torch backend": ("without kernels", "#999999", ".."),
}


def attention_figure(points):
    """Benchmarks of attention with scores (kind "bench-attention"): milliseconds in multiples of PyTorch's attention
    alone, a group of bars per shape."""
    import matplotlib.pyplot as plt

    found = settings(points)
    shapes = list(found.groupby(["model", "tokens"], sort=False))
    with plt.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axis = panels(0.42 * len(shapes) + 0.9)
        for number, (variant, (name, colour, hatch)) in enumerate(VARIANTS.items()):
            mine = [(y, rows[rows["method"] == variant]["over_sdpa"]) for y, (_, rows) in enumerate(shapes)]
            places = [y + 0.27 * (number - 1) for y, rows in mine if len(rows)]
            widths = [rows.iloc[-1] for _, rows in mine if len(rows)]
            bars = axis.barh(places, widths, height=0.25, color=colour, hatch=hatch, edgecolor="white", label=name)
            axis.bar_label(bars, fmt="%.2f" if number < 2 else "%.0f", fontsize=6, padding=1)
        axis.axvline(1, color="#000000", linewidth=0.8, linestyle="--")
        axis.set(xlabel="time / PyTorch's attention alone", xscale="log", xlim=(None, found["over_sdpa"].max() * 1.4))
        multiples(axis, [1, 2, 5, 10, 20])
        axis.minorticks_off()
        names = [
            f"{model.rsplit(', ', 1)[0].replace(', ', chr(10))}\n{tokens:g} tokens" for (model, tokens), _ in shapes
        ]
        axis.set_yticks(range(len(shapes)), names, fontsize=6)
        axis.invert_yaxis()
        legend(figure, columns=2)
    figure.set_label(
        f"Attention with contribution scores ({', '.join(found['hardware'].unique())}): time in multiples of PyTorch's "
        "attention alone, which gives no scores."
    )
    return figure


def training_figure(points):
    """A training step (kind "bench-train") with alpha drawn from its range, over one at alpha = 1; the tick is what the
    MACs promise."""
    import matplotlib.pyplot as plt

    found = settings(points)[::-1]
    with plt.rc_context(STYLE):
        figure, axis = panels(0.32 * len(found) + 0.7)
        for y, row in enumerate(found.to_dict("records")):
            ratio = row["sampled_over_conventional"]
            axis.barh(y, ratio, height=0.55, color="#0072B2" if ratio < 1 else "#E69F00")
            axis.plot([row["ideal"]] * 2, [y - 0.38, y + 0.38], color="#000000", linewidth=2)
            axis.text(0.55, y, f"{ratio:.2f}", va="center", ha="center", fontweight="bold", color="white")
        axis.axvline(1, color="#555555", linewidth=0.8, linestyle="--")
        names = [f"{row.model.split(', ')[0]}\n{row.batch:g} x {row.tokens:g}" for row in found.itertuples()]
        axis.set_yticks(range(len(found)), names)
        axis.grid(axis="y", visible=False)
        axis.set(xlabel=r"time / step at $\alpha$ = 1 (tick: MACs)", xlim=(0, 1.3))
    drawn = ", ".join(dict.fromkeys(f"{row.low:g} to {row.high:g}" for row in found.itertuples()))
    figure.set_label(
        f"A training step with alpha drawn from {drawn}, over one at alpha = 1, with random weights "
        f"({', '.join(found['hardware'].unique())}). The tick is what the MACs promise."
    )
    return figure
