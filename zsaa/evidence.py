"""A learned score: how much each token tells about the label by itself.

In every layer that may drop, a small head gives each row a vote for each class, and the votes, summed over the rows
alone, must predict the label. A row's score is how far its votes are apart. The head sees what the row would carry on,
the state that enters the layer and what its attention read, and not the rows beside it: votes would then stand beside
the words that they are for. A table adds what a token tells wherever it stands.

The module is a child of the decoder, so that it moves, trains and synchronizes with the model. It computes in float32
whatever the model does, is saved in a file of its own beside the model or adapter, which stock transformers ignores,
and is trained by zsaa.finetune.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsaa.families import find_decoder
from zsaa.keep import EVIDENCE_WIDTH, attention_widths, dropping_layers

FILE = "evidence.safetensors"
CHILD = "evidence"  # its name in the decoder


class Evidence(nn.Module):
    """What each token tells about the label by itself, as it was learned.

    The heads of `layers` (0: the first) and the table, for a decoder with this `config` and so many classes. Fresh ones
    vote for nothing. bias: do votes have one that no token earns? Ours have not; those of ablation/ have."""

    DROPOUT = 0.1
    PRICE = 0.1  # of a vote

    def __init__(self, config, layers: Iterable[int], classes: int, bias: bool = False):
        super().__init__()
        hidden, (q_dim, _) = config.hidden_size, attention_widths(config)
        self.table = nn.Embedding(config.vocab_size, classes, dtype=torch.float32)
        nn.init.zeros_(self.table.weight)
        self.heads = nn.ModuleDict()
        for layer in layers:
            norms = [nn.LayerNorm(size, dtype=torch.float32) for size in (hidden, q_dim)]
            features = nn.Linear(hidden + q_dim, EVIDENCE_WIDTH, dtype=torch.float32)
            votes = nn.Linear(EVIDENCE_WIDTH, classes, bias=bias, dtype=torch.float32)
            nn.init.zeros_(votes.weight)
            parts = {"norms": nn.ModuleList(norms), "features": features, "votes": votes}
            self.heads[str(layer)] = nn.ModuleDict(parts)

    @property
    def layers(self) -> list[int]:
        return sorted(map(int, self.heads))

    @property
    def classes(self) -> int:
        return self.table.embedding_dim

    def forward(self, layer: int, hidden: Tensor, output: Tensor, tokens: Tensor) -> Tensor:
        """Votes [batch, rows, classes] of the rows that enter a layer, float32. hidden: their states; output: what the
        layer's attention read for them, before its projection; tokens: their ids [batch, rows]."""
        head = self.heads[str(layer)]
        with torch.autocast(hidden.device.type, enabled=False):
            seen = torch.cat([norm(x.float()) for norm, x in zip(head["norms"], (hidden, output))], dim=-1)
            features = F.dropout(F.gelu(head["features"](seen)), self.DROPOUT, self.training)
            return head["votes"](features) + self.table(tokens)

    def loss(self, passed: dict[int, tuple[Tensor, Tensor]], labels: Tensor) -> Tensor:
        """Of one pass (see `zsaa.passes.Prefill.votes`): cross-entropy of the summed votes, and a price on votes, so
        that tokens that tell nothing have none; the mean over layers."""
        losses = [F.cross_entropy(summed, labels) + self.PRICE * spread for summed, spread in passed.values()]
        return sum(losses) / len(losses)

    def groups(self) -> list[dict]:
        """For an optimizer: the heads and the table learn faster than the model."""
        heads = {"params": list(self.heads.parameters()), "lr": 1e-3, "weight_decay": 0.01}
        return [heads, {"params": list(self.table.parameters()), "lr": 3e-3, "weight_decay": 0.0}]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        """Moves, but stays in float32, when the model is cast."""

        def moved(x: Tensor) -> Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        return super()._apply(moved, recurse)


def spread(votes: Tensor) -> Tensor:
    """How far the votes of each row are apart: its score."""
    return votes.amax(-1) - votes.amin(-1)


def scorer_of(model: nn.Module) -> Evidence | None:
    """The scorer on the decoder inside `model`, if there is one."""
    return getattr(find_decoder(model)[0], CHILD, None)


def attach(model: nn.Module, scorer: Evidence) -> Evidence:
    """Make `scorer` a child of the decoder inside `model`, on its device; `save_pretrained` leaves it out."""
    decoder, _ = find_decoder(model)
    decoder.add_module(CHILD, scorer.to(next(decoder.parameters()).device))
    scorer.train(decoder.training)
    for owner, names in _left_out(model, scorer):
        owner._keys_to_ignore_on_save = sorted({*(owner._keys_to_ignore_on_save or ()), *names})
    return scorer


def detach(model: nn.Module) -> None:
    """Take the scorer off again, if there is one."""
    scorer = scorer_of(model)
    if scorer is not None:
        for owner, names in _left_out(model, scorer):
            owner._keys_to_ignore_on_save = [k for k in owner._keys_to_ignore_on_save or () if k not in names] or None
        delattr(find_decoder(model)[0], CHILD)


def _left_out(model: nn.Module, scorer: Evidence) -> list[tuple[PreTrainedModel, set[str]]]:
    """The models around `scorer`, and the names that its weights have in each."""
    found = []
    for owner in model.modules():
        prefix = next((name for name, module in owner.named_modules() if module is scorer), None)
        if isinstance(owner, PreTrainedModel) and prefix:
            found.append((owner, {f"{prefix}.{name}" for name in scorer.state_dict()}))
    return found


def fresh(model: nn.Module, schedule: str) -> Evidence:
    """An untrained scorer for the classifier `model`, for the layers that may drop under `schedule`; attach it."""
    config = find_decoder(model)[0].config
    return Evidence(config, dropping_layers(config.num_hidden_layers, schedule), config.num_labels)


def save(scorer: Evidence, folder: str | Path) -> None:
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in scorer.state_dict().items()}
    save_file(weights, Path(folder) / FILE)


def read(config, folder: str | Path) -> Evidence:
    """The scorer in `folder`, for a decoder with this `config`. Other precisions become float32."""
    weights = load_file(Path(folder) / FILE)
    try:
        layers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("heads.")})
        bias = any(name.endswith("votes.bias") for name in weights)
        scorer = Evidence(config, layers, weights["table.weight"].shape[1], bias)
        scorer.load_state_dict(weights)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{Path(folder) / FILE} is not a scorer for this {config.model_type} ({config.hidden_size} wide, "
            f"{config.vocab_size} tokens): {str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return scorer


def needed(decoder: nn.Module, schedule: str) -> Evidence:
    """The scorer on `decoder`, else the one that was saved with it; ValueError if there is none, or one that lacks a
    head for a layer which drops under `schedule`."""
    scorer, folder = getattr(decoder, CHILD, None), Path(getattr(decoder.config, "_name_or_path", "") or ".")
    if scorer is None and not (folder.parts and (folder / FILE).is_file()):
        raise ValueError(
            'score="evidence" is learned, and this model has none: train it with finetune.fine_tune and '
            'Recipe.named("zsaa+"), or load a model that was saved with one by finetune.load (a plain save_pretrained '
            f"leaves out {FILE}; finetune.save does not)."
        )
    scorer = read(decoder.config, folder) if scorer is None else scorer
    lacking = sorted(set(dropping_layers(decoder.config.num_hidden_layers, schedule)) - set(scorer.layers))
    if lacking:
        raise ValueError(
            f'schedule "{schedule}" may drop tokens in layers {lacking} (0: the first), for which this model\'s scorer '
            f"has no head (it has {scorer.layers}). Use the schedule that it was trained under, or train it anew."
        )
    return scorer
