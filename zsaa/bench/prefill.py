"""The time to the first token, stock and at each alpha: by the clock, and kernel by kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.attention import check_attention
from zsaa.bench.device import WrongNumbersError, ceilings, peak_bytes, roofline_ms
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.budget import alpha_for
from zsaa.cost import attention_widths, kv_bytes, mac_reduction
from zsaa.families import find_decoder
from zsaa.fast.graphs import Graphs
from zsaa.measure import alternate
from zsaa.rule import Rule


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def prefill(model: nn.Module, ids: Tensor, alpha: float):
    with torch.inference_mode(), dial.at(model, alpha):
        return model(ids, use_cache=True, logits_to_keep=1)


def rule_of(model: nn.Module) -> Rule:
    return Rule(**dial.rule(model))


def cached_bytes(config, n: int, alpha: float, rule: Rule, batch: int, itemsize: int) -> int:
    """What the cache of such a prefill must hold."""
    return kv_bytes(config, n, alpha, rule.tau, batch, itemsize, schedule=rule.schedule)


def check_model(model: nn.Module, ids: Tensor, alpha: float) -> None:
    """Finite logits, the promised number of rows in every layer, and a repeat that is equal bit for bit."""
    first, again = prefill(model, ids, alpha), prefill(model, ids, alpha)  # with CUDA graphs, the second is a replay
    expected = rule_of(model).stages(ids.shape[1], alpha, model.config.num_hidden_layers)[:-1]
    rows = [layer.keys.shape[-2] for layer in first.past_key_values.layers]
    if rows != expected:
        raise WrongNumbersError(f"layers cache {rows} rows at alpha {alpha}, expected {expected}")
    if not torch.isfinite(first.logits).all():
        raise WrongNumbersError(f"logits at alpha {alpha} are not finite")
    if not torch.equal(first.logits, again.logits):
        raise WrongNumbersError(f"a repeat at alpha {alpha} differs: {_apart(first, again)}")


def _apart(first, again) -> str:
    """Where two passes part: logits by how much, and the first layer that was given something else."""
    off = (first.logits - again.logits).abs().max().item()
    pairs = enumerate(zip(first.past_key_values.layers, again.past_key_values.layers))
    parts = (i for i, (a, b) in pairs if not (torch.equal(a.columns, b.columns) and torch.equal(a.keys, b.keys)))
    return f"logits by up to {off:.3g}, keys or rows from layer {next(parts, None)} on"


def _given(args, config, tokens: int, rule: Rule) -> dict[str, float]:
    """The settings of --alphas, by name."""
    return {f"{alpha:g}": alpha for alpha in args.alphas}


def _solved(args, config, tokens: int, rule: Rule) -> dict[str, float]:
    """The alphas for the MAC reductions of --reductions, by reduction."""
    return {f"{times:g}": alpha_for(config, tokens, times, **asdict(rule)) for times in args.reductions}


def checked_models(args, device, dtype, alphas_of=_given):
    """For every model, batch and length: the model, its input and the settings of alpha, stock ("1") first, numerics
    checked."""
    for name in args.models:
        storage = "nf4" if "nf4" in getattr(args, "storage", ()) else None
        model = build(name, max(args.tokens) + getattr(args, "new", 0), device, dtype, storage)
        config, rule = model.config, rule_of(model)
        heads, (q_dim, kv_dim) = config.num_attention_heads, attention_widths(config)
        shape = (q_dim // heads, heads, kv_dim * heads // q_dim)
        check_attention(shape, min(2048, max(args.tokens)), device, dtype)
        for tokens, batch in itertools.product(args.tokens, args.batches):
            ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
            alphas = alphas_of(args, config, tokens, rule)
            for alpha in alphas.values():
                check_model(model, ids, alpha)
            yield name, model, ids, {"1": 1.0, **alphas}


def graphs_of(model: nn.Module) -> Graphs:
    return find_decoder(model)[0]._zsaa.graphs


def _weighed(held: dict[str, int], key: str, run: Callable) -> None:
    """Notes what the cache of run() holds: long prompts take too long to be run again for it."""
    held[key] = cache_bytes(run().past_key_values)


def by_kernel(model: nn.Module, ids: Tensor, alpha: float):
    """A prefill without CUDA graphs, whatever is recorded."""
    graphs = graphs_of(model)
    before, graphs.mode = graphs.mode, False
    try:
        return prefill(model, ids, alpha)
    finally:
        graphs.mode = before


def bench_prefill(args, device, dtype, alphas_of=_given) -> dict:
    """Time to the first token's logits, by the clock; where CUDA graphs are recorded, without them too. peak_bytes:
    what a pass takes on top of what is there; recorded_bytes: what the recordings of all alphas hold beside it.
    """
    rates, rows = ceilings(device, dtype), []
    for name, model, ids, alphas in checked_models(args, device, dtype, alphas_of):
        (batch, tokens), config, rule = ids.shape, model.config, rule_of(model)
        runs = {key: functools.partial(prefill, model, ids, alpha) for key, alpha in alphas.items()}
        captured = dial.captured(model)
        recorded = {g["alphas"][0]: g for g in captured["graphs"] if g["lengths"] == [tokens] * batch}
        plain = {key: functools.partial(by_kernel, model, ids, a) for key, a in alphas.items() if a in recorded}
        runs |= {f"{key} by kernel": run for key, run in plain.items()}
        held: dict[str, int] = {}
        timed = {key: functools.partial(_weighed, held, key, run) for key, run in runs.items()}
        limits = {"repeats": args.repeats, "warmup": args.warmup, "seconds": args.seconds}
        times = alternate(timed, **limits, clock=args.clock)
        ideals = {k: roofline_ms(config, batch, tokens, a, rule, dtype.itemsize, rates) for k, a in alphas.items()}
        for key, alpha in alphas.items():
            predicted = cached_bytes(config, tokens, alpha, rule, batch, dtype.itemsize)
            measured = held[key]
            if measured != predicted:
                raise WrongNumbersError(f"the cache holds {measured} bytes at alpha {alpha}, expected {predicted}")
            ideal, graph = ideals["1"] / ideals[key], recorded.get(alpha, {})
            unrecorded = times.get(f"{key} by kernel", times[key])
            rows.append({"model": name, "batch": batch, "tokens": tokens, "alpha": alpha,
                         **({"storage": "nf4"} if "nf4" in args.storage else {}),
                         "mac_reduction": round(mac_reduction(config, tokens, alpha, **asdict(rule)), 3),
                         **times[key], "roofline_ms": round(ideals[key], 3), "roofline_speedup": round(ideal, 3),
                         "realised": round(times[key]["speedup"] / ideal, 3),
                         "of_roofline": round(ideals[key] / times[key]["latency_ms"], 3),
                         "by_kernel_ms": unrecorded["latency_ms"],
                         "graph_bytes": graph.get("bytes"), "recorded_bytes": captured["bytes"] if graph else None,
                         "capture_ms": graph.get("capture_ms"),
                         "kv_bytes": measured, "peak_bytes": peak_bytes(runs[key], device)})  # fmt: skip
            if alphas_of is _solved:
                rows[-1] |= {"control": "alpha", "target": _whole(key), "by_kernel_speedup": unrecorded["speedup"]}
        if off := dial.captured(model)["off"]:
            print(f"  no CUDA graphs: {off}")
        shown = [f"{row['alpha']:.4f} {row['latency_ms']} ms" for row in rows[-len(alphas) :]]
        print(f"{name}, {batch} x {tokens} tokens: {', '.join(shown)}", flush=True)
        graphs_of(model).clear()
        del runs, plain, model
        args.keep({"ceilings": rates, "rows": rows})
    print_rows(
        rows,
        "model batch tokens alpha mac_reduction latency_ms by_kernel_ms speedup roofline_speedup realised of_roofline "
        "capture_ms graph_bytes",
    )
    return {"ceilings": rates, "rows": rows}


def _whole(number: str | float) -> float | int:
    number = float(number)
    return int(number) if number == int(number) else number


def bench_ttft(args, device, dtype) -> dict:
    """Table 2's speed-ups of the time to first token, which no weight decides: a prefill at the alphas that Eq. 2 needs
    for these reductions in MACs, by the clock over stock."""
    return {"name": args.output.stem, "model": {"name": ", ".join(args.models)},
            **bench_prefill(args, device, dtype, _solved)}  # fmt: skip


def bench_profile(args, device, dtype) -> dict:
    """Milliseconds on the device by kernel, in one prefill without CUDA graphs; on a CPU by operation."""
    from torch.profiler import ProfilerActivity, profile

    rows, passes = [], 3
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    for name, model, ids, alphas in checked_models(args, device, dtype):
        for alpha in alphas.values():
            by_kernel(model, ids, alpha)
            with profile(activities=[activity]) as profiler:
                for _ in range(passes):
                    by_kernel(model, ids, alpha)
                if device.type == "cuda":
                    torch.cuda.synchronize()
            which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
            totals = [(e.key, getattr(e, which) / 1000 / passes, e.count // passes) for e in profiler.key_averages()]
            total = sum(ms for _, ms, _ in totals)
            facts = {"model": name, "batch": ids.shape[0], "tokens": ids.shape[1], "alpha": alpha}
            rows.append({**facts, "kernel": "all", "calls": sum(calls for *_, calls in totals), "ms": round(total, 3)})
            for kernel, ms, calls in sorted(totals, key=lambda row: -row[1])[: args.top]:
                rows.append({**facts, "kernel": kernel[:90], "calls": calls, "ms": round(ms, 3)})
    print_rows(rows, "model batch tokens alpha ms calls kernel")
    return {"rows": rows}
