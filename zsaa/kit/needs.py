"""What a profile's notebooks need, and which of it is not here: a GPU, packages, models and data sets of the hub.

    gpu             an NVIDIA GPU that torch can use
    gpu:40          one with at least 40 GiB
    package:NAME    an installed package
    model:ID        a model that travels as a package, or one on the Hugging Face hub or in its local cache
    dataset:ID      a data set, likewise

Asked once, before anything runs and for seconds at most, so that nothing waits for a network that is not there.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

NO_GPU = (
    "no NVIDIA GPU that torch can use. Run it on a machine that has one, with a CUDA build of torch (CONTRIBUTING.md); "
    "without one, --profile smoke and --profile quick run on the CPU"
)


def missing(needs: Iterable[str]) -> tuple[dict[str, str], bool | None]:
    """(the needs that are not met, each with the reason and how to get it; whether the hub answers, or None if it was
    not asked)."""
    found, reached = {}, None
    for need in dict.fromkeys(needs):
        kind, _, name = need.partition(":")
        if kind == "gpu":
            reason = _gpu(float(name or 0))
        elif kind == "package":
            reason = _package(name)
        elif kind == "model" and _packaged(name):
            reason = _assets(name)
        elif reached is False:  # one question is enough to know that the hub is not there
            reason = f"likewise; get it with: hf download {name}" + " --repo-type dataset" * (kind == "dataset")
        else:
            reason, reached = _ask_hub(kind, name)
        if reason and not (kind in ("model", "dataset") and _in_cache(kind, name)):
            found[need] = reason
    return found, reached


ASK_GPU = """
import torch
print(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0)
"""


def _gpu(gib: float) -> str | None:
    # In a process of its own: asking makes a context, which would take GPU memory from the notebooks.
    isolated = ["-I"] if sys.flags.isolated else []
    asked = subprocess.run([sys.executable, *isolated, "-c", ASK_GPU], capture_output=True, text=True)
    if asked.returncode:  # it may be another process' alone, or full
        said = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"the GPU does not say how much memory it has ({said}); free it from other programs"
    has = int(asked.stdout.split()[-1]) / 2**30
    if not has:
        return NO_GPU
    return f"the GPU has {has:.0f} GiB of memory; take one with at least {gib:g}" if has < gib else None


def _package(name: str) -> str | None:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"the package {name} is not installed: pip install {name}"
    return None


def _packaged(name: str) -> bool:
    from zsaa.models import PACKAGED

    return name in PACKAGED


def _assets(name: str) -> str | None:
    from zsaa.models import AssetError, resolve

    try:
        resolve(name)
    except AssetError as error:
        return str(error)
    return None


def _in_cache(kind: str, name: str) -> bool:
    if kind == "dataset":
        import datasets

        return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()
    from huggingface_hub import snapshot_download

    try:
        return bool(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return False


def _ask_hub(kind: str, name: str) -> tuple[str | None, bool]:
    """(why `name` cannot be had or None, whether the hub answered)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    from zsaa.models import HUB_TIMEOUT, AssetError, UnreachedError, check_hub, hub_error

    try:
        check_hub(name, kind)
        if kind == "model":  # of a gated model the description is public, the files are not
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except Exception as error:  # whatever the hub's HTTP client raises
        reason = error if isinstance(error, AssetError) else hub_error(error, name, kind)
        return str(reason), not isinstance(reason, UnreachedError)
    return None, True
