"""The parts of a decoder layer between its matrix products, by kernels that do them at once where that is safe.

Without gradient they are those of kernels/layer.py, and on a CPU PyTorch's in place; with gradient PyTorch's own
RMSNorm and GELU (on a GPU).

Only modules of known classes, without hooks, are replaced by what they compute; all others are called. Stock models
have no such kernels: a speed-up over them is not pruning's alone, and `dispatch.use_fused(False)` shows the difference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _module

from zsaa.fast import dispatch

RMS_NORMS = {"LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm"}  # weight * normed
GATED_MLPS = {"LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma2MLP", "Gemma3MLP"}  # down(act(gate) * up)
SILU = ("SiLUActivation", "SiLU")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _known(module: nn.Module, names: set[str]) -> bool:
    """Is this just one of transformers' modules of these names, with nothing hooked to it?"""
    kind = type(module)
    if kind.__name__ not in names or not kind.__module__.startswith("transformers."):
        return False
    return _unhooked(module)


def _unhooked(module: nn.Module) -> bool:
    """Does a call of `module` run its class's forward and nothing else, no hook and no replacement?"""
    own = module.__dict__
    everywhere = _module._global_forward_hooks or _module._global_forward_pre_hooks
    return not (everywhere or "forward" in own or any(own[kind] for kind in HOOKS))


def _norm_parts(norm: nn.Module) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and epsilon of a plain RMSNorm or LayerNorm, else None."""
    if type(norm) is nn.LayerNorm:
        return (norm.weight, norm.bias, norm.eps) if _unhooked(norm) and norm.bias is not None else None
    return (norm.weight, None, norm.variance_epsilon) if _known(norm, RMS_NORMS) else None


def add_norm(hidden: Tensor, output: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """hidden + output (or hidden itself, for None), and `norm` of it."""
    kernels = dispatch.layer_kernels(hidden)
    parts = _norm_parts(norm) if kernels is not None else None
    states = (hidden,) if output is None else (hidden, output)
    alike = parts is not None and all(x.dtype == parts[0].dtype and x.stride(-1) == 1 for x in states)
    if alike and hidden.shape[-1] <= kernels.NORM_LIMIT:
        return kernels.add_norm(hidden, output, *parts)
    hidden = hidden if output is None else hidden + output
    if dispatch.in_place(hidden) and _known(norm, RMS_NORMS) and norm.weight.dtype == hidden.dtype:
        size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = size.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
        return hidden, (hidden * scale).mul_(norm.weight)
    if dispatch.fuses_training(hidden) and _known(norm, RMS_NORMS) and norm.weight.dtype == hidden.dtype:
        return hidden, _once(F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon))
    return hidden, norm(hidden)


def _once(normed: Tensor) -> Tensor:
    """In the type to which autocast would bring it for each of the products that read it, one by one; their gradients
    are added up in it, too."""
    return normed.to(torch.get_autocast_dtype("cuda")) if torch.is_autocast_enabled("cuda") else normed


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    """module(x)."""
    kernels, in_place = dispatch.layer_kernels(x), dispatch.in_place(x)
    if kernels is None and not in_place and not dispatch.fuses_training(x):
        return module(x)
    gated = (kernels is not None or in_place) and _known(module, GATED_MLPS)
    if gated and type(module.act_fn).__name__ in SILU and _unhooked(module.act_fn):
        gate, up = module.gate_proj(x), module.up_proj(x)
        if in_place:
            return module.down_proj(F.silu(gate, inplace=_unhooked(module.gate_proj)).mul_(up))
        if gate.is_contiguous() and up.is_contiguous() and gate.dtype == up.dtype:
            # The widest rows of a pass: not three times at once, where nobody else looks at the first.
            gate = kernels.silu_mul(gate, up, inplace=_unhooked(module.gate_proj))
            del up
            return module.down_proj(gate)
        return module.down_proj(module.act_fn(gate) * up)
    if _known(module, {"GPT2MLP"}) and _known(module.act, {"NewGELUActivation"}):
        return module.dropout(module.c_proj(F.gelu(module.c_fc(x), approximate="tanh")))
    return module(x)
