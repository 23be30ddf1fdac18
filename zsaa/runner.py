"""What `./run_all.sh` and `python -m zsaa.runner` start; see zsaa/kit/runner."""

import importlib
import importlib.util
import sys
from pathlib import Path


def load_kit():
    """zsaa.kit under a name of its own, and so without the package around it, which imports torch."""
    folder = Path(__file__).resolve().parent / "kit"
    where = dict(submodule_search_locations=[str(folder)])
    spec = importlib.util.spec_from_file_location("zsaa_kit", folder / "__init__.py", **where)
    sys.modules[spec.name] = kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    return importlib.import_module("zsaa_kit.runner.command")


if __name__ == "__main__":
    try:
        sys.exit(load_kit().main())
    except KeyboardInterrupt:  # before the runner listens itself
        sys.exit(130)
