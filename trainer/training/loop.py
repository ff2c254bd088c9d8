"""The training run: steps, validations, log lines and checkpoints in order; begun, gone on with, stopped and tested."""

import contextlib
import errno
import importlib.metadata
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from syncrec.model import SyNCRec
from trainer.checkpoint.resume import (
    PACKAGES,
    find_start,
    is_empty,
    leave_nothing,
    require_same_start,
    run_folder,
)
from trainer.checkpoint.save import Checkpoints, RunState, best_checkpoint, restore_best
from trainer.checkpoint.warm_start import find_warm_start
from trainer.config.load import flat, to_yaml
from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import Plan
from trainer.data.loading.stream import Fed, Feed, TrainBatches
from trainer.distributed.agreement import (
    Signals,
    StopSignal,
    Watchdog,
    agree,
    by_the_first,
)
from trainer.distributed.consensus import on_all_ranks
from trainer.distributed.determinism import deterministic_sums
from trainer.distributed.process_group import Ranks
from trainer.distributed.resources import cores_per_rank
from trainer.distributed.run_lock import locked_by_first_rank
from trainer.errors import InputError, NotFinite, Stopped
from trainer.evaluation.inspect import look_at
from trainer.evaluation.sampled import evaluate_split, evaluation_record
from trainer.files.atomic import write_json, write_text
from trainer.reporting.run_log import (
    HEADLINE,
    LOOK,
    METRICS_FILE,
    RunLog,
    evaluation_table,
    skipped_sentence,
)
from trainer.training.meters import IntervalMeter
from trainer.training.prefetch import Ready
from trainer.training.step import Halted, Trainer

_RANKINGS = (
    8  # steps of a validation between two in which the ranks agree to go on with it
)


def train(config: RunConfig, ranks: Ranks, fresh=False, accept_changes=False):
    """Trains, keeps the best model by validation, tests it, and writes the report. Called on all ranks.

    Goes on from the newest whole checkpoint where the run's folder has one. fresh, accept_changes: as in trainer.checkpoint.resume.
    Returns the test record. Raises InputError where something given cannot be used (before anything is written, if it can be
    seen then), NotFinite, and Stopped.
    """
    with (
        _full_disk_is_an_input_error(config.run),
        deterministic_sums(config.deterministic),
        contextlib.ExitStack() as locks,
    ):
        return _train(config, ranks, fresh, accept_changes, locks)


def _train(config, ranks, fresh, accept_changes, locks):
    dataset = on_all_ranks(lambda: _dataset(config, ranks))
    require_same_start(config, dataset, fresh=fresh, accept_changes=accept_changes)
    plan = Plan(
        dataset,
        config.global_batch_size,
        ranks.world_size,
        config.seed,
        config.stream.shuffle,
        max_length=config.model.max_length,
        tokens_per_batch=config.tokens_per_batch,
        balance=config.stream.balance,
    )
    run = Path(config.run)
    new = by_the_first(lambda: is_empty(run_folder(config.run, fresh)), ranks.first)
    locks.enter_context(locked_by_first_rank(run, ranks.first))
    checkpoint, state = find_start(run, config, dataset, ranks, accept_changes)
    warm = find_warm_start(config, dataset, ranks) if checkpoint is None else None
    trainer = Trainer(config, ranks, dataset, plan, checkpoint, state.step, warm)
    dist.barrier()  # every rank has looked at the folder before one of them writes
    try:
        on_all_ranks(lambda: _begin(run, config, checkpoint) if ranks.first else None)
        names = [domain.name for domain in dataset.domains]
        resume_step = None if checkpoint is None else state.step
        with RunLog(
            run,
            trainer.total_steps,
            names,
            config.log.tensorboard,
            ranks.first,
            resume_step,
        ) as log:
            log.message(describe(trainer))
            if checkpoint is not None:
                log.message(
                    f"goes on from {checkpoint}, after {state.seconds / 60:.1f} minutes of training"
                )
            if warm is not None:
                log.message(
                    f"begins with the model of {warm.run}, which knows {warm.share}"
                )
            with StopSignal() as stop:
                TrainingRun(
                    trainer, state, run, log, stop, checkpoint is not None
                ).fit()
            record = test_best(trainer, run) | {"seconds": state.seconds}
            log.evaluation(record)
            log.message(evaluation_table(record))
            if state.skipped_users:
                log.message(skipped_sentence(state.skipped_users))
    except InputError as error:
        if type(error) is InputError and ranks.first and new and not state.step:
            leave_nothing(run)  # what cannot begin is in the way of the next try
        raise
    if ranks.first:
        from trainer.reporting.run_report import (
            write_report,
        )  # Plotly and Jinja2 are for the page alone

        print(f"report: {write_report(run)}", flush=True)
    return record


def _dataset(config, ranks):
    if not config.data:
        raise InputError(
            "data=DIR is missing: the prepared dataset, see launch/prepare.py"
        )
    check_contents = ranks.local_rank == 0  # once a host
    return Dataset.load(
        config.data, config.stream.damaged == "stop", config.stream, check_contents
    )


def _begin(run, config, checkpoint):
    """The first files of the run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "config.yaml", to_yaml(config))
    if checkpoint is not None:
        write_text(run / METRICS_FILE, (checkpoint / METRICS_FILE).read_text())


@contextlib.contextmanager
def _full_disk_is_an_input_error(run):
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{error.filename or run}: {error.strerror}: make room, and the same command goes on from the last checkpoint",
            one_rank=True,
        ) from None


class TrainingRun:
    """A run from where it is to its end."""

    def __init__(
        self,
        trainer: Trainer,
        state: RunState,
        run,
        log,
        stop: StopSignal,
        resumed: bool,
    ):
        self.trainer, self.state, self.log, self.stop = trainer, state, log, stop
        self.config, self.ranks, self.plan = trainer.config, trainer.ranks, trainer.plan
        facts = {
            "config": flat(self.config),
            "dataset": trainer.dataset.fingerprint,
            "world_size": self.ranks.world_size,
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
        self.checkpoints = Checkpoints(
            run,
            self.config.checkpoint.keep,
            self.ranks,
            facts,
            last=state if resumed else None,
            beat=lambda: self.watchdog.beat(),
        )
        self.meter = IntervalMeter([domain.name for domain in trainer.dataset.domains])
        self.watchdog = Watchdog(
            60 * self.config.timeout_minutes + 5, lambda: f"step {self.state.step + 1}"
        )
        self._begun, self._before = time.monotonic(), state.seconds
        self._skipped, self._skipped_before = 0, state.skipped_users
        self._saved_at, self._saved_step, self._told = self._begun, state.step, set()
        self._ahead = self._refusal = None
        batches = TrainBatches(
            self.plan,
            self.ranks.rank,
            state.step,
            self.config.model.max_length,
            self.config.model.mutual_information_pooling,
            self.config.negatives,
            self.config.stream,
            self.config.model.mutual_information_candidates,
        )
        self.feed = Feed(
            batches,
            self.ranks.device.type == "cuda",
            cores_per_rank(self.ranks.world_size),
        )

    def fit(self):
        """Trains to the end or until validation stops getting better. Raises Stopped, with a checkpoint written, where any
        rank was asked to stop."""
        with self.watchdog, contextlib.closing(self.feed):
            if self._validation_due():  # it was stopped in between
                self._validate()
            try:
                while not self._ended():
                    self._step()
                self.trainer.settle()
            except NotFinite:  # on all ranks: what is being written was good
                self._finish()
                raise
            except Halted:  # likewise
                self._finish()
                raise self._refusal or InputError(
                    "another rank cannot go on; its own line says why"
                ) from None
            self._finish()

    def _step(self):
        """One step, and what is due after it."""
        fed, ready = self._next()
        self._ahead, looking = None, 0.0
        trouble = (
            self._refusal is not None
        )  # with this step's batch; the next step's is fetched in between

        def signals():
            minutes = (time.monotonic() - self._saved_at) / 60
            due = (
                self.ranks.first and 0 < self.config.checkpoint.every_minutes <= minutes
            )
            return Signals(trouble, self.stop.asked, due, self.checkpoints.writing)

        def look_ahead():
            nonlocal looking
            begun = time.perf_counter()
            following = self._look_ahead()
            looking = time.perf_counter() - begun
            return following

        begun = time.perf_counter()
        loss, report = self.trainer.train_step(ready, look_ahead, signals)
        computed = time.perf_counter() - begun - looking
        self.state.step = self.trainer.step
        self._note(fed, loss, report)
        if found := self.feed.computed(computed):
            self.log.message(found)
        if self._validation_due():
            self._validate()
        elif self._epoch_ends(self.config.checkpoint.every_epochs):
            self._save()

    def _look_ahead(self):
        """Takes the next step's batch and starts the exchange of its ids, so that they travel while this step computes.

        Where the run stops, saves, or ends early before the next step, the batch is not in that step's count and is made again
        by who goes on.
        """
        if self.state.step + 1 >= self.trainer.total_steps:
            return None
        ahead = self._fetch()
        self._ahead = replace(ahead, ready=self.trainer.prepare(ahead.fed.batch))
        return self._ahead.ready

    def _fetch(self):
        """The next batch. Where this rank cannot have one it takes part in the step without a user, so that the others do not
        wait, and tells them so with that step, which is then not made."""
        if self._refusal is None:
            with self.meter.waiting():
                try:
                    return _Ahead(next(self.feed))
                except InputError as error:
                    self._refusal = error
        return _Ahead(self.feed.without_users())

    def _next(self):
        """What this rank is fed next, and made ready. Before that all ranks do what any has signalled:
        save, stop, or end.

        A signal travels with a step and is known when that step is through; on a device one step
        later, so that the host does not wait for it.
        """
        ahead = self._ahead or self._fetch()
        self.watchdog.beat()
        number, told = self.trainer.signals
        if told.trouble:
            self.trainer.settle()
        if (
            number >= self._saved_step
        ):  # it was told after the newest checkpoint was begun
            self.checkpoints.settle(told.writing)
        if told.stop:
            self._stop()
        due = told.due and number >= self._saved_step
        steps = self.config.checkpoint.every_steps
        if due or (steps and self.state.step and self.state.step % steps == 0):
            self._save()
        return ahead.fed, ahead.ready or self.trainer.prepare(ahead.fed.batch)

    def _note(self, fed, loss, report):
        """The step's figures, and a log line where one is due."""
        self.meter.add(fed.batch, loss, report, fed.skipped)
        self._skipped += fed.skipped
        self._tell(fed.reasons)
        self.log.advance(1)
        step = self.state.step
        if step % self.config.log.every == 0 or step == self.trainer.total_steps:
            self.trainer.settle()
            epoch, _ = self.plan.locate(step - 1)
            seconds = {"seconds": self._seconds()}
            self.log.train(
                self.meter.record(step, epoch) | self.trainer.state_figures() | seconds
            )

    def _tell(self, reasons):
        """Says once what is damaged; each of a loader's processes meets it."""
        for reason in set(reasons) - self._told:
            print(f"rank {self.ranks.rank}: {reason}", file=sys.stderr, flush=True)
        self._told.update(reasons)

    def _epoch_ends(self, every):
        """True after the last step of every `every`-th epoch."""
        if not self.state.step or not every:
            return False
        epoch, step = self.plan.locate(self.state.step - 1)
        return step + 1 == self.plan.steps(epoch) and (epoch + 1) % every == 0

    def _validation_due(self):
        last = self.state.step == self.trainer.total_steps
        return self.state.validated != self.state.step and (
            last or self._epoch_ends(self.config.evaluation.every_epochs)
        )

    def _validate(self):
        """Validates; a checkpoint follows where the model is the best so far, and where one is due anyhow."""
        self.trainer.settle()
        state = self.state
        epoch, _ = self.plan.locate(state.step - 1)
        with self.meter.paused():
            engine, table, dataset = (
                self.trainer.engine,
                self.trainer.table,
                self.trainer.dataset,
            )
            engine.eval()
            try:
                ranking = evaluate_split(
                    engine.module,
                    table,
                    dataset,
                    self.ranks,
                    self.config,
                    "validation",
                    advance=self._between_rankings,
                    workers=self.feed.workers,
                )
            except _Interrupted:
                self._stop()
            where = {"step": state.step, "epoch": epoch, "seconds": self._seconds()}
            self._tell(ranking.reasons)
            record = evaluation_record("validation", dataset, ranking, **where)
            self.log.evaluation(record)
            value = record["mean"][HEADLINE] or 0.0
            state.validated = state.step
            if state.best is None or value > state.best[HEADLINE]:
                state.best, state.since_best = (
                    {"step": state.step, "epoch": epoch, HEADLINE: value},
                    0,
                )  # save names its folder
            else:
                state.since_best += 1
        last = state.step == self.trainer.total_steps
        if (
            state.since_best == 0
            or self._ended()
            or self._epoch_ends(self.config.checkpoint.every_epochs)
        ):
            self._save()
        if self._ended() and not last:
            best = state.best[HEADLINE]
            self.log.message(
                f"stopped early: {state.since_best} validations without a better mean {HEADLINE} than {best:.4f}"
            )

    def _between_rankings(self, done, total):
        self.watchdog.beat()
        if done % _RANKINGS == 0 and agree(stop=self.stop.asked).stop:
            raise _Interrupted

    def _ended(self):
        return (
            self.state.step >= self.trainer.total_steps
            or 0 < self.config.evaluation.patience <= self.state.since_best
        )

    def _save(self):
        self.trainer.settle()
        skipped = torch.tensor([self._skipped])
        dist.all_reduce(skipped)
        self.state.skipped_users = self._skipped_before + int(skipped)
        self.state.seconds = self._seconds()
        with self.meter.paused(), self.watchdog.held():
            self.checkpoints.save(self.trainer.engine, self.trainer.table, self.state)
        self._saved_at, self._saved_step = time.monotonic(), self.state.step

    def _finish(self):
        with self.watchdog.held():
            self.checkpoints.finish()

    def _stop(self):
        self._save()
        self._finish()
        raise Stopped(
            f"stopped after step {self.state.step}, as asked; its checkpoint is written, the same command goes on"
        )

    def _seconds(self):
        return self._before + time.monotonic() - self._begun


@dataclass(frozen=True)
class _Ahead:
    """A step's batch; ready: where its exchange has been started."""

    fed: Fed
    ready: Ready | None = None


class _Interrupted(Exception):
    """Asked to stop between two rankings."""


def test_best(trainer, run):
    """The test record of the best model, read back from disk as `launch/evaluate.py` does; a look at it stays in the run's
    folder."""
    config, ranks, dataset = trainer.config, trainer.ranks, trainer.dataset
    model = SyNCRec(config.model, len(dataset.domains)).to(ranks.device).eval()
    folder, best, _ = best_checkpoint(run, ranks)
    restore_best(folder, model, trainer.table)
    ranking = evaluate_split(model, trainer.table, dataset, ranks, config, "test")
    look = look_at(model, trainer.table, dataset, config, ranks)
    if ranks.first:
        write_json(run / LOOK, look)
    return evaluation_record(
        "test", dataset, ranking, step=best["step"], epoch=best["epoch"]
    )


def describe(trainer):
    """What runs, in a line or two."""
    table = trainer.table
    return (
        f"{trainer.dataset.users:,} users, {trainer.dataset.interactions:,} interactions, "
        f"{len(trainer.dataset.domains)} domains; table {table.rows:,} x {table.dim} ({table.capacity}), "
        f"dense model {trainer.weights:,} weights; "
        f"{trainer.ranks.world_size} ranks on {trainer.ranks.device.type}, ZeRO stage "
        f"{trainer.engine.zero_optimization_stage()}; {trainer.total_steps:,} steps of {trainer.config.global_batch_size} users"
        + (
            f" or {tokens:,} tokens"
            if (tokens := trainer.config.tokens_per_batch)
            else ""
        )
    )
