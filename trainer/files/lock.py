"""An exclusive lock on a file or a folder (flock), which ends with its process, however that ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def take_lock(file: Path) -> TextIO | None:
    """Opens and locks a file until it is closed, or its process ends.

    Returns None where another process has the lock. Raises OSError where the file cannot be
    opened, or its file system has no locks.
    """
    lock = open(file, "w", encoding="utf-8")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Within it the folder is this process's; yields False where another one has it.

    The lock is the folder's own, so nothing is written into it. It may be replaced meanwhile: what
    stands in its place is then locked by nobody. Where the file system has no locks on folders,
    nothing is locked.

    Raises OSError where the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_ours = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have replaced the folder between both calls.
            is_ours = os.fstat(handle).st_ino == folder.stat().st_ino
        except BlockingIOError:
            is_ours = False
        except OSError:  # no locks here
            pass
        yield is_ours
    finally:
        os.close(handle)
