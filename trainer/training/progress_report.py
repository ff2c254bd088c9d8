"""The run's report while it trains, and after it has stopped, failed or finished.

`report.html` is written anew after validations and, between them, with the log lines, as long as
that takes no more than a hundredth of the time. The state of the run stands on it
(trainer.reporting.run_status).
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.checkpoint.layout import RunState
from trainer.errors import InputError, RunStopped
from trainer.reporting.run_status import (
    FAILED,
    FINISHED,
    STOPPED,
    TRAINING,
    RunStatus,
)
from trainer.run_files import METRICS_FILE
from trainer.training.callbacks import Callback, StepReport
from trainer.training.run_context import RunContext

_SHARE = 0.01  # of the time that pages may take
_LEAST_SECONDS = 10.0  # between two pages
_RESUME = "the same command goes on"


class ProgressReport(Callback):
    """Writes the report while the run trains, on the first rank."""

    def __init__(self, context: RunContext):
        self._context = context
        self._due_at = 0.0

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Writes it where a log line has come and the last page is old enough."""
        if self._context.is_log_step:
            self._write_if_due(state)

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Writes it with the validation, where the last page is old enough."""
        self._write_if_due(state)

    def _write_if_due(self, state: RunState) -> None:
        begun = time.monotonic()
        if not self._context.ranks.first or begun < self._due_at:
            return
        with self._context.meter.paused():
            total = self._context.trainer.total_steps
            status = RunStatus.now(TRAINING, state.step, total)
            write_page(self._context.folder, status)
        ended = time.monotonic()
        pause = max(_LEAST_SECONDS, (ended - begun) / _SHARE)
        self._due_at = ended + pause


@contextlib.contextmanager
def report_end(
    run: Path, state: RunState, total_steps: int, first: bool
) -> Iterator[None]:
    """Within it a run trains; whatever ends it, its report says so.

    first: this is the first rank, which writes.
    """
    try:
        yield
    except BaseException as error:
        # Before the first step there is nothing to see, and the folder may be removed.
        if first and state.step:
            kind, reason = _describe_end(error)
            status = RunStatus.now(kind, state.step, total_steps, reason)
            # The error that ends the run is what is said.
            write_page(run, status, quiet=True)
        raise
    if first:
        reason = ""
        if state.step < total_steps:
            reason = f"early, after {state.since_best} validations that were no better"
        RunStatus.now(FINISHED, state.step, total_steps, reason).write(run)


def _describe_end(error: BaseException) -> tuple[str, str]:
    """The state in which an error leaves a run, and why."""
    if isinstance(error, RunStopped):
        return STOPPED, f"as asked; {_RESUME} from its checkpoint"
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, f"interrupted; {_RESUME} from the newest checkpoint"
    if isinstance(error, InputError):
        return FAILED, str(error)
    return FAILED, f"{type(error).__name__}: {error}"


def write_page(run: Path, status: RunStatus, quiet: bool = False) -> None:
    """Leaves the state and the page in the run's folder; what goes wrong with it ends no run."""
    # Plotly and Jinja2 are for the page alone.
    from trainer.reporting.run_report import write_report

    if not (run / METRICS_FILE).is_file():
        return
    try:
        status.write(run)
        write_report(run)
    except Exception as error:
        if quiet:
            return
        print(
            f"{run}: the report stays as it was: {type(error).__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
