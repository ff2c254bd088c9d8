"""The lock of a run's folder: the first rank holds it while the run lasts, so that one run writes.

    run/.lock      {"host": …, "pid": …} of the process that holds the lock

The lock (flock) ends with its process, however that ends; the file alone locks nothing. Forked
loaders do not hold it. NFS passes it on between hosts (Linux 2.6.12 and newer). Where a file system
has no locks, a line on stderr says so and the run goes on.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from trainer.distributed.agreement import run_on_first_rank
from trainer.errors import InputError
from trainer.files.close_on_fork import open_unshared
from trainer.files.lock import try_lock
from trainer.run_files import LOCK

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
# Seconds. A server of NFS forgets a host that is gone after its lease: 90 s by itself.
_LEASE = 100.0
_RETRY_AFTER = 0.5


@contextlib.contextmanager
def lock_run_folder_on_first_rank(run: Path, first: bool) -> Iterator[None]:
    """Within it the run's folder belongs to these ranks. Collective.

        with locked_by_first_rank(run, ranks.first):
            train(config, ranks)

    Raises InputError on all ranks where another process has the lock, or where the folder cannot be
    made.
    """
    locks = contextlib.ExitStack()
    run_on_first_rank(lambda: locks.enter_context(lock_run_folder(run)), first)
    with locks:
        yield


@contextlib.contextmanager
def lock_run_folder(run: Path) -> Iterator[None]:
    """Within it the run's folder belongs to this process.

    Makes the folder where there is none, and removes it where nothing was written into it. Raises
    InputError.
    """
    try:
        made = not run.exists()
        run.mkdir(parents=True, exist_ok=True)
        lock = _wait_for_lock(run)
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


def _wait_for_lock(run: Path) -> TextIO:
    """The open file that holds the lock.

    Waits up to a lease where the owner may be gone. Raises InputError where another process has it.
    """
    deadline = time.monotonic() + _LEASE
    waits = False
    while True:
        lock = _take_lock(run)
        if lock is not None:
            return lock
        owner = _read_owner(run)
        is_late = time.monotonic() > deadline
        if owner is None or is_late or not _may_be_gone(owner):
            who = "it is not known which"
            if owner is not None:
                who = f"host {owner['host']}, process {owner['pid']}"
            raise InputError(
                f"{run}: another run writes in this folder ({who}): wait for it, stop it, or give "
                "another run=DIR"
            )
        if not waits:
            waits = True
            who = f"process {owner['pid']} of host {owner['host']}"
            print(
                f"{run}: waits up to {_LEASE:.0f} s for the lock of {who}",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(_RETRY_AFTER)


def _take_lock(run: Path) -> TextIO | None:
    """The open file that holds the lock, with this process in it; None where another has it."""
    path = run / LOCK
    lock = open_unshared(open, path, "a+")
    try:
        if not try_lock(lock.fileno(), path):
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


def _read_owner(run: Path) -> dict[str, Any] | None:
    """Host and process number of the lock's owner; None where the file does not tell."""
    try:
        owner = json.loads((run / LOCK).read_text(encoding="utf-8"))
        return {"host": str(owner["host"]), "pid": int(owner["pid"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _may_be_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner may be dead while its lock lives on.

    A server may not have missed another host yet; a process of this host is not there.
    """
    if owner["host"] != socket.gethostname():
        return True
    return not Path(f"/proc/{owner['pid']}").exists()
