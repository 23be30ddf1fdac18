"""Choosing and moving rows, by kernels/rows.py where that runs; zsaa.passes does the same by plain PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from zsaa.fast import dispatch


def choose(
    scores: Tensor, before: Tensor, after: Tensor, width: int, rows: Tensor, like: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `kernels.rows.choose`, for states such as `like`; None where PyTorch is to do it."""
    kernels = dispatch.row_kernels(like)
    if kernels is None or scores.dtype != torch.float32 or scores.shape[1] > kernels.CHOOSE_LIMIT:
        return None
    return kernels.choose(scores, before, after, width, rows)


def places(kept: Tensor, rows: int, like: Tensor) -> Tensor | None:
    """Where each of `rows` rows stands among `kept` [batch, width], int32, -1 for those that are dropped: what the
    kernel that moves them asks where PyTorch chose, as of more rows than one program holds. None without the kernel."""
    if dispatch.row_kernels(like) is None:
        return None
    index = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device).expand_as(kept)
    return index.new_full((kept.shape[0], rows), -1).scatter_(1, kept, index)


class Left:
    """The states in which dropped tokens leave, until all tokens are put together again.

    stages: the states that entered a layer which dropped some; or, where a kernel moves rows, written at once: final,
    [batch, width, hidden_size], the states at their places in the input.
    """

    def __init__(self, width: int):
        self.width = width
        self.stages: dict[int, Tensor] = {}
        self.final: Tensor | None = None

    def at_once(self, layer: int, hidden: Tensor) -> bool:
        """Can a kernel write what leaves `layer`? If not, its states are kept, whatever moves the rows."""
        if self.stages or recomputed():
            return False
        if self.final is None:
            self.final = hidden.new_zeros(hidden.shape[0], self.width, hidden.shape[2])
        # Under an autocast to another half precision than the embeddings', states become float32 in the first layer.
        return self.final.dtype == hidden.dtype


def moved(step: Any, device: Any) -> Any:
    """A pass whose next layer lies on `device`: `step`, with whatever it holds there. Plans are others' too: copied."""

    def there(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        if isinstance(x, (list, tuple)):
            return type(x)(there(each) for each in x)
        if isinstance(x, dict):
            return {key: there(each) for key, each in x.items()}
        if type(x).__name__ in ("Plan", "Given", "Left"):
            x = copy.copy(x)
            vars(x).update({name: there(value) for name, value in vars(x).items()})
        return x

    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    held = {name: value for name, value in vars(step).items() if name not in ("scorer", "before", "trace", "slots")}
    vars(step).update({name: there(value) for name, value in held.items()})
    return step


def recomputed() -> bool:
    """Does something decide what is saved for the backward pass here, as gradient checkpointing does? Then this layer
    may run again, and must write nothing of its own where others look."""
    if not torch.is_grad_enabled():
        return False
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None
