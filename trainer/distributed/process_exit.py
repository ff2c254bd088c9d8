"""The begin and the end of a script that joins a process group, and its exit status."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from trainer.process_name import process_name

INTERRUPTED = 128 + signal.SIGINT


def run_script(main: Callable[[], object]) -> NoReturn:
    """Calls main() and ends this process with its status.

    That is 0, the status of `sys.exit`, 1 with the trace of an exception, or 130 where it was
    interrupted (SIGINT).

    Python's own teardown is left out: a process that goes through it while threads of gloo are at
    work (DeepSpeed and TorchRec keep the group alive) is aborted now and then, after all is done. A
    failure does not wait for anything either: the launcher takes the other ranks down when it sees
    this one gone.
    """
    status = 0
    try:
        main()
    except SystemExit as exit_request:
        status = _exit_status(exit_request)
    except KeyboardInterrupt:
        print(f"{process_name()}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BaseException:
        print(f"{process_name()} failed:", file=sys.stderr)
        traceback.print_exc()
        status = 1
    end_process(status)


def _exit_status(exit_request: SystemExit) -> int:
    """The status of `sys.exit(code)`; a text is printed, as Python does."""
    code = exit_request.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code
    if isinstance(code, str):
        print(code, file=sys.stderr)
    return 1


def end_process(status: int) -> NoReturn:
    """Ends this process at once, in any thread, and its child processes, which load batches."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
