"""Benchmarks: what attention with scores, a prefill, and decoding cost, stock and at each alpha.

    python -m zsaa.bench attention --tokens 2048 8192
    python -m zsaa.bench prefill --model llama3-8b --tokens 2048 8192 --alphas 0.99 0.97 0.9
    python -m zsaa.bench decode --model smollm2-135m --tokens 2048 --alphas 0.97 0.9
    python -m zsaa.bench footprint --models llama3-8b gemma2-2b --storage nf4 float16    (Table 3, but for its scores)
    python -m zsaa.bench ttft --models gpt2-124m gpt2-355m --tokens 224 512 1024         (Table 2's speed-ups)
    python -m zsaa.bench memory --model llama3-8b --tokens 4096 8192 16384 32768 --alphas 0.9
    python -m zsaa.bench train --model smollm2-135m --tokens 512 --batch 8 --dtype bfloat16
    python -m zsaa.bench profile --model llama3-8b --tokens 8192 --alphas 0.97    (where the time goes)
    python -m zsaa.bench sweep --tokens 2048 8192        (block sizes of the kernels)

Models have random weights: time depends on shapes, not on values. Numbers are checked before they are timed, and a
failed check ends the run. Variants are timed in turn, round after round; medians and quartiles go to one JSON file.
`prefill`, `ttft`, `footprint` and `train` write it anew after every shape ("complete": false until the last one).
Decoding does not get shorter by pruning: a new token passes all layers, and only the cache it looks at is smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsaa import dial
from zsaa.attention import attend_and_score
from zsaa.budget import alpha_for
from zsaa.cost import attention_widths, kv_bytes, layer_weights, mac_reduction
from zsaa.families import find_decoder
from zsaa.fast import dispatch
from zsaa.fast.graphs import Graphs
from zsaa.kernels import naive
from zsaa.kit import paper
from zsaa.kit.architectures import PUBLISHED
from zsaa.kit.energy import energy
from zsaa.measure import alternate, provenance, write_json
from zsaa.models import never_repack
from zsaa.rule import kept_counts

MODELS = {
    "tiny": dict(model_type="llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=128, vocab_size=256),
    "smollm2-135m": dict(model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, rope_theta=100000.0),
    "tinyllama-1.1b": dict(model_type="llama", hidden_size=2048, num_hidden_layers=22, num_attention_heads=32,
                           num_key_value_heads=4, intermediate_size=5632, vocab_size=32000),
    **{name: settings for name, (_, _, settings) in PUBLISHED.items()},
}  # fmt: skip
# (head size, heads, key/value heads): LLaMA 3 8B, one with heads of 64, and small ones for the CPU
ATTENTION_SHAPES = {"cuda": [(128, 32, 8), (128, 32, 32), (64, 32, 8)], "cpu": [(16, 4, 2)]}


class WrongNumbersError(RuntimeError):
    """A check of the numerics failed: nothing is timed."""


# What the machine can do


def ceilings(device: torch.device, dtype: torch.dtype) -> dict:
    """Measured rates of a large matrix product (FLOP/s) and a large copy (bytes/s, read and written)."""
    size, elements = (8192, 1 << 29) if device.type == "cuda" else (1024, 1 << 24)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.empty(elements, dtype=torch.float16, device=device).normal_()
    target = torch.empty_like(source)
    times = alternate({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, repeats=20, warmup=3)
    flops = 2 * size**3 / (times["product"]["latency_ms"] / 1000)
    return {"flops_per_s": flops, "bytes_per_s": 2 * source.nbytes / (times["copy"]["latency_ms"] / 1000)}


def roofline_ms(config, batch: int, tokens: int, alpha: float, tau: int, itemsize: int, rates: dict) -> float:
    """The least time of a prefill: per layer, the larger of its FLOPs over the measured matrix rate and its bytes over
    the measured bandwidth.

    FLOPs: two per multiply-accumulate, causal attention counted as half a square; scoring is left out, as attention
    has the soft-score at hand. Bytes: a layer's weights once, the rows that enter and leave it, keys and values.
    """
    hidden, (q_dim, kv_dim), (entering, kept) = config.hidden_size, attention_widths(config), layer_weights(config)
    seconds, n = 0.0, tokens
    for after in kept_counts(tokens, alpha, config.num_hidden_layers, tau):
        flops = 2 * batch * (n * entering + n * n * q_dim + after * kept)
        moved = itemsize * (entering + kept + batch * ((n + after) * hidden + 2 * n * kv_dim))
        seconds += max(flops / rates["flops_per_s"], moved / rates["bytes_per_s"])
        n = after
    head = itemsize * hidden * config.vocab_size / rates["bytes_per_s"]  # the last token's logits read the head once
    return 1000 * (seconds + head)


# Timing on the device alone


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


# Attention


def qkv(shape, batch: int, tokens: int, device, dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    dim, heads, kv_heads = shape
    generator = torch.Generator(device).manual_seed(seed)
    sizes = ((batch, h, tokens, dim) for h in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
    return q, k, v


def _by_group(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """The reference in `dtype`, one key/value head at a time, for the memory's sake: output and column sums."""
    groups, outputs, sums = q.shape[1] // k.shape[1], [], 0.0
    for head in range(k.shape[1]):
        part = (q[:, head * groups : (head + 1) * groups], k[:, head : head + 1], v[:, head : head + 1])
        output, _, received = naive.attention_and_column_sums(*(x.to(dtype) for x in part), scale=scale)
        outputs.append(output)
        sums = sums + received.to(torch.float64)
    return torch.cat(outputs, dim=1), sums


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


@torch.no_grad()
def check_attention(shape, tokens: int, device, dtype) -> dict:
    """Relative errors of attention and scores against float64, ours and plain PyTorch's in `dtype`; raises
    WrongNumbersError if ours exceeds twice PyTorch's, or if a repeat differs in a bit."""
    q, k, v = qkv(shape, 1, tokens, device, dtype, seed=1)
    scale = shape[0] ** -0.5
    exact = _by_group(q, k, v, torch.float64, scale)
    plain = _by_group(q, k, v, dtype, scale)
    ours = attend_and_score(q, k, v, scale=scale)
    again = attend_and_score(q, k, v, scale=scale)
    errors = {}
    for name, x, y, z in zip(("output", "scores"), ours, plain, exact):
        errors[name], errors[f"{name}_torch"] = _error(x, z), _error(y, z)
        if not errors[name] <= 2 * errors[f"{name}_torch"] + 1e-6:  # catches NaN too
            raise WrongNumbersError(f"{name} of {shape} at {tokens} tokens: {errors}")
    if not all(torch.equal(a, b) for a, b in zip(ours, again)):
        raise WrongNumbersError(f"a repeat of {shape} at {tokens} tokens differs")
    return errors


def attention_variants(shape, batch: int, tokens: int, device, dtype) -> dict[str, Callable[[int], object]]:
    """What is compared, by name; each call takes the number of an input set."""
    scale, gqa = shape[0] ** -0.5, shape[1] != shape[2]
    # Several input sets, more than a GPU's cache holds, unless one alone fills it.
    one = batch * tokens * shape[0] * (shape[1] + 2 * shape[2]) * dtype.itemsize
    sets = [qkv(shape, batch, tokens, device, dtype, seed) for seed in range(max(1, min(8, (200 << 20) // one)))]

    def over_sets(run):
        return lambda i: run(*sets[i % len(sets)])

    def forced(name, q, k, v):
        before = dispatch.backends()["chosen"]
        dispatch.use_backend(name)
        try:
            return attend_and_score(q, k, v, scale=scale)
        finally:
            dispatch.use_backend(before)

    variants = {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    }
    variants["attend_and_score"] = functools.partial(attend_and_score, scale=scale)
    if dispatch.backends(device)["used"] == "triton" and device.type == "cuda":
        from zsaa.kernels import attention as kernels

        flash = torch.ops.aten._scaled_dot_product_flash_attention
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention

        def with_sums(out, lse, q, k):
            return out, kernels.column_sums(q, k, lse.reshape(q.shape[:3]), scale=scale)

        variants["flash"] = lambda q, k, v: flash(q, k, v, 0.0, True, False, scale=scale)
        variants["flash + sums"] = lambda q, k, v: with_sums(*variants["flash"](q, k, v)[:2], q, k)
        variants["cudnn"] = lambda q, k, v: cudnn(q, k, v, None, True, 0.0, True, False, scale=scale)
        variants["cudnn + sums"] = lambda q, k, v: with_sums(*variants["cudnn"](q, k, v)[:2], q, k)
        variants["triton attention"] = lambda q, k, v: kernels.attention(q, k, v, scale=scale)
        if tokens <= 4096:
            variants["torch backend"] = functools.partial(forced, "torch")
        expected = attend_and_score(*sets[0], scale=scale)
        for name in [name for name in variants if name.startswith("cudnn")]:  # not on all GPUs, nor for all shapes
            try:
                result = variants[name](*sets[0])
                agrees = name == "cudnn" or _error(result[1], expected[1]) < 1e-3
            except RuntimeError as error:
                agrees = print(f"  {name}: {str(error).splitlines()[0]}")
            if not agrees:
                del variants[name]
    return {name: over_sets(run) for name, run in variants.items()}


@torch.no_grad()
def bench_attention(args, device, dtype) -> dict:
    rows, checks = [], []
    shapes = ATTENTION_SHAPES[device.type]
    # Sizes that are no multiple of any block are checked too.
    for shape, tokens in itertools.product(shapes, {*args.tokens, max(args.tokens) // 3 + 1}):
        checks.append({"shape": shape, "tokens": tokens, **check_attention(shape, tokens, device, dtype)})
    print(f"numerics: {len(checks)} checks passed")
    for shape, tokens, batch in itertools.product(shapes, args.tokens, args.batches):
        runs = attention_variants(shape, batch, tokens, device, dtype)
        calls = 10 if device.type == "cuda" else 1
        times = device_times(runs, calls, args.repeats)
        eager = alternate({name: functools.partial(run, 0) for name, run in runs.items()}, args.repeats, warmup=2)
        flops = 2 * batch * shape[1] * tokens**2 * shape[0]  # the forward pass, causal counted as half a square
        for name, row in times.items():
            peak = peak_bytes(functools.partial(runs[name], 0), device)
            over = row["latency_ms"] / times["sdpa"]["latency_ms"]
            facts = {"dim": shape[0], "heads": shape[1], "kv_heads": shape[2], "tokens": tokens, "batch": batch}
            rows.append({**facts, "variant": name, **row, "over_sdpa": round(over, 3), "peak_bytes": peak,
                         "eager_ms": eager[name]["latency_ms"],
                         "forward_tflops": round(flops / row["latency_ms"] / 1e9, 1)})  # fmt: skip
        del runs
    kernel = {1: "flash", 2: "efficient", 3: "cudnn", 0: "math"}
    q, k, v = qkv(shapes[0], 1, args.tokens[0], device, dtype)
    chosen = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=True)
    print_rows(rows, "dim heads kv_heads tokens batch variant latency_ms eager_ms over_sdpa forward_tflops peak_bytes")
    return {"sdpa_uses": kernel.get(int(chosen), int(chosen)), "checks": checks, "rows": rows}


@torch.no_grad()
def bench_sweep(args, device, dtype) -> dict:
    """Times of the two kernels at every block size that compiles, to choose the tables of kernels/attention.py."""
    from zsaa.kernels import attention as kernels

    rows = []
    for shape, tokens, kernel in itertools.product(ATTENTION_SHAPES[device.type], args.tokens, args.kernels):
        q, k, v = qkv(shape, 1, tokens, device, dtype)
        scale = shape[0] ** -0.5
        out, lse = kernels.attention(q, k, v, scale=scale)
        if kernel == "attention":
            run, expected = functools.partial(kernels.attention, q, k, v, scale=scale), out
        else:
            run = functools.partial(kernels.column_sums, q, k, lse, scale=scale)
            expected = run()
        for blocks in itertools.product(args.block_sizes, args.block_sizes, (4, 8), (2, 3, 4)):
            try:
                result = run(blocks=blocks)
                times = device_times({kernel: lambda i, run=run, b=blocks: run(blocks=b)}, 10, args.repeats)
            except Exception as error:  # of several kinds: out of shared memory, out of registers, ...
                print(f"  {kernel} {shape} {blocks}: {str(error).splitlines()[0][:90]}")
                continue
            error = _error(result[0] if kernel == "attention" else result, expected)
            if not error < 2e-3:
                raise WrongNumbersError(f"{kernel} {shape} {blocks}: relative error {error}")
            row = {"kernel": kernel, "dim": shape[0], "heads": shape[1], "kv_heads": shape[2], "tokens": tokens}
            rows.append({**row, "blocks": blocks, "latency_ms": times[kernel]["latency_ms"]})
    rows.sort(key=lambda row: (row["kernel"], row["dim"], row["kv_heads"], row["tokens"], row["latency_ms"]))
    best = [next(g) for _, g in itertools.groupby(rows, lambda r: tuple(r.values())[:5])]
    print_rows(best, "kernel dim heads kv_heads tokens blocks latency_ms")
    return {"rows": rows}


# Models


def build(name: str, tokens: int, device, dtype, storage: str | None = None) -> nn.Module:
    """A model of that shape with random weights, made on the device, in eval mode, with the dial on.

    storage: "nf4" has the decoder's linear layers in 4 bits, made one by one: only one is ever there in `dtype`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(MODELS[name])
    kind = settings.pop("model_type")
    settings["n_positions" if kind == "gpt2" else "max_position_embeddings"] = max(tokens, 1024)
    config = AutoConfig.for_model(kind, **settings)
    # transformers has no SDPA that caps scores, as Gemma 2 does.
    how = {"attn_implementation": "eager" if kind == "gemma2" else "sdpa", "dtype": dtype}
    torch.manual_seed(0)
    with torch.device("meta" if storage == "nf4" else device):
        model = AutoModelForCausalLM.from_config(config, **how)
    if storage == "nf4":
        _fill_nf4(model, torch.device(device), dtype)
    return dial.enable(model.eval())


def _fill_nf4(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device random weights on `device`, its decoder's linear layers in nf4, the rest in
    `dtype`: as `load_model(..., quantization="nf4")` leaves a model, norms at 1 but for the values."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ImportError("storage nf4 needs bitsandbytes. Get it with: pip install 'zsaa[quant]'") from error

    decoder, family = find_decoder(model)
    layers = getattr(decoder, family.layers)
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        raise ValueError(
            f"{type(decoder).__name__} has no nn.Linear to quantize: storage nf4 is for LLaMA-like models."
        )
    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                with torch.device("meta"):
                    packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
                weight = torch.randn(linear.weight.shape, device=device, dtype=dtype).mul_(0.02)
                packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
                setattr(parent, name, packed)
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)  # norms, embeddings, rotary tables
    model.tie_weights()
    never_repack(model)


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def prefill(model: nn.Module, ids: Tensor, alpha: float):
    with torch.inference_mode(), dial.at(model, alpha):
        return model(ids, use_cache=True, logits_to_keep=1)


def check_model(model: nn.Module, ids: Tensor, alpha: float) -> None:
    """Finite logits, the promised number of rows in every layer, and a repeat that is equal bit for bit."""
    first, again = prefill(model, ids, alpha), prefill(model, ids, alpha)  # with CUDA graphs, the second is a replay
    layers, n = model.config.num_hidden_layers, ids.shape[1]
    expected = [n, *kept_counts(n, alpha, layers, dial.settings(model)["tau"])[:-1]]
    rows = [layer.keys.shape[-2] for layer in first.past_key_values.layers]
    if rows != expected:
        raise WrongNumbersError(f"layers cache {rows} rows at alpha {alpha}, expected {expected}")
    if not torch.isfinite(first.logits).all() or not torch.equal(first.logits, again.logits):
        raise WrongNumbersError(f"logits at alpha {alpha} are not finite, or a repeat differs")


def _given(args, config, tokens: int, tau: int) -> dict[str, float]:
    """The settings of --alphas, by name."""
    return {f"{alpha:g}": alpha for alpha in args.alphas}


def _solved(args, config, tokens: int, tau: int) -> dict[str, float]:
    """The alphas for the MAC reductions of --reductions, by reduction."""
    return {f"{times:g}": alpha_for(config, tokens, times, tau) for times in args.reductions}


def _checked_models(args, device, dtype, alphas_of=_given):
    """For every model, batch and length: the model, its input and the settings of alpha, stock ("1") first, numerics
    checked."""
    for name in args.models:
        model = build(name, max(args.tokens) + getattr(args, "new", 0), device, dtype)
        config, tau = model.config, dial.settings(model)["tau"]
        heads, (q_dim, kv_dim) = config.num_attention_heads, attention_widths(config)
        shape = (q_dim // heads, heads, kv_dim * heads // q_dim)
        check_attention(shape, min(2048, max(args.tokens)), device, dtype)
        for tokens, batch in itertools.product(args.tokens, args.batches):
            ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
            alphas = alphas_of(args, config, tokens, tau)
            for alpha in alphas.values():
                check_model(model, ids, alpha)
            yield name, model, ids, {"1": 1.0, **alphas}


def _graphs(model: nn.Module) -> Graphs:
    return find_decoder(model)[0]._zsaa.graphs


def _by_kernel(model: nn.Module, ids: Tensor, alpha: float):
    """A prefill without CUDA graphs, whatever is recorded."""
    graphs = _graphs(model)
    before, graphs.mode = graphs.mode, False
    try:
        return prefill(model, ids, alpha)
    finally:
        graphs.mode = before


def bench_prefill(args, device, dtype, alphas_of=_given) -> dict:
    """Time to the first token's logits, by the clock; where CUDA graphs are recorded, without them too."""
    rates, rows = ceilings(device, dtype), []
    for name, model, ids, alphas in _checked_models(args, device, dtype, alphas_of):
        (batch, tokens), config, tau = ids.shape, model.config, dial.settings(model)["tau"]
        runs = {key: functools.partial(prefill, model, ids, alpha) for key, alpha in alphas.items()}
        recorded = {g["alphas"][0]: g for g in dial.captured(model)["graphs"] if g["lengths"] == [tokens] * batch}
        plain = {key: functools.partial(_by_kernel, model, ids, a) for key, a in alphas.items() if a in recorded}
        runs |= {f"{key} by kernel": run for key, run in plain.items()}
        times = alternate(runs, repeats=args.repeats, warmup=2, seconds=args.seconds)
        ideals = {k: roofline_ms(config, batch, tokens, a, tau, dtype.itemsize, rates) for k, a in alphas.items()}
        for key, alpha in alphas.items():
            predicted = kv_bytes(config, tokens, alpha, tau, batch, dtype.itemsize)
            measured = cache_bytes(runs[key]().past_key_values)
            if measured != predicted:
                raise WrongNumbersError(f"the cache holds {measured} bytes at alpha {alpha}, expected {predicted}")
            ideal, graph = ideals["1"] / ideals[key], recorded.get(alpha, {})
            by_kernel = times.get(f"{key} by kernel", times[key])
            rows.append({"model": name, "batch": batch, "tokens": tokens, "alpha": alpha,
                         "mac_reduction": round(mac_reduction(config, tokens, alpha, tau), 3),
                         **times[key], "roofline_ms": round(ideals[key], 3), "roofline_speedup": round(ideal, 3),
                         "realised": round(times[key]["speedup"] / ideal, 3),
                         "of_roofline": round(ideals[key] / times[key]["latency_ms"], 3),
                         "by_kernel_ms": by_kernel["latency_ms"],
                         "graph_bytes": graph.get("bytes"), "capture_ms": graph.get("capture_ms"),
                         "kv_bytes": measured, "peak_bytes": peak_bytes(runs[key], device)})  # fmt: skip
            if alphas_of is _solved:
                rows[-1] |= {"control": "alpha", "target": _whole(key), "by_kernel_speedup": by_kernel["speedup"]}
        if off := dial.captured(model)["off"]:
            print(f"  no CUDA graphs: {off}")
        shown = [f"{row['alpha']:.4f} {row['latency_ms']} ms" for row in rows[-len(alphas) :]]
        print(f"{name}, {batch} x {tokens} tokens: {', '.join(shown)}", flush=True)
        _graphs(model).clear()
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


ALL = 1 - 1e-10  # so near 1 that a layer drops none of 10,000 tokens, and still the pruned code


def _footprint_of(name: str, storage: str, args, device, dtype) -> Iterator[list[dict]]:
    """The rows of a model, one batch and length after another."""
    began = time.perf_counter()
    kept = getattr(torch, storage) if storage != "nf4" else dtype
    model = build(name, max(args.tokens), device, kept, storage)
    dial.enable(model, graphs=False)
    config, tau, weights = model.config, dial.settings(model)["tau"], sum(p.nbytes for p in model.parameters())
    print(f"{name} in {storage}: {weights / 1e9:.2f} GB, made in {time.perf_counter() - began:.1f} s", flush=True)
    printed = paper.TABLE_3["Gemma-2-2B-4bit" if config.model_type.startswith("gemma") else "LLaMA-3-8B-4bit"]
    for tokens, batch in itertools.product(args.tokens, args.batches):
        began, rows = time.perf_counter(), []
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
        wanted = [("alpha", t, 1.0 if t == 1 else alpha_for(config, tokens, t, tau)) for t in printed]
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
            if measured != kv_bytes(config, tokens, alpha, tau, batch, kept.itemsize):
                raise WrongNumbersError(f"the cache of {name} holds {measured} bytes at alpha {alpha}")
            rows.append({"model": name, "storage": storage, "attention": config._attn_implementation,
                         "batch": batch, "tokens": tokens, "control": control, "target": target,
                         "alpha": alpha,
                         "mac_reduction": round(mac_reduction(config, tokens, alpha, tau), 3),
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
    rows, facts = [], {"kind": "footprint", "name": "footprint", "model": {"name": ", ".join(args.models)}}
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
    stock and at each alpha, kernel by kernel (what CUDA graphs hold beside it is in `prefill`'s rows)."""
    rows = []
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        config, tau = model.config, dial.settings(model)["tau"]
        for tokens, batch, alpha in itertools.product(args.tokens, args.batches, [1.0, *args.alphas]):
            ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
            run = functools.partial(_by_kernel, model, ids, alpha)
            measured = cache_bytes(run().past_key_values)
            predicted = kv_bytes(config, tokens, alpha, tau, batch, dtype.itemsize)
            if measured != predicted:
                raise WrongNumbersError(f"the cache holds {measured} bytes at alpha {alpha}, expected {predicted}")
            rows.append({"model": name, "batch": batch, "tokens": tokens, "alpha": alpha, "kv_bytes": measured,
                         "peak_bytes": peak_bytes(run, device)})  # fmt: skip
            args.keep({"rows": rows})
        del model, run
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows}


def bench_decode(args, device, dtype) -> dict:
    """Milliseconds per new token, and the cache, after a prefill at each alpha. A new token passes all layers."""
    rows = []
    for name, model, ids, alphas in _checked_models(args, device, dtype):
        batch, tokens = ids.shape
        caches = {key: prefill(model, ids, alpha).past_key_values for key, alpha in alphas.items()}
        held = {key: cache_bytes(cache) for key, cache in caches.items()}
        new = torch.randint(0, model.config.vocab_size, (args.new, batch, 1), device=device)

        def decode(key, alpha, model=model, caches=caches, new=new):
            with torch.inference_mode(), dial.at(model, alpha):
                for token in new:
                    model(token, past_key_values=caches[key], use_cache=True)
                caches[key].crop(-len(new))

        runs = {key: functools.partial(decode, key, alpha) for key, alpha in alphas.items()}
        times = alternate(runs, repeats=args.repeats, warmup=1, seconds=args.seconds)
        for key, alpha in alphas.items():
            per_token = times[key]["latency_ms"] / args.new
            rows.append({"model": name, "batch": batch, "tokens": tokens, "new": args.new, "alpha": alpha, **times[key],
                         "ms_per_token": round(per_token, 4), "kv_bytes": held[key]})  # fmt: skip
        del caches, runs, model
    print_rows(rows, "model batch tokens alpha ms_per_token speedup kv_bytes")
    return {"rows": rows}


def bench_train(args, device, dtype) -> dict:
    """A training step with alpha drawn anew each time, every draw a new shape, over a conventional step (alpha = 1).

    As the Trainer does it: weights in float32, autocast to `dtype`, AdamW. Steps are timed in turn, one after another.
    host_ms: until the step's last launch has returned. Where that is most of a step, the host decides what it takes,
    and fewer rows save little. ideal: the mean of what Eq. 2 leaves of the decoder's multiplications.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    rows = []
    for name in args.models:
        model = build(name, max(args.tokens), device, torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        low, high = args.alpha_range
        for tokens, batch in itertools.product(args.tokens, args.batches):
            draws = torch.Generator().manual_seed(0)

            def step(alpha, model=model, optimizer=optimizer, scaler=scaler, shape=(batch, tokens)):
                ids = torch.randint(0, model.config.vocab_size, shape, device=device)
                wait()
                started = time.perf_counter()
                with dial.at(model, alpha), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(ids, labels=ids, use_cache=False).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                launched = time.perf_counter()
                wait()
                if not torch.isfinite(loss):
                    raise WrongNumbersError(f"the loss at alpha {alpha} is {loss.item()}")
                return 1000 * (time.perf_counter() - started), 1000 * (launched - started)

            tau, config = dial.settings(model)["tau"], model.config
            warmup = 3
            if device.type == "cuda":  # kernels of several sizes are compiled at their first use
                warmup = 1
                for i in range(8):
                    step(low + (high - low) * (i + 0.5) / 8)
            pairs, left, began = [], [], time.perf_counter()
            for round_ in range(warmup + args.repeats):
                alpha = low + (high - low) * torch.rand((), generator=draws).item()
                pair = step(1.0), step(alpha)
                if round_ >= warmup:
                    pairs.append(pair)
                    left.append(1 / mac_reduction(config, tokens, alpha, tau))
                if len(pairs) >= 5 and time.perf_counter() - began > args.seconds:
                    break
            facts = {"model": name, "batch": batch, "tokens": tokens, "low": low, "high": high, "steps": len(pairs)}
            for which, steps in zip(("conventional", "sampled"), zip(*pairs)):
                facts |= {f"{which}{part}_ms": round(statistics.mean(x), 3)
                          for part, x in zip(("", "_host"), zip(*steps))}  # fmt: skip
            ratio = round(facts["sampled_ms"] / facts["conventional_ms"], 3)
            rows.append({**facts, "sampled_over_conventional": ratio, "ideal": round(statistics.mean(left), 3),
                         "slowest_sampled_ms": round(max(took for _, (took, _) in pairs), 3),
                         "fused": dispatch._fused})  # fmt: skip
            args.keep({"rows": rows})
        del model, optimizer
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows}


def bench_profile(args, device, dtype) -> dict:
    """Milliseconds on the device by kernel, in one prefill without CUDA graphs; on a CPU by operation."""
    from torch.profiler import ProfilerActivity, profile

    rows, passes = [], 3
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    for name, model, ids, alphas in _checked_models(args, device, dtype):
        for alpha in alphas.values():
            _by_kernel(model, ids, alpha)
            with profile(activities=[activity]) as profiler:
                for _ in range(passes):
                    _by_kernel(model, ids, alpha)
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


# The command line


def print_rows(rows: list[dict], columns: str) -> None:
    table = [columns.split(), *([str(row[column]) for column in columns.split()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


BENCHES = {
    "attention": bench_attention,
    "prefill": bench_prefill,
    "ttft": bench_ttft,
    "footprint": bench_footprint,
    "decode": bench_decode,
    "memory": bench_memory,
    "train": bench_train,
    "profile": bench_profile,
    "sweep": bench_sweep,
}


def main(arguments: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m zsaa.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--output", type=Path, help="result file (default: outputs/bench/<bench>.json)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16" if gpu else "float32")
    parser.add_argument("--models", "--model", nargs="+", choices=MODELS, default=["smollm2-135m"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192] if gpu else [64], help="prompt lengths")
    parser.add_argument("--batches", "--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.99, 0.97, 0.9, 0.7])
    parser.add_argument("--reductions", nargs="+", type=float, default=[t for t in paper.TABLE_2 if t != 1],
                        help="ttft: of the MACs; alpha is solved for them")  # fmt: skip
    parser.add_argument("--storage", nargs="+", choices=("float16", "bfloat16", "float32", "nf4"), default=["float16"],
                        help="footprint: of the weights")  # fmt: skip
    parser.add_argument("--new", type=int, default=32, help="decode: tokens to generate")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--seconds", type=float, default=60, help="limit for the rounds of one model and length")
    parser.add_argument("--alpha-range", nargs=2, type=float, default=[0.5, 1.0], help="train: alpha is drawn from it")
    parser.add_argument("--top", type=int, default=15, help="profile: kernels to show")
    parser.add_argument("--kernels", nargs="+", default=["column_sums"], choices=("column_sums", "attention"))
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[64, 128], help="sweep: rows per block")
    parser.add_argument("--backend", choices=dispatch.NAMES, default="auto")
    without = "pruned passes without fused norms and activations, which stock models do not have"
    parser.add_argument("--no-fused", action="store_true", help=without)
    args = parser.parse_args(arguments)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    dispatch.use_backend(args.backend)
    dispatch.use_fused(not args.no_fused)
    given = list(arguments if arguments is not None else sys.argv[1:])
    if "--output" in given:  # a path of one machine, and no part of how
        del given[given.index("--output") : given.index("--output") + 2]
    command = "python -m zsaa.bench " + shlex.join(given)
    args.output = args.output or Path("outputs/bench") / f"{args.bench}.json"
    started = time.perf_counter()

    def write(result: dict, **spent) -> Path:
        facts = {"seed": 0, "repeats": args.repeats, "seconds": round(time.perf_counter() - started, 1), **spent}
        kind = args.bench if args.bench == "ttft" else f"bench-{args.bench}"
        return write_json(args.output, {"kind": kind, "command": command, "dtype": args.dtype,
                                        "backends": dispatch.backends(device), "fused": not args.no_fused,
                                        "provenance": provenance(**facts),
                                        **result})  # fmt: skip

    args.keep = lambda result: write({**result, "complete": False})
    try:
        with energy() as spent:
            result = BENCHES[args.bench](args, device, dtype)
    except WrongNumbersError as error:
        print(f"the numbers are wrong, nothing more was written: {error}", file=sys.stderr)
        return 1
    path = write(result, **spent)
    print(f"{path} ({spent['seconds']} s, {dispatch.backends(device)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
