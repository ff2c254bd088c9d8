"""An exclusive lock on a file (flock), which ends with its process, however that ends."""

import fcntl
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
