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
        is_ours = try_lock(lock.fileno(), file)
    except OSError:
        lock.close()
        raise
    if is_ours:
        return lock
    lock.close()
    return None


def try_lock(handle: int, path: Path) -> bool:
    """Locks an open file or folder; False where another process has it, or has just replaced it.

    Raises OSError where the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(handle).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


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
        with contextlib.suppress(OSError):  # no locks here
            is_ours = try_lock(handle, folder)
        yield is_ours
    finally:
        os.close(handle)
