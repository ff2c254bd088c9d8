"""File descriptors: how many files this process may hold open, and what to say where it is too many."""

import errno
import resource
from pathlib import Path

from trainer.errors import InputError

_SHARE = 4  # one in so many is for shards; the others are for sockets, shared memory and libraries


class TooManyOpenFiles(InputError):
    """A file cannot be opened, because too many are open: nothing is wrong with the file."""

    def __init__(self, path: str | Path, error: OSError):
        if error.errno == errno.ENFILE:
            limit = "this machine may have no more"
            way_out = "raise fs.file-max"
        else:
            limit = f"this process may have {_descriptor_limit()}"
            way_out = "raise it (ulimit -n 65536)"
        super().__init__(
            f"{path} cannot be opened: too many files are open, {limit}: {way_out}",
            one_rank=True,
        )


def is_too_many_open_files(error: OSError) -> bool:
    """Whether too many files are open, in this process or on this machine."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def open_file_budget(most: int) -> int:
    """The number of files to keep open for later use: `most`, or this process's share of its limit."""
    limit = _descriptor_limit()
    if limit == resource.RLIM_INFINITY:
        return most
    return max(1, min(most, limit // _SHARE))


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft
