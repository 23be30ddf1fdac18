"""The output folder: which one may be used, and by one run at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import re
import time
from collections.abc import Iterator
from pathlib import Path

from ..files import is_stray
from .console import say
from .errors import FolderError

# The clone's own folders, which no run may write to.
OURS = ("ablation", "docs", "examples", "figures", "kernels", "notebooks", "results", "tests", "tools", "zsaa")
ALLOWED = (
    "it may be a new or an empty folder, or one that an earlier run made; in the clone, one below outputs/. "
    "Name another with --output-dir, or leave the option out"
)


def output_folder(root: Path, given: str | None, profile: str) -> Path:
    """The folder that --output-dir names, outputs/<profile> without it. Raises FolderError where a run would overwrite
    or mix with other files."""
    if given is None:
        return (root / "outputs" / profile).resolve()
    reason, out = "names no folder", Path(given)
    if re.match(r"[A-Za-z][\w+.-]*://", given):
        reason = "is an address, and no folder of this machine"
    elif given.strip():
        with contextlib.suppress(RuntimeError):  # of a user who is not known
            out = out.expanduser()
        out = out.resolve()
        reason = _refusal(root, out)
    if reason:
        raise FolderError(f"--output-dir {given!r} {reason}; {ALLOWED}.")
    return out


def _refusal(root: Path, out: Path) -> str:
    """Why `out` may not be used, or nothing."""
    homes = [root.resolve()]
    with contextlib.suppress(RuntimeError):
        homes.append(Path.home().resolve())
    try:
        for home in homes:
            if any(_same(out, folder) for folder in (home, *home.parents)):
                return f"is {out}, which holds {home}" if out != home else f"is {out}, which is no run's own"
        for folder in (out, *out.parents):
            if any(_same(folder, root / name) for name in OURS):
                return f"is in {folder}, a folder of the clone itself"
            if _same(folder.parent, root) and folder.name.startswith("."):
                return f"is in {folder}, which is hidden"
        if out.exists() and not out.is_dir():
            return f"is {out}, a file"
        if out.is_dir() and not any((out / name).is_dir() for name in ("executed", "done")):
            other = next((path for path in sorted(out.iterdir()) if not is_stray(path, out)), None)
            return f"is {out}, which holds other files ({other.name})" if other else ""
    except OSError as error:
        return f"is {out}, which cannot be looked into ({error.strerror})"
    return ""


def _same(one: Path, other: Path) -> bool:
    """Whether both are one folder, on file systems too for which Results and results are the same."""
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return one == other


LOCK_SECONDS = 5.0  # how long the kernel of a killed run may take to notice


@contextlib.contextmanager
def own_folder(out: Path, notebooks: list[str] | None = None) -> Iterator[tuple[int, ...]]:
    """Makes sure that `out` can be written and that no other run is writing there; yields the locks' descriptors.

    notebooks: of a shard. Shards share the folder, and each has its notebooks for itself.
    """
    wanted = [(".lock", fcntl.LOCK_EX if notebooks is None else fcntl.LOCK_SH)]
    wanted += [(f".lock-{name}", fcntl.LOCK_EX) for name in notebooks or ()]
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            locks = [(stack.enter_context(open(out / name, "a+")), kind) for name, kind in wanted]
        except OSError as error:
            raise FolderError(f"cannot write to {out}: {error.strerror}; name another with --output-dir") from None
        deadline = time.monotonic() + LOCK_SECONDS
        for lock, kind in locks:  # freed by the system, after kill -9 too
            if not _take(lock, kind, deadline, out):
                break
        yield tuple(lock.fileno() for lock, _ in locks)


def _take(lock, kind: int, deadline: float, out: Path) -> bool:
    """Whether the lock was taken; False where the file system has no locks, which is said. Raises FolderError where
    another run holds it until the deadline."""
    while True:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):  # the last: some network drives
                say(
                    f"note: the file system of {out} has no locks ({error.strerror}), so nothing keeps a second run "
                    "out of this folder: start one at a time."
                )
                return False
            if time.monotonic() > deadline:
                raise FolderError(f"another run is using {out}; wait, or name another --output-dir") from None
            time.sleep(0.1)
