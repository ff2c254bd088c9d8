"""The log of phases: a line a step and rank, for `syncrec trace` (`profile.phases`)."""

import sys

from trainer.checkpoint.layout import RunState
from trainer.reporting.trace.records import PhaseWriter
from trainer.training.callbacks import Callback, StepReport
from trainer.training.run_context import RunContext


class PhaseLog(Callback):
    """Writes this rank's phases. What goes wrong with it ends no run."""

    def __init__(self, context: RunContext):
        ranks = context.ranks
        self._rank = ranks.rank
        self._clock = context.trainer.phases
        self._writer = PhaseWriter(
            context.folder, ranks.rank, ranks.world_size, ranks.device.type
        )
        self._clock.listeners.append(self._writer.listen)

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Writes the step's line."""
        try:
            self._writer.end_step(state.step)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Writes what is left."""
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Says so once, and listens no more."""
        if self._writer.listen not in self._clock.listeners:
            return
        self._clock.listeners.remove(self._writer.listen)
        print(
            f"rank {self._rank}: its phases are not written any more: {error}",
            file=sys.stderr,
            flush=True,
        )
