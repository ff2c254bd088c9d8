"""What the training loop and its callbacks share: trainer, state, log, meter, clock."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

from trainer.checkpoint.layout import RunState
from trainer.config.run import RunConfig
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.stream import BatchFeed, TrainBatches
from trainer.distributed.preemption import StopSignal
from trainer.distributed.process_group import Ranks
from trainer.distributed.resources import count_cores_per_rank
from trainer.distributed.watchdog import Watchdog
from trainer.reporting.run_log import RunLog
from trainer.training.meters import IntervalMeter
from trainer.training.observers.utilization import WorkMeter, find_peak
from trainer.training.step import Trainer

_WATCHDOG_MARGIN = (
    5  # seconds after timeout_minutes: a backend that gives up says more
)

_POINTS = 25  # logged steps between a step and its double, while log.every asks for fewer
_SHOWN = (5, 10, 20)  # of these, on the console


class RunContext:
    """A run in progress, on one rank."""

    def __init__(
        self,
        trainer: Trainer,
        state: RunState,
        folder: Path,
        log: RunLog,
        stop_signal: StopSignal,
        resumed: bool,
    ):
        """folder: the run's. resumed: the run's newest checkpoint holds this state."""
        self.trainer = trainer
        self.state = state
        self.folder = folder
        self.log = log
        self.stop_signal = stop_signal
        self.resumed = resumed
        self.config: RunConfig = trainer.config
        self.ranks: Ranks = trainer.ranks
        self.plan: BatchSchedule = trainer.plan
        self.meter = self._build_meter()
        self.watchdog = Watchdog(
            60 * self.config.timeout_minutes + _WATCHDOG_MARGIN,
            lambda: f"step {self.state.step + 1}",
        )
        self.skipped_users = (
            0  # by this rank, since the run was begun or resumed
        )
        self._begun = time.monotonic()
        self._seconds_before = state.seconds
        self._damages: set[str] = set()
        self.feed = self._open_feed()

    def _build_meter(self) -> IntervalMeter:
        """Builds the meter of log lines, on all ranks."""
        device = self.ranks.device
        model = self.config.model
        peak = find_peak(
            self.config.profile.peak_tflops, device, model.precision
        )
        # On a device the host's clock does not tell how long an exchange takes.
        exchange_seconds = None
        if device.type == "cpu":
            exchange_seconds = self.trainer.phases.exchange_seconds
        domains = [domain.name for domain in self.trainer.dataset.domains]
        return IntervalMeter(
            domains,
            model.mutual_information,
            WorkMeter(model, peak),
            exchange_seconds,
        )

    def _open_feed(self) -> BatchFeed:
        """Opens the stream of this rank's batches, from the state's step on."""
        config = self.config
        batches = TrainBatches(
            self.plan,
            self.ranks.rank,
            self.state.step,
            config.model.max_length,
            config.model.mutual_information_pooling,
            config.negatives,
            config.stream,
            config.model.mutual_information_candidates,
            config.accumulation,
        )
        pin_memory = self.ranks.device.type == "cuda"
        return BatchFeed(
            batches, pin_memory, count_cores_per_rank(self.ranks.world_size)
        )

    @property
    def at_last_step(self) -> bool:
        """True after the run's last step."""
        return self.state.step == self.trainer.total_steps

    @property
    def is_shown_step(self) -> bool:
        """True where the step's log line is for the console too."""
        step = self.state.step
        is_due = step % self.config.log.every == 0
        return is_due or step in _SHOWN or self.at_last_step

    @property
    def is_log_step(self) -> bool:
        """True where the step is logged: every one until 50, then fewer, down to `log.every`.

        So a run of any length has curves. Of log.every=50:

            steps logged    1 2 3 … 50    52 54 … 74    75 78 … 99    …    1200 1250 1300 …
        """
        interval = max(1, self.state.step // _POINTS)
        if interval < self.config.log.every and not self.state.step % interval:
            return True
        return self.is_shown_step

    @property
    def stopped_early(self) -> bool:
        """True once so many validations were no better: early stopping by its patience."""
        patience = self.config.evaluation.patience
        return 0 < patience <= self.state.since_best

    @property
    def finished(self) -> bool:
        """True once no step is to follow."""
        if self.state.step >= self.trainer.total_steps:
            return True
        return self.stopped_early

    def is_epoch_end(self, every: int) -> bool:
        """True after the last step of every `every`-th epoch; every: 0 for never."""
        if not self.state.step or not every:
            return False
        epoch, step = self.plan.locate(self.state.step - 1)
        steps_done = step + 1
        epochs_done = epoch + 1
        return steps_done == self.plan.steps(epoch) and epochs_done % every == 0

    def current_epoch(self) -> int:
        """Returns the epoch of the last step."""
        last_step = self.state.step - 1
        epoch, _ = self.plan.locate(last_step)
        return epoch

    def seconds(self) -> float:
        """Returns the seconds spent in the run, restarts not counted."""
        elapsed = time.monotonic() - self._begun
        return self._seconds_before + elapsed

    def warn_of_damage(self, reasons: Iterable[str]) -> None:
        """Prints once what is damaged; each of a loader's processes meets it."""
        rank = self.ranks.rank
        for reason in set(reasons) - self._damages:
            print(f"rank {rank}: {reason}", file=sys.stderr, flush=True)
        self._damages.update(reasons)
