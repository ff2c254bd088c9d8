"""The one way in which a run tells a person that what they gave cannot be used."""

import functools
import os
import sys


class InputError(Exception):
    """Something given from outside (a file, a column, a config key, a rank count) cannot be used.

    The message is one line that names the thing and the way out. `launch/` prints it and exits with status 2.
    one_rank: other ranks do not meet it (a file that only this one reads); otherwise rank 0 alone prints it for all.
    """

    def __init__(self, message, one_rank=False):
        super().__init__(message)
        self.one_rank = one_rank


def exit_on_input_error(main):
    """Decorates a script's `main`: an `InputError` becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except InputError as error:
            if error.one_rank or int(os.environ.get("RANK", "0")) == 0:
                print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
