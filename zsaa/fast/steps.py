"""Decoding steps as CUDA graphs: one new token through all layers of a pruned cache, replayed.

The kernels of such a step ask a table where each layer's rows lie and how many they are (see zsaa.fast.slots), so one
recording serves every cache of a model's batches of one size, up to a bound of rows: a power of two. It is made when
such steps have come a few times, and is checked, and let go, as recorded prefills are. What cannot be replayed takes
the same kernels one by one; what they do not take (gradients, float32, masks that change on the way, other devices)
grows its cache by torch.cat, which is the reference.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsaa.cache import PrunedLayer
from zsaa.fast import dispatch, slots
from zsaa.fast import state as states
from zsaa.fast.packing import alike
from zsaa.fast.recorder import Recorder
from zsaa.fast.slots import Slots
from zsaa.passes import Decode

if TYPE_CHECKING:
    from zsaa.fast.graphs import Graphs

AFTER = 4  # steps of a kind, after which "auto" records it
LIMIT = 8  # recordings per model


@dataclass
class Recording:
    chunks: int
    batch: int
    state: states.State
    inputs: dict[str, Tensor]
    table: Tensor
    hidden: Tensor  # [batch, 1, hidden_size], which every replay writes
    output_class: type
    names: tuple[str, ...]  # of the fields that the output fills
    graph: Any
    nbytes: int
    capture_ms: float
    used: int
    replays: int = 0


class Steps(Recorder):
    """The recorded steps of one decoder, beside its recorded prefills."""

    what = "CUDA graphs of decoding steps"
    limit = LIMIT

    def __init__(self, graphs: Graphs):
        super().__init__()
        self.graphs = graphs

    def run(self, decoder: nn.Module, forward: Callable, call: dict):
        """forward(**call), over slots and by a replay where that can be. call holds a fresh Decode as "zsaa"."""
        step, layers = call["zsaa"], call["past_key_values"].layers
        if not _takes(decoder, step, layers):
            return forward(**call)
        slots.settle(layers)
        if call.get("position_ids") is None:  # as the decoder would count them, from the cache
            call = {**call, "position_ids": torch.full((1, 1), layers[0].seen, device=layers[0].room.keys.device)}
        output = self._recorded(decoder, forward, call)
        if output is None:
            step.slots = _slots(layers)
            output = forward(**call)
        slots.advance(layers)
        return output

    def _recorded(self, decoder: nn.Module, forward: Callable, call: dict):
        """By a replay; None where there is none."""
        key, layers, graphs = self.graphs.step_key(decoder, call), call["past_key_values"].layers, self.graphs
        if key is None or not graphs.lock.acquire(blocking=False):  # another thread is at it
            return None
        try:
            key = (*key, chunks_of(layers))
            record = functools.partial(self._record, key, decoder, forward, call)
            recording = self.find(key, decoder, AFTER if graphs.mode == "auto" else 1, record)
            return None if recording is None else self._replay(recording, call)
        finally:
            graphs.lock.release()

    def _record(self, key: tuple, decoder: nn.Module, forward: Callable, call: dict, state: states.State) -> Recording:
        step, layers, started = call["zsaa"], call["past_key_values"].layers, time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            inputs = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor) and name != "attention_mask"}
            again = copy.copy(step)
            again.slots = _slots(layers)
            fixed = {**call, **inputs, "attention_mask": torch.empty_like(call["attention_mask"]), "zsaa": again}

            def run():
                output = forward(**fixed)
                return output, [output.last_hidden_state]

            run()  # what is compiled or allocated at the first use is so before recording
            graph = self.graphs.new(step.columns.device)
            (output, (hidden,)), nbytes = graph.record(run)
            # A recording is only as good as its replay: it must give what the step itself gives for another token. Both
            # write the slot that the step itself will write.
            if "input_ids" in inputs:
                inputs["input_ids"].add_(1).remainder_(decoder.config.vocab_size)
            else:
                inputs["inputs_embeds"].mul_(0.5)
            graph.replay()
            if not alike(hidden, run()[1][0]):
                raise RuntimeError("the replay of a recorded step differs from the step itself")
        if set(output.keys()) - {"last_hidden_state", "past_key_values"}:
            raise NotImplementedError(f"the decoder's output has fields of its own: {sorted(output.keys())}")
        elapsed = 1000 * (time.perf_counter() - started)
        facts = (type(output), tuple(output.keys()), graph, nbytes, elapsed, self.calls)
        return Recording(key[-1], hidden.shape[0], state, inputs, again.slots.table, hidden, *facts)

    def _replay(self, recording: Recording, call: dict):
        self.graphs.follow(recording.hidden.device)
        for name, tensor in recording.inputs.items():
            tensor.copy_(call[name])
        recording.table.copy_(torch.tensor(slots.lines(call["past_key_values"].layers)))
        recording.graph.replay()
        recording.used, recording.replays = self.calls, recording.replays + 1
        # A copy: the next replay overwrites what this one left.
        values = {"last_hidden_state": recording.hidden.clone(), "past_key_values": call["past_key_values"]}
        return recording.output_class(**{name: values[name] for name in recording.names})

    def report(self) -> list[dict]:
        return [
            {
                "batch": r.batch,
                "rows": r.chunks * slots.CHUNK,
                "bytes": r.nbytes,
                "capture_ms": round(r.capture_ms, 3),
                "replays": r.replays,
            }
            for r in self.recordings.values()
        ]


def chunks_of(layers: Sequence[Any]) -> int:
    """The bound on chunks of keys: a power of two, the same for all layers."""
    return 1 << (-(-(max(layer.rows for layer in layers) + 1) // slots.CHUNK) - 1).bit_length()


def _slots(layers: Sequence[Any]) -> Slots:
    table = torch.tensor(slots.lines(layers)).to(layers[0].room.keys.device)
    return Slots(table, chunks_of(layers))


def _takes(decoder: nn.Module, step: Decode, layers: Sequence[PrunedLayer]) -> bool:
    """Can this step go over slots?"""
    if step.width != 1 or step.hidden is not None or torch.is_grad_enabled() or decoder.training:
        return False
    if len(layers) != decoder._zsaa.family.num_layers(decoder):
        return False
    if any(type(layer) not in (PrunedLayer, slots.RoomyLayer) for layer in layers):
        return False  # one that holds its rows in another way, such as in fewer bits
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled(step.columns.device.type):
        return False  # a counter of operations knows PyTorch's own only
    if all(isinstance(layer, slots.RoomyLayer) for layer in layers):  # which were asked when they settled
        return dispatch.step_kernels(layers[0].room.keys) is not None
    plain = PrunedLayer, slots.RoomyLayer  # a quantized one holds its rows otherwise
    keys = [layer.keys for layer in layers if layer.pruned and type(layer) in plain]
    alike = len({(k.device, k.dtype) for k in keys}) == 1 and len(keys) == len(layers)
    return alike and all(dispatch.step_kernels(k) is not None for k in keys)
