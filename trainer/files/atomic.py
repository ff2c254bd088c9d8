"""Atomic files: each is there whole or not at all, after a power cut too; and patience with late storage.

Whoever writes a file writes it under another name, flushes it to disk (fsync), renames it, and
flushes the folder. On a network file system another host may see that later: NFS keeps what it
knows of a file or a folder for up to 60 s (`acregmax` and `acdirmax` of nfs(5)). So nobody decides
by a listing: files are opened by their names, and a missing one is looked for again while a
`Patience` lasts.
"""

import contextlib
import ctypes
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import InputError

T = TypeVar("T")

LATENESS = 75.0  # seconds after which every host sees what was written: NFS's 60, and some to spare
PAUSE = 0.5  # seconds between two looks

# Of renameat2(2).
_AT_FDCWD = -100
_EXCHANGE = 2

# File systems that no other host writes in; any other, and an unknown one, may show things late.
_LOCAL_FILE_SYSTEMS = {
    "btrfs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "overlay",
    "ramfs",
    "tmpfs",
    "xfs",
    "zfs",
}
# Transient errors of a storage: a handle of before, a server that is away for a while, a folder
# that is not seen yet.
_TRANSIENT = {
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.ENOENT,
    errno.ENOTCONN,
    errno.EREMOTEIO,
    errno.ESHUTDOWN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class LateStorage(InputError):
    """The storage did not show, take or give a file in time.

    The same command resumes from the last checkpoint.
    """

    status = 5


class Patience:
    """The time for which files that others wrote into a folder are still looked for.

    It lasts LATENESS seconds from its making; no time at all where the folder lies on a local disk.
    """

    def __init__(self, folder: Path):
        self.shared = is_shared(folder)
        lateness = LATENESS if self.shared else 0.0
        self._end = time.monotonic() + lateness

    @property
    def over(self) -> bool:
        """True once nothing can be late any more."""
        return time.monotonic() >= self._end

    def wait(self) -> None:
        """Sleeps until the next look."""
        left = max(0.0, self._end - time.monotonic())
        time.sleep(min(PAUSE, left))


def retry_patiently(read: Callable[[], T], patience: Patience) -> T:
    """Returns what read() returns, and retries while it raises a transient OSError.

    Raises the last error once the patience is over.
    """
    while True:
        over = patience.over
        try:
            return read()
        except OSError as error:
            if over or not is_transient(error.errno):
                raise
        patience.wait()


def is_shared(folder: Path) -> bool:
    """Whether other hosts may write in a folder: unless its file system is known to be local."""
    path = os.path.realpath(folder)
    try:
        lines = (
            Path("/proc/self/mountinfo")
            .read_text(encoding="utf-8")
            .splitlines()
        )
    except OSError:
        return True
    kind = ""
    longest = -1
    # A line, see proc(5): 36 35 98:0 /root /mount/point options - ext3 source options
    for line in lines:
        before, _, after = line.partition(" - ")
        mount_point = _unescape(before.split()[4]).rstrip("/")
        contains = path == mount_point or path.startswith(f"{mount_point}/")
        if contains and len(mount_point) >= longest:
            longest = len(mount_point)
            kind = after.split()[0]
    return kind not in _LOCAL_FILE_SYSTEMS


def _unescape(text: str) -> str:
    """A path of mountinfo, in which blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def is_transient(number: int | None) -> bool:
    """Whether an error number is transient: another attempt may not meet it."""
    return number in _TRANSIENT


def write_json(file: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    write_text(file, json_text(value))


def json_text(value: Any) -> str:
    """A value as the text of a JSON file."""
    return json.dumps(value, indent=1) + "\n"


def write_text(file: Path, text: str) -> None:
    """Writes a text atomically: a reader, and a crash, see the old file or the new one."""
    rename_partial(write_beside(file, text))


def write_beside(file: Path, text: str) -> Path:
    """Writes and flushes a text beside its file, and returns its path.

    It takes all the room on the disk that is needed; `put_in_place` needs none.
    """
    partial = _partial(file)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    return partial


def rename_partial(partial: Path) -> None:
    """Renames what was written beside a file to the file, and flushes the folder."""
    file = partial.with_suffix("")
    os.replace(partial, file)
    flush(file.parent)


@contextlib.contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yields the path to write a file under; it replaces the file unless something is raised."""
    partial = _partial(file)
    yield partial
    flush(partial)
    rename_partial(partial)


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def move_folder(partial: Path, folder: Path) -> None:
    """Flushes a folder with all that is in it, and renames it."""
    flush_tree(partial)
    os.rename(partial, folder)
    flush(folder.parent)


def exchange_folders(one: Path, other: Path) -> None:
    """Exchanges what two names of one file system stand for, in one move, and flushes the folders.

    Raises OSError where the system or the file system cannot.
    """
    library = ctypes.CDLL(None, use_errno=True)
    try:
        rename = library.renameat2
    except AttributeError:
        number = errno.ENOSYS
    else:
        names = [os.fsencode(one), os.fsencode(other)]
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE) == 0:
            flush(one.parent)
            flush(other.parent)
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), str(other))


def flush_tree(folder: Path) -> None:
    """Flushes every file in a folder to disk, and every folder after what is in it."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(parent) / name
            if not file.is_symlink():
                flush(file)
        flush(Path(parent))


def flush(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
