"""Files that are written in one piece, and files that are nobody's data."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import os
import platform
import secrets
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

FOREIGN_DRAFT_SECONDS = 24 * 3600  # after which a draft of another machine is taken for left behind


@contextlib.contextmanager
def draft(path: str | Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to; at the block's end the file takes `path`'s place.

    Readers see the old or the whole new content, after a power cut too, and no draft, as its suffix is none that they
    look for. The name is this call's alone, so that processes and threads that write the same file do not meet. If the
    block raises, nothing is left. Drafts of processes that were killed are cleared away. The umask sets the mode.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path)
    own = _own(path)
    try:
        yield own
        handle = os.open(own, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` (UTF-8) to `path` in one piece; see `draft`."""
    with draft(path) as own:
        own.write_text(text, encoding="utf-8")
    return Path(path)


def check_writable(path: str | Path) -> None:
    """OSError, before hours are spent on what goes there, if a file cannot be written to `path`. Leaves nothing."""
    path = Path(path)
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        own = _own(there / path.name)
        own.touch()
        own.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}. Name another place, or make room there.") from error


def _own(path: Path) -> Path:
    """A hidden name beside `path` that no other call has."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


@functools.cache
def _host() -> str:
    """Tells the processes apart that share a folder but not a table of processes: machines, and their containers."""
    spaces = ""
    with contextlib.suppress(OSError):
        spaces = os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(f'{platform.node()} {spaces}'.encode()):08x}"


def _clear(path: Path) -> None:
    """Removes the drafts of `path` whose writers are no more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*-*"):
        host, _, rest = left.name.removeprefix(f".{path.name}.").partition("-")
        pid = rest.partition("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another process clears as well
            if not pid.isdigit():
                continue
            if not _alive(int(pid)) if host == _host() else left.stat().st_mtime < time.time() - FOREIGN_DRAFT_SECONDS:
                left.unlink()


def _alive(pid: int) -> bool:
    if os.name != "posix":  # there, signal 0 is no question but Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def is_stray(path: Path, root: Path) -> bool:
    """Whether a file below `root` is an editor's, a system's or Python's leaving: .DS_Store, swap files, backups,
    notebook checkpoints, caches. Such files are never data, sources or results."""
    parts = path.relative_to(root).parts
    return (
        any(part.startswith(".") or part == "__pycache__" for part in parts)
        or parts[-1].startswith(("~", "#"))
        or parts[-1].endswith(("~", "#", ".bak", ".orig", ".rej", ".swp", ".tmp", ".pyc"))
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
    )
