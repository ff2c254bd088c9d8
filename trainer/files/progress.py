"""Progress on stderr, with the time left, for what takes more than a few seconds."""

import contextlib

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Stages(Progress):
    """A line for each stage on stderr while it runs, with the time left where DuckDB or the stage knows it.

    Nothing is shown where stderr is no terminal, nor left behind where it is one. `connection`: DuckDB's, while it works.
    shown: False on ranks that say nothing.
    """

    def __init__(self, shown=True):
        self.connection = self._query = None
        console = Console(stderr=True)
        super().__init__(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not (shown and console.is_terminal), refresh_per_second=4,
        )  # fmt: skip

    def get_renderables(self):
        if self._query is not None and self.connection is not None:
            percent = self.connection.query_progress()
            if percent > 0:
                self.update(self._query, total=100, completed=percent)
        return super().get_renderables()

    @contextlib.contextmanager
    def __call__(self, description, total=None):
        """Runs a stage; yields a function that is told how much of `total` more is done."""
        task = self.add_task(description, total=total)
        self._query = task if total is None else None
        try:
            yield lambda done: self.advance(task, done)
        finally:
            self._query = None
            self.update(task, total=1, completed=1)
