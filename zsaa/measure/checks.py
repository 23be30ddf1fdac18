"""Checks of arguments. What does not fit raises a ValueError that names the value, the allowed range and, for text, the
remedy; what fits is returned, NumPy's scalars as Python's."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any


def _refused(name: str, allowed: str, value: Any) -> ValueError:
    text = ", which is text: give a number (YAML reads 2e-5 as text, and 2.0e-5 as a number)"
    return ValueError(f"{name} must be {allowed}, got {value!r}{text if isinstance(value, str) else ''}.")


def check_number(name: str, value: Any, interval: str) -> float:
    """`value`, if it is a number in `interval`, written like "[0, 1)" or "(0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    fits = (
        isinstance(value, Real)
        and not isinstance(value, bool)
        and low <= value <= high  # NaN is in no interval
        and (value != low or interval[0] == "[")
        and (value != high or interval[-1] == "]")
    )
    if not fits:
        raise _refused(name, f"in {interval}", value)
    return value.item() if hasattr(value, "item") else value


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None, also: dict | None = None) -> Any:
    """`value`, if it is a whole number from `least` to `most` (None: no limit), or one of the values `also`, each of
    which is named with its meaning."""
    for other in also or ():
        if value is other or (type(value) is type(other) and value == other):
            return value
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        allowed = f"a whole number, {least} or more" if most is None else f"a whole number from {least} to {most}"
        allowed += "".join(f", or {other} ({meaning})" for other, meaning in (also or {}).items())
        raise _refused(name, allowed, value)
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """`value`, if it is True or False; "false", as text, would count as True."""
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy 2.0 calls its own bool
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)
