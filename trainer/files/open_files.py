"""File descriptors: how many files this process may hold open, and what to say where it is too many."""

import errno
import resource
from pathlib import Path

from trainer.errors import InputError

# Errors of the system for which a file itself is at fault. Any other (a mount that is away, no
# memory) may pass; tools that unpack say EINVAL of a torn file, and some OSErrors have no number.
ERRORS_OF_FILE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    None,
}
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


def explain_unreadable(
    path: str | Path, error: OSError, way_out: str
) -> InputError:
    """The error for a file that cannot be read: whether it or this machine is at fault.

    way_out: what to do where the file is. A disk or a mount that is away, a permission and a lack of
    memory or descriptors are no fault of the file.
    """
    if is_too_many_open_files(error):
        return TooManyOpenFiles(path, error)
    reason = error.strerror or error
    if error.errno not in ERRORS_OF_FILE:
        way_out = "look after its disk or mount, and the same command goes on"
    if error.errno in (errno.EACCES, errno.EPERM):
        way_out = "give this user the right to read it"
    return InputError(f"{path} cannot be read ({reason}): {way_out}")


def open_file_budget(most: int) -> int:
    """The number of files to keep open for later use: `most`, or this process's share of its limit."""
    limit = _descriptor_limit()
    if limit == resource.RLIM_INFINITY:
        return most
    return max(1, min(most, limit // _SHARE))


def _descriptor_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft
