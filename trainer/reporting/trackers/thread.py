"""A thread that feeds a tracker, so that no step waits for a server, and none that is away ends a run.

Calls are made in the order in which they came. One that fails is warned of in one line, and made
again after a while; meanwhile further ones queue up.
"""

import contextlib
import functools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.files.redact import hide_secrets, printable_text
from trainer.reporting.trackers.tracker import Scalars, Tracker

RETRY_SECONDS = 60.0
END_SECONDS = 30.0  # for which the end of a run waits for what is not sent yet
_MOST_CALLS = 10_000  # that wait; the oldest make room
_MOST_ATTEMPTS = (
    5  # at a call: one that the tool refuses is not in the way for ever
)


class TrackerThread:
    """Feeds one tracker. None of its methods waits but `end`, which does so for a limited time."""

    def __init__(
        self,
        tracker: Tracker,
        say: Callable[[str], None],
        retry_seconds: float = RETRY_SECONDS,
        end_seconds: float = END_SECONDS,
    ):
        """say: prints a line of the run's log."""
        self.name = tracker.name
        self._tracker = tracker
        self._say = say
        self._retry_seconds = retry_seconds
        self._end_seconds = end_seconds
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_ending = False
        self._is_failing = False
        self._has_begun = False
        self._attempts = 0  # at the first of the calls
        self._lost = 0
        self._thread = threading.Thread(
            target=self._work, daemon=True, name=f"tracker {self.name}"
        )
        self._put(self._begin)
        self._thread.start()

    def log(self, scalars: Scalars, step: int) -> None:
        """Logs figures of a step."""
        self._put(functools.partial(self._tracker.log, scalars, step))

    def summarize(self, scalars: Scalars, step: int) -> None:
        """Logs figures of the whole run."""
        self._put(functools.partial(self._tracker.summarize, scalars, step))

    def end(self, state: str, files: Sequence[Path]) -> None:
        """Keeps files, ends the tracker's run, and waits until all is sent, but not for ever.

        state: as of `Tracker.end`.
        """
        for file in files:
            self._put(functools.partial(self._tracker.add_file, file))
        self._put(functools.partial(self._tracker.end, state))
        with self._changed:
            self._is_ending = True
            self._changed.notify()
        self._thread.join(self._end_seconds)
        with self._changed:
            left = len(self._calls) + self._lost
        if left:
            self._warn(
                f"{left} records or files were not sent; metrics.jsonl has every figure"
            )

    def _put(self, call: Callable[[], None]) -> None:
        with self._changed:
            if len(self._calls) >= _MOST_CALLS:
                # The first one begins the run.
                del self._calls[1]
                self._lost += 1
            self._calls.append(call)
            self._changed.notify()

    def _begin(self) -> None:
        place = self._tracker.begin()
        self._has_begun = True
        if place:
            self._say(f"{self.name}: {printable_text(hide_secrets(place))}")

    def _work(self) -> None:
        """What the thread does: makes the calls, one after the other, until the end."""
        while True:
            with self._changed:
                while not self._calls and not self._is_ending:
                    self._changed.wait()
                if not self._calls:
                    return
                call = self._calls[0]
            if self._make(call):
                self._remove_first()
                continue
            self._attempts += 1
            if self._attempts >= _MOST_ATTEMPTS and self._has_begun:
                self._remove_first()
                self._lost += 1
            if not self._wait_to_retry():
                return

    def _remove_first(self) -> None:
        with self._changed:
            self._calls.popleft()
        self._attempts = 0

    def _make(self, call: Callable[[], None]) -> bool:
        """Makes a call; False where it failed, of which the first failure is warned."""
        try:
            call()
        except Exception as error:
            if not self._is_failing:
                reason = hide_secrets(f"{type(error).__name__}: {error}")
                self._warn(
                    f"{printable_text(reason)}: the run goes on without it, "
                    "and tries again now and then"
                )
            self._is_failing = True
            return False
        if self._is_failing:
            self._say(f"{self.name}: takes records again")
        self._is_failing = False
        return True

    def _wait_to_retry(self) -> bool:
        """Waits before a failed call is made again; False once the run has ended."""
        deadline = time.monotonic() + self._retry_seconds
        with self._changed:
            if self._is_ending:
                return False
            while not self._is_ending:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        return True

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(
                f"warning: {self.name}: {text}",
                file=sys.stderr,
                flush=True,
            )
