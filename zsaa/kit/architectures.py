"""Table 4: what the models' published configurations say, read off models that are built from them without weights.

    python -m zsaa.kit.architectures        writes outputs/audit/architectures.json

PUBLISHED holds the values of each checkpoint's config.json on the Hugging Face hub (those that shape the model).
Everything else is measured: the model is built from them on PyTorch's meta device, which takes no memory, and its
parameters, layers, heads, norms and matrices are counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from zsaa.families import find_decoder
from zsaa.measure import provenance, write_json

# Name -> (checkpoint on the hub, the row of the paper's Table 4 that it bears on, its configuration).
PUBLISHED = {
    "gpt2-124m": ("openai-community/gpt2", "GPT-2", dict(
        model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12,
        activation_function="gelu_new")),
    "gpt2-355m": ("openai-community/gpt2-medium", "GPT-2", dict(
        model_type="gpt2", vocab_size=50257, n_positions=1024, n_embd=1024, n_layer=24, n_head=16,
        activation_function="gelu_new")),
    "gemma2-2b": ("google/gemma-2-2b", "Gemma 2", dict(
        model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096,
        max_position_embeddings=8192, hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, tie_word_embeddings=True)),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", "Mistral", dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=4096, max_position_embeddings=32768,
        hidden_act="silu", tie_word_embeddings=False)),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", "LLaMA 3", dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, max_position_embeddings=8192,
        hidden_act="silu", tie_word_embeddings=False)),
}  # fmt: skip
_GATED = {"gelu": "GeGLU", "silu": "SwiGLU"}  # Shazeer's names for a gated MLP with that activation
_PLAIN = {"gelu": "GeLU", "silu": "SiLU"}


def config(name: str, **changes):
    """transformers' configuration of a model of PUBLISHED, with `changes`."""
    from transformers import AutoConfig

    if name not in PUBLISHED:
        raise ValueError(f"unknown model {name!r}; these are known: {', '.join(PUBLISHED)}")
    settings = {**PUBLISHED[name][2], **changes}
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def facts(name: str) -> dict:
    """One model's facts under the columns of the paper's Table 4 ("parameters" for "size")."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(name))
    decoder, family = find_decoder(model)
    layers = getattr(decoder, family.layers)
    layer, hidden = layers[0], decoder.get_input_embeddings().embedding_dim
    attention, mlp = getattr(layer, family.attention), getattr(layer, family.mlp)
    with torch.device("meta"):
        q, k, _ = family.qkv(attention, torch.empty(1, 1, hidden))
    heads, kv_heads = q.shape[1], k.shape[1]
    activation = next(a for a in _PLAIN if a in _activation(model.config))
    matrices = sum(parameter.dim() == 2 for parameter in mlp.parameters())
    norms = [n for n, _ in layer.named_children() if "norm" in n or n.startswith("ln_")]
    return {
        "type": "Decoder" if attention.is_causal and not model.config.is_encoder_decoder else "other",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": len(layers),
        "heads": heads,
        "hidden size": hidden,
        "activation": (_GATED if matrices == 3 else _PLAIN)[activation],
        "residual": {2: "Pre-Norm", 4: "Pre- and Post-Norm"}[len(norms)],
        "attention": "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA",
        "key/value heads": kv_heads,
        "norms of a layer": norms,
    }


def _activation(config) -> str:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next(value for name in names if (value := getattr(config, name, None)))


def run(output_dir: str | Path) -> dict:
    """Write output_dir/architectures.json: the facts of every model of PUBLISHED; returns its content."""
    started = time.perf_counter()
    rows = [
        {"model": name, "checkpoint": checkpoint, "row": row, "config": settings, **facts(name)}
        for name, (checkpoint, row, settings) in PUBLISHED.items()
    ]
    result = {
        "name": "architectures",
        "kind": "architectures",
        "command": "python -m zsaa.kit.architectures",
        "model": {"name": ", ".join(PUBLISHED)},
        "provenance": provenance(torch.device("cpu"), seed=0, seconds=round(time.perf_counter() - started, 1)),
        "rows": rows,
    }
    write_json(Path(output_dir) / "architectures.json", result)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m zsaa.kit.architectures", description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", default="outputs/audit", help="results/audit: anew what is committed")
    for row in run(parser.parse_args(arguments).output_dir)["rows"]:
        print({k: row[k] for k in row if k != "config"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
