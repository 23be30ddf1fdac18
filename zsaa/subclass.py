"""Classes made at run time. An enabled model is one of subclasses, not of patched instances: they survive deepcopy and
pickle, keep isinstance checks and output capturing working, and inherit what else the class can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def subclass(base: type, make: Callable[..., type], arguments: tuple, members: dict[str, Any]) -> type:
    """A subclass of `base` with these members, under its name. make(*arguments) gives it again, for a copy."""

    def __reduce_ex__(self, protocol):
        return empty, (make, *arguments), *super(made, self).__reduce_ex__(protocol)[2:]

    made: Any = type(base.__name__, (base,), {**members, "__reduce_ex__": __reduce_ex__, "__module__": base.__module__})
    return made


def empty(make: Callable[..., type], *arguments) -> Any:
    """An instance of the class make(*arguments), before it gets its state. Classes made at run time are in no module,
    so pickle and deepcopy are told how to make them."""
    made: Any = make(*arguments)
    return made.__new__(made)


def recast(module: Any, make: Callable[..., type], *more) -> None:
    """Make `module` an instance of the subclass of its class that `make` gives."""
    module.__class__ = make(type(module), *more)


def restore(module: Any) -> None:
    """Give `module` the class back that it had before."""
    module.__class__ = type(module).__bases__[0]


@contextmanager
def saving(decoder: Any) -> Iterator[None]:
    """A configuration may be shared by several models: while one is saved, it holds that model's settings."""
    dial, config = getattr(decoder, "_zsaa", None), decoder.config
    if dial is None:
        yield
        return
    before = vars(config).get("zsaa")
    config.zsaa = dial.saved()
    try:
        yield
    finally:
        del config.zsaa
        if before is not None:
            config.zsaa = before
