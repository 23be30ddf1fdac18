"""Which model bears a key/value cache in fewer bits? `python -m ablation.bits --models NAME --output outputs/bits`

The first tokens of a held-out film review are read into the cache, and what follows is predicted from it, token by
token of the text itself: perplexity, and how often the likeliest next token is that of the cache in full. Keys are
grouped across tokens (axis 0) or within one (axis 1), values within one, as hqq counts axes.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import QuantizedCache

import zsaa
from zsaa.data.tasks import load_task
from zsaa.measure import output_folder, provenance, stats, write_json
from zsaa.models import load_model

WAYS = ((None, None), (8, 1), (8, 0), (4, 1), (4, 0))  # bits, axis of the keys
GROUP = 64


class Reader:
    def __init__(self, name: str, alpha: float):
        model, self.tokenizer = load_model(name)
        self.model, self.alpha = zsaa.enable(model.eval()), alpha

    def windows(self, texts: Sequence[str], length: int, count: int) -> list[Tensor]:
        read = (torch.tensor([self.tokenizer(text, verbose=False)["input_ids"]]) for text in texts)
        return [ids[:, :length] for ids in read if ids.shape[1] >= length][:count]

    @torch.inference_mode()
    def logits(self, ids: Tensor, prompt: int, bits: int | None, axis: int | None) -> Tensor:
        """Of what follows the prompt [tokens, words], each but the first through the cache."""
        if bits is None:
            cache = DynamicCache(config=self.model.config)
        else:
            groups = {"nbits": bits, "axis_key": axis, "axis_value": 1, "q_group_size": GROUP}
            cache = QuantizedCache("hqq", self.model.config, **groups)
        with zsaa.trace(self.model):  # alpha = 1 goes through the pruned layers, too
            first = self.model(ids[:, :prompt], alpha=self.alpha, past_key_values=cache)
        rest = self.model(ids[:, prompt:-1], past_key_values=first.past_key_values, alpha=1.0).logits
        return torch.cat([first.logits[:, -1:], rest], dim=1)[0]


def measured(name: str, alpha: float, texts: Sequence[str], prompt: int, new: int, count: int) -> list[dict]:
    """Rows of one model. The interval is of the loss per token that the bits add, over texts."""
    reader = Reader(name, alpha)
    windows = reader.windows(texts, prompt + new, count)
    losses, same = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for ids in windows:
        full = None
        for way in WAYS:
            logits = reader.logits(ids, prompt, *way)
            full = logits if full is None else full
            loss = torch.nn.functional.cross_entropy(logits.double(), ids[0, prompt:])
            losses[way].append(float(loss))
            same[way].append(float((logits.argmax(-1) == full.argmax(-1)).double().mean()))
    rows = []
    for (bits, axis), found in losses.items():
        added = [a - b for a, b in zip(found, losses[None, None])]
        mean, half = sum(added) / len(added), stats.half_width(added) if bits else 0.0
        row = {
            "model": reader.model.config.model_type,
            "alpha": alpha,
            "bits": bits or 32,
            "axis_key": axis,
            "n": len(found),
        }
        row |= {"perplexity": math.exp(sum(found) / len(found)), "times": math.exp(mean)}
        row |= {"times_ci95": [math.exp(mean - half), math.exp(mean + half)]}
        rows.append(row | {"same_next_token": 100 * sum(same[bits, axis]) / len(found)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m ablation.bits", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--models", nargs="+", default=["smollm2-135m"], help="packaged names or folders")
    add("--alphas", nargs="+", type=float, default=[1.0, 0.9])
    add("--output", default="outputs/bits")
    add("--texts", type=int, default=24)
    add("--prompt", type=int, default=160, help="tokens that are read into the cache")
    add("--new", type=int, default=48, help="tokens that are predicted from it")
    chosen, begun = made.parse_args(), time.monotonic()
    texts = load_task("imdb", test=10 * chosen.texts, seed=0).test["text"]
    rows, options = [], (texts, chosen.prompt, chosen.new, chosen.texts)
    for name in chosen.models:
        for alpha in chosen.alphas:
            rows += measured(name, alpha, *options)
    content = {
        "kind": "cache-bits",
        "command": shlex.join(["python", "-m", "ablation.bits", *sys.argv[1:]]),
        "group": GROUP,
        "rows": rows,
        "provenance": provenance(seed=0, seconds=round(time.monotonic() - begun, 1), samples=chosen.texts),
    }
    print(write_json(output_folder(chosen.output) / "results" / "bits.json", content))


if __name__ == "__main__":
    main()
