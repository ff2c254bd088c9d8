"""Preemption: the signals by which a scheduler, or a person at a terminal, asks a run to stop.

Slurm and Kubernetes send SIGTERM, or a signal of one's choice (`sbatch --signal=USR1@120`), some
time before they kill. A terminal sends SIGINT (Ctrl-C), and SIGHUP where it is closed or its
connection is lost. A run then writes a checkpoint and ends with the status of `errors.RunStopped`.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from trainer import interrupts

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignal:
    """Catches the signals of `stop_signals` within a `with` block, and remembers in `asked`.

        with StopSignal() as stop:
            while not stop.asked:
                step()
        save_checkpoint()

    The process goes on and ends itself at a good moment. interrupted: it was Ctrl-C. Who presses it
    again does not want to wait for a checkpoint: a command then ends at once, and in a notebook
    KeyboardInterrupt is raised. In a thread other than the main one no signal is caught, since
    Python allows it there alone.
    """

    def __init__(self):
        self.asked = False
        self._ctrl_c = interrupts.CtrlC()
        self._handlers_before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in interrupts.stop_signals():
                self._handlers_before[number] = signal.signal(
                    number, self._remember
                )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before.clear()

    @property
    def interrupted(self) -> bool:
        """Whether a person has pressed Ctrl-C."""
        return self._ctrl_c.pressed

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self.asked = True
        if number == signal.SIGHUP:
            interrupts.leave_terminal()
        elif number == signal.SIGINT and self._ctrl_c.is_second():
            if self._handlers_before[number] is interrupts.interrupt:
                interrupts.end_at_once()
            raise KeyboardInterrupt
