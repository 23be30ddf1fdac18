"""CUDA graphs: a pruned prefill is recorded once and then replayed, without Python launching every kernel again; so are
decoding steps (zsaa.fast.steps).

How many tokens a layer keeps follows from the lengths and the dial's settings alone, so two passes of the same shapes
run the same kernels in the same memory. Such a pass is recorded when its shapes come a second time, from the embedding
to the last norm, and later ones copy their inputs in, replay, and copy the last hidden states and the cache out (a
large cache leaves layer by layer, zsaa.fast.outlet): the same numbers bit for bit, and nothing that is handed out is
written again. Whatever cannot be replayed runs as before: gradients, training, traces, hooks inside the decoder,
weights that are not plain tensors of one GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from zsaa.cache import pruned_cache
from zsaa.depth.stop import Stop
from zsaa.fast import dispatch
from zsaa.fast import state as states
from zsaa.fast.outlet import Outlet, outlet_for
from zsaa.fast.packing import Packing, alike, unheld
from zsaa.fast.recorder import Pool, Recorder
from zsaa.fast.state import State
from zsaa.fast.steps import Steps
from zsaa.fast.training import Training
from zsaa.passes import Decode, Given, Plan, Prefill, Request
from zsaa.subclass import empty, saving, subclass  # noqa: F401 - pickles of earlier versions look for empty here

LIMIT = 16  # recordings per model
MEMORY = 0.1  # share of the GPU's memory that they may hold together; what is over it runs without
DEVICES = ("cuda",)


class CudaGraph:
    """One recorded run. The recordings of a model share a memory pool, and each may use all of it: they never run at
    the same time, and what they leave is copied out at once."""

    def __init__(self, device: torch.device, pool: Pool):
        self.device, self.pool, self.graph = device, pool, torch.cuda.CUDAGraph()
        pool.open(device)

    def record(self, run: Callable[[], Any]) -> tuple[Any, int]:
        """What `run` returns, in the memory that `replay` will write again; bytes by which the memory grew."""
        pool, stream = self.pool
        with torch.cuda.device(self.device), _no_collection():
            before = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    held = torch.cuda.memory_reserved()
                    result = run()
                    grown = torch.cuda.memory_reserved() - held
            except BaseException:
                torch.cuda.set_stream(before)
                _recover(pool)
                raise
        return result, grown

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()


@contextlib.contextmanager
def _rolled(inputs: dict[str, Tensor]) -> Iterator[None]:
    """Another text in the same tensors."""
    before = {name: inputs[name].clone() for name in ("input_ids", "inputs_embeds") if name in inputs}
    for name, x in before.items():
        inputs[name].copy_(x.roll(1, dims=1))
    yield
    for name, x in before.items():
        inputs[name].copy_(x)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage is collected meanwhile: an old graph that is freed by chance would end the capture of a new one."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _recover(pool) -> None:
    """After a capture that failed on the current device, PyTorch's allocator and random numbers still wait for its end
    (torch 2.11): tell them."""
    with contextlib.suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(RuntimeError, AttributeError):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())


@dataclass
class Recording:
    request: Request
    plan: Plan  # its tensors are read at every replay
    state: State
    inputs: dict[str, Tensor]
    outputs: Packing  # the last hidden states; then keys, values and columns of every layer, if there is no outlet
    outlet: Outlet | None
    cached: bool
    output_class: type
    names: tuple[str, ...]  # of the fields that the output fills
    graph: CudaGraph
    nbytes: int
    capture_ms: float
    used: int
    replays: int = 0


def _budget(device: torch.device) -> float:
    """Bytes that all recordings of a model may hold."""
    return MEMORY * torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else float("inf")


class Graphs(Recorder):
    """The recorded prefills of one decoder, and what else is recorded of it. mode: "auto" records shapes that come a
    second time, True at once, False never."""

    what = "CUDA graphs of prefills"
    limit = LIMIT

    def __init__(self, mode: bool | str = "auto"):
        self.mode = mode
        self.lock = threading.Lock()
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Free all recordings."""
        self.forget()
        self.pool = Pool()
        self.stream: torch.cuda.Stream | None = None
        self.steps, self.training = Steps(self), Training(self)

    def new(self, device: torch.device, pool: Pool | None = None) -> CudaGraph:
        """A graph that shares its memory with the others, or with those of `pool`."""
        return CudaGraph(device, self.pool if pool is None else pool)

    def __deepcopy__(self, memo) -> Graphs:
        return Graphs(self.mode)  # of another model's memory

    def __reduce__(self):
        return Graphs, (self.mode,)

    def run(self, decoder: nn.Module, forward: Callable, call: dict):
        """forward(**call), by a replay where that is the same. call holds a fresh Prefill as "zsaa"."""
        if torch.is_grad_enabled():
            return self.training.run(decoder, forward, call)
        key = self._key(decoder, call)
        if key is None or not self.lock.acquire(blocking=False):  # another thread is at it
            return forward(**call)
        try:
            record = functools.partial(self._record, key, decoder, forward, call)
            recording = self.find(key, decoder, 2 if self.mode == "auto" else 1, record)
            if recording is not None:
                return self._replay(recording, call)
        finally:
            self.lock.release()
        return forward(**call)

    def _key(self, decoder: nn.Module, call: dict) -> tuple | None:
        """All that decides which kernels a prefill runs; None for calls that must run as they are."""
        step = call["zsaa"]
        if step.trace is not None or not getattr(step.scorer, "recordable", True):
            return None
        cached = call["past_key_values"] is not None if "past_key_values" in call else False
        key = self.shapes(decoder, call, step.request.device)
        return None if key is None else (step.request, *key[:2], cached, *key[2:])

    def step_key(self, decoder: nn.Module, call: dict) -> tuple | None:
        """All that decides which kernels a decoding step runs, but for the bound on its rows; None as above."""
        return self.shapes(decoder, call, call["zsaa"].columns.device)

    def shapes(self, decoder: nn.Module, call: dict, device: torch.device, training: bool = False) -> tuple | None:
        """Of what is common to all calls: shapes first, then settings; None for calls that must run as they are."""
        if (
            self.mode is False
            or device.type not in DEVICES
            or not torch.is_grad_enabled() == training == decoder.training
        ):
            return None
        if call["zsaa"].partial or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return None
        if torch._C._len_torch_dispatch_stack() or _module._global_forward_hooks or _module._global_forward_pre_hooks:
            return None  # something watches all operations or modules, such as a counter: a replay runs none
        rest = {k: v for k, v in call.items() if k not in ("zsaa", "attention_mask", "past_key_values")}
        shapes = tuple((k, tuple(v.shape), v.dtype, v.device) for k, v in rest.items() if isinstance(v, Tensor))
        plain = tuple((k, v) for k, v in rest.items() if not isinstance(v, Tensor) and v is not None)
        if not all(isinstance(v, (bool, int, float, str)) for _, v in plain):
            return None
        wanted = [k for k, v in plain if v and k.startswith("output_")]
        config = decoder.config
        if wanted or config.output_hidden_states or ("return_dict", False) in plain or not config.return_dict:
            return None
        kind = device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        used = dispatch.backends(device)["used"], dispatch._fused
        return shapes, plain, autocast, dispatch.matmul_precision(), used

    def room(self) -> bool:
        """Make room for one more: only a recording that has not been used for long gives way, so that more settings
        than fit do not chase each other out."""
        if len(self.recordings) < self.limit:
            return True
        key, oldest = min(self.recordings.items(), key=lambda item: item[1].used)
        if self.calls - oldest.used <= 4 * self.limit:
            return False
        del self.recordings[key]
        return True

    def _record(self, key: tuple, decoder: nn.Module, forward: Callable, call: dict, state: State) -> Recording | None:
        step, cached = call["zsaa"], key[3]
        request, plan, layers = step.request, step.plan, step.depth
        # Grad mode is off already. Not inference mode: later replays write into these tensors from outside it too.
        with torch.inference_mode(False), torch.no_grad(), states.casting(request.device.type):
            names = [name for name, *_ in key[1]]
            inputs = {name: call[name].clone() for name in names}
            fixed = {**call, **inputs, "attention_mask": torch.empty_like(call["attention_mask"])}
            given = {name: x.clone() for name, x in step.given.tensors().items()}

            def run(outlet: Outlet | None = None):
                cache = pruned_cache(None, layers) if cached else None
                if outlet is not None:
                    cache.layers = outlet.layers(layers)
                again = Prefill(request, plan, Given(**given), step.scorer)
                output = forward(**{**fixed, "past_key_values": cache, "zsaa": again})
                tensors = [output.last_hidden_state]
                for layer in cache.layers if cached and outlet is None else ():
                    tensors += [layer.keys, layer.values, layer.columns]
                return output, tensors

            # A recording is only as good as its replay: it must give what the pass itself gives for another input. That
            # pass comes first: what is compiled, planned or allocated at the first use is so before recording.
            with _rolled(inputs):
                wanted = run()[1]
            outlet = outlet_for(wanted[1:])
            left = outlet.open() if outlet is not None else []
            started = time.perf_counter()
            graph = self.new(request.device)
            (output, tensors), nbytes = graph.record(functools.partial(run, outlet))
            with _rolled(inputs):
                graph.replay()
            if not all(alike(a, b) for a, b in zip([*tensors, *left], wanted, strict=True)):
                raise RuntimeError("the replay of a recorded prefill differs from the prefill itself")
        if set(output.keys()) - {"last_hidden_state", "past_key_values"}:
            raise NotImplementedError(f"the decoder's output has fields of its own: {sorted(output.keys())}")
        inputs |= {f"zsaa.{name}": x for name, x in given.items()}
        nbytes += sum(x.nbytes for x in inputs.values())
        if nbytes + sum(r.nbytes for r in self.recordings.values()) > _budget(request.device):
            self.seen[key] = -(1 << 30)  # too large: no second try
            return None
        with torch.inference_mode(False), torch.no_grad():
            packing = Packing(tensors)
            # Their memory is the pool's, which the graph holds. The next recording may use it: replays take turns, and
            # what one leaves is copied out before the next.
            packing.tensors = [unheld(x) for x in tensors]
        elapsed = 1000 * (time.perf_counter() - started)
        facts = (cached, type(output), tuple(output.keys()), graph, nbytes, elapsed, self.calls)
        return Recording(request, plan, state, inputs, packing, outlet, *facts)

    def _replay(self, recording: Recording, call: dict):
        self.follow(recording.request.device)
        own = {f"zsaa.{name}": x for name, x in call["zsaa"].given.tensors().items()}
        for name, tensor in recording.inputs.items():
            tensor.copy_(own[name] if name in own else call[name])
        left = recording.outlet.open() if recording.outlet is not None else []
        recording.graph.replay()
        # Copies: the next replay overwrites what this one left. All that follows runs while the device is at work.
        hidden, *rest = *recording.outputs.copies(), *left
        recording.used, recording.replays = self.calls, recording.replays + 1
        cache = call.get("past_key_values")
        if recording.cached:
            real = call["zsaa"].real
            for layer, padding, k, v, columns in zip(cache.layers, real, rest[::3], rest[1::3], rest[2::3]):
                layer.extend(k, v, columns, padding is None, recording.request.width)
        values = {"last_hidden_state": hidden, "past_key_values": cache}
        return recording.output_class(**{name: values[name] for name in recording.names})

    def follow(self, device: torch.device) -> None:
        """Replays share their memory: one on another stream waits for the last one."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            if self.stream is not None and self.stream != stream:
                stream.wait_stream(self.stream)
            self.stream = stream

    def report(self) -> dict:
        rows = []
        for recording in self.recordings.values():
            request = recording.request
            rows.append(
                {
                    "lengths": list(request.lengths),
                    "alphas": list(request.alphas),
                    **asdict(request.rule),
                    "cache": recording.cached,
                    "bytes": recording.nbytes,
                    "capture_ms": round(recording.capture_ms, 3),
                    "replays": recording.replays,
                }
            )
        steps = self.steps.report()
        training = self.training.report()
        held = sum(row["bytes"] for row in (*rows, *steps, *training))
        off = self.off or self.steps.off or self.training.off
        return {"mode": self.mode, "graphs": rows, "steps": steps, "training": training, "bytes": held, "off": off}


@functools.cache
def replaying(decoder_class: Any) -> type[nn.Module]:
    """A subclass of a decoder that replays what it has recorded, and completes what a pruned pass leaves short."""

    @functools.wraps(decoder_class.forward)
    def forward(self, *args, **kwargs):
        stock, step = super(made, self).forward, kwargs.get("zsaa")
        if step is not None and step.partial:
            return _completed(step, stock, kwargs, self.config.return_dict)
        if isinstance(step, Prefill) and not torch.compiler.is_compiling():
            return self._zsaa.graphs.run(self, stock, kwargs)
        if isinstance(step, Decode) and not torch.compiler.is_compiling():
            return self._zsaa.graphs.steps.run(self, stock, kwargs)
        return stock(*args, **kwargs)

    @functools.wraps(decoder_class.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        with saving(self):
            return super(made, self).save_pretrained(*args, **kwargs)

    made = subclass(
        decoder_class, replaying, (decoder_class,), {"forward": forward, "save_pretrained": save_pretrained}
    )
    return made


def _completed(step: Prefill | Decode | Stop, forward: Callable, call: dict, return_dict: bool):
    """forward(**call), and what `step` has to add to it."""
    wanted = call.get("return_dict")
    output = forward(**{**call, "return_dict": True})
    if (states := output.get("hidden_states")) is not None:  # layers that were passed by have none of their own
        output.hidden_states = (*states[: step.depth], states[-1])
    output = step.complete(output)
    return output if (return_dict if wanted is None else wanted) else output.to_tuple()


def check_mode(mode: Any) -> bool | str:
    if mode not in (True, False, "auto"):
        raise ValueError(f'graphs must be "auto", True or False, got {mode!r}.')
    return mode
