"""The model on its device with adapters of low rank, saved small."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK, SCALE = 16, 2.0  # LoRA's rank, and alpha / rank


class Adapted(nn.Module):
    """A frozen linear layer and a trained product of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = RANK):
        super().__init__()
        self.base = base
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = F.linear(x, self.down).flatten(0, -2)
        out = torch.addmm(self.base(x).flatten(0, -2), rows, (self.up * SCALE).t())  # no pass over the output beside it
        return out.unflatten(0, x.shape[:-1])


def adapt(lm, first: int = 0, rank: int = RANK) -> list[nn.Parameter]:
    """Freeze the model and put adapters beside every linear layer of its blocks, from block `first` on."""
    lm.requires_grad_(False)
    trained = []
    for block in lm.model.layers[first:]:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Adapted(layer, rank))
                    trained += [getattr(part, name).down, getattr(part, name).up]
    return trained


def adapters(lm) -> dict[str, Tensor]:
    return {n: p.detach().half().cpu() for n, p in lm.named_parameters() if n.endswith((".down", ".up"))}


@torch.no_grad()
def merge(lm) -> None:
    """Fold the adapters into the weights they stand beside."""
    for part in (p for block in lm.model.layers for p in (block.self_attn, block.mlp)):
        for name, layer in list(part.named_children()):
            if isinstance(layer, Adapted):
                change = (layer.up.float() @ layer.down.float()) * SCALE
                weight = layer.base.weight
                weight.copy_((weight.float() + change.to(weight.device)).to(weight.dtype))
                setattr(part, name, layer.base)


def load(folder: str | Path, device):
    """A model from a folder with config.json and weights.pt; "tiny": a random one, for rehearsals."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if str(folder) == "tiny":
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=26, num_attention_heads=2)
        config = LlamaConfig(vocab_size=49152, num_key_value_heads=1, tie_word_embeddings=True, **sizes)
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(device).eval()
    config = json.loads(Path(folder, "config.json").read_text())
    with torch.device(device):
        lm = LlamaForCausalLM(LlamaConfig(**config))
    found = lm.load_state_dict(torch.load(Path(folder, "weights.pt"), map_location=device), strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"The weights in {folder} are of another model: {found}.")
    lm.tie_weights()
    return lm.to(torch.bfloat16 if str(device) == "cuda" else torch.float32).eval()


def convert(gguf: str | Path, folder: str | Path) -> None:
    """Write what `load` reads, from a GGUF file, by transformers' own reader."""
    from transformers import AutoModelForCausalLM

    gguf, folder = Path(gguf), Path(folder)
    lm = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
             "max_position_embeddings")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(lm.state_dict(), folder / "weights.pt")
    (folder / "config.json").write_text(json.dumps({n: getattr(lm.config, n) for n in names}))
