"""The environment of the kernels: what of the user's own settings they see, and how they share the processor."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Settings of the user's that would change what a notebook does: start-up files, search paths, configurations, the way
# in which figures are drawn. The runner itself is started with -I and heeds no PYTHON variable either.
FOREIGN = ("PYTHON", "IPYTHON", "JUPYTER_", "MPLBACKEND", "MATPLOTLIBRC")


def variables(folder: str, more: dict[str, str]) -> dict[str, str | None]:
    """What differs for a kernel from the runner's environment; None: not set there. `folder` takes the kernel's
    connection file, history and configuration, which so stay out of the user's home."""
    foreign = {name: None for name in os.environ if name.startswith(FOREIGN)}
    own = {f"JUPYTER_{name}_DIR": f"{folder}/{name.lower()}" for name in ("RUNTIME", "CONFIG", "DATA")}
    own["IPYTHONDIR"] = f"{folder}/ipython"
    own["MPLCONFIGDIR"] = os.environ.get("MPLCONFIGDIR", str(Path(sys.prefix) / "var" / "matplotlib"))
    own["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each log begins with a warning
    if sys.flags.no_user_site:  # kernels see the packages that the runner sees
        own["PYTHONNOUSERSITE"] = "1"
    return {**foreign, **own, **more}


@contextlib.contextmanager
def environment(more: dict[str, str]) -> Iterator[None]:
    """os.environ as a kernel gets it, and `more`."""
    with tempfile.TemporaryDirectory(prefix="zsaa-jupyter-", ignore_cleanup_errors=True) as folder:
        new = variables(folder, more)
        old = {name: os.environ.get(name) for name in new}
        _set(new)
        try:
            yield
        finally:
            _set(old)


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
