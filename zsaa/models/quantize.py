"""Weights of 4 and 8 bits, by bitsandbytes."""

import importlib.metadata
import json
import logging
import re
from pathlib import Path

import torch

from zsaa.models.errors import AssetError
from zsaa.models.pretrained import HEADS

QUANTIZATIONS = ("nf4", "int8")
BITSANDBYTES = "0.48.2"  # the oldest that does, as in pyproject.toml: 0.48.0 reads saved int8 models wrongly


def quantized(quantization, dtype, device, kwargs):
    """(dtype, from_pretrained's arguments) to load a model quantized; an error that says why it cannot be."""
    from transformers import BitsAndBytesConfig

    if quantization not in QUANTIZATIONS:
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise ValueError(f"quantization is {quantization!r}; it must be one of {known}, or None")
    for other in ("quantization_config", "gguf_file"):
        if kwargs.get(other) is not None:
            raise ValueError(f"quantization={quantization!r} and {other}= cannot both say how weights are stored")
    need = f"quantization={quantization!r} needs bitsandbytes {BITSANDBYTES} or newer"
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(f"{need}, which is not installed. Get it with: pip install 'zsaa[quant]'") from None
    if [int(n) for n in re.findall(r"\d+", found)[:3]] < [int(n) for n in BITSANDBYTES.split(".")]:
        raise AssetError(f"{need}; {found} is installed. Get it with: pip install -U 'zsaa[quant]'")

    on_gpu = torch.cuda.is_available() and ("device_map" in kwargs or torch.device(device).type == "cuda")
    fast = torch.float32
    if on_gpu:
        fast = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype is None:
        dtype = torch.bfloat16 if fast == torch.bfloat16 else torch.float32
    if quantization == "nf4":
        compute = dtype if dtype in (torch.float16, torch.bfloat16) else fast
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
    else:
        how = {"load_in_8bit": True}
        say_no_casts()
    config = BitsAndBytesConfig(**how, llm_int8_skip_modules=["lm_head", *HEADS])
    return dtype, {"device_map": {"": device}, **kwargs, "quantization_config": config}


def say_no_casts():
    """int8 layers compute in float16 whatever they are given, and would say so at every call."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_tells_news)


def _tells_news(record):
    return "will be cast" not in record.getMessage()


def stores_bits(folder):
    """Are the weights of a checkpoint's folder those of bitsandbytes?"""
    file = Path(folder).expanduser() / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def stored_as(model):
    """What bitsandbytes stores the model's linear layers as: one of QUANTIZATIONS, another name, or None."""
    if getattr(model, "quantization_method", None) != "bitsandbytes":
        return None
    config = model.config.quantization_config
    return "int8" if config.load_in_8bit else config.bnb_4bit_quant_type


def never_repack(model):
    """Keep bitsandbytes from repacking 4-bit weights at their first evaluation on a CPU with bfloat16 units: repacked
    ones pass no gradient, without a word, and are wrong once a state dict was made of them (0.50.2). This costs the
    fast kernel for single tokens there. True if it is too late for some of them."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)
