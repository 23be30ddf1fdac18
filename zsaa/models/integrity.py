"""Whether files are what they were: checksums, the shape of safetensors and GGUF files, a disk that can be written."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import struct
from pathlib import Path

from zsaa.kit.files import is_stray
from zsaa.models.errors import AssetError, DamagedError, first_line


def sha256(*paths):
    """Hex sha256 of the files, one after the other; remembered until a file's size or time changes."""
    stats = [os.stat(path) for path in paths]
    return _sha256_of(tuple((os.fspath(p), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)))


@functools.lru_cache(maxsize=64)
def _sha256_of(files):
    digest = hashlib.sha256()
    for path, _, _ in files:
        with open(path, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def check_safetensors(folder):
    """DamagedError for a safetensors file in `folder` that is cut short or has no header."""
    for path in sorted(p for p in Path(folder).glob("*.safetensors") if not is_stray(p, Path(folder))):
        size = path.stat().st_size
        try:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                if length > size:
                    raise ValueError("the header says more bytes than there are")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            whole = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
            if size != whole:
                raise ValueError(f"{size} bytes instead of {whole}")
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{path} is damaged: {error}. Save or copy the folder {folder} again.") from error


def check_gguf(folder, name):
    """AssetError for a GGUF file that is not in `folder`, or not a whole model."""
    if not (folder / name).is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*.gguf") if not is_stray(p, folder))) or "none"
        raise AssetError(f"there is no file {name} in {folder}; GGUF files there: {there}")
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", name)
    if part and int(part[1]) > 1:
        raise AssetError(
            f"{folder / name} is one of {int(part[1])} parts of a model. Join them first, with llama.cpp: "
            f"llama-gguf-split --merge {name} whole.gguf"
        )


@contextlib.contextmanager
def gguf_errors(gguf):
    """DamagedError for a GGUF file that cannot be understood (where no RECORD tells that it is damaged). None: none is
    read."""
    try:
        yield
    except (ValueError, LookupError, EOFError, ArithmeticError, TypeError, MemoryError, struct.error) as error:
        if gguf is None:
            raise
        raise DamagedError(
            f"{gguf} is damaged or no GGUF file of a known model ({first_line(error)}). Copy or fetch it again"
        ) from error


@contextlib.contextmanager
def disk_errors(folder, name, gib):
    """Turn a full or read-only disk, or one without locks, into an AssetError that names the folder and ZSAA_CACHE.
    gib: what the model `name` needs there."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:  # safetensors reports a full disk as its own SafetensorError
        move = f"or set ZSAA_CACHE to a folder with room (now {folder})."
        if getattr(error, "errno", None) in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise AssetError(
                f"the file system of {folder} has no locks ({error}), which keep two processes from converting "
                f"{name!r} at the same time. Set ZSAA_CACHE to a folder on another disk, a local one."
            ) from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise AssetError(
                f"the disk is full: {name!r} needs {gib:.1f} GiB in {folder}. Nothing was left behind. "
                f"Make room there, {move}"
            ) from error
        if isinstance(error, (PermissionError, NotADirectoryError, FileExistsError)) or (
            getattr(error, "errno", None) == errno.EROFS
        ):
            raise AssetError(f"cannot write to the cache folder {folder}: {error}. Make it writable, {move}") from error
        raise
