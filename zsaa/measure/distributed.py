"""Several processes, one result. Under torchrun or `accelerate launch` each process drives one GPU (or a share of the
CPU); these few functions say who does what. With one process they do nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist


def start() -> None:
    """Join the other processes, if a launcher started several, and take this one's GPU. Harmless when done before.

    Raises RuntimeError if more processes than GPUs were started on this host.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or (dist.is_available() and dist.is_initialized()):
        return
    gpus, processes = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < gpus < processes:
        raise RuntimeError(
            f"{processes} processes were started on this host, but it has {gpus} GPU(s): each needs one of its own. "
            f"Launch with --nproc-per-node {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to use the CPU."
        )
    from accelerate import PartialState

    PartialState(cpu=not gpus)  # also chooses the backends (NCCL, gloo, or both) that the run needs


def place() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Any) -> list:
    """`value` of every process, in their order, on every process. Small objects only: they are pickled."""
    _, processes = place()
    if processes == 1:
        return [value]
    values = [None] * processes
    dist.all_gather_object(values, value)
    return values


def on_first(action: Callable[[], Any]) -> None:
    """When all processes have come here, the first one alone runs `action`, and the others wait for it.

    If it raises, so do all: nobody waits for a process that has failed, or goes on without what it should have done.
    """
    number, processes = place()
    gather(None)  # all have come
    failure = None
    if number == 0:
        try:
            action()
        except Exception as error:
            failure = error
    told = gather(None if failure is None else f"{type(failure).__name__}: {failure}")[0]
    if failure is not None:
        raise failure
    if told:
        raise RuntimeError(f"process 0 of {processes} failed, so this one stops too: {told}")
