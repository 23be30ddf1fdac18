"""What follows from the configuration: operations, bytes held and bytes moved, by phase.

Rows that a layer sees are those of Eq. 2 (`Rule.stages`). A fine-tuning step counts as three forward passes: the
backward pass computes two products for each of the forward's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from zsaa.cost import attention_widths, kv_bytes, layer_weights, macs
from zsaa.rule import Rule

ID = 4  # bytes of a token's id, as it goes to and from a client


@dataclass(frozen=True)
class Shape:
    """A request: batch texts of n tokens, answered by `new` tokens each, under a dial's rule. outputs: what the head
    gives for a token, the vocabulary or the classes; language: is it asked for every token in training? itemsize: bytes
    of a weight. parts: devices of a pipeline, or copies of the model."""

    config: Any
    n: int
    batch: int
    new: int
    rule: Rule
    outputs: int
    language: bool
    itemsize: int
    parameters: int
    trained: int
    parts: int = 2

    def stages(self, alpha: float) -> list[int]:
        """Rows that enter each layer, and those that leave the last."""
        return self.rule.stages(self.n, alpha, self.config.num_hidden_layers)

    def head(self, tokens: int) -> int:
        """Multiply-accumulates of the head for so many tokens of each text."""
        return self.batch * tokens * self.config.hidden_size * self.outputs

    def prefill_macs(self, alpha: float) -> int:
        rule = {"tau": self.rule.tau, "score": self.rule.score, "schedule": self.rule.schedule}
        return self.batch * macs(self.config, self.n, alpha, **rule) + self.head(1)

    def token_macs(self, alpha: float) -> int:
        """Of one new token of each text, in the middle of the answer."""
        entering, kept = layer_weights(self.config)
        linear = (entering + kept) * self.config.num_hidden_layers
        return self.batch * (linear + 2 * attention_widths(self.config)[0] * self.seen(alpha)) + self.head(1)

    def seen(self, alpha: float) -> int:
        """Cached rows of all layers that the middle token of the answer looks at: stock layers with a sliding window
        cache no more than that."""
        cached = self.kv_bytes(alpha) // (2 * self.batch * self.itemsize * attention_widths(self.config)[1])
        return cached + self.config.num_hidden_layers * ((self.new + 1) // 2)

    def training_macs(self, alpha: float) -> int:
        forward = self.prefill_macs(alpha) - self.head(1) + self.head(self.n if self.language else 1)
        return 3 * forward

    def kv_bytes(self, alpha: float) -> int:
        rule = {"tau": self.rule.tau, "schedule": self.rule.schedule, "score": self.rule.score}
        return kv_bytes(self.config, self.n, alpha, batch=self.batch, itemsize=self.itemsize, **rule)

    def weight_bytes(self) -> int:
        """Of the matrices of all layers, in the model's own type."""
        return self.itemsize * sum(layer_weights(self.config)) * self.config.num_hidden_layers

    def prefill_moved(self, alpha: float) -> int:
        """Bytes from and to memory, at the least: each layer's matrices once, the rows that enter and leave it, keys
        and values; the head once."""
        hidden, kv_dim = self.config.hidden_size, attention_widths(self.config)[1]
        rows = sum((before + after) * hidden + 2 * before * kv_dim for before, after in pairwise(self.stages(alpha)))
        return self.weight_bytes() + self.itemsize * (self.batch * rows + hidden * self.outputs)

    def token_moved(self, alpha: float) -> int:
        """Of one new token: all matrices, the head, and the cache that it looks at, half of the answer included."""
        head, kv_dim = self.itemsize * self.config.hidden_size * self.outputs, attention_widths(self.config)[1]
        return self.weight_bytes() + head + 2 * self.itemsize * self.batch * self.seen(alpha) * kv_dim

    def handed_on(self, alpha: float) -> int:
        """Bytes between the devices of a pipeline with equally many layers each, in a prefill: the rows alive at each
        border. Between copies of the model (data parallel) a prefill moves none."""
        stages, layers = self.stages(alpha), self.config.num_hidden_layers
        borders = [stages[round(i * layers / self.parts)] for i in range(1, self.parts)]
        return self.itemsize * self.batch * self.config.hidden_size * sum(borders)

    def token_handed_on(self) -> int:
        return self.itemsize * self.batch * self.config.hidden_size * (self.parts - 1)

    def exchanged(self) -> int:
        """Bytes that each of the copies sends in a training step: an all-reduce of the gradients as a ring."""
        return round(2 * (self.parts - 1) / self.parts * self.itemsize * self.trained)

    def training_bytes(self) -> int:
        """Weights, gradients and AdamW's two moments in float32."""
        return self.itemsize * (self.parameters + self.trained) + 8 * self.trained
