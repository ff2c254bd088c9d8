"""Callbacks of the training loop: log lines, validation, early stopping, checkpoints; one's own.

A caller's callbacks follow the run's own, which use the same methods:

    class PrintValidation(Callback):
        def on_validation(self, state, record):
            print(state.step, record["mean"]["NDCG@10"])

    train(config, ranks, callbacks=[PrintValidation()])

After each step the loop calls `on_step` of all callbacks, one after the other, in this order:

    StepLog             the step's figures; where a log line is due: writes it, then calls
                        `on_log` of all callbacks in this order
    WorkerTuning        how many loader processes the steps need
    Validation          where one is due: ranks the validation split, then calls `on_validation` of
                        all callbacks in this order
    CheckpointWriter    where one is due: begins a checkpoint
    EarlyStopping       says so where the validation ends the run
    ProgressReport      draws report.html anew (trainer.training.progress_report)
    Tracking            hands records to TensorBoard, MLflow, W&B (trainer.training.observers.tracking)
    a caller's          in the order in which they were given

`on_checkpoint` of all callbacks is called in the same order once a checkpoint is visible, which is
some steps after it was begun, at the latest when the run ends. `on_test` is called once, after the
last step.

Callbacks run on all ranks, in the same order and after the same steps. So a callback may use
collectives, and has to print or write on one rank alone (`Ranks.first`). What they are called with
is the run's own: it may be read, not changed. An exception ends the run like any fault of the
program, and the last checkpoint stays.
"""

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from syncrec.model import LossReport
from trainer.checkpoint.layout import RunState
from trainer.checkpoint.resume import PACKAGES
from trainer.checkpoint.save import Checkpoints
from trainer.config.load import flatten_config
from trainer.data.loading.stream import RankBatch
from trainer.distributed.agreement import Signals, reduce_signals
from trainer.errors import RunStopped
from trainer.evaluation.metrics import domains_of_mean
from trainer.evaluation.sampled import (
    PositionCounts,
    count_users,
    evaluate_split,
    make_evaluation_record,
)
from trainer.reporting.console import mean_sentence
from trainer.reporting.run_log import plain_record
from trainer.run_files import HEADLINE
from trainer.training.run_context import RunContext

# Steps of a validation between two in which the ranks agree to go on with it.
_STEPS_PER_AGREEMENT = 8


@dataclass(frozen=True)
class StepReport:
    """What one step gave on this rank.

    rank_batch: its users, its batch (on the host), and what could not be read. loss: this rank's;
    losses: of the global batch. Both are on the device, where reading them waits for the step.
    seconds: what the step took without fetching the next batch.
    """

    rank_batch: RankBatch
    loss: torch.Tensor
    losses: LossReport
    seconds: float


class Callback:
    """Is called by the training loop, on all ranks. Each method does nothing by default."""

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Called after each step.

        A step that turns out not to be finite is undone and ends the run. On a device that is known
        one step later, so `on_step` may be called for it.
        """

    def on_log(self, state: RunState, record: dict[str, Any]) -> None:
        """Called after a step whose figures are logged, more often than the console has a line.

        record: the train record, as metrics.jsonl has it (trainer.reporting.run_log).
        """

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Called after each validation.

        record: as metrics.jsonl has it (trainer.reporting.run_log). state.since_best is 0 where the
        model is the best so far.
        """

    def on_checkpoint(self, state: RunState, folder: Path) -> None:
        """Called once a checkpoint is visible. state: what it holds."""

    def on_test(self, state: RunState, record: dict[str, Any]) -> None:
        """Called once the best model was tested. record: as metrics.jsonl has it."""


class StepLog(Callback):
    """Logs the steps' figures, and each validation.

    The console has a line every `log.every` steps. metrics.jsonl has more of the first steps, so
    that a short run has curves (`RunContext.is_log_step`).
    """

    def __init__(self, context: RunContext, callbacks: Sequence[Callback]):
        """callbacks: whose `on_log` is called."""
        self._context = context
        self._callbacks = callbacks
        self._has_stepped = False

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Adds the step's figures, and logs a line where one is due."""
        context = self._context
        rank_batch = report.rank_batch
        context.meter.add(
            rank_batch.batch, report.loss, report.losses, rank_batch.skipped
        )
        context.skipped_users += rank_batch.skipped
        context.warn_of_damage(rank_batch.reasons)
        context.log.advance(1)
        if context.is_log_step:
            self._log(state)
        if not (self._has_stepped or context.is_shown_step):
            context.log.show_first_step()
        self._has_stepped = True

    def _log(self, state: RunState) -> None:
        """Logs the steps since the last record."""
        context = self._context
        context.trainer.settle()
        record = context.meter.record(state.step, context.current_epoch())
        record |= context.trainer.state_figures()
        record["seconds"] = context.seconds()
        record = plain_record({"kind": "train", **record})
        context.log.train(record, shown=context.is_shown_step)
        for callback in self._callbacks:
            callback.on_log(state, record)

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Logs the validation."""
        self._context.log.evaluation(record, state.best)


class WorkerTuning(Callback):
    """Starts as many loader processes as the measured steps need (`stream.workers`)."""

    def __init__(self, context: RunContext):
        self._context = context

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Tells the loader how long a step computes."""
        message = self._context.feed.computed(report.seconds)
        if message:
            self._context.log.message(message)


class CheckpointWriter(Callback):
    """Writes checkpoints after epochs and validations; the loop has it write between steps.

    Between steps the ranks agree on it: every so many steps or minutes, and where a rank was asked
    to stop.
    """

    def __init__(self, context: RunContext, callbacks: Sequence[Callback]):
        """callbacks: whose `on_checkpoint` is called."""
        self._context = context
        self._callbacks = callbacks
        self._config = context.config.checkpoint
        self._skipped_before = context.state.skipped_users
        self._saved_at = time.monotonic()
        self._saved_step = context.state.step
        versions = {}
        for name in PACKAGES:
            versions[name] = importlib.metadata.version(name)
        origin = {
            "config": flatten_config(context.config),
            "dataset": context.trainer.dataset.fingerprint,
            "world_size": context.ranks.world_size,
            "versions": versions,
        }
        self._checkpoints = Checkpoints(
            context.folder,
            self._config.keep,
            context.ranks,
            origin,
            newest_state=context.state if context.resumed else None,
            beat=context.watchdog.beat,
            on_written=self._report_written,
        )

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Saves after an epoch, unless a validation has decided on it already."""
        validated = state.validated == state.step
        if not validated and self._context.is_epoch_end(
            self._config.every_epochs
        ):
            self.save()

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Saves the best model so far, the run's last, and where one is due anyhow."""
        is_best = state.since_best == 0
        is_due = self._context.is_epoch_end(self._config.every_epochs)
        if is_best or is_due or self._context.finished:
            self.save()

    @property
    def writing(self) -> bool:
        """True while this rank writes."""
        return self._checkpoints.writing

    @property
    def due_by_time(self) -> bool:
        """True on the first rank once `checkpoint.every_minutes` have passed."""
        seconds = time.monotonic() - self._saved_at
        every = self._config.every_minutes
        is_due = 0 < every <= seconds / 60
        return self._context.ranks.first and is_due

    def follow_signals(self, step: int, signals: Signals) -> None:
        """Publishes, stops or saves as the ranks have signalled with a step. Raises RunStopped."""
        # Only what was signalled after the newest checkpoint was begun is about it.
        is_newer = step >= self._saved_step
        if is_newer:
            self._checkpoints.settle(signals.writing)
        if signals.stop:
            self.stop()
        state = self._context.state
        every = self._config.every_steps
        due_by_steps = every and state.step and state.step % every == 0
        if (signals.due and is_newer) or due_by_steps:
            self.save()

    def save(self) -> None:
        """Begins a checkpoint of the state as it is."""
        context = self._context
        context.trainer.settle()
        skipped = torch.tensor([context.skipped_users])
        dist.all_reduce(skipped)
        context.state.skipped_users = self._skipped_before + int(skipped)
        context.state.seconds = context.seconds()
        trainer = context.trainer
        with context.meter.paused(), context.watchdog.held():
            self._checkpoints.save(trainer.engine, trainer.table, context.state)
        self._saved_at = time.monotonic()
        self._saved_step = context.state.step

    def finish(self) -> None:
        """Waits for the checkpoint in flight."""
        with self._context.watchdog.held():
            self._checkpoints.finish()

    def stop(self) -> NoReturn:
        """Writes a checkpoint and ends the run: preemption, or a person's Ctrl-C."""
        self.save()
        self.finish()
        raise RunStopped(
            f"stopped after step {self._context.state.step}, as asked; "
            "its checkpoint is written, the same command goes on",
            interrupted=self._context.stop_signal.interrupted,
        )

    def _report_written(self, state: RunState, folder: Path) -> None:
        """Tells all callbacks of a checkpoint that is visible now."""
        for callback in self._callbacks:
            callback.on_checkpoint(state, folder)


class Validation(Callback):
    """Validates after every `evaluation.every_epochs`-th epoch and after the last step.

    It keeps which model is the best, and counts the validations since then for early stopping.
    """

    def __init__(
        self,
        context: RunContext,
        checkpoint_writer: CheckpointWriter,
        callbacks: Sequence[Callback],
    ):
        """callbacks: whose `on_validation` is called."""
        self._context = context
        self._checkpoint_writer = checkpoint_writer
        self._callbacks = callbacks

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Validates where it is due."""
        self.validate_if_due()

    def validate_if_due(self) -> None:
        """Validates after an epoch or the last step, unless the state has this validation."""
        context = self._context
        if context.state.validated == context.state.step:
            return
        every = context.config.evaluation.every_epochs
        if context.at_last_step or context.is_epoch_end(every):
            self._validate()

    def _validate(self) -> None:
        """Evaluates, counts, and tells all callbacks."""
        context = self._context
        context.trainer.settle()
        with context.meter.paused():
            record = self._evaluate()
            self._count(record)
            record = plain_record(record)
            for callback in self._callbacks:
                callback.on_validation(context.state, record)

    def _evaluate(self) -> dict[str, Any]:
        """Ranks the validation split; returns its record."""
        context = self._context
        trainer = context.trainer
        begun = context.seconds()
        recency = trainer.open_recency(context.watchdog.beat)
        try:
            ranking = evaluate_split(
                trainer.evaluation_model(),
                trainer.table,
                trainer.dataset,
                context.ranks,
                context.config,
                "validation",
                advance=self._go_on,
                workers=context.feed.workers,
                recency=recency,
            )
        except _ValidationStopped:
            self._checkpoint_writer.stop()
        seconds = context.seconds()
        context.warn_of_damage(ranking.reasons)
        return make_evaluation_record(
            "validation",
            trainer.dataset,
            ranking,
            min_users=context.config.evaluation.min_users,
            mean_domains=self._mean_domains(ranking),
            step=context.state.step,
            epoch=context.current_epoch(),
            seconds=seconds,
            validation_seconds=seconds - begun,
        )

    def _mean_domains(self, ranking: PositionCounts) -> list[str]:
        """The domains by whose mean models are compared: the same at every validation of a run.

        The first validation chooses them, by its users over all ranks, and says what it leaves out.
        """
        context = self._context
        state = context.state
        if state.mean_domains is None:
            users = count_users(context.trainer.dataset, ranking)
            least = context.config.evaluation.min_users
            if state.best is not None:
                # Begun by an earlier version, which has compared by all of them.
                least = 1
            state.mean_domains = domains_of_mean(users, least)
            sentence = mean_sentence(users, state.mean_domains, least)
            if sentence is not None:
                context.log.message(f"validation: {sentence}")
        return state.mean_domains

    def _go_on(self, done: int, total: int) -> None:
        """Called between two steps of the ranking: any rank may have been asked to stop."""
        context = self._context
        context.watchdog.beat()
        context.log.show_activity(f"validation: batch {done} of {total}")
        if done % _STEPS_PER_AGREEMENT == 0:
            agreed = reduce_signals(stop=context.stop_signal.asked)
            if agreed.stop:
                raise _ValidationStopped

    def _count(self, record: dict[str, Any]) -> None:
        """Keeps the best validation, or counts one more since then."""
        state = self._context.state
        value = record["mean"][HEADLINE] or 0.0
        state.validated = state.step
        if state.best is None or value > state.best[HEADLINE]:
            # The checkpoint that is written next adds its folder.
            state.best = {
                "step": state.step,
                "epoch": record["epoch"],
                HEADLINE: value,
            }
            state.since_best = 0
        else:
            state.since_best += 1


class _ValidationStopped(Exception):
    """A rank was asked to stop while the validation split was ranked."""


class EarlyStopping(Callback):
    """Says so where a validation ends the run before its last step (`evaluation.patience`)."""

    def __init__(self, context: RunContext):
        self._context = context

    def on_validation(self, state: RunState, record: dict[str, Any]) -> None:
        """Logs why the run ends here."""
        context = self._context
        best = state.best
        if best is None or not context.finished or context.at_last_step:
            return
        context.log.message(
            f"stopped early: {state.since_best} validations without a better mean "
            f"{HEADLINE} than {best[HEADLINE]:.4f}"
        )
