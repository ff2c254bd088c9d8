"""Progress bars on stderr, with the time left, for what takes more than a few seconds.

Where nothing can be drawn anew (a pipe, nohup, a container's log) a line says from time to time
what goes on.
"""

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_FIRST = 10.0  # seconds until a pipe hears of what goes on
_EVERY = 30.0


def can_animate(console: Console) -> bool:
    """Whether a line may be drawn anew: on a terminal, and in a notebook that has ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


class Heartbeat:
    """Calls say() where nothing was said for a while: after 10 s, and then every 30 s.

        with Heartbeat(lambda: print("still at work")) as heartbeat:
            ...
            heartbeat.reset()    # something was said

    say: called in a thread of its own. shown: False where a bar tells it.
    """

    def __init__(
        self,
        say: Callable[[], None],
        shown: bool = True,
        first: float | None = None,
        every: float | None = None,
    ) -> None:
        """first, every: other seconds."""
        self._say = say
        self._every = _EVERY if every is None else every
        self._due = time.monotonic() + (_FIRST if first is None else first)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if shown:
            self._thread = threading.Thread(
                target=self._run, name="heartbeat", daemon=True
            )

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def reset(self) -> None:
        """Notes that something was said."""
        self._due = time.monotonic() + self._every

    def _run(self) -> None:
        while not self._over.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() >= self._due:
                self.reset()
                self._say()


class Stages(Progress):
    """A line on stderr for each stage while it runs, with the time left where it is known.

    Nothing is left behind on a terminal. Where stderr is none, a stage of more than some seconds is
    told by lines (`Heartbeat`). `connection` is DuckDB's while it works: a stage without a total
    shows the progress of its query.
    """

    def __init__(self, shown: bool = True):
        """shown: False on ranks that say nothing."""
        self.connection: DuckDBPyConnection | None = None
        self._query: TaskID | None = None
        self._running: list[TaskID] = []
        console = Console(stderr=True)
        drawn = can_animate(console)
        self._heartbeat = Heartbeat(self._say, shown and not drawn)
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and drawn),
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """The lines to draw, with the query's progress in them."""
        if self._query is not None and self.connection is not None:
            percent = self.connection.query_progress()
            if percent > 0:
                self.update(self._query, total=100, completed=percent)
        return super().get_renderables()

    @contextlib.contextmanager
    def __call__(
        self, description: str, total: float | None = None
    ) -> Iterator[Callable[[float], None]]:
        """Runs a stage; yields a function that takes how much more of `total` is done."""
        task = self.add_task(description, total=total)
        self._running.append(task)
        if total is None:
            self._query = task
        else:
            self._query = None
        try:
            yield lambda amount: self.advance(task, amount)
        finally:
            self._query = None
            self._running.remove(task)
            self.update(task, total=1, completed=1)

    @contextlib.contextmanager
    def open_stage(
        self, description: str
    ) -> Iterator[Callable[[int, int], None]]:
        """Runs a stage; yields a function that takes how much is done, and of how much."""
        with self(description):
            task = self._running[-1]
            self._query = None

            def show(done: int, total: int) -> None:
                self.update(task, completed=done, total=total)

            yield show

    def start(self) -> None:
        """Begins to draw, or to tell by lines."""
        self._heartbeat.__enter__()
        super().start()

    def stop(self) -> None:
        """Ends that."""
        self._heartbeat.__exit__()
        super().stop()

    def _say(self) -> None:
        """Says which stage runs.

        sorting, writing shards: 40 % after 80 s
        """
        if not self._running:
            return
        (task,) = [task for task in self.tasks if task.id == self._running[-1]]
        done = ""
        if task.total:
            done = f"{task.percentage:.0f} % "
        line = f"{task.description}: {done}after {task.elapsed or 0:.0f} s"
        print(line, file=sys.stderr, flush=True)
