"""Clock times at the settings of a curve, each in turn with the stock model, which gives the speed-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

import zsaa
from zsaa.data.batching import pad
from zsaa.dial import rule
from zsaa.evaluation.controls import CUTS, applied, cut, precision_of
from zsaa.families import find_decoder, only_last_logits
from zsaa.measure import alternate

STOCK = {"keep_tokens": None, "control": "alpha", "alpha": 1.0}


def longest(samples: Sequence[Sequence[int]], count: int) -> list:
    """The `count` longest samples: a batch without padding when they all reach the maximum length."""
    return sorted(samples, key=len, reverse=True)[:count]


@torch.inference_mode()
def time_batch(
    model: nn.Module, rows: list[dict], tokenizer, samples: Sequence[Sequence[int]], repeats: int = 5, precision="fp32"
) -> list[dict]:
    """Time one forward pass over `samples` as one batch at every row's setting, alternating with the stock model.
    Timed are the dial's rows and those of the first cut among them: random keep computes what the dial does, and all
    cuts leave as many tokens.

    Adds "latency_ms" (median), "latency_ms_quartiles", "speedup" (over stock, same run), and what was timed:
    "latency_batch", "latency_tokens" (longest sample) and "latency_mac_reduction" on this very batch.
    """
    cut_short = next((row["control"] for row in rows if row["control"] in CUTS), None)
    timed = {str(i): row for i, row in enumerate(rows) if row["control"] in ("alpha", cut_short)}

    def forward(ids, mask):
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    _time(model, timed, tokenizer, samples, repeats, precision, forward)
    config, chosen, lengths = find_decoder(model)[0].config, rule(model), [len(s) for s in samples]
    whole = sum(zsaa.macs(config, n) for n in lengths)
    for row in timed.values():
        kept = [min(n, row["keep_tokens"] or n) for n in lengths]
        cost = sum(zsaa.macs(config, n, row["alpha"] or 1.0, **chosen) for n in kept)
        row["latency_mac_reduction"] = round(whole / cost, 4)
    return rows


@torch.inference_mode()
def time_first_token(
    model: nn.Module, rows: list[dict], tokenizer, prefix: Sequence[int], repeats: int = 5, precision="fp32"
) -> list[dict]:
    """Time to first token: one prefill of `prefix` (ids) with the last token's logits and the cache, at every row's
    setting. Adds what `time_batch` does, but for the MACs, which are the curve's. Rows of the control "random" are not
    timed: they compute what the dial does.
    """
    timed = {"stock" if row["alpha"] == 1 else str(i): row for i, row in enumerate(rows) if row["control"] != "random"}

    def prefill(ids, mask):
        model(input_ids=ids, attention_mask=mask, use_cache=True, **only_last_logits(model))

    _time(model, timed, tokenizer, [prefix], repeats, precision, prefill)
    return rows


def _time(model, timed: dict[str, dict], tokenizer, samples, repeats: int, precision: str, run: Callable) -> None:
    """Fill in the clock of these rows: each as `run` of its inputs, ids and mask int64 [batch, longest], in turn with
    the stock model, whose own row, if any, is called "stock"."""
    pad_id, device = find_decoder(model)[0].config.pad_token_id or 0, next(model.parameters()).device

    def at(row: dict) -> Callable:
        short = [cut(s, row["keep_tokens"], row["control"], tokenizer.bos_token_id) for s in samples]
        ids, mask = pad(short, pad_id, device)

        def once() -> None:
            with applied(model, row), precision_of(model, precision):
                run(ids, mask)

        return once

    clock = alternate({"stock": at(STOCK), **{name: at(row) for name, row in timed.items()}}, repeats)
    for name, row in timed.items():
        row.update(clock[name], latency_batch=len(samples), latency_tokens=max(map(len, samples)))
