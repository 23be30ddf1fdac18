"""What a prefill takes in memory: footprints at the shapes of Table 3, and peaks against the length."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

import torch

from zsaa import dial
from zsaa.bench.device import WrongNumbersError, peak_bytes, prefill_work, printed_flops
from zsaa.bench.prefill import by_kernel, cache_bytes, cached_bytes, check_model, prefill, rule_of
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.budget import alpha_for
from zsaa.cost import mac_reduction
from zsaa.kit import paper
from zsaa.measure import alternate

ALL = 1 - 1e-10  # so near 1 that a layer drops none of 10,000 tokens, and still the pruned code


def _footprint_of(name: str, storage: str, args, device, dtype) -> Iterator[list[dict]]:
    """The rows of a model, one batch and length after another."""
    began = time.perf_counter()
    kept = getattr(torch, storage) if storage != "nf4" else dtype
    model = build(name, max(args.tokens), device, kept, storage, attention=args.attention)
    dial.enable(model, graphs=False)
    config, rule, weights = model.config, rule_of(model), sum(p.nbytes for p in model.parameters())
    print(f"{name} in {storage}: {weights / 1e9:.2f} GB, made in {time.perf_counter() - began:.1f} s", flush=True)
    printed = paper.TABLE_3["Gemma-2-2B-4bit" if config.model_type.startswith("gemma") else "LLaMA-3-8B-4bit"]
    for tokens, batch in itertools.product(args.tokens, args.batches):
        began, rows = time.perf_counter(), []
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
        wanted = [("alpha", t, 1.0 if t == 1 else alpha_for(config, tokens, t, **asdict(rule))) for t in printed]
        wanted += [("printed", t, row["alpha"]) for t, row in printed.items() if t != 1]
        wanted += [("all", 1, ALL)]
        for _, _, alpha in wanted[1:]:
            check_model(model, ids, alpha)
        runs = {str(i): functools.partial(prefill, model, ids, alpha) for i, (*_, alpha) in enumerate(wanted)}
        # The checks have warmed up all but stock.
        times = alternate(runs, repeats=args.repeats, warmup=1, seconds=args.seconds)
        peaks = [peak_bytes(run, device) for run in runs.values()]
        for (control, target, alpha), run, clock, peak in zip(wanted, runs.values(), times.values(), peaks):
            measured = cache_bytes(run().past_key_values)
            if measured != cached_bytes(config, tokens, alpha, rule, batch, kept.itemsize):
                raise WrongNumbersError(f"the cache of {name} holds {measured} bytes at alpha {alpha}")
            rows.append({"model": name, "storage": storage, "attention": config._attn_implementation,
                         "batch": batch, "tokens": tokens, "control": control, "target": target,
                         "alpha": alpha,
                         "mac_reduction": round(mac_reduction(config, tokens, alpha, **asdict(rule)), 3),
                         "weight_bytes": weights, "kv_bytes": measured, "peak_bytes": peak, **clock,
                         "footprint_reduction": round(peaks[0] / peak, 3) if peak else None,
                         "over_all": round(peaks[-1] / peak, 3) if peak else None})  # fmt: skip
        shown = [f"{row['control']} {row['target']}x {row['footprint_reduction']}" for row in rows]
        seconds = time.perf_counter() - began
        print(f"  {batch} x {tokens} tokens, {seconds:.1f} s; footprint over stock: {', '.join(shown)}", flush=True)
        yield rows


def bench_footprint(args, device, dtype) -> dict:
    """Table 3's columns that no weight decides: what a prefill takes at its peak on top of the weights, the cache that
    it leaves, MACs, and the time to the first token, at the paper's printed alphas ("printed") and at those that Eq. 2
    needs for its reductions ("alpha"). Without CUDA graphs, whose memory is another. On a CPU peaks are not measured.

    Reductions of the footprint are over the stock model. "over_all" are those over the dial's own code while it drops
    nothing (the control "all"): what pruning alone gives, where stock attention and ours take different memory.
    "too_large" names what did not fit this GPU.
    """
    rows, facts = [], {"kind": "footprint", "name": args.output.stem, "model": {"name": ", ".join(args.models)}}
    if "nf4" in args.storage:  # releases differ in when they unpack a matrix, which takes memory
        with contextlib.suppress(PackageNotFoundError):
            facts["bitsandbytes"] = version("bitsandbytes")
    for storage, name in itertools.product(args.storage, args.models):
        try:
            for found in _footprint_of(name, storage, args, device, dtype):
                rows += found
                args.keep({**facts, "rows": rows})
        except torch.OutOfMemoryError:  # of a smaller GPU: what it has measured stays
            size = torch.cuda.get_device_properties(device).total_memory / 2**30
            print(f"{name} in {storage}: not run (further), {size:.0f} GiB of GPU memory are too little", flush=True)
            facts.setdefault("too_large", []).append(f"{name}, {storage}")
        torch.cuda.empty_cache()
    print_rows(
        rows, "model storage batch tokens control target alpha mac_reduction latency_ms kv_bytes peak_bytes "
        "footprint_reduction over_all",
    )  # fmt: skip
    return {**facts, "rows": rows}


def bench_memory(args, device, dtype) -> dict:
    """What a prefill takes at its peak on top of the weights, cache and last logits included, against its length:
    stock and at each alpha, kernel by kernel (what CUDA graphs hold beside it is in `prefill`'s rows). ms: of the run
    whose peak is taken (on a GPU), the second one; one only, as long prompts take seconds. flops: that it executes,
    attention causal, scoring left out; mfu: of what the maker prints for the device."""
    rows, printed = [], printed_flops()
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        config, rule = model.config, rule_of(model)
        alphas = [*([] if args.no_stock else [1.0]), *args.alphas]
        for tokens, batch, alpha in itertools.product(args.tokens, args.batches, alphas):
            ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
            run = functools.partial(by_kernel, model, ids, alpha)
            measured = cache_bytes(run().past_key_values)
            predicted = cached_bytes(config, tokens, alpha, rule, batch, dtype.itemsize)
            if measured != predicted:
                raise WrongNumbersError(f"the cache holds {measured} bytes at alpha {alpha}, expected {predicted}")
            began = time.perf_counter()
            peak = peak_bytes(run, device)
            clock = None if peak is None else round(1000 * (time.perf_counter() - began), 3)
            flops = sum(work for work, _ in prefill_work(config, batch, tokens, alpha, rule, dtype.itemsize))
            mfu = round(1000 * flops / clock / printed, 4) if clock and printed else None
            rows.append({"model": name, "batch": batch, "tokens": tokens, "alpha": alpha, "kv_bytes": measured,
                         "peak_bytes": peak, "ms": clock, "flops": flops, "mfu": mfu})  # fmt: skip
            print(rows[-1], flush=True)
            args.keep({"rows": rows})
        del model, run
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows}
