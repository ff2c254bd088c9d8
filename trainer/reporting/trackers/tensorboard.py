"""TensorBoard: event files in RUN/tensorboard."""

from pathlib import Path

from trainer.reporting.console import escape_name
from trainer.reporting.trackers.tracker import (
    Scalars,
    TrackedRun,
    Tracker,
)
from trainer.run_files import TENSORBOARD

_FLUSH_SECONDS = 30


class TensorBoard(Tracker):
    """Writes scalars as event files, which `tensorboard --logdir RUN` shows."""

    name = "tensorboard"
    package = "tensorboard"

    def __init__(self, run: TrackedRun):
        super().__init__(run)
        from torch.utils.tensorboard import SummaryWriter

        # Events of an earlier attempt stay on disk; purge_step tells TensorBoard from where on
        # they no longer count.
        purge_step = 0 if run.resume_step is None else run.resume_step + 1
        self._writer = SummaryWriter(
            str(run.folder / TENSORBOARD),
            purge_step=purge_step,
            flush_secs=_FLUSH_SECONDS,
        )

    def begin(self) -> str:
        """Says nothing: the files are in the run's folder, as always."""
        return ""

    def log(self, scalars: Scalars, step: int) -> None:
        """Writes the scalars by their tags."""
        for tag, value in scalars.items():
            self._writer.add_scalar(escape_name(tag), value, step)

    def add_file(self, file: Path) -> None:
        """Keeps nothing: the run's folder has the file."""

    def end(self, state: str) -> None:
        """Writes what is left."""
        self._writer.close()
