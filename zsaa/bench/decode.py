"""What a new token takes behind a pruned prompt: a step of the model, and a token of `generate`."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from zsaa import dial
from zsaa.bench.device import WrongNumbersError
from zsaa.bench.prefill import cache_bytes, checked_models, prefill
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.measure import alternate


def bench_decode(args, device, dtype) -> dict:
    """Milliseconds per new token, and the cache, after a prefill at each alpha. A new token passes all layers."""
    rows = []
    for name, model, ids, alphas in checked_models(args, device, dtype):
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


class _FirstToken(StoppingCriteria):
    """Notes when the first token is there. It never stops anything."""

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.at = wait, 0.0

    def __call__(self, ids, scores, **kwargs):
        if not self.at:
            self.wait()
            self.at = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class _Generation:
    """`generate` of one model at one alpha: greedy, and no token ends it. per_token: milliseconds of every run."""

    def __init__(self, model: nn.Module, ids: Tensor, new: int, alpha: float | None, **options):
        self.model, self.ids, self.new, self.alpha, self.options = model, ids, new, alpha, options
        self.wait = torch.cuda.synchronize if ids.is_cuda else (lambda: None)
        self.per_token: list[float] = []
        model.generation_config.eos_token_id = None

    def __call__(self) -> Tensor:
        clock, alpha = _FirstToken(self.wait), {} if self.alpha is None else {"alpha": self.alpha}
        given = {"attention_mask": torch.ones_like(self.ids), "pad_token_id": 0, "do_sample": False}
        made = self.model.generate(
            self.ids, max_new_tokens=self.new, stopping_criteria=[clock], **given, **alpha, **self.options
        )
        self.wait()
        self.per_token.append(1000 * (time.perf_counter() - clock.at) / (self.new - 1))
        return made[:, self.ids.shape[1] :]


class _ByKernel(_Generation):
    """The same without CUDA graphs."""

    def __call__(self) -> Tensor:
        graphs = self.model.base_model._zsaa.graphs
        before, graphs.mode = graphs.mode, False
        try:
            return super().__call__()
        finally:
            graphs.mode = before


def _variants(stock, model, ids, args) -> dict[str, tuple[str, float, _Generation]]:
    found: dict = {"stock": ("stock", 1.0, _Generation(stock, ids, args.new, None))}
    if args.compiled:  # transformers compiles the steps itself where the cache is static
        options = {"cache_implementation": "static"}
        found["compiled"] = ("static cache, compiled", 1.0, _Generation(stock, ids, args.new, None, **options))
    for alpha in args.alphas:
        found[f"{alpha:g}"] = ("graphs", alpha, _Generation(model, ids, args.new, alpha))
        found[f"{alpha:g} by kernel"] = ("by kernel", alpha, _ByKernel(model, ids, args.new, alpha))
    return found


def bench_generate(args, device, dtype) -> dict:
    """Milliseconds that `generate` takes for each token after the first, greedily: the stock model as it comes and,
    with --compiled, with a static cache and torch.compile; and the dial, with CUDA graphs of its steps and without.

    Before they are timed both ways of the dial must give the same tokens."""
    rows = []
    for name, tokens, batch in itertools.product(args.models, args.tokens, args.batches):
        stock = dial.disable(build(name, tokens + args.new, device, dtype))
        model = build(name, tokens + args.new, device, dtype)
        ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=device)
        found = _variants(stock, model, ids, args)
        if "compiled" in found:
            try:
                found["compiled"][2]()
            except Exception as error:  # a compiler's, most likely: the others are worth their times
                print(f"  not run, static cache and torch.compile: {type(error).__name__}: {error}", flush=True)
                del found["compiled"]
        for alpha in args.alphas:
            made = [found[key][2]() for key in (f"{alpha:g}", f"{alpha:g}", f"{alpha:g} by kernel")]
            if not all(torch.equal(tokens, made[0]) for tokens in made):
                raise WrongNumbersError(f"at alpha {alpha}, with CUDA graphs other tokens come than without")
        times = alternate({k: run for k, (*_, run) in found.items()}, args.repeats, 1, args.seconds)
        medians = {k: statistics.median(run.per_token[-args.repeats :]) for k, (*_, run) in found.items()}
        steps = dial.captured(model)["steps"]
        for key, (how, alpha, run) in found.items():
            recorded = how == "graphs" and bool(steps)
            rows.append({"model": name, "batch": batch, "tokens": tokens, "new": args.new, "how": how, "alpha": alpha,
                         **times[key], "ms_per_token": round(medians[key], 4),
                         "token_speedup": round(medians["stock"] / medians[key], 3), "runs": len(run.per_token),
                         "replays": sum(step["replays"] for step in steps) if recorded else 0,
                         "graph_bytes": sum(step["bytes"] for step in steps) if recorded else 0})  # fmt: skip
        if off := dial.captured(model)["off"]:
            print(f"  no CUDA graphs: {off}")
        args.keep({"rows": rows})
        print_rows(rows, "model batch tokens how alpha ms_per_token token_speedup latency_ms replays")
        del found, stock, model
    return {"rows": rows}
