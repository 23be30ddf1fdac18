"""What a `with` block sets for the calls inside it: per thread and task, and for no other model.

A context variable holds the blocks that are open in this thread or task. It does not know generators: a block that is
opened in one would go on for its caller while the generator is suspended, and be lost where another thread resumes it.
Such a block is therefore tied to the generator's frame and holds for the calls that run below that frame, in whichever
thread. A generator that contextlib drives is a context manager: its block is its caller's.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

GENERATOR = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


class Scope:
    """One open block: what it sets for calls of `owner`. suspendable: is it a generator's?"""

    def __init__(self, owner: object, values: dict[str, Any], frame: FrameType | None):
        self.owner, self.values, self.frame = owner, values, frame
        self.suspendable = frame is not None and bool(frame.f_code.co_flags & GENERATOR)
        self.warned = False


_OPEN: ContextVar[tuple[Scope, ...]] = ContextVar("zsaa_open", default=())
_ALL: list[Scope] = []  # of all threads


def _opener() -> FrameType | None:
    """The frame whose `with` block is being entered: this module's and contextlib's own are skipped."""
    frame: FrameType | None = sys._getframe(1)
    skipped = {__file__, contextlib.__file__}
    while frame is not None:
        within = frame.f_code.co_filename in skipped
        driven = frame.f_back is not None and frame.f_back.f_code.co_filename == contextlib.__file__
        if not within and not (driven and frame.f_code.co_flags & GENERATOR):
            return frame
        frame = frame.f_back
    return None


@contextmanager
def opened(owner: object, **values: Any) -> Iterator[Scope]:
    """Calls of `owner` in this block have these values."""
    scope = Scope(owner, values, _opener())
    _ALL.append(scope)
    if not scope.suspendable:
        _OPEN.set((*_OPEN.get(), scope))
    try:
        yield scope
    finally:
        scope.frame = None  # a copied context may outlive the block: let go of what the frame holds
        _ALL.remove(scope)
        if not scope.suspendable:
            # By identity: blocks may end in another order than they began in, or in another context.
            _OPEN.set(tuple(other for other in _OPEN.get() if other is not scope))


def innermost(owner: object, name: str) -> Scope | None:
    """The innermost open block that sets `name` for `owner`, if there is one."""
    here = [scope for scope in _OPEN.get() if scope.owner is owner and name in scope.values]
    elsewhere = [scope for scope in _of(owner, name) if scope.suspendable]
    if not elsewhere:
        return here[-1] if here else None
    by_frame = {id(scope.frame): scope for scope in (*here, *elsewhere)}  # of one frame the latest counts
    for frame in _stack():
        if id(frame) in by_frame:
            return by_frame[id(frame)]
    for scope in elsewhere:
        _say_suspended(scope, name)
    return here[-1] if here else None


def opened_anywhere(owner: object, name: str) -> bool:
    """Is a block open that sets `name` for `owner`, in whatever thread?"""
    return bool(_of(owner, name))


def _of(owner: object, name: str) -> list[Scope]:
    return [scope for scope in tuple(_ALL) if scope.owner is owner and name in scope.values]


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _say_suspended(scope: Scope, name: str) -> None:
    """A fixture or another driver of generators may have meant the block for its caller: that must not pass unseen."""
    if scope.warned or scope.frame is None:
        return
    scope.warned = True
    warnings.warn(
        f"{name} was set by a `with` block in the generator {scope.frame.f_code.co_name!r}, which is suspended: this "
        "call is outside of it and does not get it. If the block is meant for whoever drives the generator, make it a "
        "context manager (contextlib.contextmanager), or set it for good (zsaa.set_alpha).",
        stacklevel=2,
    )
