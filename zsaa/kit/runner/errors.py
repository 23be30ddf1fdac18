"""Exit codes, and the exceptions that lead to them."""

from __future__ import annotations

import errno

OK, FAILED, USAGE, SETUP, FOLDER, LACKING = 0, 1, 2, 3, 4, 5
EXIT_CODES = """exit codes:
  0    every selected notebook is done
  1    a notebook failed (an error in a cell, or its kernel was killed), or the index page did
  2    bad usage: unknown profile, notebook, option or parameter, or a damaged profiles.yaml or notebook
  3    the set-up failed (no network, no or too old Python, no room on the disk, a package missing)
  4    the output folder cannot be used: not a run's own, in use by another run, not writable, or full
  5    nothing failed, but a notebook was not run: what it needs is not here (the run says what, and how to get it)
  130  interrupted by Ctrl-C (143: by SIGTERM, 129: by SIGHUP); the same command goes on where it stopped
"""


class UsageError(Exception):
    """The command, profiles.yaml or a notebook's parameters are wrong; exit code 2."""


class FolderError(Exception):
    """The output folder cannot be used; exit code 4."""


class NotebookError(Exception):
    """A notebook did not run to its end; exit code 1."""


class DiskError(NotebookError):
    """A notebook did not run to its end because a disk is full; exit code 4."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def is_full(error: BaseException | None) -> bool:
    """Whether the system refused to write: a full disk, a full quota, a read-only disk."""
    return isinstance(error, OSError) and error.errno in FULL
