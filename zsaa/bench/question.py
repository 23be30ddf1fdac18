"""The time to the first token of a long prompt that ends in a question: what the asked score spares, itself counted."""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from zsaa import dial
from zsaa.bench.attention import check_attention
from zsaa.bench.device import WrongNumbersError, ceilings, peak_bytes, roofline_ms
from zsaa.bench.prefill import cache_bytes, check_model, prefill
from zsaa.bench.rows import print_rows
from zsaa.bench.shapes import build
from zsaa.budget import alpha_for
from zsaa.cost import attention_widths, kv_bytes, macs
from zsaa.families import find_decoder
from zsaa.learned import salience
from zsaa.learned.asked import QUESTION, Scorer, Shape
from zsaa.measure import alternate
from zsaa.rule import ASKED, ASKERS, Rule

RULES = {"asked": Rule(score=ASKED, schedule="entry"), "alpha": Rule()}


@dataclass(frozen=True)
class Setting:
    """One way to read a prompt. control: "alpha" (the paper's rule; stock at 1), "asked" (what the last tokens ask for
    enters the first layer), or "last" (the stock model, and only the last tokens of the prompt)."""

    control: str
    target: float  # the reduction in MACs that was asked for
    rule: Rule
    alpha: float
    read: int  # tokens of the prompt that are given
    kept: int  # that leave the last layer

    def run(self, model: nn.Module, ids: Tensor):
        find_decoder(model)[0]._zsaa.rule = self.rule
        return prefill(model, ids[:, -self.read :], self.alpha)


def settings(config, tokens: int, reductions: list[float]) -> list[Setting]:
    """Stock first; then, for each reduction, both rules and a cut to as many tokens as "asked" keeps."""
    found = [Setting("alpha", 1, Rule(), 1.0, tokens, tokens)]
    for target in reductions:
        for control, rule in RULES.items():
            alpha = alpha_for(config, tokens, target, **asdict(rule))
            kept = rule.counts(tokens, alpha, config.num_hidden_layers)[-1]
            found.append(Setting(control, target, rule, alpha, tokens, kept))
        kept = found[-2].kept
        found.append(Setting("last", target, Rule(), 1.0, kept, kept))
    return found


def bench_question(args, device, dtype) -> dict:
    """Time to the first token of prompts whose last 32 tokens ask, at the reductions in MACs of --reductions, scores
    included, all in turn with the stock model on the whole prompt. The scorer has random weights, as the model has;
    "scores": what it takes by itself. Prefills that come again are replayed from CUDA graphs where these fit."""
    rates, rows, scores = ceilings(device, dtype), [], []
    for name in args.models:
        model = build(name, max(args.tokens), device, dtype)
        config = model.config
        words = torch.arange(config.vocab_size)
        scorer = Scorer(Shape(config.hidden_size), words, torch.ones(config.vocab_size))
        salience.attach(model, scorer.requires_grad_(False).eval())
        heads, (q_dim, kv_dim) = config.num_attention_heads, attention_widths(config)
        check_attention((q_dim // heads, heads, kv_dim * heads // q_dim), min(2048, max(args.tokens)), device, dtype)
        for tokens, batch in itertools.product(args.tokens, args.batches):
            ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device)
            found, score = _timed(name, model, ids, args, rates)
            rows, scores = rows + found, [*scores, score]
            find_decoder(model)[0]._zsaa.graphs.clear()
            args.keep({"ceilings": rates, "rows": rows, "scores": scores})
        del model
    print_rows(rows, "model batch tokens control target kept latency_ms speedup mac_reduction roofline_speedup graph")
    print_rows(scores, "model batch tokens latency_ms")
    return {"ceilings": rates, "rows": rows, "scores": scores}


def _timed(name: str, model: nn.Module, ids: Tensor, args, rates: dict) -> tuple[list[dict], dict]:
    """The rows of one prompt, stock first, and the row of the scorer by itself."""
    (batch, tokens), config, size = ids.shape, model.config, model.dtype.itemsize
    shape = {"model": name, "batch": batch, "tokens": tokens}
    runs = {
        setting: functools.partial(setting.run, model, ids) for setting in settings(config, tokens, args.reductions)
    }
    for setting in runs:
        if setting.alpha < 1:
            find_decoder(model)[0]._zsaa.rule = setting.rule
            check_model(model, ids, setting.alpha)
    clocks = alternate({**runs, "score": functools.partial(score, model, ids)}, args.repeats, 2, args.seconds)
    recorded = {(g["score"], *g["alphas"][:1]) for g in dial.captured(model)["graphs"]}
    stock, rows = {"ms": roofline_ms(config, batch, tokens, 1.0, Rule(), size, rates), "macs": macs(config, tokens)}, []
    for s, run in runs.items():
        held = cache_bytes(run().past_key_values)
        foretold = kv_bytes(config, s.read, s.alpha, s.rule.tau, batch, size, s.rule.schedule, s.rule.score)
        if held != foretold:
            raise WrongNumbersError(
                f"the cache holds {held} bytes by {s.control!r} at {s.target}x, expected {foretold}"
            )
        ideal = roofline_ms(config, batch, s.read, s.alpha, s.rule, size, rates)
        rows.append({**shape, "control": s.control, "target": s.target, "alpha": s.alpha, "kept": s.kept,
                     "mac_reduction": round(stock["macs"] / macs(config, s.read, s.alpha, **asdict(s.rule)), 3),
                     **clocks[s], "roofline_ms": round(ideal, 3), "roofline_speedup": round(stock["ms"] / ideal, 3),
                     "graph": (s.rule.score, s.alpha) in recorded, "kv_bytes": held,
                     "peak_bytes": peak_bytes(run, ids.device)})  # fmt: skip
    shown = [f"{row['control']} {row['target']}x {row['latency_ms']} ms" for row in rows]
    print(f"{name}, {batch} x {tokens} tokens: {', '.join(shown)}", flush=True)
    if off := dial.captured(model)["off"]:
        print(f"  no CUDA graphs: {off}", flush=True)
    return rows, {**shape, **clocks["score"], "speedup": None}


@torch.inference_mode()
def score(model: nn.Module, ids: Tensor) -> Tensor:
    """The asked score of a prompt's tokens by itself, from its embeddings on."""
    decoder, _ = find_decoder(model)
    part = torch.zeros_like(ids)
    part[:, -ASKERS:] = QUESTION
    states, real = decoder.get_input_embeddings()(ids), torch.ones_like(ids, dtype=torch.bool)
    return decoder.asked.rank(states, ids, part, real, min(ASKERS, ids.shape[1]))
