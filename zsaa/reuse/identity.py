"""What decides the result of a prefill beside tokens and dial: weights, adapters, and how numbers are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsaa.fast.dispatch import backends


def weights(decoder: nn.Module) -> tuple:
    """Changes when a parameter is replaced, or written into by an operation that PyTorch counts: optimizers,
    `load_state_dict`, `copy_`. What is written through `.data` is not counted."""
    return tuple((id(p), p.data_ptr(), _version(p)) for p in decoder.parameters())


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def adapters(decoder: nn.Module) -> tuple:
    """Which of PEFT's adapters are active in each layer that has any, merged, switched off, and at which scale."""
    found = []
    for name, module in decoder.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            scaling = getattr(module, "scaling", {})
            at = tuple(sorted((str(k), float(v)) for k, v in scaling.items() if isinstance(v, (int, float))))
            state = tuple(module.active_adapters), tuple(module.merged_adapters), bool(module.disable_adapters)
            found.append((name, *state, at))
    return tuple(found)


def arithmetic(decoder: nn.Module) -> tuple:
    """How numbers are computed: bits differ between these."""
    first = next(decoder.parameters())
    device = first.device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    attention = getattr(decoder.config, "_attn_implementation", None)
    kernels = (
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return str(first.dtype), str(first.device), str(cast), attention, backends(first.device)["used"], *kernels
