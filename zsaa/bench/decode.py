"""What a new token takes behind a pruned prompt."""

from __future__ import annotations

import functools

import torch

from zsaa import dial
from zsaa.bench.prefill import cache_bytes, checked_models, prefill
from zsaa.bench.rows import print_rows
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
