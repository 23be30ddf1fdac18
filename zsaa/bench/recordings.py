"""What recorded prefills hold in memory, and what a replay takes beside it."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.prefill import by_kernel, check_model, graphs_of, prefill
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.fast import graphs
from zsaa.measure import alternate

WAYS = {"dial": True, "dial, the cache copied at the end": False}  # does a large cache leave layer by layer?


@contextlib.contextmanager
def leaving(by_layer: bool) -> Iterator[None]:
    """How a large cache leaves the recordings that are made in this block."""
    before = graphs.outlet_for
    graphs.outlet_for = before if by_layer else lambda tensors: None
    try:
        yield
    finally:
        graphs.outlet_for = before


def peaks(run: Callable[[], object], times: int, device: torch.device) -> tuple[int | None, int | None]:
    """What `times` runs take at their peak on top of what was there: bytes of tensors, and bytes that PyTorch asks of
    the driver, freed ones given back before; None on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(times):
        run()
    if device.type != "cuda":
        return None, None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held[0], torch.cuda.max_memory_reserved() - held[1]


def _recorded(model: nn.Module, ids: Tensor, args, device, stock_peak: int | None) -> Iterator[dict]:
    """A row for each alpha, the mildest first, whose recordings share one memory; for each way in which a cache leaves
    them."""
    for way, by_layer in WAYS.items():
        graphs_of(model).clear()
        for alpha in sorted(args.alphas, reverse=True):
            kernel, run = (functools.partial(each, model, ids, alpha) for each in (by_kernel, prefill))
            kernel()
            alone, _ = peaks(kernel, 1, device)
            with leaving(by_layer):
                _, first = peaks(run, 3, device)
            check_model(model, ids, alpha)
            later, _ = peaks(run, 2, device)
            times = alternate({"": run, "kernel": kernel}, repeats=args.repeats, warmup=1, seconds=args.seconds)
            held, made = dial.captured(model), list(graphs_of(model).recordings.values())
            taken = None if later is None else held["bytes"] + later
            yield {"alpha": alpha, "variant": way, "recorded_bytes": held["bytes"], "peak_bytes": later,
                   "over_stock": round(taken / stock_peak, 3) if taken and stock_peak else None,
                   "by_kernel_peak_bytes": alone, "first_reserved_peak": first, "off": held["off"],
                   "leaves_by_layer": bool(made) and made[-1].outlet is not None,
                   "latency_ms": times[""]["latency_ms"], "latency_ms_quartiles": times[""]["latency_ms_quartiles"],
                   "by_kernel_ms": times["kernel"]["latency_ms"]}  # fmt: skip
    graphs_of(model).clear()


def bench_recordings(args, device, dtype) -> dict:
    """What the recordings of a prefill at these alphas hold, and what a pass takes at its peak beside them.

    recorded_bytes: of all alphas of the shape so far, the mildest recorded first. peak_bytes: of a later pass beside
    that; over_stock: both over the peak of a stock pass. first_reserved_peak: what PyTorch asks of the driver in the
    first three passes, recording and its check included. A large cache leaves its recording layer by layer; the other
    variant copies it at the end. Bytes are None on a CPU.
    """
    rows = []
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        for batch, tokens in itertools.product(args.batches, args.tokens):
            ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
            facts, stock = (
                {"model": name, "batch": batch, "tokens": tokens},
                functools.partial(prefill, model, ids, 1.0),
            )
            stock()
            peak, reserved = peaks(stock, 3, device)
            clock = alternate({"": stock}, repeats=args.repeats, warmup=1, seconds=args.seconds)[""]
            rows.append({**facts, "alpha": 1.0, "variant": "stock", "recorded_bytes": None, "peak_bytes": peak,
                         "first_reserved_peak": reserved, "latency_ms": clock["latency_ms"],
                         "latency_ms_quartiles": clock["latency_ms_quartiles"]})  # fmt: skip
            for row in _recorded(model, ids, args, device, peak):
                rows.append({**facts, **row})
                print(rows[-1], flush=True)
                args.keep({"rows": rows})
        del model, stock
    print_rows(rows, "model batch tokens alpha recorded_bytes peak_bytes latency_ms variant")
    return {"rows": rows}
