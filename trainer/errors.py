"""Errors that end a run: one line on stderr, and an exit status that a job can act on."""

import errno
import functools
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from trainer.interrupts import is_interrupted
from trainer.process_name import process_name, rank_for_messages

P = ParamSpec("P")
T = TypeVar("T")

RANKS_LOST_ADVICE = (
    "another rank or host is gone or hangs (its own lines say why, if it is there); the same "
    "command goes on from the last checkpoint; timeout_minutes is how long a rank waits"
)
# Time for the first rank's line, and for its launcher to end the others, who then do not repeat it.
_SECONDS_FOR_FIRST_RANK = 2.5

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


class InputError(Exception):
    """An input (a file, a column, a config key, a rank count, a full disk) cannot be used.

    The message is one line that names the thing and the way out. `launch/` prints it and exits with
    `status`. one_rank: other ranks do not meet it (a file that only this one reads). said: it was
    printed already, for all ranks that met it (trainer.distributed.liveness).
    """

    status = 2

    def __init__(self, message: str, one_rank: bool = False):
        super().__init__(message)
        self.one_rank = one_rank
        self.said = False


class NonFiniteLoss(InputError):
    """The loss is infinite or not a number; the same command would meet it again."""

    status = 3


class LostRanks(InputError):
    """Other ranks do not answer any more; the same command resumes from the last checkpoint.

    The backend's error is its `__cause__`, and is printed below the line.
    """

    status = 4


class RunStopped(InputError):
    """The run was asked to stop (preemption, Ctrl-C) and has written a checkpoint.

    The same command resumes from it. interrupted: it was Ctrl-C, in this process.
    """

    status = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(self, message: str, interrupted: bool = False):
        super().__init__(message)
        self.interrupted = interrupted


def explain_os_error(error: OSError) -> InputError | None:
    """The InputError for a place that cannot be used; None where the program is at fault.

    A folder below a file, a read-only disk, a missing right, a full disk.
    """
    place = error.filename2 or error.filename
    if error.errno in _FULL:
        return InputError(
            f"{place or 'the disk'}: {error.strerror}: make room, and the same command again",
            one_rank=True,
        )
    if error.errno in _UNUSABLE and place is not None:
        return InputError(
            f"{place}: {error.strerror}: give a place that this user may use",
            one_rank=True,
        )
    return None


def print_error(error: InputError, who: str = "") -> None:
    """Prints an error's line on stderr, and below it the backend's error.

    who: a name to put before the message.
    """
    start = "" if isinstance(error, RunStopped) else "error: "
    line = " ".join(f"{who}{error}".split())
    print(start + line, file=sys.stderr, flush=True)
    if isinstance(error, LostRanks) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)


def exit_on_input_error(main: Callable[P, T]) -> Callable[P, T]:
    """Decorates a script's `main`: an `InputError` becomes one line on stderr and its exit status.

    So does an OSError of a place that cannot be used.

    Ranks that have met (trainer.distributed.liveness) print it once. Before they have, each prints
    it with its own name. The first rank does so at once, and where its launcher then ends all
    ranks, the others do not repeat it.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except InputError as error:
            _exit(error)
        except OSError as error:
            refusal = explain_os_error(error)
            if refusal is None:
                raise
            _exit(refusal)

    return wrapped


def _exit(error: InputError) -> NoReturn:
    if is_interrupted() and not isinstance(error, RunStopped):
        raise KeyboardInterrupt from error
    if not error.said:
        _print_on_this_rank(error)
    sys.exit(error.status)


def _print_on_this_rank(error: InputError) -> None:
    if isinstance(error, LostRanks) or rank_for_messages() == 0:
        print_error(error)
        return
    if not error.one_rank:
        time.sleep(_SECONDS_FOR_FIRST_RANK)
    print_error(error, f"{process_name()}: ")
