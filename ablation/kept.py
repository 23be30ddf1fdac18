"""Models of rows as they were judged: kept (run.py's --weights), read again, and asked as teachers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ablation.curves import logits_of
from ablation.scorers import make
from ablation.training import Training
from ablation.variants import Variant
from zsaa.data.batching import pad
from zsaa.families import find_decoder
from zsaa.finetune import Recipe, add_lora
from zsaa.models import load_model


def build(name: str, training: Training, device: str) -> tuple:
    """(model, tokenizer) as a row's training begins: its head drawn from the seed, its layers, its adapters."""
    model, tokenizer = load_model(name, kind="sequence-classification", num_labels=2, device=device)
    torch.manual_seed(training.seed)
    torch.nn.init.normal_(model.score.weight, std=0.02)
    if training.layers:
        shorten(model, training.layers)
    if training.start:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, training.start, is_trainable=True)
    elif training.lora:
        rank, dropout = training.lora, training.dropout
        recipe = Recipe(tuning="lora", lora_rank=rank, lora_alpha=2 * rank, dropout=dropout, seed=training.seed)
        model = add_lora(model, recipe)
    return model, tokenizer


def shorten(model: nn.Module, layers: int) -> None:
    """Leave the decoder its first `layers` layers alone; its config's `whole_layers` says how many it had."""
    decoder, family = find_decoder(model)
    every = getattr(decoder, family.layers)
    if not 0 < layers <= len(every):
        raise ValueError(f"layers is {layers}, and the model has {len(every)}: give 1 to {len(every)}.")
    setattr(decoder, family.layers, nn.ModuleList(every[:layers]))
    decoder.config.num_hidden_layers, decoder.config.whole_layers = layers, len(every)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = decoder.config.layer_types[:layers]


def by_fewer_layers(rows: list[dict], model: nn.Module) -> list[dict]:
    """Rows of a shortened model on whole inputs, as those of the control "layers": MACs are against all layers, each of
    which costs the same."""
    config = find_decoder(model)[0].config
    layers, ratio = config.num_hidden_layers, config.whole_layers / config.num_hidden_layers
    return [
        {**r, "control": "layers", "target": ratio, "layers": layers, "mac_reduction": ratio}
        for r in rows
        if r["control"] == "alpha" and r["target"] == 1
    ]


def keep(folder: str | Path, name: str, model: nn.Module, probe: nn.Module | None, rule: Variant) -> Path:
    """Write <name>.pt into the folder: the weights as they are judged, the probe's, and the rule."""
    path = Path(folder) / f"{name}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    learned = probe.state_dict() if isinstance(probe, nn.Module) else None
    draft = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "probe": learned, "rule": dict(vars(rule))}, draft)
    return draft.replace(path)


def read(folder: str | Path, name: str, result: dict, device: str) -> tuple:
    """(model, tokenizer, probe, rule, training) of the row whose result is given, and which `keep` wrote there."""
    path, training = Path(folder) / f"{name}.pt", Training(**result["training"])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run the row with --weights {folder}.")
    whole = torch.load(path, map_location=device, weights_only=True)
    model, tokenizer = build(result["model"]["name"], training, device)
    model.to(next(iter(whole["model"].values())).dtype).load_state_dict(whole["model"])
    rule, probe = Variant(**whole["rule"]), None
    if whole["probe"] is not None:
        probe = make(training.probe, find_decoder(model)[0].config, rule, model.config.num_labels).to(device).eval()
        probe.load_state_dict(whole["probe"])
    return model.eval(), tokenizer, probe, rule, training


@torch.no_grad()
def verdicts(model: nn.Module, samples: Sequence, batch_size: int = 64) -> Tensor:
    """float32 [samples, classes] on the CPU: what the model says of whole texts, as probabilities."""
    device, found = next(model.parameters()).device, [None] * len(samples)
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, _ = pad([samples[i] for i in batch], 0, device)
        logits, *_ = logits_of(model, ids, [len(samples[i]) for i in batch], 1.0, Variant())
        for i, said in zip(batch, logits.softmax(-1).cpu()):
            found[i] = said
    return torch.stack(found)
