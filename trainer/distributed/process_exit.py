"""The begin and the end of a command, and its exit status."""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from trainer.interrupts import (
    GOES_ON,
    INTERRUPTED,
    end_on_interrupt,
    is_interrupted,
    print_interrupted,
)
from trainer.process_name import process_name


def run_script(main: Callable[[], object], goes_on: bool = False) -> NoReturn:
    """Calls main() and ends this process with its status.

    That is 0, the status of `sys.exit`, 1 with the trace of an exception, or 130 where it was
    interrupted (SIGINT). Whatever is raised after an interrupt comes of it, and is not shown.
    goes_on: the same command goes on with what an interrupted one has left. Until main() calls
    `begin_work`, or joins a process group, an interrupt ends the process at once.

    Python's own teardown is left out: a process that goes through it while threads of gloo are at
    work (DeepSpeed and TorchRec keep the group alive) is aborted now and then, after all is done. A
    failure does not wait for anything either: the launcher takes the other ranks down when it sees
    this one gone.
    """
    end_on_interrupt()
    print_any_letter()
    end_process(_run(main, GOES_ON if goes_on else "interrupted"))


def print_any_letter() -> None:
    """Has what the terminal's encoding cannot write printed as a question mark."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _run(main: Callable[[], object], interrupted: str) -> int:
    """Calls main(); its status."""
    try:
        main()
    except SystemExit as exit_request:
        return _exit_status(exit_request)
    except BaseException as error:
        if is_interrupted() or isinstance(error, KeyboardInterrupt):
            print_interrupted(interrupted)
            return INTERRUPTED
        print(f"{process_name()} failed:", file=sys.stderr)
        traceback.print_exc()
        return 1
    return 0


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
        # A pipe whose reader is gone, a terminal that was closed.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
