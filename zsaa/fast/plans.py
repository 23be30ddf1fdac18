"""Plans kept for the next pass of the same shapes."""

from __future__ import annotations

import functools

import torch

from zsaa.passes import Plan, Request


@functools.lru_cache(maxsize=64)
def _plan(request: Request, stream: int | None) -> Plan:
    with torch.inference_mode(False):  # or a later pass could not save these tensors for its backward pass
        return Plan(request)


def plan(request: Request) -> Plan:
    """The plan of a request, kept for the next pass of the same shapes on the same stream."""
    if torch._C._len_torch_dispatch_stack():  # its tensors may be fake, as under torch.export: not for later passes
        return Plan(request)
    cuda = request.device.type == "cuda"
    return _plan(request, torch.cuda.current_stream(request.device).cuda_stream if cuda else None)
