"""What the machine can do, and times and memory of the device alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from zsaa.cost import attention_widths, layer_weights
from zsaa.measure import alternate
from zsaa.rule import Rule


class WrongNumbersError(RuntimeError):
    """A check of the numerics failed: nothing is timed."""


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """Measured rates of a large matrix product (FLOP/s) and a large copy (bytes/s, read and written)."""
    size, elements = (8192, 1 << 29) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.float16, device=device).normal_()
    target = torch.empty_like(source)
    times = alternate({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=20, warmup=3)
    flops = 2 * size**3 / (times["product"]["latency_ms"] / 1000)
    return {"flops_per_s": flops, "bytes_per_s": 2 * source.nbytes / (times["copy"]["latency_ms"] / 1000)}


PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 311.9e12}  # FLOP/s that makers print, dense, 16 bits


def printed_flops() -> float | None:
    """Of this machine's GPU, each second; None where it is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for kind, rate in PEAKS.items() if kind in name), None)


def prefill_work(config, batch: int, tokens: int, alpha: float, rule: Rule, itemsize: int) -> Iterator[tuple[int, int]]:
    """(FLOPs, bytes) of each layer of a prefill.

    FLOPs: two per multiply-accumulate, causal attention counted as half a square; scoring is left out, as attention
    has the soft-score at hand. Bytes: a layer's weights once, the rows that enter and leave it, keys and values.
    """
    hidden, (q_dim, kv_dim), (entering, kept) = config.hidden_size, attention_widths(config), layer_weights(config)
    for n, after in pairwise(rule.stages(tokens, alpha, config.num_hidden_layers)):
        flops = 2 * batch * (n * entering + n * n * q_dim + after * kept)
        yield flops, itemsize * (entering + kept + batch * ((n + after) * hidden + 2 * n * kv_dim))


def roofline_ms(config, batch: int, tokens: int, alpha: float, rule: Rule, itemsize: int, rates: dict) -> float:
    """The least time of a prefill: per layer, the larger of its FLOPs over the measured matrix rate and its bytes over
    the measured bandwidth (`prefill_work`)."""
    hidden, work = config.hidden_size, prefill_work(config, batch, tokens, alpha, rule, itemsize)
    seconds = sum(max(flops / rates["flops_per_s"], moved / rates["bytes_per_s"]) for flops, moved in work)
    head = itemsize * hidden * config.vocab_size / rates["bytes_per_s"]  # the last token's logits read the head once
    return 1000 * (seconds + head)


def captured(run: Callable[[int], object], calls: int) -> Callable[[], object]:
    """`calls` calls, run(0) to run(calls - 1), as one: on a GPU replayed from a CUDA graph, without launch gaps."""
    if not torch.cuda.is_available():
        return lambda: [run(i) for i in range(calls)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(calls):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i)
    return graph.replay


def device_times(runs: dict[str, Callable[[int], object]], calls: int, repeats: int) -> dict[str, dict]:
    """Milliseconds per call of each variant, timed in turn: median, quartiles, speed-up over the first."""
    times = alternate({name: captured(run, calls) for name, run in runs.items()}, repeats=repeats, warmup=2)
    for row in times.values():
        row["latency_ms"] = round(row["latency_ms"] / calls, 5)
        row["latency_ms_quartiles"] = [round(q / calls, 5) for q in row["latency_ms_quartiles"]]
    return times


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Memory that `run` takes at its peak, on top of what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
