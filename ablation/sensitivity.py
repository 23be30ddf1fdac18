"""Where dropping tokens hurts, layer by layer, and the schedule that follows: one row of the ablation.

python -m ablation.sensitivity results/adapters/imdb-lora-salience

Half of the tokens that enter a layer are dropped there and nowhere else, by the score that the adapter was trained
with; what that costs is the divergence of the class probabilities from those at alpha = 1. `solve` then spreads the
drops so that a budget of MACs costs as little as possible, if costs add up over layers and grow with the square of
log(alpha_l).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from ablation import run
from ablation.curves import logits_of
from ablation.variants import Variant, alpha_for
from zsaa.cost import attention_widths, layer_weights
from zsaa.data.batching import pad
from zsaa.finetune import SETTINGS_FILE
from zsaa.measure import cached, provenance
from zsaa.models import load_model

FLOOR = 0.02  # of the mean sensitivity: a layer that seems to cost nothing still costs something


@torch.inference_mode()
def _log_probabilities(model: nn.Module, texts: Sequence, alpha: float, variant: Variant, scorer, batch_size: int):
    """float32 [texts, classes]"""
    found = []
    for start in range(0, len(texts), batch_size):
        part = texts[start : start + batch_size]
        ids, _ = pad(part, 0, next(model.parameters()).device)
        logits, *_ = logits_of(model, ids, [len(text) for text in part], alpha, variant, scorer=scorer)
        found.append(logits.log_softmax(-1))
    return torch.cat(found)


def divergences(
    model: nn.Module, scorer, texts: Sequence, settings: Iterable[tuple[float, Variant]], batch_size: int = 8
) -> list[float]:
    """Mean divergence KL(alpha = 1 || setting) of the class probabilities, in nats, for each (alpha, variant)."""
    texts = sorted(texts, key=len)
    whole = _log_probabilities(model, texts, 1.0, Variant(), scorer, batch_size)
    pruned = (_log_probabilities(model, texts, *setting, scorer, batch_size) for setting in settings)
    return [F.kl_div(found, whole, reduction="batchmean", log_target=True).item() for found in pruned]


def only(layer: int, layers: int, share: float) -> tuple[float, Variant]:
    """The alpha and the variant under which one layer (0: the first) keeps `share` of its tokens and all others all."""
    return share ** (1 / layers), Variant(schedule=tuple(float(n == layer) for n in range(layers)))


def sensitivity(
    model: nn.Module, scorer, texts: Sequence, share: float = 0.5, batch_size: int = 8, progress: bool = True
) -> list[float]:
    """Per layer, the divergence in nats that keeping `share` of its tokens causes."""
    layers = model.config.num_hidden_layers
    bar = tqdm(range(layers), disable=not progress, mininterval=10, desc="layers")
    return divergences(model, scorer, texts, (only(layer, layers, share) for layer in bar), batch_size)


def solve(costs: Sequence[float], config, length: int, mac_reduction: float, steps: int = 4000) -> list[float]:
    """The weights of a schedule (see variants.weights) that costs least: drops d_l = -log(alpha_l) that minimise
    sum(costs_l d_l^2) while the MACs of `length` tokens fall by `mac_reduction`. By gradient, on shares instead of
    whole tokens."""
    layers, q_dim = config.num_hidden_layers, attention_widths(config)[0]
    floor = FLOOR * sum(costs) / layers
    price = torch.tensor([max(cost, floor) for cost in costs], dtype=torch.float64)
    price = price / price.mean()
    entering_weights, kept_weights = layer_weights(config)
    terms = torch.tensor([length * entering_weights, 2 * length**2 * q_dim, length * kept_weights])
    by_entering, by_pairs, by_kept = (terms / terms.sum()).tolist()
    raw = torch.full((layers,), -2.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=0.02)
    for step in range(steps):
        drops = F.softplus(raw)
        kept = torch.exp(-drops.cumsum(0))
        entering = torch.cat((kept.new_ones(1), kept[:-1]))
        spent = (by_entering * entering + by_pairs * entering.square() + by_kept * kept).mean()
        over = torch.relu(spent * mac_reduction - 1)
        loss = (price * drops.square()).sum() + (10 + step / 10) * (over + over.square())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drops = F.softplus(raw).detach()
    return [round(w, 3) for w in (drops * layers / drops.sum()).tolist()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ablation.sensitivity", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, help="an adapter with a scorer that gradients taught")
    add("--model", default="smollm2-135m")
    add("--texts", type=int, default=96, help="training reviews to measure on")
    add("--length", type=int, default=256, help="their first tokens")
    add("--mac-reduction", type=float, default=5.0, help="the budget that the schedule is solved for")
    add("--output-dir", default=str(run.RESULTS))
    options = parser.parse_args(arguments)
    unit = {key: str(value) for key, value in vars(options).items() if key != "output_dir"}

    def compute() -> dict:
        model, tokenizer = load_model(options.model, kind="sequence-classification", num_labels=2)
        tau = json.loads((options.folder / SETTINGS_FILE).read_text(encoding="utf-8"))["tau"]
        model, scorer, _ = run._read(options.folder, model, Variant(tau=tau), "wide")
        model.eval()
        settings = run.load_config()["tasks"]["imdb"]
        (texts, _), _, source = run._data(
            "imdb", {**settings, "max_length": options.length}, tokenizer, {"train": options.texts, "test": 1}
        )
        costs = sensitivity(model, scorer, texts)
        solved = solve(costs, model.config, options.length, options.mac_reduction)
        tried = []
        for target in (2.0, 3.0, 5.0, 7.0):
            for name, schedule in (("geometric", "geometric"), ("rising", "rising"), ("solved", tuple(solved))):
                variant = Variant(schedule=schedule, tau=tau)
                with contextlib.suppress(ValueError):  # texts too short for it
                    alpha = alpha_for(model.config, list(map(len, texts)), target, variant)
                    tried.append((name, target, alpha, variant))
        apart = divergences(model, scorer, texts, [setting[2:] for setting in tried])
        rows = [
            {"schedule": name, "target": target, "alpha": alpha, "divergence": round(nats, 5)}
            for (name, target, alpha, _), nats in zip(tried, apart)
        ]
        return {
            "name": "sensitivity", "kind": "ablation", "row": "sensitivity",
            "about": "what dropping half of the tokens in one layer alone costs, and the schedule solved from it",
            "model": {"name": options.model}, "task": {"name": "imdb", "source": source, "substitute": True},
            "adapter": options.folder.name, "share": 0.5, "sensitivity": [round(cost, 6) for cost in costs],
            "weights": solved, "rows": rows,
            "provenance": provenance(seed=0, eval_samples=len(texts)),
        }  # fmt: skip

    result = cached(Path(options.output_dir) / "sensitivity.json", unit, compute)
    print("sensitivity:", *result["sensitivity"])
    print("weights:", *result["weights"])
    for row in result["rows"]:
        print(f"{row['schedule']:10} {row['target']:g}x  {row['divergence']} nats")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
