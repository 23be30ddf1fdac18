"""More than one device: a model spread over several, neighbouring layers together; and copies, each on its own."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import nn

from zsaa import dial
from zsaa.bench.device import ceilings, prefill_work, printed_flops
from zsaa.bench.prefill import check_model, prefill, rule_of
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build, config_of
from zsaa.cost import mac_reduction
from zsaa.families import find_decoder
from zsaa.measure import alternate
from zsaa.measure.distributed import gather, place, start

AT_ONCE = 4  # prompts that follow each other without a wait, so that each device has some at any time


def devices_of(device: torch.device) -> list[torch.device]:
    """All GPUs that are seen; of a CPU two halves of a model on one."""
    if device.type != "cuda":
        return [device] * 2
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def spread(name: str, tokens: int, devices: list[torch.device], dtype: torch.dtype) -> nn.Module:
    """A model with random weights that are made where they stay: as many layers on each device, embeddings on the
    first, the head on the last. Between devices go the rows that are alive (accelerate's hooks)."""
    import accelerate
    import transformers

    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config_of(name, tokens), attn_implementation="sdpa", dtype=dtype
        )
    decoder, family = find_decoder(model)
    body = next(key for key, module in model.named_modules() if module is decoder)
    layers = getattr(decoder, family.layers)
    places = {f"{body}.{family.layers}.{i}": devices[i * len(devices) // len(layers)] for i in range(len(layers))}
    for key, module in model.named_modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            late = key.startswith(f"{body}.norm") or not key.startswith(body)
            inside = next((where for layer, where in places.items() if key.startswith(f"{layer}.")), None)
            where = inside or devices[-1 if late else 0]
            module.to_empty(device=where, recurse=False)
            model._init_weights(module)
            if inside is None:
                places[key] = where
    dial.enable(model.eval(), graphs=False)  # the hooks of accelerate rule recordings out
    return accelerate.dispatch_model(model, places, main_device=devices[0], force_hooks=True)


def bench_scale(args, device, dtype) -> dict:
    """Prefills of a model that is spread over all GPUs: one prompt at a time, when one GPU works and the others wait,
    and several after another, when all work.

    flops: that the pass executes, attention causal, scoring left out. mfu: of what the makers print for all devices;
    of_measured: of a large product's rate, measured here. Peaks and weights: bytes, the sum over devices.
    """
    devices, rows = devices_of(device), []
    rates, printed = ceilings(device, dtype), printed_flops()
    for name in args.models:
        began = time.perf_counter()
        model = spread(name, max(args.tokens), devices, dtype)
        config, rule, made = model.config, rule_of(model), time.perf_counter() - began
        weights = sum(p.nbytes for p in model.parameters())
        print(f"{name}: {weights / 1e9:.1f} GB on {len(devices)} devices, made in {made:.1f} s", flush=True)
        for batch, tokens in itertools.product(args.batches, args.tokens):
            ids = torch.randint(0, config.vocab_size, (batch, tokens), device=devices[0])
            alphas = [1.0, *args.alphas]
            for alpha in alphas[1:]:
                check_model(model, ids, alpha)
            passes = {str(a): functools.partial(prefill, model, ids, a) for a in alphas}
            one = {key: functools.partial(_several, run, 1, devices) for key, run in passes.items()}
            many = {key: functools.partial(_several, run, AT_ONCE, devices) for key, run in passes.items()}
            alone = alternate(one, repeats=args.repeats, warmup=1, seconds=args.seconds)
            together = alternate(many, repeats=args.repeats, warmup=0, seconds=args.seconds)
            for alpha in alphas:
                flops = sum(work for work, _ in prefill_work(config, batch, tokens, alpha, rule, dtype.itemsize))
                each = together[str(alpha)]["latency_ms"] / AT_ONCE
                rate = flops / each * 1000 / len(devices)
                rows.append({"model": name, "devices": len(devices), "batch": batch, "tokens": tokens, "alpha": alpha,
                             "mac_reduction": round(mac_reduction(config, tokens, alpha, **asdict(rule)), 3),
                             **alone[str(alpha)], "several_ms": round(each, 3),
                             "several_speedup": together[str(alpha)]["speedup"], "flops": flops,
                             "mfu": round(rate / printed, 4) if printed else None,
                             "of_measured": round(rate / rates["flops_per_s"], 4),
                             "weight_bytes": weights, "peak_bytes": _peaks(one[str(alpha)], devices)})  # fmt: skip
            args.keep({"ceilings": rates, "printed_flops": printed, "rows": rows})
        del model
    print_rows(rows, "model devices batch tokens alpha mac_reduction latency_ms speedup several_ms several_speedup mfu "
                     "of_measured peak_bytes")  # fmt: skip
    return {"ceilings": rates, "printed_flops": printed, "rows": rows}


def _wait(devices: list[torch.device]) -> None:
    for each in devices:
        if each.type == "cuda":
            torch.cuda.synchronize(each)


def _several(run: Callable[[], object], times: int, devices: list[torch.device]) -> None:
    for _ in range(times):
        run()
    _wait(devices)


def _peaks(run: Callable[[], object], devices: list[torch.device]) -> int | None:
    """Memory that `run` takes at its peaks on top of what was there, the sum over GPUs; None on a CPU."""
    if devices[0].type != "cuda":
        return None
    _wait(devices)
    for each in devices:
        torch.cuda.reset_peak_memory_stats(each)
    before = [torch.cuda.memory_allocated(each) for each in devices]
    run()
    _wait(devices)
    return sum(torch.cuda.max_memory_allocated(each) - held for each, held in zip(devices, before))


def bench_replicas(args, device, dtype) -> dict:
    """Copies of a model, one a process and GPU (start with torchrun): prefills of each while the others wait, then of
    all at the same time. efficiency: prompts a second of all together, over the sum of what each does alone."""
    start()
    number, copies = place()
    device, rows = torch.device("cuda", number) if device.type == "cuda" else device, []
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        for batch, tokens in itertools.product(args.batches, args.tokens):
            ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
            for alpha in (1.0, *args.alphas):
                run = functools.partial(prefill, model, ids, alpha)
                if alpha < 1:
                    check_model(model, ids, alpha)
                alone = [
                    rate for turn in range(copies) for rate in gather(_rate(run, args) if turn == number else None)
                ]
                together = gather(_rate(run, args))
                sums = [sum(rate * batch for rate in found if rate) for found in (alone, together)]
                rows.append({"model": name, "copies": copies, "batch": batch, "tokens": tokens, "alpha": alpha,
                             "alone_per_second": round(sums[0] / copies, 3), "together_per_second": round(sums[1], 3),
                             "efficiency": round(sums[1] / sums[0], 3)})  # fmt: skip
                if number == 0:
                    args.keep({"rows": rows})
    if number == 0:
        print_rows(rows, " ".join(rows[0]))
    return {"rows": rows}


def _rate(run: Callable[[], object], args) -> float:
    """Runs a second, one after another, by the median of one."""
    return 1000 / alternate({"": run}, repeats=args.repeats, warmup=2, seconds=args.seconds)[""]["latency_ms"]
