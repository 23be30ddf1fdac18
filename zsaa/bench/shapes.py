"""Models of known shapes with random weights, and the shapes of attention that are timed."""

from __future__ import annotations

import torch
from torch import nn

from zsaa import dial
from zsaa.families import find_decoder
from zsaa.kit.architectures import PUBLISHED
from zsaa.models import never_repack

MODELS = {
    "tiny": dict(model_type="llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=128, vocab_size=256),
    "smollm2-135m": dict(model_type="llama", hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
                         num_key_value_heads=3, intermediate_size=1536, vocab_size=49152, rope_theta=100000.0),
    "tinyllama-1.1b": dict(model_type="llama", hidden_size=2048, num_hidden_layers=22, num_attention_heads=32,
                           num_key_value_heads=4, intermediate_size=5632, vocab_size=32000),
    "llama3-70b": dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                       num_key_value_heads=8, intermediate_size=28672, vocab_size=128256, rope_theta=500000.0,
                       tie_word_embeddings=False),
    **{name: settings for name, (_, _, settings) in PUBLISHED.items()},
}  # fmt: skip


HEADS = {"causal-lm": "AutoModelForCausalLM", "sequence-classification": "AutoModelForSequenceClassification"}

# (head size, heads, key/value heads): LLaMA 3 8B, one with heads of 64, and small ones for the CPU
ATTENTION_SHAPES = {"cuda": [(128, 32, 8), (128, 32, 32), (64, 32, 8)], "cpu": [(16, 4, 2)]}


def config_of(name: str, tokens: int):
    """transformers' configuration of a model of MODELS, for inputs of so many tokens."""
    import transformers

    settings = dict(MODELS[name])
    kind = settings.pop("model_type")
    settings["n_positions" if kind == "gpt2" else "max_position_embeddings"] = max(tokens, 1024)
    return transformers.AutoConfig.for_model(kind, **settings)


def build(
    name: str,
    tokens: int,
    device,
    dtype,
    storage: str | None = None,
    head: str = "causal-lm",
    attention: str | None = None,
) -> nn.Module:
    """A model of that shape with random weights, made on the device, in eval mode, with the dial on.

    head: one of HEADS; a classifier's pads are tokens 0.
    attention: of the stock model, "sdpa" or "eager"; None for sdpa where transformers has it.
    storage: "nf4" has the decoder's linear layers in 4 bits, made one by one: only one is ever there in `dtype`.
    """
    import transformers

    config = config_of(name, tokens)
    if head != "causal-lm":
        config.pad_token_id = 0
    # transformers has no SDPA that caps scores, as Gemma 2 does.
    attention = attention or ("eager" if config.model_type == "gemma2" else "sdpa")
    how = {"attn_implementation": attention, "dtype": dtype}
    torch.manual_seed(0)
    with torch.device("meta" if storage == "nf4" else device):
        model = getattr(transformers, HEADS[head]).from_config(config, **how)
    if storage == "nf4":
        _fill_nf4(model, torch.device(device), dtype)
    return dial.enable(model.eval())


def _fill_nf4(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device random weights on `device`, its decoder's linear layers in nf4, the rest in
    `dtype`: as `load_model(..., quantization="nf4")` leaves a model, norms at 1 but for the values."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ImportError("storage nf4 needs bitsandbytes. Get it with: pip install 'zsaa[quant]'") from error

    decoder, family = find_decoder(model)
    layers = getattr(decoder, family.layers)
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        raise ValueError(
            f"{type(decoder).__name__} has no nn.Linear to quantize: storage nf4 is for LLaMA-like models."
        )
    for parent in list(layers.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                with torch.device("meta"):
                    packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
                weight = torch.randn(linear.weight.shape, device=device, dtype=dtype).mul_(0.02)
                packed.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
                setattr(parent, name, packed)
    for module in model.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device=device, recurse=False)
            model._init_weights(module)  # norms, embeddings, rotary tables
    model.tie_weights()
    never_repack(model)
