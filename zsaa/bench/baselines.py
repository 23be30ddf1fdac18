"""Prefills of the stock model as a hostile reader would time it, beside the dial: compiled, recorded, both, and what
each takes in memory, recordings included."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.device import WrongNumbersError, captured
from zsaa.bench.prefill import by_kernel, check_model, prefill, rule_of
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.cost import mac_reduction
from zsaa.families import find_decoder
from zsaa.measure import alternate

NO_MASK = "sdpa_without_mask"
APART = 0.03  # of the logits' length: a compiled model's may be so far from stock's, in 16 bits


def whole(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the last token, without a cache: what leaves the compiler the least to stumble over."""
    with torch.inference_mode():
        return model(ids, use_cache=False, logits_to_keep=1).logits


def without_mask(model: nn.Module) -> nn.Module:
    """The model with PyTorch's attention told that it is causal. transformers hands it a mask wherever a pass is being
    recorded, which rules the fast kernels out, and has compiled layers compiled anew."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NO_MASK, sdpa_attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NO_MASK, lambda *_, **__: None)
    model.config._attn_implementation = NO_MASK
    return model


def compiled(model: nn.Module) -> nn.Module:
    """The model with its decoder layers compiled, each by the same code, for the shapes that come."""
    decoder, family = find_decoder(model)
    for layer in getattr(decoder, family.layers):
        layer.compile(dynamic=False)
    return model


def stock_runs(name: str, args, device, dtype) -> dict[str, nn.Module]:
    """The same random weights three times: as transformers has them, without a mask, and compiled."""
    stock, bare, third = (dial.disable(build(name, max(args.tokens), device, dtype)) for _ in range(3))
    return {"stock": stock, "no mask": without_mask(bare), "compiled": compiled(without_mask(third))}


def check_alike(logits: Tensor, expected: Tensor, name: str) -> None:
    apart = (logits.float() - expected.float()).norm() / expected.float().norm()
    if not apart < APART:  # NaN is wrong, too
        raise WrongNumbersError(f"the logits of {name} are {apart:.3g} of their length apart from stock's")


def first_use(run: Callable[[], object], device: torch.device) -> dict:
    """Bytes that three calls take at their peak, with all that compiling and recording allocates, and that stay behind
    them beyond the result; None on a CPU. And the seconds that they take."""
    began = time.perf_counter()
    if device.type != "cuda":
        for _ in range(3):
            run()
        return {"first_peak_bytes": None, "held_bytes": None, "first_s": round(time.perf_counter() - began, 2)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    peak, held = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    return {"first_peak_bytes": peak, "held_bytes": held, "first_s": round(time.perf_counter() - began, 2)}


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph, recorded by its first call."""
    replays: list[Callable[[], object]] = []

    def replay() -> object:
        if not replays:
            replays.append(captured(lambda _: run(), 1))
        return replays[0]()

    return replay


def _stock(models: dict[str, nn.Module], dialled: nn.Module, ids: Tensor, device) -> tuple[dict, dict, dict]:
    """(runs of the stock model by their way, what the first use of each takes, why others fail). A compiler or a
    recording that fails is no fault of the dial's, and says so in the result."""
    runs, memory, failed = {key: functools.partial(whole, model, ids) for key, model in models.items()}, {}, {}
    runs["stock with a cache"] = functools.partial(prefill, dialled, ids, 1.0)
    fast = [key for key in models if key != "stock"]
    runs |= {f"{key}, recorded": recorded(runs[key]) for key in fast} if device.type == "cuda" else {}
    for key, run in list(runs.items()):
        try:
            memory[key] = first_use(run, device)
        except RuntimeError as error:  # torch.compile's and CUDA's are such
            failed[key] = str(error)[:300]
            print(f"  {key}: not run: {failed[key]}", flush=True)
            del runs[key]
    for key in (key for key in fast if key in runs):
        check_alike(runs[key](), runs["stock"](), key)
    return runs, memory, failed


def _shape(models: dict[str, nn.Module], dialled: nn.Module, ids: Tensor, args, device) -> tuple[list[dict], dict]:
    """The rows of one shape: ways of the stock model, then the dial with and without its recordings; what failed."""
    runs, memory, failed = _stock(models, dialled, ids, device)
    stock, alphas = list(runs), {f"dial {alpha:g}": alpha for alpha in args.alphas}
    pruned = {key: functools.partial(prefill, dialled, ids, alpha) for key, alpha in alphas.items()}
    pruned |= {f"{key} by kernel": functools.partial(by_kernel, dialled, ids, alphas[key]) for key in alphas}
    memory |= {key: first_use(run, device) for key, run in pruned.items()}  # before the checks record anything
    for alpha in args.alphas:
        check_model(dialled, ids, alpha)
    times = alternate({**runs, **pruned}, repeats=args.repeats, warmup=1, seconds=args.seconds)
    config, rule, best, rows = dialled.config, rule_of(dialled), min(times[k]["latency_ms"] for k in stock), []
    for key, clock in times.items():
        alpha = alphas.get(key.removesuffix(" by kernel"), 1.0)
        fewer = mac_reduction(config, ids.shape[1], alpha, **asdict(rule))
        rows.append({"batch": ids.shape[0], "tokens": ids.shape[1], "way": key, "alpha": alpha,
                     "mac_reduction": round(fewer, 3), **clock,
                     "over_best_stock": round(best / clock["latency_ms"], 3), **memory[key]})  # fmt: skip
    return rows, failed


def bench_baselines(args, device, dtype) -> dict:
    """Time to the first token's logits: stock; without a mask; so, and with its layers compiled (torch.compile); the
    last two as CUDA graphs, too; all these without a cache; stock with one; and the dial, which keeps one, recorded
    and kernel by kernel.
    "speedup" is over stock, "over_best_stock" over the fastest way of the stock model."""
    rows, failed = [], {}
    for name in args.models:
        for batch, tokens in itertools.product(args.batches, args.tokens):
            models, dialled = stock_runs(name, args, device, dtype), build(name, max(args.tokens), device, dtype)
            ids = torch.randint(0, dialled.config.vocab_size, (batch, tokens), device=device)
            found, why = _shape(models, dialled, ids, args, device)
            rows += [{"model": name, **row} for row in found]
            failed |= {f"{name}, {batch} x {tokens}, {key}": reason for key, reason in why.items()}
            args.keep({"rows": rows, "not_run": failed})
            del models, dialled
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print_rows(rows, "model batch tokens way mac_reduction latency_ms speedup over_best_stock first_peak_bytes first_s")
    return {"rows": rows, "not_run": failed}


def table(results: list[dict]):
    """A line per shape: milliseconds of stock, of its fastest way, and of the dial at each alpha, with the speed-up
    over the fastest and, in brackets, the reduction of MACs; then what the first calls take at their peak, in MB."""
    import pandas as pd

    lines = []
    for result in results:
        for (name, tokens), rows in pd.DataFrame(result["rows"]).groupby(["model", "tokens"], sort=False):
            found = rows.set_index("way")
            stock = found[~found.index.str.startswith("dial")]
            best = stock["latency_ms"].idxmin()
            line = {"shape": f"{name}, {tokens}", "stock": f"{found.loc['stock', 'latency_ms']:.1f} ms"}
            line["fastest stock"] = f"{stock.loc[best, 'latency_ms']:.1f} ms ({best})"
            alphas = [way for way in found.index if way.startswith("dial") and "kernel" not in way]
            for way, place in zip(alphas, ("mild", "middle", "strong")):
                row = found.loc[way]
                line[place] = f"{row['alpha']:g}: {row['over_best_stock']:.2f}x ({row['mac_reduction']:.2f}x)"
            ways = ("stock with a cache", best, alphas[1])
            line["peak, MB"] = " / ".join(f"{found.loc[way, 'first_peak_bytes'] / 1e6:.0f}" for way in ways)
            lines.append(line)
    return pd.DataFrame(lines)
