"""Attention with scores against plain PyTorch: checked, then timed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zsaa.attention import attend_and_score
from zsaa.bench.device import WrongNumbersError, device_times, peak_bytes
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import ATTENTION_SHAPES
from zsaa.fast import dispatch
from zsaa.kernels import naive
from zsaa.measure import alternate


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
