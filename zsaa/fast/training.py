"""Training passes as CUDA graphs: forward and backward of a pruned pass through the decoder, replayed.

A sampled alpha and texts of many lengths would bring a new shape with every step. So a pass runs in the room of a
bucket: alpha and lengths are rounded up, which says how many rows each layer has at most, and how many of them are real
is read from a table on the device, as of any ragged batch. Rows beyond are padding: they decide nothing and get no
gradient. Embeddings, head, loss and optimizer stay outside, and so does whatever hangs on the weights' gradients.

Only with `zsaa.enable(model, graphs=True)`. A recording is made of a bucket's first pass and compared with that pass
without it, gradients and all; what cannot be recorded runs as before: caches, checkpointing, hooks inside the decoder,
a second pass before the first one's backward.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zsaa.fast import state as states
from zsaa.fast.recorder import Pool, Recorder
from zsaa.fast.rows import recomputed
from zsaa.passes import Given, Plan, Prefill, Request
from zsaa.rule import ENTRY

if TYPE_CHECKING:
    from zsaa.fast.graphs import Graphs

LIMIT = 64  # recordings per model
LEVELS = (*(k / 16 for k in range(1, 16)), 1 - 1 / 32, 1 - 1 / 64, 1.0)  # of alpha: finer where its cost is steep
NEAR = 0.02  # how far a replay's tensors may be from the pass's, of their length: sums of 16-bit numbers in any order


def rows_of(n: int) -> int:
    """`n` rows rounded up: to a multiple of 16, or to the next of 8 steps per octave."""
    step = max(16, 1 << max((n - 1).bit_length() - 4, 0))
    return -(-n // step) * step


def bucket_of(request: Request) -> Request:
    """The request with room for this one: its alpha and lengths rounded up, the same for all samples. Its input has one
    column more than any text, so that some of it is padding, and no text begins a bucket of its own by having none."""
    alpha = next(level for level in LEVELS if level >= max(request.alphas))
    batch, longest = len(request.lengths), rows_of(max(request.lengths))
    return replace(
        request,
        lengths=(longest,) * batch,
        width=rows_of(request.width) + 1,
        alphas=(alpha,) * batch,
    )


def fitted(plan: Plan, sizes: Tensor, tau: int) -> Plan:
    """The plan of a bucket for a batch of these sizes, int64 [stages, batch], read on the device."""
    fits = copy.copy(plan)
    fits.sizes, fits.lengths, fits.compact = sizes, sizes[0], True
    fits.drops = [width > tau for width in plan.widths[:-1]]  # of fewer rows no sample loses any
    real = plan.index[: plan.widths[0]] < sizes[:, :, None]
    fits.real = [mask[:, :width] for mask, width in zip(real, plan.widths)]
    return fits


class Room:
    """The memory in which the passes of a bucket run: what they read and what they leave. Buckets of the same input
    share it. embeds, its gradient, hidden, and its gradient (pull): [batch, width, hidden_size]."""

    def __init__(self, embeds: Tensor, request: Request):
        with torch.inference_mode(False), torch.no_grad():
            shape = embeds.shape[0], request.width, embeds.shape[2]
            self.embeds, self.pulled, self.hidden, self.pull = (embeds.new_zeros(shape) for _ in range(4))
            self.real = torch.zeros(self.embeds.shape[:2], dtype=torch.bool, device=embeds.device)
            stages = request.depth + 1
            self.sizes = torch.ones(stages, embeds.shape[0], dtype=torch.long, device=embeds.device)

    @torch.no_grad()
    def fill(self, embeds: Tensor, step: Prefill) -> None:
        """embeds [batch, request.width, hidden_size]."""
        width = embeds.shape[1]
        self.embeds[:, :width].copy_(embeds)
        self.embeds[:, width:].zero_()
        self.real.zero_()
        self.real[:, :width] = True if step.given.real is None else step.given.real
        self.sizes.copy_(step.plan.sizes)


@contextlib.contextmanager
def _aliases(decoder: nn.Module) -> Iterator[list[nn.Parameter]]:
    """New leaves in place of the weights that learn, of the same memory: what gathers a weight's gradient belongs to
    the stream of its first use, which is not the one that records."""
    held = [(module._parameters, name, p) for module in decoder.modules() for name, p in module._parameters.items()]
    held = [(own, name, p) for own, name, p in held if p is not None and p.requires_grad]
    new = {p: nn.Parameter(p.detach()) for *_, p in held}
    for own, name, p in held:
        own[name] = new[p]
    try:
        yield list(new.values())
    finally:
        for own, name, p in held:
            own[name] = p


class Passes:
    """Forward and backward of a bucket, each as something to record: what they leave lies in the room, and in the
    buffers of the weights' gradients. forward: of embeddings [batch, width, hidden_size], to the decoder's output."""

    def __init__(self, room: Room, decoder: nn.Module, forward: Callable[[Tensor], Any]):
        self.room, self.decoder, self.forward = room, decoder, forward
        self.weights = [p for p in decoder.parameters() if p.requires_grad]
        self.leaves: list[Tensor] = []  # of the last forward: the embeddings and the weights
        self.left: Tensor | None = None
        self.output: Any = None
        self.buffers: list[Tensor | None] = []

    def ahead(self) -> tuple[None, list[Tensor]]:
        embeds = self.room.embeds.detach().requires_grad_()
        with torch.enable_grad(), _aliases(self.decoder) as weights:
            self.output = self.forward(embeds)
        self.left, self.leaves = self.output.last_hidden_state, [embeds, *weights]
        if self.left.dtype != embeds.dtype or self.left.shape != embeds.shape:
            raise NotImplementedError(f"its states leave as {self.left.dtype}, and came as {embeds.dtype}")
        self.room.hidden.copy_(self.left.detach())
        return None, [self.room.hidden]

    def _gradients(self) -> list[Tensor | None]:
        """Of the embeddings and the weights; what the pass has kept for them is let go."""
        found = torch.autograd.grad(self.left, self.leaves, self.room.pull, allow_unused=True)
        self.left, self.output, self.leaves = None, None, []
        return list(found)

    def back(self) -> tuple[None, list[Tensor]]:
        pulled, *found = self._gradients()
        written = [self.room.pulled, *(b for b in self.buffers if b is not None)]
        torch._foreach_copy_(written, [pulled, *(g for g in found if g is not None)])
        return None, written

    def prepare(self, buffers: dict[Tensor, Tensor]) -> type:
        """Run once, for what is compiled or planned at the first use; which weights get a gradient, and the class of
        the decoder's output."""
        self.ahead()
        kind, names = type(self.output), set(self.output.keys())
        if names - {"last_hidden_state", "past_key_values"}:
            raise NotImplementedError(f"the decoder's output has fields of its own: {sorted(names)}")
        for weight, gradient in zip(self.weights, found := self._gradients()[1:], strict=True):
            if gradient is not None and weight not in buffers:
                buffers[weight] = torch.zeros_like(gradient)
        self.buffers = [None if g is None else buffers[w] for w, g in zip(self.weights, found)]
        return kind


@dataclass
class Recording:
    request: Request  # the bucket's
    state: states.State
    room: Room
    plan: Plan  # its tensors are read at every replay
    passes: Passes
    ahead: Any  # graphs
    back: Any
    output_class: type
    nbytes: int
    capture_ms: float
    used: int
    replays: int = 0


class Turn:
    """One pass whose activations lie in the shared memory, until its backward pass, or until nobody can ask for it."""

    done = False


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording: Recording, turns: list, width: int, embeds: Tensor, *weights: Tensor) -> Tensor:
        ctx.recording, ctx.turn, ctx.width, ctx.turns = recording, Turn(), width, turns
        turns[:] = [weakref.ref(ctx.turn)]
        recording.ahead.replay()
        return recording.room.hidden[:, :width].clone()

    @staticmethod
    def backward(ctx, pull: Tensor):
        recording, room = ctx.recording, ctx.recording.room
        if ctx.turn.done or ctx.turns[0]() is not ctx.turn:
            raise RuntimeError(
                "a recorded training pass has one backward pass, and this is its second. Call "
                "zsaa.enable(model, graphs=False) where retain_graph is wanted."
            )
        ctx.turn.done = True
        room.pull.zero_()
        room.pull[:, : ctx.width].copy_(pull)
        recording.back.replay()
        # Copies: the next replay overwrites what this one left. All at once, and not one by one as they are added up.
        written = [room.pulled[:, : ctx.width], *(b for b in recording.passes.buffers if b is not None)]
        copies = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in written]
        torch._foreach_copy_(copies, written)
        rest = iter(copies[1:])
        return None, None, None, copies[0], *(None if b is None else next(rest) for b in recording.passes.buffers)


def _near(got: list[Tensor], expected: list[Tensor]) -> str | None:
    """What is farther apart than sums in another order are, and how far; None if nothing. Overflow equals itself."""
    pairs = [(a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(got, expected, strict=True)]
    apart, sizes = (torch.stack([x.norm() for x in each]) for each in (
        [a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    far = apart > NEAR * sizes + 1e-6 * sizes.max()
    if not far.any():
        return None
    worst = int((apart / sizes.clamp(min=1e-30)).argmax())
    return f"{int(far.sum())} of {len(pairs)} tensors, number {worst} by {float(apart[worst] / sizes[worst]):.3g} of it"


class Training(Recorder):
    """The recorded training passes of one decoder, beside its recorded prefills."""

    what, instead = "training passes", "zsaa.enable(model, graphs='auto')"
    limit, training = LIMIT, True

    def __init__(self, graphs: Graphs):
        super().__init__()
        self.graphs = graphs
        self.rooms: dict[tuple, Room] = {}
        self.buffers: dict[Tensor, Tensor] = {}
        self.pool = Pool()
        self.turns: list = []

    def run(self, decoder: nn.Module, forward: Callable, call: dict):
        """forward(**call), by a replay where that can be. call holds a fresh Prefill as "zsaa"."""
        key = self._key(decoder, call)
        if key is None or self._waits() or not self.graphs.lock.acquire(blocking=False):
            return forward(**call)
        try:
            embeds = decoder.get_input_embeddings()(call["input_ids"])
            record = functools.partial(self._record, key[0], decoder, forward, call, embeds.detach())
            fits = embeds.shape[:2] == call["input_ids"].shape
            recording = self.find(key, decoder, 1, record) if fits else None
            if recording is not None:
                return self._replay(recording, call, embeds)
        finally:
            self.graphs.lock.release()
        return forward(**call)

    def _waits(self) -> bool:
        """Has the last pass not had its backward yet?"""
        turn = self.turns[0]() if self.turns else None
        return turn is not None and not turn.done

    def _key(self, decoder: nn.Module, call: dict) -> tuple | None:
        """All that decides which kernels a pass runs; None for calls that must run as they are."""
        step, config = call["zsaa"], decoder.config
        request = step.request
        if self.graphs.mode is not True or call.get("past_key_values") is not None or recomputed():
            return None
        if step.trace is not None or not getattr(step.scorer, "recordable", True) or request.rule.schedule == ENTRY:
            return None
        if request.exempt or request.asks or not isinstance(call.get("input_ids"), Tensor):
            return None
        if getattr(decoder, "gradient_checkpointing", False) or getattr(config, "use_bidirectional_attention", False):
            return None
        others = [k for k, v in call.items() if isinstance(v, Tensor) and k not in ("input_ids", "attention_mask")]
        key = self.graphs.shapes(decoder, call, request.device, training=True)
        return None if key is None or others else (bucket_of(request), *key[1:])

    def _record(
        self, request: Request, decoder: nn.Module, forward: Callable, call: dict, embeds: Tensor, state: states.State
    ) -> Recording:
        started, step, device = time.perf_counter(), call["zsaa"], request.device
        shape = (*embeds.shape[::2], request.width, request.depth, embeds.dtype)
        room = self.rooms.setdefault(shape, Room(embeds, request))
        with torch.inference_mode(False):
            plan = Plan(request)
        fixed = {**call, "input_ids": None, "attention_mask": torch.empty_like(call["attention_mask"])}

        def through(embeds: Tensor) -> Any:
            # No cache of casts: weights that it has cast are let go when its block ends, and a replay would read them.
            with states.casting(device.type):
                again = Prefill(request, fitted(plan, room.sizes, request.rule.tau), Given(room.real), step.scorer)
                return forward(**{**fixed, "inputs_embeds": embeds, "zsaa": again})

        room.fill(embeds, step)
        passes = Passes(room, decoder, through)
        kind = passes.prepare(self.buffers)
        ahead, back = (self.graphs.new(device, self.pool) for _ in range(2))
        nbytes = sum(graph.record(run)[1] for graph, run in ((ahead, passes.ahead), (back, passes.back)))
        _check(passes, ahead, back)
        elapsed = 1000 * (time.perf_counter() - started)
        return Recording(request, state, room, plan, passes, ahead, back, kind, nbytes, elapsed, self.calls)

    def _replay(self, recording: Recording, call: dict, embeds: Tensor):
        step = call["zsaa"]
        self.graphs.follow(recording.request.device)
        recording.room.fill(embeds, step)
        recording.used, recording.replays = self.calls, recording.replays + 1
        arguments = (recording, self.turns, embeds.shape[1], embeds, *recording.passes.weights)
        return recording.output_class(last_hidden_state=_Replayed.apply(*arguments))

    def report(self) -> list[dict]:
        return [
            {
                "batch": len(r.request.lengths),
                "rows": r.request.lengths[0],
                "alpha": r.request.alphas[0],
                "bytes": r.nbytes,
                "capture_ms": round(r.capture_ms, 3),
                "replays": r.replays,
            }
            for r in self.recordings.values()
        ]


def _check(passes: Passes, ahead: Any, back: Any) -> None:
    """A recording is only as good as its replay: it must give what the pass itself gives for another input."""
    room, device = passes.room, passes.room.embeds.device
    cuda = device.type == "cuda"
    with torch.no_grad():
        room.embeds.copy_(room.embeds.flip(2))  # padding stays zero: a token that is has gradients without bound
        room.pull.normal_(std=0.1)
    drawn = torch.cuda.get_rng_state(device) if cuda else None  # dropout draws the same twice
    _, hidden = passes.ahead()
    _, gradients = passes.back()
    expected = [x.clone() for x in (*hidden, *gradients)]
    for x in (*hidden, *gradients):
        x.zero_()
    if cuda:
        torch.cuda.set_rng_state(drawn, device)
    ahead.replay()
    back.replay()
    if far := _near([*hidden, *gradients], expected):
        raise RuntimeError(f"the replay of a recorded training pass differs from the pass itself ({far})")
