"""What a training step takes whose alpha is drawn anew each time."""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.baselines import without_mask
from zsaa.bench.device import WrongNumbersError
from zsaa.bench.prefill import graphs_of, rule_of
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.budget import alpha_for
from zsaa.cost import mac_reduction
from zsaa.fast import dispatch
from zsaa.fast.training import LEVELS, NEAR
from zsaa.finetune.losses import chunked
from zsaa.finetune.sampling import draw_reductions


def _drawn(model: nn.Module, batch: int, tokens: int, device) -> tuple[Tensor, Tensor]:
    """Token ids and labels."""
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens), device=device)
    return ids, torch.randint(model.config.num_labels, (batch,), device=device) if hasattr(model, "score") else ids


def _stepper(model: nn.Module, batch: int, tokens: int, device, dtype) -> Callable[..., tuple]:
    """One training step of passes at these alphas, as (milliseconds, those until its last launch has returned, bytes at
    its peak on top of what was there, None on a CPU)."""
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(*alphas: float, recorded: bool = False, in_chunks: bool = False) -> tuple[float, float, int | None]:
        ids, labels = _drawn(model, batch, tokens, device)
        graphs_of(model).mode = recorded or "auto"
        wait()
        held = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for alpha in alphas:
            with contextlib.ExitStack() as around:
                around.enter_context(dial.at(model, alpha))
                around.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
                if in_chunks:
                    around.enter_context(chunked(model))
                loss = model(ids, labels=labels, use_cache=False).loss / len(alphas)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        launched = time.perf_counter()
        wait()
        if not torch.isfinite(loss):
            raise WrongNumbersError(f"the loss at alpha {alphas[-1]} is {loss.item()}")
        taken = 1000 * (time.perf_counter() - started), 1000 * (launched - started)
        return *taken, torch.cuda.max_memory_allocated() - held if cuda else None

    return step


def _recorded_stock(args, name: str, batch: int, tokens: int, device, dtype) -> Callable[[], tuple]:
    """The conventional step as a CUDA graph, but for its optimizer: stock's fastest, where no shape ever changes."""
    model = without_mask(dial.disable(build(name, max(args.tokens), device, torch.float32, head=args.head))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids, labels = _drawn(model, batch, tokens, device)

    def run() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        run()

    def step() -> tuple[float, float, None]:
        for old, new in zip((ids, labels), _drawn(model, batch, tokens, device)):
            old.copy_(new)
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        optimizer.step()  # every replay writes the gradients anew
        launched = time.perf_counter()
        torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started), 1000 * (launched - started), None

    return step


def _options(kind: str) -> dict[str, bool]:
    """What `step` is given for a kind of step."""
    return {"recorded": "_recorded" in kind, "in_chunks": "_chunked" in kind}


def _check_chunks(model: nn.Module, batch: int, tokens: int, device, dtype) -> None:
    """The loss in chunks must be the loss, and pull at the words alike."""
    ids, labels = _drawn(model, batch, tokens, device)
    words, found = model.get_input_embeddings().weight, []
    for way in (contextlib.nullcontext(), chunked(model)):
        torch.manual_seed(0)  # dropout draws the same twice
        with way, dial.at(model, 0.9), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=labels, use_cache=False).loss
        found.append((loss.item(), torch.autograd.grad(loss, words)[0]))
    (loss, pull), (in_chunks, again) = found
    far = ((again - pull).norm() / pull.norm()).item()
    if abs(in_chunks - loss) > 1e-3 * loss or not far < NEAR:
        raise WrongNumbersError(f"the loss in chunks is {in_chunks}, whole {loss}; gradients are {far:.3g} apart")


def _rungs(model: nn.Module, tokens: int, strongest: float, number: int) -> tuple[float, float, float]:
    """The alphas of a ladder step's passes, drawn as zsaa.finetune draws them."""
    drawn = draw_reductions(strongest, 0, number)
    return 1.0, *(alpha_for(model.config, tokens, times, **asdict(rule_of(model))) for times in drawn)


def _rounds(
    model: nn.Module, step: Callable, stock: Callable | None, tokens: int, args, device
) -> Iterator[dict[str, tuple]]:
    """By kind of step, its alphas and what it took, warmed up, round after round. stock: a recorded conventional one,
    if there is one."""
    (low, high), warmup = args.alpha_range, 3
    if device.type == "cuda":  # kernels of several sizes are compiled at their first use
        warmup = 1
        for i in range(8):
            step(low + (high - low) * (i + 0.5) / 8)
    for level in LEVELS if args.recorded else ():
        if low < level:
            step(level - 1e-6, recorded=True, in_chunks=args.chunked_loss)
    draws, began = torch.Generator().manual_seed(0), time.perf_counter()
    for round_ in range(warmup + args.repeats):
        kinds = {"conventional": (1.0,), "sampled": (low + (high - low) * torch.rand((), generator=draws).item(),)}
        if args.ladder is not None:
            kinds["ladder"] = _rungs(model, tokens, args.ladder, round_)
        ways = ["", "_recorded"] if args.recorded else [""]
        ways += [f"{way}_chunked" for way in ways] if args.chunked_loss else []
        taken = {
            kind + way: (alphas, *step(*alphas, **_options(way)))
            for way in ways
            for kind, alphas in kinds.items()
            if kind != "conventional" or "_recorded" not in way
        }
        if stock is not None:
            taken["conventional_recorded"] = ((1.0,), *stock())
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
    and fewer rows save little. ideal: the mean of what Eq. 2 leaves of the decoder's multiplications. With --recorded
    each kind once more by CUDA graphs (stock's conventional step, too); recordings are made before, and what they took.
    With --chunked-loss each kind once more with the loss of a language head in chunks. peak_bytes: of a step, on top of
    what was there before it.
    """
    rows, profiles, (low, high) = [], [], args.alpha_range
    for name in args.models:
        model = build(name, max(args.tokens), device, torch.float32, head=args.head).train()
        config, rule = model.config, asdict(rule_of(model))
        for tokens, batch in itertools.product(args.tokens, args.batches):
            if args.chunked_loss:
                _check_chunks(model, batch, tokens, device, dtype)
            step, stock = _stepper(model, batch, tokens, device, dtype), None
            if args.recorded and device.type == "cuda":
                stock = _recorded_stock(args, name, batch, tokens, device, dtype)
            taken = list(_rounds(model, step, stock, tokens, args, device))
            facts = {"model": name, "batch": batch, "tokens": tokens}
            row = {**facts, "low": low, "high": high, "steps": len(taken)}
            for kind in taken[0]:
                for part, column in (("", 1), ("_host", 2)):
                    row[f"{kind}{part}_ms"] = round(statistics.mean(each[kind][column] for each in taken), 3)
                peaks = [each[kind][3] for each in taken if each[kind][3] is not None]
                if peaks:
                    row[f"{kind}_peak_bytes"] = max(peaks)
                if kind != "conventional":
                    row[f"{kind}_over_conventional"] = round(row[f"{kind}_ms"] / row["conventional_ms"], 3)
            for kind, ideal in (("sampled", "ideal"), ("ladder", "ladder_ideal")):
                if kind in taken[0]:
                    left = [sum(1 / mac_reduction(config, tokens, a, **rule) for a in each[kind][0]) for each in taken]
                    row[ideal] = round(statistics.mean(left), 3)
            row["slowest_sampled_ms"] = round(max(each["sampled"][1] for each in taken), 3)
            if args.recorded:
                held = dial.captured(model)
                row |= {"recordings": len(held["training"]), "off": held["off"], "recorded_bytes": held["bytes"]}
                row["capture_ms"] = round(statistics.mean([r["capture_ms"] for r in held["training"]] or [0]), 1)
            rows.append({**row, "head": args.head, "fused": dispatch._fused})
            args.keep({"rows": rows, "profiles": profiles})
            for kind, (alphas, *_) in taken[-1].items() if args.profiled else ():
                if kind != "conventional_recorded":
                    again = functools.partial(step, **_options(kind))
                    profiles.append({"model": name, "batch": batch, "tokens": tokens, "step": kind,
                                     **_profiled(again, alphas, args.top, device)})  # fmt: skip
                    args.keep({"rows": rows, "profiles": profiles})
        del model, step, stock
    print_rows(rows, " ".join(rows[0]))
    return {"rows": rows, **({"profiles": profiles} if profiles else {})}
