"""Benchmarks: what attention with scores, a prefill, and decoding cost, stock and at each alpha.

    python -m zsaa.bench attention --tokens 2048 8192
    python -m zsaa.bench prefill --model llama3-8b --tokens 2048 8192 --alphas 0.99 0.97 0.9
    python -m zsaa.bench decode --model smollm2-135m --tokens 2048 --alphas 0.97 0.9
    python -m zsaa.bench generate --model smollm2-135m --tokens 512 --alphas 0.9 --new 64 --compiled
    python -m zsaa.bench footprint --models llama3-8b gemma2-2b --storage nf4 float16    (Table 3, but for its scores)
    python -m zsaa.bench ttft --models gpt2-124m gpt2-355m --tokens 224 512 1024         (Table 2's speed-ups)
    python -m zsaa.bench question --model llama3-8b --tokens 8192 --batches 1 8 --reductions 2 3 5    (a long prompt's)
    python -m zsaa.bench baselines --model llama3-8b --tokens 2048 8192 --alphas 0.97 0.9    (stock compiled, recorded)
    python -m zsaa.bench rivals --tokens 256 --batches 1 32 --reductions 2 3 5 7 9 11        (dial, layers, cut inputs)
    python -m zsaa.bench memory --model llama3-8b --tokens 4096 8192 16384 32768 --alphas 0.9
    python -m zsaa.bench recordings --models gpt2-124m --tokens 512 --batches 32 1 --alphas 0.9    (what graphs hold)
    python -m zsaa.bench scale --model llama3-70b --tokens 8192 --alphas 0.97 0.9 --repeats 3    (over all GPUs)
    torchrun --nproc-per-node 2 -m zsaa.bench replicas --model llama3-8b --tokens 8192 --alphas 0.9
    python -m zsaa.bench train --model smollm2-135m --tokens 512 --batch 8 --dtype bfloat16
    python -m zsaa.bench profile --model llama3-8b --tokens 8192 --alphas 0.97    (where the time goes)
    python -m zsaa.bench sweep --tokens 2048 8192        (block sizes of the kernels)

Models have random weights: time depends on shapes, not on values. Numbers are checked before they are timed, and a
failed check ends the run. Variants are timed in turn, round after round; medians and quartiles go to one JSON file.
`prefill`, `ttft`, `question`, `baselines`, `rivals`, `recordings`, `generate`, `footprint` and `train` write it anew
after every shape ("complete": false until the last one).
Decoding does not get shorter by pruning: a new token passes all layers, and only the cache it looks at is smaller. What
`generate` shows is what CUDA graphs of its steps give.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import torch

from zsaa.bench.attention import bench_attention, bench_sweep
from zsaa.bench.baselines import bench_baselines
from zsaa.bench.decode import bench_decode, bench_generate
from zsaa.bench.device import WrongNumbersError
from zsaa.bench.memory import bench_footprint, bench_memory
from zsaa.bench.prefill import bench_prefill, bench_profile, bench_ttft
from zsaa.bench.question import bench_question
from zsaa.bench.recordings import bench_recordings
from zsaa.bench.rivals import bench_rivals
from zsaa.bench.scale import bench_replicas, bench_scale
from zsaa.bench.shapes import HEADS, MODELS
from zsaa.bench.train import bench_train
from zsaa.fast import dispatch
from zsaa.kit import paper
from zsaa.kit.energy import energy
from zsaa.kit.files import check_writable
from zsaa.measure import provenance, write_json
from zsaa.measure.checks import check_number, check_whole
from zsaa.measure.distributed import place

BENCHES = {
    "attention": bench_attention,
    "prefill": bench_prefill,
    "ttft": bench_ttft,
    "question": bench_question,
    "baselines": bench_baselines,
    "rivals": bench_rivals,
    "footprint": bench_footprint,
    "decode": bench_decode,
    "generate": bench_generate,
    "memory": bench_memory,
    "recordings": bench_recordings,
    "scale": bench_scale,
    "replicas": bench_replicas,
    "train": bench_train,
    "profile": bench_profile,
    "sweep": bench_sweep,
}


def parser() -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    made = argparse.ArgumentParser(
        prog="python -m zsaa.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("bench", choices=BENCHES)
    made.add_argument("--output", type=Path, help="result file (default: outputs/bench/<bench>.json)")
    made.add_argument("--device", default="cuda" if gpu else "cpu")
    made.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16" if gpu else "float32")
    made.add_argument("--models", "--model", nargs="+", choices=MODELS, default=["smollm2-135m"])
    made.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192] if gpu else [64], help="prompt lengths")
    made.add_argument("--batches", "--batch", nargs="+", type=int, default=[1])
    made.add_argument("--alphas", nargs="+", type=float, default=[0.99, 0.97, 0.9, 0.7])
    made.add_argument("--reductions", nargs="+", type=float, default=[t for t in paper.TABLE_2 if t != 1],
                        help="ttft, question, rivals: of the MACs; alpha is solved for them")  # fmt: skip
    made.add_argument("--storage", nargs="+", choices=("float16", "bfloat16", "float32", "nf4"), default=["float16"],
                        help="footprint: of the weights; prefill, profile: nf4, or as --dtype says")  # fmt: skip
    made.add_argument("--attention", choices=("sdpa", "eager"), help="footprint: of the stock model (default: sdpa, "
                      "and eager where transformers has no other)")  # fmt: skip
    made.add_argument("--new", type=int, default=32, help="decode, generate: tokens to generate")
    made.add_argument("--compiled", action="store_true", help="generate: stock compiled, too (on a GPU; takes minutes)")
    made.add_argument("--repeats", type=int, default=15, help="timed rounds")
    made.add_argument("--warmup", type=int, help="prefill, ttft: rounds before those (default: 1, and 2 on a GPU)")
    made.add_argument("--seconds", type=float, default=60, help="limit for the rounds of one model and length")
    made.add_argument("--alpha-range", nargs=2, type=float, default=[0.5, 1.0], help="train: alpha is drawn from it")
    made.add_argument("--no-stock", action="store_true", help="memory: the dial alone, where stock's is known")
    made.add_argument("--head", choices=HEADS, default="causal-lm", help="train: of the model")
    made.add_argument("--ladder", type=float, metavar="STRONGEST",
                      help="train: ladder steps, too, of MAC reductions up to this one")  # fmt: skip
    made.add_argument("--recorded", action="store_true", help="train: each kind of step by CUDA graphs, too")
    made.add_argument("--chunked-loss", action="store_true",
                      help="train: each kind of step with a language head's loss in chunks, too")  # fmt: skip
    made.add_argument("--profiled", action="store_true", help="train: where the time of a step of each kind goes")
    made.add_argument("--top", type=int, default=15, help="profile, train: kernels to show")
    made.add_argument("--kernels", nargs="+", default=["column_sums"], choices=("column_sums", "attention"))
    made.add_argument("--block-sizes", nargs="+", type=int, default=[64, 128], help="sweep: rows per block")
    made.add_argument("--process-time", action="store_true",
                      help="prefill, rivals, on a CPU that others share: time that the process has had")  # fmt: skip
    made.add_argument("--backend", choices=dispatch.NAMES, default="auto")
    without = "pruned passes without fused norms and activations, which stock models do not have"
    made.add_argument("--no-fused", action="store_true", help=without)
    return made


def _check(args: argparse.Namespace) -> torch.device:
    """The device; ValueError, OSError or RuntimeError for what no bench can do, before anything is timed."""
    whole = dict.fromkeys(("tokens", "batches", "new", "repeats", "top", "block_sizes"))
    numbers = {"seconds": "(0, inf)", "alphas": "(0, 1]", "alpha_range": "(0, 1]", "reductions": "[1, inf)"}
    for name, interval in {**whole, **numbers}.items():
        option, values = f"--{name.replace('_', '-')}", getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            check_number(option, value, interval) if interval else check_whole(option, value)
    check_writable(args.output)
    try:
        torch.empty(1, device=args.device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {args.device} is not there ({error!s:.80}). Leave it out, or say cpu.") from None
    dispatch.use_backend(args.backend)
    return torch.device(args.device)


def main(arguments: list[str] | None = None) -> int:
    """Run one of BENCHES and write its result file; 1 where a check of the numbers failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = parser()
    args = made.parse_args(given)
    args.output = args.output or Path("outputs/bench") / f"{args.bench}.json"
    try:
        device, dtype = _check(args), getattr(torch, args.dtype)
    except (ValueError, OSError, RuntimeError) as error:
        made.error(str(error))
    dispatch.use_fused(not args.no_fused)
    if "--output" in given:  # a path of one machine, and no part of how
        del given[given.index("--output") : given.index("--output") + 2]
    command = "python -m zsaa.bench " + shlex.join(given)
    args.clock = time.process_time if args.process_time else None
    started = time.perf_counter()

    def write(result: dict, **spent) -> Path:
        facts = {"seed": 0, "repeats": args.repeats, "seconds": round(time.perf_counter() - started, 1), **spent}
        kind = args.bench if args.bench == "ttft" else f"bench-{args.bench}"
        return write_json(args.output, {"kind": kind, "command": command, "dtype": args.dtype,
                                        "backends": dispatch.backends(device), "fused": not args.no_fused,
                                        **({"clock": "process"} if args.process_time else {}),
                                        "provenance": provenance(**facts),
                                        **result})  # fmt: skip

    args.keep = lambda result: write({**result, "complete": False})
    try:
        with energy() as spent:
            result = BENCHES[args.bench](args, device, dtype)
    except WrongNumbersError as error:
        print(f"the numbers are wrong, nothing more was written: {error}", file=sys.stderr)
        return 1
    if place()[0]:  # one process of several writes
        return 0
    path = write(result, **spent)
    print(f"{path} ({spent['seconds']} s, {dispatch.backends(device)})")
    return 0
