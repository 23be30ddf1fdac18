"""Models in a process of their own. A GPU is fed by thousands of small calls in each batch, and every one of them wants
the interpreter; beside HTTP and texts in the same process they wait for it, and the GPU for them.

The process is told nothing but batches, through a pipe to its parent, and ends with it."""

from __future__ import annotations

import copy
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from zsaa.serve.engine import Completer, Engine
from zsaa.serve.furnish import Furnished, Settings, made
from zsaa.serve.lane import TRIM_S, settle, trim

Told = Callable[[int, str, "str | None"], None]


class Apart:
    """The process. furnished: what `furnish.made` made there, each engine without its model, whose `run` asks the
    process. RuntimeError: it could not be made, and why. One thread at a time may run."""

    def __init__(self, settings: Settings):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, settings), daemon=True, name="model")
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        kind, said = self.pipe.recv()
        if kind == "failed":
            raise RuntimeError(said)
        for name, furnished in said.items():
            furnished.engine.run = partial(self.run, name)
        self.furnished: dict[str, Furnished] = said

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def run(
        self,
        name: str,
        requests: Sequence[Any],
        alphas: Sequence[float],
        told: Told | None = None,
        gone: Callable[[int], bool] | None = None,
    ) -> Any:
        """As the `run` of the engine called `name`, but of a Completer's rows nothing comes back. An error has the name
        of the kind that it had there, and no words. EOFError, BrokenPipeError: the process has ended."""
        self.pipe.send((name, list(requests), list(alphas)))
        while True:
            kind, said = self.pipe.recv()
            if kind == "told":
                told and told(*said)
            elif kind == "gone":
                self.pipe.send(gone is not None and gone(said))
            elif kind == "failed":
                raise type(said, (RuntimeError,), {})
            else:
                return said


def _serve(pipe, settings: Settings) -> None:
    """What the process does: says what it made, then runs batches until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pipe
    try:
        furnished = made(settings)
    except Exception as error:
        pipe.send(("failed", str(error) or type(error).__name__))
        return
    engines = {name: each.engine for name, each in furnished.items()}
    pipe.send(("made", {name: replace(each, engine=_face(each.engine)) for name, each in furnished.items()}))
    settle()
    trimmed = time.monotonic()
    while True:
        try:
            name, requests, alphas = pipe.recv()
        except EOFError:
            return
        pipe.send(_ran(pipe, engines[name], requests, alphas))
        if time.monotonic() - trimmed > TRIM_S:
            trim()
            trimmed = time.monotonic()


def _ran(pipe, engine: Engine, requests: Sequence[Any], alphas: Sequence[float]) -> tuple[str, Any]:

    def gone(index: int) -> bool:
        pipe.send(("gone", index))
        return pipe.recv()

    try:
        if not isinstance(engine, Completer):
            return "ran", engine.run(requests, alphas)
        engine.run(requests, alphas, lambda *said: pipe.send(("told", said)), gone)
        return "ran", None
    except (EOFError, BrokenPipeError):
        raise  # the parent has ended
    except Exception as error:  # its words may hold a user's text
        return "failed", type(error).__name__


def _face(engine: Engine) -> Engine:
    """All of an engine but its model: tokenizer, limits, prices."""
    found = copy.copy(engine)
    found.model = None
    return found
