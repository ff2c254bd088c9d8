"""A run's folder has one writer: the first rank locks it for as long as the run lasts.

    run/.lock      {"host": …, "pid": …} of the process that holds the lock

The lock (flock) ends with its process, however that ends; the file alone locks nothing. Forked
loaders do not hold it. NFS passes it on between hosts (Linux 2.6.12 and newer); where a file system
has no locks, that is said and the run goes on.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trainer.distributed.agreement import by_the_first
from trainer.errors import InputError
from trainer.files.close_on_fork import open_unshared
from trainer.run_files import LOCK

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Seconds. A server of NFS forgets a host that is gone after its lease: 90 s by itself.
_LEASE = 100.0
_TRY = 0.5


@contextlib.contextmanager
def locked_by_first_rank(run: Path, first: bool) -> Iterator[None]:
    """Within it the run's folder belongs to these ranks. Called on all ranks; raises InputError on
    all where another process has it, or where the folder cannot be made."""
    locks = contextlib.ExitStack()
    by_the_first(lambda: locks.enter_context(locked(run)), first)
    with locks:
        yield


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """The folder, which is made where it is not there, for this process alone. Leaves nothing where
    nothing was written."""
    try:
        made = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        lock = _wait_for(run)
    except OSError as error:
        raise InputError(
            f"{run}: cannot be written ({error.strerror}): give a folder that can be as run=DIR"
        ) from None
    try:
        yield
    finally:
        (run / LOCK).unlink(missing_ok=True)
        lock.close()
        if made:
            with contextlib.suppress(OSError):  # it holds a run
                run.rmdir()


def _wait_for(run):
    """The open file that holds the lock. Waits where its owner is on a host that does not answer
    for it any more."""
    deadline = time.monotonic() + _LEASE
    told = False
    while True:
        lock = _take(run)
        if lock is not None:
            return lock
        owner = _owner(run)
        if not _may_be_gone(owner) or time.monotonic() > deadline:
            who = (
                f"host {owner['host']}, process {owner['pid']}"
                if owner
                else "it is not known which"
            )
            raise InputError(
                f"{run}: another run writes in this folder ({who}): wait for it, stop it, or give "
                "another run=DIR"
            )
        if not told:
            told = True
            who = f"process {owner['pid']} of host {owner['host']}"
            print(
                f"{run}: waits up to {_LEASE:.0f} s for the lock of {who}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_TRY)


def _take(run):
    path = run / LOCK
    lock = open_unshared(open, path, "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (
            os.fstat(lock.fileno()).st_ino != path.stat().st_ino
        ):  # the owner has just taken it away
            raise FileNotFoundError
    except (BlockingIOError, FileNotFoundError):
        lock.close()
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            lock.close()
            raise
        print(
            f"{run}: this file system has no locks ({error.strerror}): see to it that one run at a "
            "time writes here",
            file=sys.stderr,
            flush=True,
        )
    lock.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid()}, lock)
    lock.flush()
    return lock


def _owner(run):
    try:
        owner = json.loads((run / LOCK).read_text(encoding="utf-8"))
        return {"host": str(owner["host"]), "pid": int(owner["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _may_be_gone(owner):
    """A process of another host, which may be one that a server has not missed yet; or of this one,
    which is not there."""
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return True
    return not Path(f"/proc/{owner['pid']}").exists()
