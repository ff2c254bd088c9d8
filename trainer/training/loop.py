"""The training run: begun or resumed, trained step by step, stopped, and tested at its end."""

import contextlib
import errno
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from syncrec.model import SyNCRec
from trainer.checkpoint.best_model import TrainedModel
from trainer.checkpoint.layout import RunState
from trainer.checkpoint.load import find_best, restore_best
from trainer.checkpoint.resume import (
    check_run_folder,
    find_start,
    is_empty,
    remove_failed_start,
    require_same_start,
)
from trainer.checkpoint.warm_start import (
    WarmStart,
    find_warm_start,
    refuse_later_model,
)
from trainer.config.load import to_yaml
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.stream import RankBatch
from trainer.data.loading.timeline import describe_split, split_dataset
from trainer.data.split import Timeline
from trainer.distributed.agreement import Signals, run_on_first_rank
from trainer.distributed.consensus import run_on_all_ranks
from trainer.distributed.determinism import use_deterministic_sums
from trainer.distributed.preemption import StopSignal
from trainer.distributed.process_group import Ranks
from trainer.distributed.run_lock import lock_run_folder_on_first_rank
from trainer.errors import InputError, NonFiniteLoss
from trainer.evaluation.inspect import inspect_model
from trainer.evaluation.recency.stored import open_recency_term
from trainer.evaluation.sampled import evaluate_split, make_evaluation_record
from trainer.files.atomic import write_json, write_text
from trainer.files.redact import printable_text, redact_location
from trainer.reporting.console import evaluation_table
from trainer.reporting.run_log import (
    RunLog,
    plain_record,
    skipped_sentence,
)
from trainer.reporting.trace.phases import DATA
from trainer.run_files import CONFIG, LOOK, METRICS_FILE, NCCL, SPLIT
from trainer.training.callbacks import (
    Callback,
    CheckpointWriter,
    EarlyStopping,
    StepLog,
    StepReport,
    Validation,
    WorkerTuning,
)
from trainer.training.observers.memory_snapshot import (
    snapshot_out_of_memory,
)
from trainer.training.observers.node_exporter import open_node_exporter
from trainer.training.observers.phase_log import PhaseLog
from trainer.training.observers.profiler import (
    StepProfiler,
    require_profile_window,
)
from trainer.training.observers.tracking import Tracking, require_trackers
from trainer.training.prefetch import PrefetchedBatch
from trainer.training.progress_report import ProgressReport, report_end
from trainer.training.run_context import RunContext
from trainer.training.step import RankFailure, Trainer


def train(
    config: RunConfig,
    ranks: Ranks,
    fresh: bool = False,
    accept_changes: bool = False,
    callbacks: Sequence[Callback] = (),
    titles: str | None = None,
) -> dict[str, Any]:
    """Trains, keeps the best model by validation, tests it, and writes the report.

    Called on all ranks. Resumes from the newest whole checkpoint where the run's folder has one.
    fresh, accept_changes: as in trainer.checkpoint.resume. callbacks: called on all ranks after the
    run's own, in this order (trainer.training.callbacks). titles: a table of item titles for the
    report (trainer.reporting.titles).

    Returns the test record. Raises InputError where something given cannot be used (before anything
    is written, if it can be seen then), NonFiniteLoss, and RunStopped.
    """
    with (
        _refuse_full_disk(config.run),
        use_deterministic_sums(config.deterministic),
        contextlib.ExitStack() as locks,
    ):
        if titles is not None:
            # A query engine is for them alone.
            from trainer.reporting.titles import check_titles

            run_on_first_rank(lambda: check_titles(Path(titles)), ranks.first)
        run_on_first_rank(lambda: require_trackers(config.log), ranks.first)
        trainer, start = _begin(config, ranks, fresh, accept_changes, locks)
        return _train(trainer, start, callbacks, titles)


def _finish_report(run: Path, titles: str | None) -> None:
    """Draws the report of a finished run, and says where it is."""
    # Plotly and Jinja2 are for the page alone.
    from trainer.reporting.run_report import write_report

    if titles is not None:
        from trainer.reporting.titles import add_titles

        try:
            add_titles(run, Path(titles))
        except InputError as error:  # it was there when the run began
            print(f"{error}: the report has ids", file=sys.stderr, flush=True)
    print(f"report: {write_report(run)}", flush=True)


@dataclass(frozen=True)
class _Start:
    """Where a run begins. is_new: its folder was empty."""

    run: Path
    is_new: bool
    checkpoint: Path | None
    state: RunState
    warm: WarmStart | None

    @property
    def resume_step(self) -> int | None:
        """The step of the checkpoint that it goes on from; None: it begins."""
        return None if self.checkpoint is None else self.state.step


def _begin(
    config: RunConfig,
    ranks: Ranks,
    fresh: bool,
    accept_changes: bool,
    locks: contextlib.ExitStack,
) -> tuple[Trainer, _Start]:
    """Finds where the run begins, and makes its trainer; writes nothing.

    locks: gets the lock of the run's folder.
    """
    _say(config, ranks, f"reads the dataset {redact_location(config.data)}")
    dataset = run_on_all_ranks(lambda: _load_dataset(config, ranks))
    require_same_start(
        config, dataset, fresh=fresh, accept_changes=accept_changes
    )
    if config.split.kind == Timeline.name:
        _say(config, ranks, "reads when all events were, to split them by time")
    dataset = split_dataset(dataset, config, ranks)
    plan = BatchSchedule.of_run(config, dataset, ranks.world_size)
    run = Path(config.run)
    is_new = run_on_first_rank(
        lambda: is_empty(check_run_folder(config.run, fresh)), ranks.first
    )
    locks.enter_context(lock_run_folder_on_first_rank(run, ranks.first))
    checkpoint, state = find_start(run, config, dataset, ranks, accept_changes)
    warm = None
    if checkpoint is None:
        warm = find_warm_start(config, dataset, ranks)
        if warm is not None:
            refuse_later_model(warm, dataset, ranks)
    _say(config, ranks, "makes the model and its optimizer")
    trainer = Trainer(
        config, ranks, dataset, plan, checkpoint, state.step, warm
    )
    if config.profile.window is not None:
        require_profile_window(config.profile.window, trainer.total_steps)
    return trainer, _Start(run, is_new, checkpoint, state, warm)


def _train(
    trainer: Trainer,
    start: _Start,
    callbacks: Sequence[Callback],
    titles: str | None,
) -> dict[str, Any]:
    """Trains from where the run begins to its test and its report."""
    ranks = trainer.ranks
    run = start.run
    dist.barrier()  # every rank has looked at the folder before one of them writes
    try:
        run_on_all_ranks(lambda: _write_first_files(trainer, start))
        with Tracking(trainer, run, start.resume_step) as tracking:
            record = _fit_and_test(trainer, start, tracking, callbacks)
            if ranks.first:
                _finish_report(run, titles)
    except InputError as error:
        is_refusal = type(error) is InputError
        if is_refusal and ranks.first and start.is_new and not start.state.step:
            # What cannot begin is in the way of the next try.
            remove_failed_start(run)
        raise
    return record


def _fit_and_test(
    trainer: Trainer,
    start: _Start,
    tracking: Tracking,
    callbacks: Sequence[Callback],
) -> dict[str, Any]:
    """Trains, and tests the best model; all of it is in the run's log."""
    run = start.run
    state = start.state
    with (
        report_end(run, state, trainer.total_steps, trainer.ranks.first),
        _open_log(trainer, start) as log,
    ):
        _log_start(log, trainer, start)
        tracking.start(log.message)
        with StopSignal() as stop_signal:
            resumed = start.checkpoint is not None
            context = RunContext(trainer, state, run, log, stop_signal, resumed)
            observers = [tracking, *open_node_exporter(context)]
            training = TrainingRun(context, [*observers, *callbacks])
            training.fit()
        log.show_activity("testing the best model")
        record = test_best(trainer, run)
        record["seconds"] = state.seconds
        _log_test(log, record, state)
        record_of_log = plain_record(record)
        for callback in training.callbacks:
            callback.on_test(state, record_of_log)
    return record


def _say(config: RunConfig, ranks: Ranks, activity: str) -> None:
    """Says on the first rank what the run does before its log is open."""
    if ranks.first and config.log.console != "quiet":
        print(printable_text(activity), flush=True)


def _load_dataset(config: RunConfig, ranks: Ranks) -> Dataset:
    """Opens the dataset; the first rank of each host reads its files whole."""
    if not config.data:
        raise InputError(
            "data=DIR is missing: the prepared dataset, see launch/prepare.py"
        )
    check_shards = config.stream.damaged == "stop"
    check_contents = ranks.local_rank == 0
    return Dataset.load(
        config.data, check_shards, config.stream, check_contents
    )


def _write_first_files(trainer: Trainer, start: _Start) -> None:
    """Writes the first files of the run's folder, on the first rank."""
    run = start.run
    if trainer.ranks.device.type == "cuda":
        # Of each host: the flight recorder makes none (trainer.distributed.process_group).
        (run / NCCL).mkdir(parents=True, exist_ok=True)
    if not trainer.ranks.first:
        return
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / CONFIG, to_yaml(trainer.config))
    split = describe_split(trainer.dataset)
    if split is not None:
        write_json(run / SPLIT, split)
    else:
        (run / SPLIT).unlink(missing_ok=True)
    if start.checkpoint is not None:
        file = start.checkpoint / METRICS_FILE
        write_text(run / METRICS_FILE, file.read_text(encoding="utf-8"))


def _open_log(trainer: Trainer, start: _Start) -> RunLog:
    """Opens the run's log, which goes on after the step that is resumed from."""
    domains = [domain.name for domain in trainer.dataset.domains]
    return RunLog(
        start.run,
        trainer.total_steps,
        domains,
        trainer.ranks.first,
        start.resume_step,
        verbosity=trainer.config.log.console,
    )


def _log_start(log: RunLog, trainer: Trainer, start: _Start) -> None:
    """Logs what runs, and what it begins with."""
    log.message(describe_run(trainer))
    warm = start.warm
    if start.checkpoint is not None:
        minutes = start.state.seconds / 60
        log.message(
            f"goes on from {start.checkpoint}, after {minutes:.1f} minutes of training"
        )
    if warm is not None:
        log.message(
            f"begins with the model of {warm.run}, which knows {warm.share}"
        )


def _log_test(log: RunLog, record: dict[str, Any], state: RunState) -> None:
    """Logs the test record, and shows it."""
    log.evaluation(record)
    table = evaluation_table(record)
    log.message(table)
    if state.skipped_users:
        log.message(skipped_sentence(state.skipped_users))


@contextlib.contextmanager
def _refuse_full_disk(run: str) -> Iterator[None]:
    """Within it, a full disk becomes an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{error.filename or run}: {error.strerror}: "
            "make room, and the same command goes on from the last checkpoint",
            one_rank=True,
        ) from None


@dataclass(frozen=True)
class StepBatch:
    """A step's batch on the host; prefetched: where it is on its way to the device."""

    rank_batch: RankBatch
    prefetched: PrefetchedBatch | None = None


class TrainingRun:
    """The training loop, from where a run is to its end."""

    def __init__(self, context: RunContext, callbacks: Sequence[Callback] = ()):
        """callbacks: a caller's, which are called after the run's own."""
        self.context = context
        self.trainer = context.trainer
        self.state = context.state
        self.feed = context.feed
        self.callbacks: list[Callback] = []
        self.checkpoint_writer = CheckpointWriter(context, self.callbacks)
        self.validation = Validation(
            context, self.checkpoint_writer, self.callbacks
        )
        self.callbacks += [
            StepLog(context, self.callbacks),
            WorkerTuning(context),
            self.validation,
            self.checkpoint_writer,
            EarlyStopping(context),
            ProgressReport(context),
            *callbacks,
        ]
        self._next_batch: StepBatch | None = None
        self._prefetch_seconds = 0.0
        self._refusal: InputError | None = None  # why this rank cannot go on

    def fit(self) -> None:
        """Trains to the end, or until early stopping.

        Raises RunStopped, with a checkpoint written, where any rank was asked to stop.
        """
        with (
            self.context.watchdog,
            contextlib.closing(self.feed),
            self._observe(),
        ):
            self.validation.validate_if_due()  # the run was stopped in between
            try:
                self._run_steps()
            except (
                NonFiniteLoss
            ):  # on all ranks: what is being written was good
                self.checkpoint_writer.finish()
                raise
            except RankFailure:  # likewise
                self.checkpoint_writer.finish()
                raise self._refusal or InputError(
                    "another rank cannot go on; its own line says why"
                ) from None
            self.checkpoint_writer.finish()

    @contextlib.contextmanager
    def _observe(self) -> Iterator[None]:
        """Within it steps are traced and their phases logged, where that is asked for."""
        profile = self.context.config.profile
        with contextlib.ExitStack() as observers:
            snapshot = snapshot_out_of_memory(
                self.context.folder, self.context.ranks, profile.memory
            )
            observers.enter_context(snapshot)
            if profile.phases:
                log = PhaseLog(self.context)
                observers.callback(log.close)
                self.callbacks.insert(0, log)
            if profile.window is not None:
                profiler = StepProfiler(self.context, *profile.window)
                observers.callback(profiler.close)
                self.callbacks.insert(0, profiler)
            yield

    def _run_steps(self) -> None:
        """The loop: fetch, agree, step, call back."""
        while not self.context.finished:
            batch = self.next_batch()
            self.coordinate()
            report = self.step(batch)
            for callback in self.callbacks:
                callback.on_step(self.state, report)
        self.trainer.settle()

    def next_batch(self) -> StepBatch:
        """Returns this step's batch, prefetched during the step before where there was one."""
        return self._next_batch or self._fetch()

    def coordinate(self) -> None:
        """Has all ranks do what any has signalled: save, stop, or end.

        A signal travels with a step and is known when that step is through; on a device one step
        later, so that the host does not wait for it.
        """
        self.context.watchdog.beat()
        step, signals = self.trainer.signals
        if signals.trouble:
            self.trainer.settle()  # raises RankFailure
        self.checkpoint_writer.follow_signals(step, signals)

    def step(self, batch: StepBatch) -> StepReport:
        """Makes one step, and prefetches the next step's batch meanwhile."""
        prefetched = batch.prefetched
        if prefetched is None:
            prefetched = self.trainer.prepare(batch.rank_batch.batch)
        self._next_batch = None
        self._prefetch_seconds = 0.0
        # With this step's batch; the next step's is fetched in between.
        in_trouble = self._refusal is not None
        signals = functools.partial(self._signals, in_trouble)
        begun = time.perf_counter()
        loss, losses = self.trainer.train_step(
            prefetched, self._prefetch, signals
        )
        elapsed = time.perf_counter() - begun
        seconds = elapsed - self._prefetch_seconds
        self.state.step = self.trainer.step
        return StepReport(batch.rank_batch, loss, losses, seconds)

    def _signals(self, in_trouble: bool) -> Signals:
        """Returns what this rank signals the others with a step."""
        stop = self.context.stop_signal.asked
        due = self.checkpoint_writer.due_by_time
        return Signals(in_trouble, stop, due, self.checkpoint_writer.writing)

    def _prefetch(self) -> PrefetchedBatch | None:
        """Fetches the next step's batch and starts to prefetch it, while this step computes.

        Where the run stops, saves, or ends early before the next step, the batch is not in that
        step's count: the run that resumes makes it again.
        """
        begun = time.perf_counter()
        if self.state.step + 1 < self.trainer.total_steps:
            batch = self._fetch()
            prefetched = self.trainer.prepare(batch.rank_batch.batch)
            self._next_batch = replace(batch, prefetched=prefetched)
        self._prefetch_seconds = time.perf_counter() - begun
        if self._next_batch is None:
            return None
        return self._next_batch.prefetched

    def _fetch(self) -> StepBatch:
        """Fetches the next batch.

        Where this rank cannot have one it takes part in the step without a user, so that the others
        do not wait, and signals trouble with that step, which is then not made.
        """
        if self._refusal is None:
            with (
                self.context.meter.waiting(),
                self.trainer.phases.within(DATA),
            ):
                try:
                    return StepBatch(next(self.feed))
                except InputError as error:
                    self._refusal = error
        return StepBatch(self.feed.build_without_users())


def test_best(trainer: Trainer, run: Path) -> dict[str, Any]:
    """Tests the best model, read back from disk as `launch/evaluate.py` does.

    Returns the test record. An inspection of the model stays in the run's folder.
    """
    config = trainer.config
    ranks = trainer.ranks
    dataset = trainer.dataset
    domains = len(dataset.domains)
    model = SyNCRec(config.model, domains).to(ranks.device).eval()
    folder, best, _ = find_best(run, ranks)
    restore_best(folder, model, trainer.table)
    recency = trainer.open_recency()
    term = None
    if config.evaluation.recency_term:
        trained = TrainedModel(
            run, config, dataset, model, trainer.table, best, ranks
        )
        term = open_recency_term(trained, recency.counts, locked=True)
    ranking = evaluate_split(
        model,
        trainer.table,
        dataset,
        ranks,
        config,
        "test",
        recency=recency,
        term=term,
    )
    inspection = inspect_model(model, trainer.table, dataset, config, ranks)
    if ranks.first:
        write_json(run / LOOK, inspection)
    return make_evaluation_record(
        "test",
        dataset,
        ranking,
        min_users=config.evaluation.min_users,
        step=best["step"],
        epoch=best["epoch"],
    )


def describe_run(trainer: Trainer) -> str:
    """Describes what runs, in two lines, and a split by time in one more."""
    dataset = trainer.dataset
    table = trainer.table
    config = trainer.config
    ranks = trainer.ranks
    batch = f"{config.global_batch_size} users"
    if config.tokens_per_batch:
        batch += f" or {config.tokens_per_batch:,} tokens"
    if config.accumulation > 1:
        batch += f" in {config.accumulation} micro-batches"
    domains = len(dataset.domains)
    processes = f"{ranks.world_size} ranks"
    if ranks.world_size == 1:
        processes = "1 rank"
    stage = trainer.engine.zero_optimization_stage()
    split = describe_split(dataset)
    cuts = ""
    if split is not None:
        cuts = (
            f"split by time: trained on what is before {split['validation']}, test from "
            f"{split['test']} on, {split['whose']} of each user's events there\n"
        )
    return (
        f"{dataset.users:,} users, {dataset.interactions:,} interactions, "
        f"{domains} domains; {trainer.total_steps:,} steps of {batch}\n{cuts}"
        f"table {table.rows:,} x {table.dim} ({table.capacity}), "
        f"dense model {trainer.weights:,} weights; "
        f"{processes} on {ranks.device.type}, ZeRO stage {stage}"
    )
