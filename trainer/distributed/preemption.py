"""Preemption: the signals by which a scheduler, or a person at a terminal, asks a run to stop.

Slurm and Kubernetes send SIGTERM, or a signal of one's choice (`sbatch --signal=USR1@120`), some
time before they kill. A run then writes a checkpoint and ends with the status of `errors.RunStopped`.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_Handler = Callable[[int, FrameType | None], Any] | int | None


class StopSignal:
    """Catches SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) within a `with` block, and remembers in `asked`.

        with StopSignal() as stop:
            while not stop.asked:
                step()
        save_checkpoint()

    The process goes on and ends itself at a good moment. A second SIGINT raises KeyboardInterrupt:
    who presses Ctrl-C again does not want to wait for a checkpoint. In a thread other than the main
    one no signal is caught, since Python allows it there alone.
    """

    def __init__(self):
        self.asked = False
        self._interrupted = False
        self._handlers_before: dict[int, _Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
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

    def _remember(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.asked = True
