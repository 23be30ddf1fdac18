"""What a training step takes whose alpha is drawn anew each time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import nn

from zsaa import dial
from zsaa.bench.device import WrongNumbersError
from zsaa.bench.prefill import rule_of
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.cost import mac_reduction
from zsaa.fast import dispatch


def _stepper(model: nn.Module, batch: int, tokens: int, device, dtype) -> Callable[[float], tuple[float, float]]:
    """One training step at an alpha, as (milliseconds, those until its last launch has returned)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(alpha: float) -> tuple[float, float]:
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
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

    return step


def _pairs(step: Callable, low: float, high: float, args, device) -> Iterator[tuple[float, tuple, tuple]]:
    """(alpha, what a conventional step took, what the one at alpha took), warmed up, round after round."""
    warmup = 3
    if device.type == "cuda":  # kernels of several sizes are compiled at their first use
        warmup = 1
        for i in range(8):
            step(low + (high - low) * (i + 0.5) / 8)
    draws, began = torch.Generator().manual_seed(0), time.perf_counter()
    for round_ in range(warmup + args.repeats):
        alpha = low + (high - low) * torch.rand((), generator=draws).item()
        pair = step(1.0), step(alpha)
        if round_ >= warmup:
            yield alpha, *pair
        if round_ >= warmup + 4 and time.perf_counter() - began > args.seconds:
            return


def bench_train(args, device, dtype) -> dict:
    """A training step with alpha drawn anew each time, every draw a new shape, over a conventional step (alpha = 1).

    As the Trainer does it: weights in float32, autocast to `dtype`, AdamW. Steps are timed in turn, one after another.
    host_ms: until the step's last launch has returned. Where that is most of a step, the host decides what it takes,
    and fewer rows save little. ideal: the mean of what Eq. 2 leaves of the decoder's multiplications.
    """
    rows, (low, high) = [], args.alpha_range
    for name in args.models:
        model = build(name, max(args.tokens), device, torch.float32).train()
        config, rule = model.config, asdict(rule_of(model))
        for tokens, batch in itertools.product(args.tokens, args.batches):
            taken = list(_pairs(_stepper(model, batch, tokens, device, dtype), low, high, args, device))
            left = [1 / mac_reduction(config, tokens, alpha, **rule) for alpha, *_ in taken]
            row = {"model": name, "batch": batch, "tokens": tokens, "low": low, "high": high, "steps": len(taken)}
            for which, steps in zip(("conventional", "sampled"), list(zip(*taken))[1:]):
                for part, milliseconds in zip(("", "_host"), zip(*steps)):
                    row[f"{which}{part}_ms"] = round(statistics.mean(milliseconds), 3)
            row["sampled_over_conventional"] = round(row["sampled_ms"] / row["conventional_ms"], 3)
            row["ideal"] = round(statistics.mean(left), 3)
            row["slowest_sampled_ms"] = round(max(sampled for *_, (sampled, _) in taken), 3)
            rows.append({**row, "fused": dispatch._fused})
            args.keep({"rows": rows})
        del model
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows}
