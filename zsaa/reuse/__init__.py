"""Prompts that come again, off unless asked for: exact ones, and declared prefixes, are prefilled once. And pruned
caches in fewer bits."""

from zsaa.reuse import quantized
from zsaa.reuse.prompts import Prompts
from zsaa.reuse.store import Store

__all__ = ["Prompts", "Store", "quantized"]
