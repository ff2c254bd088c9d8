"""How a run ends before its time: one line on stderr and an exit status that a job can act on."""

import functools
import os
import sys
import time

_LET_IT_BE_SAID = 1.0  # seconds


class InputError(Exception):
    """Something given from outside (a file, a column, a config key, a rank count, a full disk) cannot be used.

    The message is one line that names the thing and the way out. `launch/` prints it and exits with `status`.
    one_rank: other ranks do not meet it (a file that only this one reads); otherwise rank 0 alone prints it for all.
    """

    status = 2

    def __init__(self, message, one_rank=False):
        super().__init__(message)
        self.one_rank = one_rank


class NotFinite(InputError):
    """The loss is infinite or not a number; the same command would meet it again."""

    status = 3


class RanksLost(InputError):
    """Other ranks do not answer any more; the same command goes on from the last checkpoint."""

    status = 4


class Stopped(InputError):
    """Asked to stop (SIGTERM, SIGUSR1), and a checkpoint written; the same command goes on from there."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def exit_on_input_error(main):
    """Decorates a script's `main`: an `InputError` becomes one line on stderr and its exit status."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if error.one_rank or int(os.environ.get("RANK", "0")) == 0:
                start = "" if isinstance(error, Stopped) else "error: "
                print(start + " ".join(str(error).split()), file=sys.stderr, flush=True)
            else:  # a launcher takes all down when it sees the first one gone, and it is rank 0 that says why
                time.sleep(_LET_IT_BE_SAID)
            sys.exit(error.status)

    return wrapped
