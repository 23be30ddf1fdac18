"""Which versions of transformers the dial was built against: it relies on the insides of their decoder layers."""

from __future__ import annotations

import re
from logging import getLogger

OLDEST, BELOW = (5, 15), (6,)  # as in pyproject.toml; a test compares them

# peft imports bitsandbytes where it is installed, and this module then warns, on some CPUs, that a kernel which nothing
# here needs cannot be fetched from the hub: the first line of every notebook, in red.
getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in record.getMessage())


def check_transformers() -> None:
    """ImportError if the transformers that is imported lies outside OLDEST <= version < BELOW; the message names the
    version, the range and the command that installs one of it."""
    import transformers

    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])
    if OLDEST <= version < BELOW:
        return
    wanted = f"transformers>={'.'.join(map(str, OLDEST))},<{'.'.join(map(str, BELOW))}"
    raise ImportError(
        f"zsaa works with {wanted}, but transformers {transformers.__version__} is installed. Run "
        f"`pip install '{wanted}'` and start Python again."
    )
