"""An exclusive lock on a file or a folder (flock), which ends with its process, however that ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# A process that was killed has its locks until it has ended, which takes a moment on a busy host.
PATIENCE = 5.0
_RETRY_AFTER = 0.05


def wait_for_lock(file: Path) -> TextIO | None:
    """As `take_lock`, but waits up to `PATIENCE` seconds for one who may be ending.

    Returns None too where the other process has removed the folder meanwhile: it has finished.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            lock = take_lock(file)
        except FileNotFoundError:
            return None
        if lock is not None or time.monotonic() > deadline:
            return lock
        time.sleep(_RETRY_AFTER)


def take_lock(file: Path) -> TextIO | None:
    """Opens and locks a file until it is closed, or its process ends.

    Returns None where another process has the lock, or has just removed the file. Raises OSError
    where the file cannot be opened, or its file system has no locks.
    """
    lock = open(file, "w", encoding="utf-8")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock.fileno()).st_ino != file.stat().st_ino:
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        lock.close()
        return None
    except OSError:
        lock.close()
        raise
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
