"""One training step: table and dense model, forward, backward, both updated.

A `Trainer` builds both or restores them from a checkpoint.

Shapes: N uses of rows in a batch, U distinct rows, D domains, r width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from embeddings.optimizers import ignores_zero_gradients
from embeddings.placement import HostNeeds
from embeddings.table import ItemTable
from syncrec.batch.views import Batch
from syncrec.losses.loss_correction import LossCorrection
from syncrec.model import LossReport, SyNCRec
from trainer.checkpoint.load import (
    restore_optimizers,
    restore_training_model,
)
from trainer.checkpoint.zero_state import (
    drop_average,
    gather_average,
    gather_state,
)
from trainer.config.run import RunConfig
from trainer.data.counter_rng import RandomStream, random_bits
from trainer.data.loading.day_counts import count_recent
from trainer.distributed.agreement import Signals
from trainer.distributed.deepspeed_engine import (
    build_engine_config,
    learning_rate_share,
    set_learning_rate,
    start_engine,
)
from trainer.distributed.process_group import (
    RankReduction,
    Ranks,
    sum_over_ranks,
)
from trainer.errors import InputError, NonFiniteLoss
from trainer.evaluation.recency.ranking import RecencyPopularity
from trainer.evaluation.recency.stored import open_recency
from trainer.reporting.trace.phases import (
    BACKWARD,
    BETWEEN,
    COPY,
    FORWARD,
    GRADIENTS,
    IDS,
    OPTIMIZER,
    ROWS,
    SUMS,
    TABLE,
    PhaseClock,
)
from trainer.training.gradients import Gradients, HostCopy
from trainer.training.loader_memory import estimate_loader_bytes
from trainer.training.prefetch import PrefetchedBatch, Prefetcher
from trainer.training.weight_average import WeightAverage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from trainer.checkpoint.warm_start import WarmStart
    from trainer.data.format.dataset import Dataset
    from trainer.data.loading.batch_schedule import BatchSchedule


@dataclass(frozen=True)
class _ForwardState:
    """What a forward pass changes, none of it in place.

    buffers: the model's (λ, φ̄ and its noise): module, name, value. updates: the table's count of updates.
    """

    buffers: list[tuple[torch.nn.Module, str, torch.Tensor]]
    updates: int


@dataclass(frozen=True)
class _PendingStep:
    """A step of which the host does not know yet whether it was made.

    outcome: 1 where it was finite, and the ranks' signals summed. before: the state to go back to.
    """

    number: int
    outcome: HostCopy
    report: LossReport
    before: _ForwardState


class RankFailure(Exception):
    """A rank signalled that it cannot go on.

    Raised on all ranks, with everything as it was before that step.
    """


class Trainer:
    """Everything that a training step needs, and how many there have been.

    `step` is also the position in the data.
    """

    _recency: RecencyPopularity | None = None

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        dataset: "Dataset",
        plan: "BatchSchedule",
        checkpoint: Path | None = None,
        step: int = 0,
        warm: "WarmStart | None" = None,
    ):
        """Builds table and dense model. Called on all ranks.

        checkpoint: a folder to resume from, made after `step` steps. warm: a model to begin with.
        Raises InputError where the host has no room for the table, or the model cannot be built.
        """
        self.config = config
        self.ranks = ranks
        self.dataset = dataset
        self.plan = plan
        self.step = step
        self.total_steps = plan.count_steps(
            config.epochs, ranks.rank, sum_over_ranks, config.max_steps
        )
        deepspeed_config = build_engine_config(
            config.optimizer,
            config.deepspeed,
            config.global_batch_size,
            ranks.world_size,
        )
        is_new = checkpoint is None and warm is None
        try:
            self.table = self._build_table(is_new)
            torch.manual_seed(config.seed)
            self.model = SyNCRec(config.model, len(dataset.domains))
        except ValueError as error:
            raise InputError(str(error)) from None
        # Counted here: ZeRO 3 partitions the parameters.
        self.weights = sum(
            parameter.numel() for parameter in self.model.parameters()
        )
        self._fill_model(checkpoint, warm)
        self.engine = start_engine(self.model, deepspeed_config)
        if checkpoint is not None:
            restore_optimizers(checkpoint, self.engine, self.table)
        if warm is not None:
            warm.restore_table(
                self.table, config.table.init_std, config.warm_kept
            )
        self._build_clock()
        self._prefetcher = Prefetcher(ranks.device)
        self._gradients = Gradients(self.engine, config.optimizer.clip)
        self._average = self._start_average()
        self._skips_on_device = (
            self._gradients.skips_on_device
            and ignores_zero_gradients(config.table)
        )
        self._pending: _PendingStep | None = None
        self._settled_signals = (step - 1, Signals())

    def _start_average(self) -> WeightAverage | None:
        """Goes on with the average of the weights, or begins it; None without one."""
        decay = self.config.optimizer.ema
        if decay:
            return WeightAverage(self.engine, decay)
        drop_average(self.engine)
        return None

    def _build_clock(self) -> None:
        """Builds the clock of phases, and has the exchanges of the dense model timed."""
        self.phases = PhaseClock()
        self.reduction = RankReduction(
            functools.partial(self.phases.within, SUMS)
        )
        _time_gradients(self.engine, self.phases)

    def _fill_model(
        self, checkpoint: Path | None, warm: "WarmStart | None"
    ) -> None:
        """Fills the dense model before an engine is built around it."""
        if checkpoint is not None:
            restore_training_model(checkpoint, self.model)
        if warm is not None:
            warm.restore_model(self.model)
        if self.model.clock is not None:
            self.model.clock.end_training(self.dataset.split.newest_tick)

    def _build_table(self, is_new: bool) -> ItemTable:
        """Builds the item table; is_new: with its first vectors drawn."""
        config = self.config
        loaders = estimate_loader_bytes(
            config, self.dataset, self.ranks.world_size
        )
        return ItemTable(
            self.dataset.num_embeddings,
            config.model.dim,
            config.table,
            config.seed,
            self.ranks.device,
            filled=is_new,
            beside=HostNeeds(checkpoints=True, loaders=loaders),
        )

    def open_recency(
        self, beat: Callable[[], None] | None = None
    ) -> RecencyPopularity:
        """Recency popularity of the dataset, which is counted once. Called on all ranks.

        Its half-life is kept in the run's folder. beat: called now and then while it is counted.
        """
        if self._recency is None:
            counts = count_recent(
                self.dataset, self.ranks, self.config.stream, beat
            )
            self._recency = open_recency(
                counts,
                self.dataset,
                self.ranks,
                self.config,
                beat,
                run=Path(self.config.run),
                locked=True,
            )
        return self._recency

    def evaluation_model(self) -> torch.nn.Module:
        """The dense model to validate with, in evaluation mode. Called on all ranks.

        It is the engine's own, or with `optimizer.ema` another one with the average of its weights.
        """
        self.engine.eval()
        average = gather_average(self.engine)
        if not average:
            return self.engine.module
        model = SyNCRec(self.config.model, len(self.dataset.domains))
        model.load_state_dict(gather_state(self.engine, True) | average)
        return model.to(self.ranks.device).eval()

    def prepare(self, batch: Batch) -> PrefetchedBatch:
        """Starts to prefetch a batch for a step to come.

        It is copied to the device and its ids are sent to the ranks that hold the rows. Called on
        all ranks, in the order of the steps.
        """
        self.phases.begin(COPY)
        return self._prefetcher.prepare(batch, self.table)

    def train_step(
        self,
        batch: Batch | PrefetchedBatch,
        following: PrefetchedBatch
        | Callable[[], PrefetchedBatch | None]
        | None = None,
        signals: Callable[[], Signals] = Signals,
    ) -> tuple[torch.Tensor, LossReport]:
        """Makes one step of table and dense model. Called on all ranks.

        batch: a Batch, or what `prepare` made of it. following: what `prepare` made of the next
        step's batch, or a function that gives it and is called once forward has been queued; its
        ids are sent once backward has been queued too. So what the host waits for (the loader, the
        batch's copy, how many ids go where) passes while the device computes. signals: called when
        the step's sums set off; gives what this rank signals the others with them.

        Returns this rank's loss and the model's LossReport.

        A step whose loss or gradient is not finite on any rank changes nothing, nor does one with
        which a rank signals trouble. The host learns of it when the device is through with that
        step: then NonFiniteLoss or RankFailure is raised on all ranks, by the next step before it
        changes anything, or by `settle`.
        """
        if isinstance(batch, PrefetchedBatch):
            prefetched = batch
        else:
            prefetched = self.prepare(batch)
        self._set_learning_rates()
        self._seed_dropout()
        self.engine.train()
        before = self._state_before_forward()
        self.phases.begin(IDS)
        batch, exchange = self._prefetcher.take(prefetched)
        self.phases.begin(ROWS)
        rows_UR = self.table.look_up(exchange)
        self.phases.begin(FORWARD)
        # A leaf for each use: what is clipped is the norm over uses, which does not depend on the
        # rank that a user is on.
        used_NR = batch.gather_vectors(rows_UR.detach()).requires_grad_()
        loss, report = self.engine(batch, used_NR, self.reduction)
        if callable(following):
            following = following()
        self.phases.begin(BACKWARD)
        self.engine.backward(loss)
        if following is not None:
            self.phases.begin(IDS)
            self._prefetcher.send(following)
        self.phases.begin(SUMS)
        gradient_NR = used_NR.grad
        assert gradient_NR is not None  # of backward
        gradient_NR = self._guard_gradient(
            gradient_NR, loss.detach(), report, batch, before, signals
        )
        self._update(batch, gradient_NR)
        return loss.detach(), report

    def _update(self, batch: Batch, gradient_NR: torch.Tensor) -> None:
        """Updates table and dense model, and the average of the weights. Called on all ranks."""
        self.phases.begin(TABLE)
        self.table.update(batch.reduce_gradient(gradient_NR))
        self.phases.begin(OPTIMIZER)
        self.engine.step()
        self.step += 1
        if self._average is not None and self._gradients.made is not None:
            self._average.update(self.step, self._gradients.made)
        self.phases.begin(BETWEEN)

    def _set_learning_rates(self) -> None:
        """Sets both learning rates to where the schedule is."""
        config = self.config.optimizer
        share = learning_rate_share(config, self.step, self.total_steps)
        self.learning_rate = config.learning_rate * share
        set_learning_rate(self.engine, self.learning_rate)
        self.table.set_learning_rate(self.config.table.learning_rate * share)

    def _seed_dropout(self) -> None:
        """Seeds dropout from (seed, step, rank), so that a resumed run draws the same masks."""
        bits = random_bits(
            self.config.seed, RandomStream.DROPOUT, self.step, self.ranks.rank
        )
        torch.manual_seed(int(bits >> 1))

    @property
    def signals(self) -> tuple[int, Signals]:
        """The newest step whose signals are known, and what the ranks signalled with it.

        It is the last step where there is no device to wait for, otherwise the last that was
        settled. The same on all ranks.
        """
        pending = self._pending
        if pending is not None and pending.outcome.on_host:
            _, *signal_sums = pending.outcome.values()
            return pending.number, Signals.from_sums(signal_sums)
        return self._settled_signals

    def settle(self) -> None:
        """Waits until it is known that the last step was made. Called on all ranks.

        Called before its weights or figures are used. Raises NonFiniteLoss, and RankFailure where a
        rank signalled trouble; all is then as it was before that step.
        """
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        finite, *signal_sums = pending.outcome.values()
        signals = Signals.from_sums(signal_sums)
        self._settled_signals = (pending.number, signals)
        if finite and not signals.trouble:
            return
        self.step = pending.number
        self.table.updates = pending.before.updates
        for module, name, value in pending.before.buffers:
            setattr(module, name, value)
        if signals.trouble:
            raise RankFailure
        raise NonFiniteLoss(self._describe_not_finite(pending.report))

    def state_figures(self) -> dict[str, float | None]:
        """Returns what a log line shows beside the meter's: α, β, learning rate, gradient norm."""
        correction = self.model.correction
        alpha = None
        beta = None
        if isinstance(correction, LossCorrection):
            alpha = correction.alpha.item()
            beta = correction.beta.item()
        return {
            "alpha": alpha,
            "beta": beta,
            "learning_rate": self.learning_rate,
            "gradient_norm": self._gradient_norm.item(),
        }

    def _state_before_forward(self) -> _ForwardState:
        """Takes what the forward pass is about to change."""
        buffers = []
        for module in self.model.modules():
            for name, value in module.named_buffers(recurse=False):
                buffers.append((module, name, value))
        return _ForwardState(buffers, self.table.updates)

    def _guard_gradient(
        self,
        gradient_NR: torch.Tensor,
        loss: torch.Tensor,
        report: LossReport,
        batch: Batch,
        before: _ForwardState,
        signals: Callable[[], Signals],
    ) -> torch.Tensor:
        """Clips the table's gradient; it is zero where the step is skipped.

        The step before this one is settled here: this one's work is queued by now, and nothing of
        it has been updated. So is this step itself where only the host can keep an optimizer from
        stepping.
        """
        # Shared negatives are scaled too, but not counted: every rank looks them up, and has a part
        # of their gradient.
        counted = gradient_NR
        if batch.negatives is None:
            counted = gradient_NR[: batch.interactions]
        gradient_NR, outcome, self._gradient_norm = self._gradients.check(
            gradient_NR, counted, loss, signals()
        )
        step = _PendingStep(self.step, HostCopy(outcome), report, before)
        self.settle()
        self._pending = step
        if not self._skips_on_device:
            self.settle()
        return gradient_NR

    def _describe_not_finite(self, report: LossReport) -> str:
        """Says which part of a loss is not finite, and of which domain. Called on all ranks.

        The loss is that of step `self.step`.
        """
        information = report.mutual_information.clone()
        dist.all_reduce(information)
        parts = [
            self._describe_view(
                "single-domain", report.single_D, report.single_targets_D
            ),
            self._describe_view(
                "cross-domain", report.cross_D, report.cross_targets_D
            ),
        ]
        if not information.isfinite():
            parts.append("the mutual information")
        culprit = " and ".join(filter(None, parts)) or "the gradient"
        epoch, batch = self.plan.locate(self.step)
        return (
            f"step {self.step + 1} (batch {batch} of epoch {epoch}): {culprit} is not finite; "
            "neither weights nor table were updated, and the last checkpoint stays: "
            "lower optimizer.learning_rate or table.learning_rate, set optimizer.clip"
        )

    def _describe_view(
        self, view: str, losses_D: torch.Tensor, targets_D: torch.Tensor
    ) -> str:
        """Names the domains whose mean loss is not finite, "" where there is none."""
        # A domain without targets has no mean loss.
        failed_D = ~losses_D.isfinite() & (targets_D > 0)
        names = []
        domains = self.dataset.domains
        for domain, failed in zip(domains, failed_D.tolist(), strict=True):
            if failed:
                names.append(domain.name)
        if not names:
            return ""
        return f"the {view} loss of {', '.join(names)}"


def _time_gradients(engine: "DeepSpeedEngine", phases: PhaseClock) -> None:
    """Has DeepSpeed's reduction of the dense gradient counted as a phase of its own."""
    reduce = engine.allreduce_gradients

    def reduce_timed(*arguments: Any, **options: Any) -> None:
        with phases.within(GRADIENTS):
            reduce(*arguments, **options)

    engine.allreduce_gradients = reduce_timed
