"""LoRA adapters without dropout, trained as part of the weights."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Merged:
    """LoRA adapters without dropout, computed as part of the weights: each linear layer multiplies by W + s B A once,
    where peft multiplies three times. `merge` before a step's passes, `split` behind them (the gradients of B and A
    from those of W + s B A), `release` at the end."""

    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        for layer in self.layers:
            dropped = any(isinstance(m, nn.Dropout) and m.p for m in layer.lora_dropout.values())
            if dropped or not isinstance(layer.base_layer, nn.Linear):
                raise ValueError(f"only adapters of nn.Linear without dropout can be merged; got {layer}.")
        shapes = [layer.base_layer.weight.shape for layer in self.layers]
        self.groups = [[m for m, s in zip(self.layers, shapes) if s == shape] for shape in dict.fromkeys(shapes)]
        self.weights: list[list[Tensor]] = []

    @staticmethod
    def _stacked(group) -> tuple[Tensor, Tensor, float]:
        a = torch.stack([m.lora_A["default"].weight for m in group])
        return a, torch.stack([m.lora_B["default"].weight for m in group]), group[0].scaling["default"]

    @torch.no_grad()
    def merge(self) -> None:
        self.weights = []
        for group in self.groups:
            a, b, scale = self._stacked(group)
            whole = torch.stack([m.base_layer.weight for m in group]).baddbmm_(b, a, alpha=scale)
            self.weights.append([w.detach().requires_grad_() for w in whole.unbind()])
            for layer, weight in zip(group, self.weights[-1]):
                layer.forward = partial(F.linear, weight=weight, bias=layer.base_layer.bias)

    @torch.no_grad()
    def split(self) -> None:
        for group, weights in zip(self.groups, self.weights):
            a, b, scale = self._stacked(group)
            pull = torch.stack([w.grad for w in weights])
            of_a, of_b = scale * b.mT @ pull, scale * pull @ a.mT
            for layer, da, db in zip(group, of_a, of_b):
                layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad = da, db

    def release(self) -> None:
        for layer in self.layers:
            del layer.forward
        self.weights = []
