"""Progress bars on stderr, with the time left, for what takes more than a few seconds."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

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


def can_animate(console: Console) -> bool:
    """Whether a line may be drawn anew: on a terminal, and in a notebook that has ipywidgets."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


class Stages(Progress):
    """A line on stderr for each stage while it runs, with the time left where it is known.

    Nothing is shown where stderr is no terminal, nor left behind where it is one. `connection` is
    DuckDB's while it works: a stage without a total shows the progress of its query.
    """

    def __init__(self, shown: bool = True):
        """shown: False on ranks that say nothing."""
        self.connection: DuckDBPyConnection | None = None
        self._query: TaskID | None = None
        console = Console(stderr=True)
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and can_animate(console)),
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
        if total is None:
            self._query = task
        else:
            self._query = None
        try:
            yield lambda amount: self.advance(task, amount)
        finally:
            self._query = None
            self.update(task, total=1, completed=1)
