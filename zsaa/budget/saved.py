"""Saved calibrations: found again only where nothing that bears on the time of a prefill has changed."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from zsaa.depth.stop import check_depth
from zsaa.dials.settings import current_settings
from zsaa.families import find_decoder
from zsaa.fast.dispatch import backends, matmul_precision
from zsaa.measure import hardware, hash_of
from zsaa.measure.origin import version
from zsaa.rule import RULE, Rule

FORMAT = 1  # of a saved calibration; raise it when its content or what is timed changes


def rule_of(chosen: dict, **given) -> dict:
    """The rule (see `zsaa.dial.rule`) in a dial's settings; what is `given`, and not None, overrides."""
    return asdict(Rule(**{name: chosen[name] if given.get(name) is None else given[name] for name in RULE}))


def key_of(model: nn.Module, n: int, batch: int, depth: int | None = None, **given) -> dict:
    """All that bears on the time of a prefill, as JSON: two calls with the same key take the same time."""
    for name, value in (("n", n), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
    decoder, family = find_decoder(model)
    device, chosen = next(decoder.parameters()).device, current_settings(decoder)
    layers_run = chosen["depth"] if depth is None else check_depth(depth, decoder.config.num_hidden_layers)
    config = {k: v for k, v in decoder.config.to_dict().items() if k not in ("_name_or_path", "zsaa")}
    layers = set(getattr(decoder, family.layers))  # their class says whether the dial is on
    modules = Counter(type(module).__name__ for module in model.modules() if module not in layers)
    sizes: Counter = Counter()
    for parameter in model.parameters():
        sizes[str(parameter.dtype)] += parameter.numel()
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return {
        "format": FORMAT,
        "n": int(n),
        "batch": int(batch),
        **rule_of(chosen, **given),
        "depth": layers_run or decoder.config.num_hidden_layers,
        "model": type(model).__name__,
        "config": hash_of([config, decoder.config._attn_implementation]),
        "modules": hash_of(modules),
        "parameters": dict(sizes),
        "dtype": str(decoder.dtype),
        "autocast": str(autocast),
        "matmul": matmul_precision(),
        "backend": backends(device)["used"],
        "graphs": decoder._zsaa.graphs.mode if hasattr(decoder, "_zsaa") else "auto",
        "compiled": any(module._compiled_call_impl is not None for module in model.modules()),
        "device": str(device),
        "hardware": hardware(device),
        "versions": {package: version(package) for package in ("torch", "transformers")} | {"zsaa": _version()},
        "code": _code(),
    }


def path_of(key: dict) -> Path:
    """Where a calibration of this key is saved, whether it is there or not."""
    from zsaa.models import cache_dir

    return cache_dir() / "latency" / f"{hash_of(key)[:32]}.json"


def read(path: Path, key: dict) -> dict | None:
    """What is saved at `path`, if it is whole and was measured under this very key."""
    try:
        record = json.loads(path.read_text())
        whole = record.pop("sha256") == hash_of(record)
        return record if whole and record["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


@functools.cache
def _code() -> str:
    """A digest of zsaa's source: in a checkout, the version does not tell what is timed."""
    specs = filter(None, map(find_spec, ("zsaa", "zsaa.kernels")))  # kernels lie elsewhere in a checkout
    folders = [folder for spec in specs for folder in spec.submodule_search_locations]
    files = (file for folder in folders for file in sorted(Path(folder).rglob("*.py")))
    return hash_of([file.read_text(encoding="utf-8") for file in files])


def _version() -> str:
    from zsaa import __version__

    return __version__
