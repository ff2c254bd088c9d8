"""Files that are there whole or not at all, after a power cut too; and patience with a storage that
shows them late.

Whoever writes a file writes it under another name, flushes it to disk, moves it over with one
rename, and flushes the folder. On a network file system another host may see that later: NFS keeps
what it knows of a file or a folder for up to 60 s (`acregmax` and `acdirmax` of nfs(5)). So nobody
decides by a listing: files are opened by their names, and what is not there yet is looked for again
while a `Patience` lasts."""

import contextlib
import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from trainer.errors import InputError

T = TypeVar("T")

LATENESS = 75.0  # seconds after which every host sees what was written: NFS's 60, and some to spare
PAUSE = 0.5  # seconds between two looks

# File systems that no other host writes in; any other, and an unknown one, may show things late.
_OF_ONE_HOST = {
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
# What a storage says in passing: a handle of before, a server that is away for a while, a folder
# that is not seen yet.
_PASSING = {
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


class StorageLate(InputError):
    """The storage did not show, take or give a file in time; the same command goes on from the last
    checkpoint."""

    status = 5


class Patience:
    """How long files that others wrote into a folder are still looked for: LATENESS seconds from when
    it was made; not at all where the folder lies on a disk of this host's own."""

    def __init__(self, folder: Path):
        self.shared = is_shared(folder)
        self._end = time.monotonic() + (LATENESS if self.shared else 0.0)

    @property
    def over(self) -> bool:
        """True once nothing can be late any more."""
        return time.monotonic() >= self._end

    def wait(self) -> None:
        """Until the next look."""
        time.sleep(min(PAUSE, max(0.0, self._end - time.monotonic())))


def patiently(read: Callable[[], T], patience: Patience) -> T:
    """What read() returns, tried again while it raises an OSError that passes. Raises the last
    one."""
    while True:
        over = patience.over
        try:
            return read()
        except OSError as error:
            if over or not passes(error.errno):
                raise
        patience.wait()


def is_shared(folder: Path) -> bool:
    """Whether other hosts may write in a folder: where its file system is none that one host has."""
    place = os.path.realpath(folder)
    kind, longest = "", -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return True
    for line in (
        lines
    ):  # 36 35 98:0 /root /mount/point options - ext3 source options, see proc(5)
        fields, _, others = line.partition(" - ")
        point = _unescaped(fields.split()[4]).rstrip("/")
        if len(point) >= longest and (place == point or place.startswith(f"{point}/")):
            longest = len(point)
            kind = others.split()[0]
    return kind not in _OF_ONE_HOST


def _unescaped(text):
    """A path of mountinfo, where blanks and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def passes(number: int | None) -> bool:
    """Whether an error number is of the kind that another attempt may not meet."""
    return number in _PASSING


def write_json(file: Path, value) -> None:
    """`write_text` of a value as JSON."""
    write_text(file, as_json(value))


def as_json(value) -> str:
    """A value as this program's JSON files have it."""
    return json.dumps(value, indent=1) + "\n"


def write_text(file: Path, text: str) -> None:
    """A reader, and a crash, see the old file or the new one."""
    put_in_place(write_beside(file, text))


def write_beside(file: Path, text: str) -> Path:
    """Writes and flushes all that needs room on the disk; `put_in_place` needs none."""
    partial = _beside(file)
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    return partial


def put_in_place(partial: Path) -> None:
    """What was written beside a file takes its place."""
    file = partial.with_suffix("")
    os.replace(partial, file)
    flush(file.parent)


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Yields the name under which the file is to be written; it takes the file's place where
    nothing is raised."""
    partial = _beside(file)
    yield partial
    flush(partial)
    put_in_place(partial)


def _beside(file):
    return file.with_name(file.name + ".partial")


def move_folder(partial: Path, folder: Path) -> None:
    """Flushes a folder with all that is in it, and gives it its name."""
    flush_tree(partial)
    os.rename(partial, folder)
    flush(folder.parent)


def flush_tree(folder: Path) -> None:
    """Flushes every file in a folder to disk, and every folder after what is in it."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(place) / name
            if not file.is_symlink():
                flush(file)
        flush(Path(place))


def flush(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
