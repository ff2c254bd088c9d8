"""Files that this process may hold open at once: how many, and what to say where it may open no more."""

import errno
import resource

from trainer.errors import InputError

_SHARE = 4  # one in so many is for shards; the others are for sockets, shared memory and libraries


class NoDescriptors(InputError):
    """A file cannot be opened, because too many are open: nothing is wrong with the file."""

    def __init__(self, path, error: OSError):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        where, way_out = f"this process may have {limit}", "raise it (ulimit -n 65536)"
        if error.errno == errno.ENFILE:
            where, way_out = "this machine may have no more", "raise fs.file-max"
        super().__init__(
            f"{path} cannot be opened: too many files are open, {where}: {way_out}",
            one_rank=True,
        )


def is_lack(error: OSError) -> bool:
    """Whether too many files are open, in this process or on this machine."""
    return error.errno in (errno.EMFILE, errno.ENFILE)


def files_to_keep(most: int) -> int:
    """How many files to keep open for later use: `most`, or a share of what the process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // _SHARE))
    )
