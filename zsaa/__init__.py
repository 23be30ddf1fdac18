"""zsaa: one dial, alpha, between a language model's speed and its accuracy, turned at inference without retraining."""

from zsaa.dial import at, disable, enable, set_alpha, trace
from zsaa.families import SUPPORTED, UnsupportedModelError
from zsaa.keep import alpha_for, kept_counts, mac_reduction, macs, truncation_for

__version__ = "0.1.0"
__all__ = [
    "SUPPORTED",
    "UnsupportedModelError",
    "alpha_for",
    "at",
    "disable",
    "enable",
    "kept_counts",
    "mac_reduction",
    "macs",
    "set_alpha",
    "trace",
    "truncation_for",
]
