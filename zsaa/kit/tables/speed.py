"""Benchmarks at true shapes with random weights, from their points: a row per setting."""

from __future__ import annotations

from zsaa.kit.points import settings


def _shape(row) -> str:
    return row["model"].split(", ")[0]


def _format(row) -> str:
    """The number format, or how weights are stored."""
    return row["model"].split(", ")[-1]


def _prefill(row) -> str:
    return f"{row['batch']:g} x {row['tokens']:g} tokens"


def _number(row, name: str, text: str, unit: float = 1) -> str:
    """The number of that name; "-" where there is none."""
    value = row.get(name)
    return "-" if value is None or value != value else text.format(value / unit)


def ttft_table(points):
    """Points of results of the kind "ttft"."""
    import pandas as pd

    return pd.DataFrame(
        {
            "shape, random weights": _shape(row),
            "prefill": _prefill(row),
            "MACs": f"{row['mac_reduction']:.2f}x",
            "alpha": round(row["alpha"], 4),
            "first token, ms": f"{row['latency_ms']:.2f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "without CUDA graphs": _number(row, "by_kernel_speedup", "{:.2f}x")
            if row.get("capture_ms", 0) > 0
            else "-",
            "on": f"{row['hardware']}, {_format(row)}",
        }
        for row in settings(points).to_dict("records")
    )


def prefill_table(points):
    """Points of results of the kind "bench-prefill". Columns without a value (on a CPU, a GPU's) are left out."""
    import pandas as pd

    def between(row) -> str:  # peaks are a GPU's, and so are fused kernels
        return _number(row, "peak_bytes", "fused" if row["method"] == "dial" else "PyTorch's")

    table = pd.DataFrame(
        {
            "shape, random weights": _shape(row),
            "prefill": _prefill(row),
            "alpha": f"{row['alpha']:g}",
            "kernels between": between(row),
            "MACs": f"{row['mac_reduction']:.2f}x",
            "ms [quartiles]": f"{row['latency_ms']:.1f} [{row['latency_ms_low']:.1f}, {row['latency_ms_high']:.1f}]",
            "speed-up": f"{row['speedup']:.2f}x",
            "roofline's": f"{row['roofline_speedup']:.2f}x",
            "measured / roofline": f"{row['realised']:.2f}",
            "recording a graph, ms": _number(row, "capture_ms", "{:.0f}"),
            "cache, MB": _number(row, "kv_bytes", "{:.1f}", 1e6),
            "peak, MB": _number(row, "peak_bytes", "{:.1f}", 1e6),
            "graph, MB": _number(row, "graph_bytes", "{:.1f}", 1e6),
            "on": f"{row['hardware']}, {_format(row)}",
        }
        for row in settings(points).to_dict("records")
    )
    return table.loc[:, (table != "-").any()]


def footprint_table(points):
    """Points of results of the kind "footprint"."""
    import pandas as pd

    kinds = {"dial": "solved", "dial at the printed alpha": "as printed"}
    found = settings(points).sort_values(["file", "model", "tokens", "batch"], kind="stable")
    return pd.DataFrame(
        {
            "shape, random weights": row["model"].replace(", random weights", ""),
            "prefill": _prefill(row),
            "alpha": "1" if row["alpha"] == 1 else f"{row['alpha']:.4f} ({kinds.get(row['method'], row['method'])})",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "footprint, MB": _number(row, "peak_bytes", "{:.0f}", 1e6),
            "over stock": _number(row, "footprint_reduction", "{:.2f}x"),
            "over the dial's own code": _number(row, "over_all", "{:.2f}x"),
            "cache, MB": f"{row['kv_bytes'] / 1e6:.1f}",
            "first token, ms": f"{row['latency_ms']:.1f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "on": row["hardware"],
        }
        for row in found.to_dict("records")
    )
