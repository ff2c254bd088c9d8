"""Signals that ask a command to stop; and Ctrl-C (SIGINT): one line and status 130 at any moment.

    imports     end_on_interrupt: nothing was begun, the process ends at once
    work        begin_work: KeyboardInterrupt, so that what is half made is taken away
    training    trainer.distributed.preemption: a checkpoint first

A second Ctrl-C ends the process at once. A launcher passes on what the terminal has sent to all
processes already, so what comes within a second of the first one is no second one. Imports Python
alone: a script calls it before it imports anything else.
"""

import os
import signal
import stat
import sys
import time
from types import FrameType
from typing import NoReturn

from trainer.process_name import rank_for_messages

INTERRUPTED = 128 + signal.SIGINT
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    signal.SIGHUP,
)
GOES_ON = "interrupted; the same command goes on"
_SAME_PRESS = 1.0  # seconds


class CtrlC:
    """How often a person has pressed Ctrl-C since this was made."""

    def __init__(self) -> None:
        self._first: float | None = None

    @property
    def pressed(self) -> bool:
        """Whether once or more."""
        return self._first is not None

    def is_second(self) -> bool:
        """Notes a SIGINT; whether it is of a second press."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first >= _SAME_PRESS


_ctrl_c = CtrlC()


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends this process at once."""
    signal.signal(signal.SIGINT, _end)


def begin_work() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and a second one ends this process at once.

    That is after `end_on_interrupt`. In a notebook, and where somebody else has said what Ctrl-C
    does, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, interrupt)


def is_interrupted() -> bool:
    """Whether a command at work was interrupted: what is raised later comes of it."""
    return _ctrl_c.pressed


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of a command at work."""
    first = not _ctrl_c.pressed
    if _ctrl_c.is_second():
        end_at_once()
    if first:
        raise KeyboardInterrupt


def end_at_once() -> NoReturn:
    """Ends this process without a word, and its child processes, which may hear no Ctrl-C."""
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        for child in multiprocessing.active_children():
            child.kill()
    os._exit(INTERRUPTED)


def print_interrupted(line: str = "interrupted") -> None:
    """Prints the line; of several ranks, on the first one alone."""
    if rank_for_messages() == 0:
        print(line, file=sys.stderr, flush=True)


def _end(number: int, frame: FrameType | None) -> None:
    """The handler while a command imports."""
    # Not by print: the signal may have come within one.
    if rank_for_messages() == 0:
        os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to stop: `nohup` has it ignore SIGHUP."""
    heard = []
    for number in STOP_SIGNALS:
        ignored = signal.getsignal(number) == signal.SIG_IGN
        if not (ignored and number == signal.SIGHUP):
            heard.append(number)
    return tuple(heard)


def leave_terminal() -> None:
    """Has this process print into nothing where it printed on a terminal, which is gone.

    A line to a terminal that was closed would raise OSError (EIO).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
            # isatty says no of a terminal that is gone.
            if stat.S_ISCHR(os.fstat(number).st_mode):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, number)
                os.close(nothing)
        except (OSError, ValueError):
            continue
