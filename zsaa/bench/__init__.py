"""Benchmarks of attention, prefills, memory, decoding and training steps, each checked before it is timed;
zsaa.bench.command says what there is."""

from zsaa.bench.command import main
from zsaa.bench.shapes import MODELS, build

__all__ = ["MODELS", "build", "main"]
