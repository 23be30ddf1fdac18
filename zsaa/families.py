"""Where each supported model family keeps the parts of a decoder layer.

A decoder layer is always: norm, attention, residual, norm, MLP, residual. Families differ only in the names of these
parts, in fused or separate Q/K/V, and in whether a norm also follows attention and MLP (Gemma). To add a family, add
its `config.model_type` to FAMILIES (with a new `Family` if its names differ); the exactness tests then cover it as
soon as tests/tiny.py can build it. Names are not all: a sliding window that stands in the configuration (`window_of`),
dropout on the residual, a fused gate (`mlp_matrices`, zsaa/fast/fused.py), and rotary embeddings of a part of each head
(zsaa/attention.py turns whole heads) need code of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

Part = Any  # a module of transformers: its family says which parts it has in turn


def _separate_qkv(attention: Part, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q_proj, k_proj, v_proj, and the per-head norms of Qwen 3 and Gemma 3: [batch, heads, rows, head_dim] each."""
    q, k, v = (
        projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return q, k, v


def _fused_qkv(attention: Part, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GPT-2's single c_attn: three tensors [batch, heads, rows, head_dim]."""
    heads = (part.unflatten(-1, (-1, attention.head_dim)) for part in attention.c_attn(hidden).chunk(3, dim=-1))
    q, k, v = (part.transpose(1, 2) for part in heads)
    return q, k, v


def _output(attention: Part, x: Tensor) -> Tensor:
    return attention.o_proj(x)


def _gpt2_output(attention: Part, x: Tensor) -> Tensor:
    return attention.resid_dropout(attention.c_proj(x))


def _dropout(attention: Part) -> float:
    return attention.attention_dropout


def _gpt2_dropout(attention: Part) -> float:
    return attention.attn_dropout.p


def window_of(attention: Part) -> int | None:
    """A layer's sliding window in tokens; Mistral keeps it in the configuration, for all layers."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None


@dataclass(frozen=True)
class Family:
    """Names of the parts of one decoder layer; `None` where a family has no such norm. Its functions have names, so
    that a model with the dial on can be pickled."""

    layers: str
    attention: str
    attention_norm: str
    after_attention_norm: str | None
    mlp_norm: str
    mlp: str
    after_mlp_norm: str | None
    qkv: Callable[[Part, Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Part, Tensor], Tensor]
    dropout: Callable[[Part], float]
    mlp_matrices: int  # weight matrices in the MLP: 3 when gated (SwiGLU), 2 otherwise
    softcap: bool = False  # does its attention cap its logits, if the configuration says so?
    all_layers: bool = False  # does the decoder run all that it has, whatever config.num_hidden_layers says?

    def num_layers(self, decoder: Part) -> int:
        """How many layers a pass of `decoder` runs now: an early exit, or a user, may have told it to run fewer."""
        there = len(getattr(decoder, self.layers))
        return there if self.all_layers else min(there, decoder.config.num_hidden_layers)


LLAMA = Family(layers="layers", attention="self_attn", attention_norm="input_layernorm", after_attention_norm=None,
               mlp_norm="post_attention_layernorm", mlp="mlp", after_mlp_norm=None, qkv=_separate_qkv, output=_output,
               dropout=_dropout, mlp_matrices=3)  # fmt: skip
GEMMA = replace(LLAMA, after_attention_norm="post_attention_layernorm", mlp_norm="pre_feedforward_layernorm",
                after_mlp_norm="post_feedforward_layernorm")  # fmt: skip
GPT2 = replace(LLAMA, layers="h", attention="attn", attention_norm="ln_1", mlp_norm="ln_2", qkv=_fused_qkv,
               output=_gpt2_output, dropout=_gpt2_dropout, mlp_matrices=2, all_layers=True)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": replace(GEMMA, softcap=True),  # Gemma 3 has the setting, and its attention ignores it
    "gemma3_text": GEMMA,
}
SUPPORTED = tuple(FAMILIES)


class UnsupportedModelError(TypeError):
    """The model holds no decoder that the dial knows how to prune."""


def only_last_logits(model: Part) -> dict[str, int]:
    """The keyword arguments by which a language model gives the logits of the last token only; none for others."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT passes all arguments on
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def _decoders(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Part, Family]]:
    """Name, decoder and family of each supported decoder in `module`, itself included; none inside another."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    family = FAMILIES.get(getattr(getattr(module, "config", None), "model_type", ""))
    # Its own layers: wrappers such as PeftModel hand on the attributes of what they wrap.
    if family and isinstance(module._modules.get(family.layers), nn.ModuleList):
        yield name, module, family
        return
    for child, inner in module.named_children():
        yield from _decoders(inner, f"{name}.{child}" if name else child, seen)


def find_decoder(model: nn.Module) -> tuple[Part, Family]:
    """The base decoder (`LlamaModel`, `GPT2Model`, ...) inside `model`, however deep PEFT or a task head wraps it.

    Raises UnsupportedModelError if there is none (it lists the supported families) or more than one.
    """
    if not isinstance(model, nn.Module):
        held = ", or its .model" if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise UnsupportedModelError(
            f"a model is needed, and {model!r:.60} is a {type(model).__name__}. Give the loaded model itself (of "
            f"from_pretrained, or zsaa.models.load_model){held}."
        )
    found = list(_decoders(model))
    if len(found) > 1:
        names = ", ".join(name for name, *_ in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} decoders ({names}), and a dial turns one. Call zsaa.enable on "
            "each model by itself."
        )
    for _, module, family in found:
        if getattr(module.config, "add_cross_attention", False):
            raise UnsupportedModelError(
                f"{type(module).__name__} has cross-attention (add_cross_attention=True); zsaa prunes decoder-only "
                "models. Load it with add_cross_attention=False."
            )
        if getattr(module.config, "use_bidirectional_attention", False):
            raise UnsupportedModelError(
                f"{type(module).__name__} uses bidirectional attention; zsaa prunes causal decoders. "
                "Load it with use_bidirectional_attention=False."
            )
        return module, family
    kind = getattr(getattr(model, "config", None), "model_type", None)
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type={kind!r}) is not supported. Supported model types: "
        f"{', '.join(SUPPORTED)}. To add one, see zsaa/families.py."
    )
