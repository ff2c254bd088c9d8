"""How a run ends before its time: one line on stderr and an exit status that a job can act on."""

import functools
import sys
import time
import traceback

from trainer.process_name import process_name, rank_for_messages

LOST = (
    "another rank or host is gone or hangs (its own lines say why, if it is there); the same "
    "command goes on from the last checkpoint; timeout_minutes is how long a rank waits"
)
_LET_IT_BE_SAID = 2.5  # seconds


class InputError(Exception):
    """Something given from outside (a file, a column, a config key, a rank count, a full disk)
    cannot be used.

    The message is one line that names the thing and the way out. `launch/` prints it and exits with
    `status`. one_rank: other ranks do not meet it (a file that only this one reads). said: it is on
    stderr already, for all ranks that met it (trainer.distributed.liveness).
    """

    status = 2

    def __init__(self, message, one_rank=False):
        super().__init__(message)
        self.one_rank = one_rank
        self.said = False


class NotFinite(InputError):
    """The loss is infinite or not a number; the same command would meet it again."""

    status = 3


class RanksLost(InputError):
    """Other ranks do not answer any more; the same command goes on from the last checkpoint.

    What the backend raised is its `__cause__`, and is printed below the line.
    """

    status = 4


class Stopped(InputError):
    """Asked to stop (SIGTERM, SIGUSR1, SIGINT), and a checkpoint written; the same command goes on
    from there."""

    status = 75  # EX_TEMPFAIL of sysexits.h


def say(error: InputError, who: str = "") -> None:
    """The error's line on stderr, and below it what the backend raised. who: a name that is put
    before the message."""
    start = "" if isinstance(error, Stopped) else "error: "
    print(start + " ".join(f"{who}{error}".split()), file=sys.stderr, flush=True)
    if isinstance(error, RanksLost) and error.__cause__ is not None:
        traceback.print_exception(error.__cause__)


def exit_on_input_error(main):
    """Decorates a script's `main`: an `InputError` becomes one line on stderr and its exit status.

    Ranks that have met (trainer.distributed.liveness) say it once. Before they have, each says it for itself,
    with its name; the first rank does so at once, and where its launcher then takes all down, the
    others have not said it again.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if not error.said:
                _say_alone(error)
            sys.exit(error.status)

    return wrapped


def _say_alone(error):
    if isinstance(error, RanksLost) or rank_for_messages() == 0:
        say(error)
        return
    if not error.one_rank:
        time.sleep(_LET_IT_BE_SAID)
    say(error, f"{process_name()}: ")
