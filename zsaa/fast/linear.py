"""Linear layers of a pruned pass: on a CPU oneDNN computes products of few rows faster than PyTorch's default does."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

LARGE, WORK = 1 << 18, 1 << 23  # numbers of a weight, multiplications of a call: below both its 13 us a call cost more


def quick(x: Tensor) -> bool:
    """Are linear layers of x to be computed by oneDNN? In float32 on x86 without gradient, where nothing watches."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        and not torch._C._len_torch_dispatch_stack()  # counters of operations know PyTorch's own only
        and torch.backends.mkldnn.enabled
        and _onednn() is not None
    )


@functools.cache
def _onednn():
    """PyTorch's call of oneDNN's product with a weight as it is, or None. Not public (Inductor's), so tried first."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    try:
        product = torch.ops.mkldnn._linear_pointwise
        with torch.inference_mode(), torch.device("cpu"):  # whatever is the default
            x, weight, bias = (torch.arange(1, n, dtype=torch.float32) for n in (9, 13, 4))
            x, weight = x.view(2, 4), weight.view(3, 4)
            agrees = torch.equal(product(x, weight, bias, "none", [], ""), x @ weight.t() + bias)
    except (AttributeError, RuntimeError):
        return None
    return product if agrees else None


def untouched(module: nn.Module) -> bool:
    """Does a call of `module` run its class's forward and nothing else, no hook and no replacement?"""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or "forward" in own
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
    )


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by oneDNN if that is `quick` and `layer` a plain nn.Linear: adapters and quantized layers are not."""
    if type(layer) is nn.Linear and quick(x) and untouched(layer):
        weight = layer._parameters["weight"]
        large = weight.numel() >= LARGE or x.numel() * weight.shape[0] >= WORK
        if type(weight) is nn.Parameter and weight.dtype == x.dtype and large:
            return _onednn()(x, weight, layer._parameters["bias"], "none", [], "")
    return layer(x)
