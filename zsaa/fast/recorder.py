"""What the recorders of prefills, of decoding steps and of training passes have in common: when a call is recorded, how
its recording is found again, and what follows where it cannot be recorded."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from zsaa.fast.state import State, state_of

MANY = 4096  # kinds of calls whose number is remembered, of which few come again


class Pool(list):
    """The memory of recordings that take turns, and the stream on which they are made; empty before the first.

    PyTorch keeps cuBLAS a workspace for each stream for ever (32 MiB on Hopper), so the stream of a pool that is gone
    serves the next one.
    """

    idle: ClassVar[dict[torch.device, list]] = {}

    def open(self, device: torch.device) -> None:
        if not self:
            idle = Pool.idle.setdefault(device, [])
            stream = idle.pop() if idle else torch.cuda.Stream(device)
            self += [torch.cuda.graph_pool_handle(), stream]
            weakref.finalize(self, idle.append, stream).atexit = False


class Recorder:
    """Recordings of one decoder, by all that decides which kernels a call runs (its key)."""

    what: str  # is recorded, for whoever reads a warning
    instead = "zsaa.enable(model, graphs=False)"  # says from the start that nothing is
    limit: int  # recordings that are held at a time
    training = False

    def __init__(self):
        self.off: str | None = None  # why no more are made
        self.forget()

    def forget(self) -> None:
        self.recordings: dict[tuple, Any] = {}
        self.seen: Counter[tuple] = Counter()
        self.calls = 0

    def room(self) -> bool:
        """Make room for one more, if there is none; False where none is made."""
        if len(self.recordings) >= self.limit:
            del self.recordings[min(self.recordings, key=lambda k: self.recordings[k].used)]
        return True

    def find(self, key: tuple, decoder: nn.Module, after: int, record: Callable[[State], Any]) -> Any:
        """The recording of `key`, if it is of this decoder's weights; else it is made, the `after`th time that such a
        call comes. None: run the call as it is."""
        self.calls += 1
        recording = self._held(key, decoder)
        if recording is not None or self.off or self.seen[key] < after or not self.room():
            return recording
        state = state_of(decoder, self.training)
        if state is None:
            return None
        try:
            recording = record(state)
        except Exception as error:  # of many kinds: whatever a model does that a graph cannot hold
            self.off = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            warnings.warn(
                f"zsaa records no {self.what} of this {type(decoder).__name__}, they run kernel by kernel: {self.off}. "
                f"{self.instead} says so from the start.",
                stacklevel=2,
            )
            return None
        if recording is not None:
            self.recordings[key] = recording
        return recording

    def _held(self, key: tuple, decoder: nn.Module) -> Any:
        recording = self.recordings.get(key)
        if recording is not None and recording.state.holds(decoder):
            return recording
        if recording is not None:  # other weights, or other adapters: not what was recorded
            del self.recordings[key], recording
            self.seen[key] = 0
        if len(self.seen) > MANY:
            self.seen.clear()
        self.seen[key] += 1
        return None
