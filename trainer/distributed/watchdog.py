"""A watchdog: ends a process that makes no progress, such as one that waits in a collective.

Some backends wait for ever for a rank or a host that is gone. DeepSpeed's own groups wait half an
hour, whatever the configuration says.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from trainer.distributed.process_exit import end_process
from trainer.errors import RANKS_LOST_ADVICE, LostRanks
from trainer.process_name import rank_for_messages


class Watchdog:
    """Ends this process, with the status of `LostRanks`, where `beat` is not called for `seconds`.

        with Watchdog(1800, lambda: f"step {step}") as watchdog:
            for step in range(steps):
                train(step)
                watchdog.beat()
            with watchdog.held():
                draw_report()

    activity: names what the process is at ("step 7"), for the line on stderr.
    """

    def __init__(self, seconds: float, activity: Callable[[], str]):
        self._seconds = seconds
        self._activity = activity
        self._last_beat = time.monotonic()
        self._pauses = 0
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.beat()
        self._thread = threading.Thread(
            target=self._watch, daemon=True, name="watchdog"
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def beat(self) -> None:
        """Reports progress."""
        self._last_beat = time.monotonic()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Expects no progress within it: a report is drawn, a disk is written."""
        self._pauses += 1
        try:
            yield
        finally:
            self.beat()  # first: the watching thread reads the pauses, then the beat
            self._pauses -= 1

    def _watch(self) -> None:
        """What the watching thread does."""
        pause = min(1.0, self._seconds / 4)
        while not self._ended.wait(pause):
            if self._pauses:
                continue
            waited = time.monotonic() - self._last_beat
            if waited > self._seconds:
                self._end(waited)

    def _end(self, waited: float) -> None:
        """Says in one line what did not go on, and ends the process."""
        rank = rank_for_messages()
        line = (
            f"rank {rank}: no progress for {waited:.0f} s in {self._activity()}"
        )
        print(
            f"error: {line}: {RANKS_LOST_ADVICE}", file=sys.stderr, flush=True
        )
        end_process(LostRanks.status)
