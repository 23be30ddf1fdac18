"""zsaa: one dial, alpha, between a language model's speed and its accuracy, turned at inference without retraining."""

import sys

from zsaa.compat import check_transformers

try:
    from zsaa import slider
    from zsaa.budget import alpha_for, calibrate, report, split_for, truncation_for
    from zsaa.card import card
    from zsaa.cost import mac_reduction, macs
    from zsaa.dial import at, captured, disable, enable, set_alpha, set_depth, settings, trace
    from zsaa.families import SUPPORTED, UnsupportedModelError
    from zsaa.fast.dispatch import backends, use_backend
    from zsaa.heads import generation
    from zsaa.learned import asked, salience
    from zsaa.reuse import Prompts
    from zsaa.rule import kept_counts
except ImportError:  # where transformers is so old that it lacks what the dial is built on, say that
    check_transformers()
    raise

# Models that were pickled whole look for their classes where these once lay.
sys.modules.update({"zsaa.asked": asked, "zsaa.salience": salience, "zsaa.generation": generation})

__version__ = "0.1.0"
__all__ = [
    "SUPPORTED",
    "Prompts",
    "UnsupportedModelError",
    "alpha_for",
    "at",
    "backends",
    "calibrate",
    "captured",
    "card",
    "disable",
    "enable",
    "kept_counts",
    "mac_reduction",
    "macs",
    "report",
    "set_alpha",
    "set_depth",
    "settings",
    "slider",
    "split_for",
    "trace",
    "truncation_for",
    "use_backend",
]
