"""A decoder layer that prunes: its own forward once more, with the rows that go on chosen between attention and MLP.

One forward for all families; zsaa.families says where each keeps its parts.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from zsaa.attention import Rows, attend, attend_and_score, rotate
from zsaa.families import Family, Part, window_of
from zsaa.fast.attention import padded_rows
from zsaa.fast.fused import add_norm, mlp
from zsaa.passes import Decode, Prefill
from zsaa.subclass import subclass

MARK = "_zsaa_layer"  # an attribute of the classes that are made here


@functools.cache
def pruned_class(layer_class: Any, family: Family) -> type[nn.Module]:
    """A subclass of a decoder layer that prunes; it inherits gradient checkpointing."""

    def forward(self, hidden_states, *args, zsaa=None, **kwargs):
        step: Any = zsaa  # None, a Prefill, a Decode, or a Stop: how far the stock code goes
        attention = getattr(self, family.attention)
        if step is not None and attention.layer_idx >= step.depth:
            return hidden_states
        if step is None or step.stock:
            return super(pruned, self).forward(hidden_states, *args, **kwargs)
        # GPT-2 passes the cache by position, the others by name.
        cache = kwargs.get("past_key_values", args[0] if args else None)
        prefill = isinstance(step, Prefill)
        if prefill and attention.layer_idx == 0:
            hidden_states = step.begin(hidden_states)
        hidden_states, normed = add_norm(hidden_states, None, getattr(self, family.attention_norm))
        inputs = family.qkv(attention, normed), kwargs.get("position_embeddings"), cache
        settings = {
            "scale": attention.scaling,
            "softcap": attention.attn_logit_softcapping if family.softcap else None,
            "dropout": family.dropout(attention) if self.training else 0.0,
        }
        hidden_states, output = (_prefill if prefill else _decode)(step, attention, hidden_states, *inputs, settings)
        output = family.output(attention, output)
        if family.after_attention_norm:
            output = getattr(self, family.after_attention_norm)(output)
        hidden_states, normed = add_norm(hidden_states, output, getattr(self, family.mlp_norm))
        output = mlp(getattr(self, family.mlp), normed)
        if family.after_mlp_norm:
            output = getattr(self, family.after_mlp_norm)(output)
        hidden_states = hidden_states + output
        last = prefill and attention.layer_idx == step.depth - 1
        return step.end(hidden_states) if last else hidden_states

    members = {"forward": forward, MARK: True}
    pruned: Any = subclass(layer_class, pruned_class, (layer_class, family), members)
    return pruned


def _prefill(
    step: Prefill, attention: Part, hidden: Tensor, qkv: tuple[Tensor, ...], tables, cache, settings: dict
) -> tuple[Tensor, Tensor]:
    """Attention over the rows that enter a layer, and the choice of those that go on: their hidden states, and the
    heads' output for them [batch, rows, heads x head_dim]. The layer's keys and values go into `cache`, if there is
    one."""
    layer, (q, k, v), window = attention.layer_idx, qkv, window_of(attention)
    real, n = step.real[layer], q.shape[2]
    window = window if window is not None and max(step.request.lengths) > window else None
    if tables is not None:
        padded = n if window or settings["softcap"] else padded_rows(q, k)
        q, k, v = step.rotate(layer, q, k, v, tables, padded)
    if cache is not None:
        columns = step.columns(layer)
        cache.layers[layer].extend(k[:, :, :n], v[:, :, :n], columns, real is None, step.request.width)
    positions = step.positions(layer) if window is not None else None
    rows, score = Rows(n, real, positions, window), step.plan.drops[layer] and step.scorer is None
    output, sums = attend_and_score(q, k, v, rows=rows, score=score, **settings)
    step.choose(layer, sums if step.scorer is None else step.learned(layer, hidden), hidden)
    return step.move(layer, hidden, output.transpose(1, 2).flatten(2))


def _decode(
    step: Decode, attention: Part, hidden: Tensor, qkv: tuple[Tensor, ...], tables, cache, settings: dict
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over a pruned cache, which they join; all of them go on."""
    (q, k, v), window = qkv, window_of(attention)
    if step.slots is not None:
        return hidden, step.slots.attend(attention.layer_idx, q, k, v, tables, window=window, **settings)
    if tables is not None:
        q, k = rotate(q, k, *tables)
    cached = cache.layers[attention.layer_idx]
    k, v = cached.extend(k, v, step.columns, True, step.width)
    mask = step.mask(cached, window)
    return hidden, attend(q, k, v, mask, **settings).transpose(1, 2).flatten(2)
