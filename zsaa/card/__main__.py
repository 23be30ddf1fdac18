"""A card from the command line.

python -m zsaa.card --model smollm2-135m --tokens 2048 --alphas 1 0.9 --output card.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from zsaa import dial
from zsaa.bench.shapes import MODELS, build
from zsaa.card import card
from zsaa.kit.files import check_writable
from zsaa.measure.checks import check_whole
from zsaa.models import load_model
from zsaa.studies.command import exit_code


def main(arguments: list[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m zsaa.card", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="as zsaa.models.load_model takes it")
    parser.add_argument("--shape", choices=MODELS, help="instead: random weights of this shape")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.9, 0.7, 0.5])
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/card/card.json"))
    args = parser.parse_args(arguments)
    check_writable(args.output)
    check_whole("--tokens", args.tokens), check_whole("--new", args.new)
    device, dtype = torch.device("cuda" if gpu else "cpu"), getattr(torch, args.dtype)
    if args.shape:
        model = build(args.shape, args.tokens + args.new, device, dtype)
    else:
        model = dial.enable(load_model(args.model, dtype=dtype, device=device)[0])
    made = card(
        model, args.tokens, args.alphas, batch=args.batch, new=args.new, seconds=args.seconds, repeats=args.repeats
    )
    made.about["model"] = args.shape or args.model
    made.save(args.output)
    made.figure().savefig(args.output.with_suffix(".png"))
    print(made)
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.card"))
