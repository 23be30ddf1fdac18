"""Benchmarks at true shapes with random weights, a row per setting."""

from __future__ import annotations

from collections.abc import Sequence

from zsaa.kit.labels import device_of


def ttft_table(results: Sequence[dict]):
    """Results of the kind "ttft", a row per setting."""
    import pandas as pd

    return pd.DataFrame(
        {
            "shape, random weights": row["model"],
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "alpha": round(row["alpha"], 4),
            "first token, ms": f"{row['latency_ms']:.2f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "without CUDA graphs": f"{row['by_kernel_speedup']:.2f}x" if row["capture_ms"] else "-",
            "on": f"{device_of(result)}, {result['dtype']}",
        }
        for result in results
        for row in result["rows"]
    )


def prefill_table(results: Sequence[dict]):
    """Results of the kind "bench-prefill", a row per setting. Columns without a value (on a CPU, a GPU's) are left
    out."""
    import pandas as pd

    def mega(value: float | None) -> str:
        return "-" if value is None else f"{value / 1e6:.1f}"

    def between(result: dict, row: dict) -> str:  # peaks are a GPU's, and so are fused kernels
        fused = result.get("fused", True) and row["alpha"] < 1
        return "-" if row["peak_bytes"] is None else "fused" if fused else "PyTorch's"

    table = pd.DataFrame(
        {
            "shape, random weights": row["model"],
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "alpha": f"{row['alpha']:g}",
            "kernels between": between(result, row),
            "MACs": f"{row['mac_reduction']:.2f}x",
            "ms [quartiles]": "{:.1f} [{:.1f}, {:.1f}]".format(row["latency_ms"], *row["latency_ms_quartiles"]),
            "speed-up": f"{row['speedup']:.2f}x",
            "roofline's": f"{row['roofline_speedup']:.2f}x",
            "measured / roofline": f"{row['realised']:.2f}",
            "recording a graph, ms": f"{row['capture_ms']:.0f}" if row["capture_ms"] else "-",
            "cache, MB": mega(row["kv_bytes"]),
            "peak, MB": mega(row["peak_bytes"]),
            "graph, MB": mega(row["graph_bytes"]),
            "on": f"{device_of(result)}, {result['dtype']}",
        }
        for result in results
        for row in result["rows"]
    )
    return table.loc[:, (table != "-").any()]


def footprint_table(results: Sequence[dict]):
    """Results of the kind "footprint", a row per setting."""
    import pandas as pd

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    kinds = {"alpha": "solved", "printed": "as printed", "all": "dial's code, nothing dropped"}
    return pd.DataFrame(
        {
            "shape, random weights": f"{row['model']}, {row['storage']}",
            "prefill": f"{row['batch']} x {row['tokens']} tokens",
            "alpha": "1" if row["alpha"] == 1 else f"{row['alpha']:.4f} ({kinds[row['control']]})",
            "MACs": f"{row['mac_reduction']:.2f}x",
            "footprint, MB": "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
            "over stock": times(row["footprint_reduction"]),
            "over the dial's own code": times(row["over_all"]),
            "cache, MB": f"{row['kv_bytes'] / 1e6:.1f}",
            "first token, ms": f"{row['latency_ms']:.1f}",
            "speed-up": f"{row['speedup']:.2f}x",
            "on": device_of(result),
        }
        for result in results
        for row in sorted(result["rows"], key=lambda row: (row["model"], row["storage"], row["tokens"], row["batch"]))
    )
