"""Tracking: hands a run's records to the trackers that are asked for, on the first rank.

TensorBoard is one of them (`log.tensorboard`), the others are named in `log.trackers`. Each is fed
by a thread of its own: no step waits for it, and where it fails the run goes on.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.checkpoint.layout import RunState
from trainer.config.load import flatten_config
from trainer.config.run import LogConfig
from trainer.errors import RunStopped
from trainer.reporting.run_status import FAILED, FINISHED, STOPPED
from trainer.reporting.trackers.mlflow import MLflow
from trainer.reporting.trackers.scalars import (
    evaluation_scalars,
    train_scalars,
)
from trainer.reporting.trackers.tensorboard import TensorBoard
from trainer.reporting.trackers.thread import TrackerThread
from trainer.reporting.trackers.tracker import (
    TrackedRun,
    Tracker,
    require_package,
)
from trainer.reporting.trackers.wandb import WeightsAndBiases
from trainer.run_files import REPORT
from trainer.training.callbacks import Callback
from trainer.training.step import Trainer

_KINDS: dict[str, type[Tracker]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


class Tracking(Callback):
    """Hands each record to all trackers; a context manager around a run.

    At the end, however it comes, they get the run's report as a file, and how it has ended. On
    other ranks than the first there are none.
    """

    def __init__(self, trainer: Trainer, run: Path, resume_step: int | None):
        """resume_step: of the checkpoint that the run goes on from; None: it begins."""
        self._trainer = trainer
        self._run = run
        self._resume_step = resume_step
        self._trackers: list[TrackerThread] = []

    def start(self, say: Callable[[str], None]) -> None:
        """Starts the trackers. say: prints a line of the run's log."""
        if not self._trainer.ranks.first:
            return
        kinds = _list_kinds(self._trainer.config.log)
        if not kinds:
            return
        tracked = _describe(self._trainer, self._run, self._resume_step)
        for kind, _ in kinds:
            self._trackers.append(TrackerThread(kind(tracked), say))

    def on_log(self, state: RunState, record: dict[str, Any]) -> None:
        """Sends a train record's figures."""
        for tracker in self._trackers:
            tracker.log(train_scalars(record), record["step"])

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Sends a validation's figures."""
        for tracker in self._trackers:
            tracker.log(evaluation_scalars(record), record["step"])

    def on_test(self, state: RunState, record: dict[str, Any]) -> None:
        """Sends the test's figures."""
        for tracker in self._trackers:
            tracker.summarize(evaluation_scalars(record), record["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = FINISHED
        if isinstance(error, RunStopped | KeyboardInterrupt):
            state = STOPPED
        elif error is not None:
            state = FAILED
        files = []
        report = self._run / REPORT
        if report.is_file():
            files.append(report)
        for tracker in self._trackers:
            tracker.end(state, files)


def require_trackers(config: LogConfig) -> None:
    """Raises InputError, which names the extra, where a tracker's package is not installed."""
    for kind, switch in _list_kinds(config):
        require_package(kind, switch)


def _list_kinds(config: LogConfig) -> list[tuple[type[Tracker], str]]:
    """The trackers that are asked for, each with the setting that asks for it."""
    kinds: list[tuple[type[Tracker], str]] = []
    if config.tensorboard:
        kinds.append((TensorBoard, "log.tensorboard"))
    for name in config.trackers:
        kinds.append((_KINDS[name], "log.trackers"))
    return kinds


def _describe(
    trainer: Trainer, run: Path, resume_step: int | None
) -> TrackedRun:
    """What trackers are told of the run."""
    # Jinja2 comes with it.
    from trainer.reporting.html import page_title

    parameters = flatten_config(trainer.config)
    parameters["dataset"] = trainer.dataset.fingerprint
    parameters["world_size"] = trainer.ranks.world_size
    return TrackedRun(
        folder=run,
        name=page_title(run),
        project=trainer.config.log.project,
        parameters=parameters,
        resume_step=resume_step,
    )
