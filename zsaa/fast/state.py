"""What a recording of a decoder depends on beside its inputs, and whether it is still so."""

from __future__ import annotations

import copy
from itertools import chain, repeat
from operator import contains, itemgetter

import torch
from torch import Tensor, nn

# bitsandbytes' weights in 4 bits, which the same kernels unpack at every call; those in 8 look at their input first.
PACKED = {"Params4bit"}


class State:
    """What a recording depends on beside its inputs: modules, where their weights lie, which adapters are on.

    marks: all of it, from a walk over the modules. Before every replay a walk would take longer than the replay itself,
    so `holds` looks at flat lists of the same things, and walks only where one of them differs. Replaced weights are
    not kept alive.
    """

    def __init__(self, decoder: nn.Module, modules: list[nn.Module], marks: list, training: bool = False):
        self.marks, self.training = marks, training
        self.owns = [module.__dict__ for module in modules]  # without the decoder's: it owns the recordings
        owns = [decoder.__dict__, *self.owns]
        self.parents = [own["_modules"] for own in owns if own["_modules"]]
        self.holders = [own[kind] for own in owns for kind in ("_parameters", "_buffers") if own[kind]]
        hooks = [own[kind] for own in self.owns for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.unhooked, self.hooked = [h for h in hooks if not h], [h for h in hooks if h]
        self.adapters = [own for own in self.owns if "_active_adapter" in own]
        self.seen = self._look(copies=True)

    def _look(self, copies: bool = False) -> tuple:
        tensors = [t for t in chain.from_iterable(map(dict.values, self.holders)) if t is not None]
        adapters = [[own.get(name) for name in ADAPTER_SETTINGS] for own in self.adapters]
        return (
            any(map(itemgetter("training"), self.owns)),
            any(map(contains, self.owns, repeat("forward"))),
            any(self.unhooked),
            [*chain.from_iterable(self.hooked)],
            [*chain.from_iterable(map(dict.values, self.parents))],
            [*map(id, tensors)],
            [*map(Tensor.data_ptr, tensors)],
            [(t.dtype, t.shape) for t in tensors],  # others may come to lie in the same place
            copy.deepcopy(adapters) if copies else adapters,
        )

    def holds(self, decoder: nn.Module) -> bool:
        """Is all as it was?"""
        if self._look() == self.seen:
            return True
        now = state_of(decoder, self.training)
        if now is None or now.marks != self.marks:
            return False
        self.__dict__ = now.__dict__  # what differs does not matter
        return True


ADAPTER_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")  # of a layer of PEFT


def state_of(decoder: nn.Module, training: bool = False) -> State | None:
    """The state of `decoder`. None if something inside must run on every call: a hook, a forward of an instance's own,
    dropout (unless it is `training` that is recorded), weights of a special kind."""
    marks: list = []
    modules: list[nn.Module] = []
    stack = [decoder]
    while stack:
        module = stack.pop()
        own = module.__dict__
        hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
        # The decoder's own hooks run around a replay too; those of transformers do nothing unless states are asked for.
        foreign = [h for h in hooks if getattr(h, "__module__", None) != "transformers.utils.output_capturing"]
        if (own["training"] and not training) or (module is not decoder and (foreign or "forward" in own)):
            return None
        if type(module).__module__.startswith("torch.distributed."):  # FSDP: its weights come and go
            return None
        if module is not decoder:  # it would never be freed, as it owns the recordings
            marks.append(module)
            modules.append(module)
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is not None:
                if type(tensor) not in (nn.Parameter, Tensor) and type(tensor).__name__ not in PACKED:
                    return None
                marks.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()))
        if "_active_adapter" in own:
            marks.append(str([own.get(name) for name in ADAPTER_SETTINGS]))
        stack.extend(child for child in own["_modules"].values() if child is not None)
    return State(decoder, modules, marks, training)


def casting(kind: str) -> torch.autocast:
    """The autocast that is on, without its cache: weights that it has cast are let go when its block ends, and a
    recording that read them would read what lies there next."""
    on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, enabled=on, cache_enabled=False)
