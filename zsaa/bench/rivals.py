"""Milliseconds of what accuracy is compared of: the dial with its learned score, fewer layers, left when sure or fixed,
and shorter inputs."""

from __future__ import annotations

import functools
import itertools
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.baselines import recorded, without_mask
from zsaa.bench.baselines import whole as logits_of
from zsaa.bench.prefill import check_model, prefill
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.budget import alpha_for, truncation_for
from zsaa.cost import macs
from zsaa.evaluation.sure import until_sure
from zsaa.learned import salience
from zsaa.measure import alternate
from zsaa.rule import Rule

RULE = Rule(score="salience", schedule="rising", tau=2)  # of zsaa+ by adapters


@contextmanager
def first_layers(config, count: int):
    """The model runs its first `count` layers alone, inside the block."""
    before, config.num_hidden_layers = config.num_hidden_layers, count
    try:
        yield
    finally:
        config.num_hidden_layers = before


def by_layers(model: nn.Module, ids: Tensor, count: int) -> Tensor:
    with first_layers(model.config, count):
        return logits_of(model, ids)


class SureAt(nn.Module):
    """In place of a classification head, whose weights would decide at random: sure where it is asked for the `count`th
    time, and not before. It computes what a head of two classes does."""

    out_features = 2

    def __init__(self, like: nn.Module):
        super().__init__()
        weight = like.get_output_embeddings().weight
        self.head = nn.Linear(weight.shape[1], 2, bias=False).to(weight)
        self.says = torch.tensor([[0.0, 0.0], [0.0, 99.0]]).to(weight)  # not sure, sure
        self.count, self.asked = 1, 0

    def forward(self, states: Tensor) -> Tensor:
        self.asked += 1
        self.head(states)
        return self.says[int(self.asked == self.count)].expand(len(states), -1)


def by_confidence(model: nn.Module, ids: Tensor, depth: int) -> Tensor:
    """One text that leaves behind layer `depth`, each layer from the first on asked whether it is sure."""
    model.score.count, model.score.asked = depth, 0
    return until_sure(model, {"input_ids": ids}, first=1).logits


def ways(model: nn.Module, stock: nn.Module, ids: Tensor, reductions: list[float]) -> dict[tuple, tuple]:
    """(control, target) -> (what to run, its MAC reduction, alpha, layers, tokens), the whole model first."""
    config, tokens = model.config, ids.shape[1]
    replayed = recorded if ids.is_cuda else lambda run: run
    whole, depth, found = macs(config, tokens), config.num_hidden_layers, {}
    found["alpha", 1] = replayed(functools.partial(logits_of, stock, ids)), 1.0, 1.0, depth, tokens
    if len(ids) == 1:  # of several texts the last one decides when all are done
        for target in (1, *reductions):
            count = max(1, int(depth / target + 1e-9))
            leaving = functools.partial(by_confidence, stock, ids, count)
            found["confidence", target] = leaving, depth / count, 1.0, count, tokens
    for target in reductions:
        alpha = alpha_for(config, tokens, target, **asdict(RULE))
        fewer = whole / macs(config, tokens, alpha, **asdict(RULE))
        found["alpha", target] = functools.partial(prefill, model, ids, alpha), fewer, alpha, depth, tokens
        count = max(1, int(depth / target + 1e-9))
        shallow = functools.partial(by_layers, stock, ids, count)
        found["layers", target] = replayed(shallow), depth / count, 1.0, count, tokens
        kept = truncation_for(config, tokens, target)
        shorter = functools.partial(logits_of, stock, ids[:, -kept:].contiguous())
        found["last", target] = replayed(shorter), whole / macs(config, kept), 1.0, depth, kept
    return found


def bench_rivals(args, device, dtype) -> dict:
    """Time to the last token's logits at the MAC reductions of --reductions: the dial (salience with random heads,
    drops that rise, tau 2), the first layers alone, and the stock model on the last tokens; of one text also
    the layers up to one that is sure (`until_sure`). All in turn, and on a GPU all but the last as CUDA graphs, stock
    ones without a mask (`zsaa.bench.baselines`) and without a cache."""
    rows = []
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        scorer = salience.Salience(model.config, range(model.config.num_hidden_layers)).to(device)
        salience.attach(model, scorer.requires_grad_(False).eval())
        dial.enable(model, **asdict(RULE))
        stock = without_mask(dial.disable(build(name, max(args.tokens), device, dtype)))
        stock.score = SureAt(stock)
        for batch, tokens in itertools.product(args.batches, args.tokens):
            ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
            found = ways(model, stock, ids, args.reductions)
            for alpha in {alpha for _, _, alpha, *_ in found.values()} - {1.0}:
                check_model(model, ids, alpha)
            runs = {key: run for key, (run, *_) in found.items()}
            times = alternate(runs, repeats=args.repeats, seconds=args.seconds, clock=args.clock)
            for (control, target), (_, fewer, alpha, layers, kept) in found.items():
                rows.append({"model": name, "batch": batch, "tokens": tokens, "control": control, "target": target,
                             "alpha": alpha, "layers": layers, "kept": kept, "mac_reduction": round(fewer, 3),
                             **times[control, target]})  # fmt: skip
            args.keep({"rows": rows})
    print_rows(rows, "model batch tokens control target layers kept mac_reduction latency_ms speedup")
    return {"rows": rows}
