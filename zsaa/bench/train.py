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
from zsaa.budget import alpha_for
from zsaa.cost import mac_reduction
from zsaa.fast import dispatch
from zsaa.finetune.sampling import draw_reductions


def _stepper(model: nn.Module, batch: int, tokens: int, device, dtype) -> Callable[..., tuple[float, float]]:
    """One training step of passes at these alphas, as (milliseconds, those until its last launch has returned)."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    classes = model.config.num_labels if hasattr(model, "score") else None

    def step(*alphas: float) -> tuple[float, float]:
        ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=device)
        labels = ids if classes is None else torch.randint(classes, (batch,), device=device)
        wait()
        started = time.perf_counter()
        for alpha in alphas:
            with dial.at(model, alpha), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = model(ids, labels=labels, use_cache=False).loss / len(alphas)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        launched = time.perf_counter()
        wait()
        if not torch.isfinite(loss):
            raise WrongNumbersError(f"the loss at alpha {alphas[-1]} is {loss.item()}")
        return 1000 * (time.perf_counter() - started), 1000 * (launched - started)

    return step


def _rungs(model: nn.Module, tokens: int, strongest: float, number: int) -> tuple[float, float, float]:
    """The alphas of a ladder step's passes, drawn as zsaa.finetune draws them."""
    drawn = draw_reductions(strongest, 0, number)
    return 1.0, *(alpha_for(model.config, tokens, times, **asdict(rule_of(model))) for times in drawn)


def _rounds(model: nn.Module, step: Callable, tokens: int, args, device) -> Iterator[dict[str, tuple]]:
    """By kind of step, its alphas and what it took, warmed up, round after round."""
    (low, high), warmup = args.alpha_range, 3
    if device.type == "cuda":  # kernels of several sizes are compiled at their first use
        warmup = 1
        for i in range(8):
            step(low + (high - low) * (i + 0.5) / 8)
    draws, began = torch.Generator().manual_seed(0), time.perf_counter()
    for round_ in range(warmup + args.repeats):
        kinds = {"conventional": (1.0,), "sampled": (low + (high - low) * torch.rand((), generator=draws).item(),)}
        if args.ladder is not None:
            kinds["ladder"] = _rungs(model, tokens, args.ladder, round_)
        taken = {kind: (alphas, *step(*alphas)) for kind, alphas in kinds.items()}
        if round_ >= warmup:
            yield taken
        if round_ >= warmup + 4 and time.perf_counter() - began > args.seconds:
            return


def _profiled(step: Callable, alphas: tuple[float, ...], top: int, device) -> dict:
    """Where the device's time of a step goes: milliseconds of all kernels, how many they are, and the longest by
    name."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        step(*alphas)
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    totals = sorted(((getattr(e, which) / 1000, e.count, e.key) for e in profiler.key_averages()), reverse=True)
    longest = [{"ms": round(ms, 3), "calls": calls, "kernel": name[:90]} for ms, calls, name in totals[:top]]
    return {
        "alphas": [round(a, 4) for a in alphas],
        "ms": round(sum(ms for ms, *_ in totals), 3),
        "calls": sum(calls for _, calls, _ in totals),
        "longest": longest,
    }


def bench_train(args, device, dtype) -> dict:
    """A training step with alpha drawn anew each time, every draw a new shape, over a conventional step (alpha = 1);
    with --ladder one of three passes, too, at alpha = 1 and at two drawn MAC reductions.

    As the Trainer does it: weights in float32, autocast to `dtype`, AdamW. Steps are timed in turn, one after another.
    host_ms: until the step's last launch has returned. Where that is most of a step, the host decides what it takes,
    and fewer rows save little. ideal: the mean of what Eq. 2 leaves of the decoder's multiplications.
    """
    rows, profiles, (low, high) = [], [], args.alpha_range
    for name in args.models:
        model = build(name, max(args.tokens), device, torch.float32, head=args.head).train()
        config, rule = model.config, asdict(rule_of(model))
        for tokens, batch in itertools.product(args.tokens, args.batches):
            step = _stepper(model, batch, tokens, device, dtype)
            taken = list(_rounds(model, step, tokens, args, device))
            facts = {"model": name, "batch": batch, "tokens": tokens}
            row = {**facts, "low": low, "high": high, "steps": len(taken)}
            for kind in taken[0]:
                for part, column in (("", 1), ("_host", 2)):
                    row[f"{kind}{part}_ms"] = round(statistics.mean(each[kind][column] for each in taken), 3)
            for kind, ideal in (("sampled", "ideal"), ("ladder", "ladder_ideal")):
                if kind in taken[0]:
                    row[f"{kind}_over_conventional"] = round(row[f"{kind}_ms"] / row["conventional_ms"], 3)
                    left = [sum(1 / mac_reduction(config, tokens, a, **rule) for a in each[kind][0]) for each in taken]
                    row[ideal] = round(statistics.mean(left), 3)
            row["slowest_sampled_ms"] = round(max(each["sampled"][1] for each in taken), 3)
            rows.append({**row, "head": args.head, "fused": dispatch._fused})
            profiles += [
                {
                    "model": name,
                    "batch": batch,
                    "tokens": tokens,
                    "step": kind,
                    **_profiled(step, alphas, args.top, device),
                }
                for kind, (alphas, *_) in (taken[-1].items() if args.profiled else ())
            ]
            args.keep({"rows": rows, "profiles": profiles})
        del model
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows, **({"profiles": profiles} if profiles else {})}
