"""One training step: table and dense model, forward, backward, both updated; and how they are built and brought back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from embeddings.optimizers import zero_changes_nothing
from embeddings.placement import HostNeeds
from embeddings.table import ItemTable
from syncrec.batch.build import Batch
from syncrec.losses.loss_correction import LossCorrection
from syncrec.model import LossReport, SyNCRec
from trainer.checkpoint.save import restore_model, restore_optimizers
from trainer.data.counter_rng import RandomStream, random_bits
from trainer.distributed.agreement import Signals
from trainer.distributed.deepspeed_engine import (
    engine_config,
    rate_share,
    set_learning_rate,
    start_engine,
)
from trainer.distributed.process_group import RankReduction, sum_of_ranks
from trainer.errors import InputError, NotFinite
from trainer.training.gradients import Gradients, Known
from trainer.training.loader_memory import loader_bytes
from trainer.training.prefetch import Beside, Ready


@dataclass(frozen=True)
class _Unsettled:
    """A step of which the host does not know yet whether it was made, with the model's buffers (λ, φ̄) and the table's count
    of updates before it. outcome: 1 where it was finite, and the ranks' signals summed."""

    number: int
    outcome: Known
    report: LossReport
    buffers: list[tuple[torch.nn.Module, str, torch.Tensor]]
    updates: int


class Halted(Exception):
    """A rank signalled that it cannot go on: raised on all ranks, with everything as it was before that step."""


class Trainer:
    """Everything that a training step needs, and how many there have been: `step` is also the position in the data."""

    def __init__(
        self, config, ranks, dataset, plan, checkpoint=None, step=0, warm=None
    ):
        """checkpoint: a folder to go on from, made after `step` steps; warm: a Carried to begin with."""
        self.config, self.ranks, self.dataset, self.plan = config, ranks, dataset, plan
        self.step = step
        self.total_steps = plan.count_steps(
            config.epochs, ranks.rank, sum_of_ranks, config.max_steps
        )
        deepspeed = engine_config(
            config.optimizer,
            config.deepspeed,
            config.global_batch_size,
            ranks.world_size,
        )
        try:
            self.table = ItemTable(
                dataset.num_embeddings,
                config.model.dim,
                config.table,
                config.seed,
                ranks.device,
                filled=checkpoint is None and warm is None,
                beside=HostNeeds(
                    checkpoints=True,
                    loaders=loader_bytes(config, dataset, ranks.world_size),
                ),
            )
            torch.manual_seed(config.seed)
            self.model = SyNCRec(config.model, len(dataset.domains))
        except ValueError as error:
            raise InputError(str(error)) from None
        self.weights = sum(
            parameter.numel() for parameter in self.model.parameters()
        )  # ZeRO 3 takes them apart
        if checkpoint is not None:
            restore_model(checkpoint, self.model)
        if warm is not None:
            warm.restore_model(self.model)
        self.engine = start_engine(self.model, deepspeed)
        if checkpoint is not None:
            restore_optimizers(checkpoint, self.engine, self.table)
        if warm is not None:
            warm.restore_table(self.table, config.table.init_std, config.warm_kept)
        self.reduction = RankReduction()
        self._beside = Beside(ranks.device)
        self._gradients = Gradients(self.engine, config.optimizer.clip)
        self._held = self._gradients.can_be_held and zero_changes_nothing(config.table)
        self._unsettled, self._told = None, (step - 1, Signals())

    def prepare(self, batch: Batch) -> Ready:
        """Starts to bring a batch to the device and its ids to the ranks that hold the rows, for a
        step to come. Called on all ranks, in the order of the steps."""
        return self._beside.prepare(batch, self.table)

    def train_step(
        self,
        batch: Batch | Ready,
        following: Ready | Callable[[], Ready | None] | None = None,
        signals: Callable[[], Signals] = Signals,
    ) -> tuple[torch.Tensor, LossReport]:
        """One step of table and dense model; returns this rank's loss and the model's LossReport. Called on all ranks.

        batch: a Batch, or what `prepare` made of it. following: what `prepare` made of the next step's batch, or a function
        that gives it and is called once forward has been queued; its ids are sent once backward has been queued too. So what
        the host waits for (the loader, the batch's copy, how many ids go where) passes while the device computes. signals:
        called when the step's sums set off; gives what this rank tells the others with them.

        A step whose loss or gradient is no number on any rank changes nothing, nor does one with which a rank signals trouble.
        The host learns of it when the device is through with that step: then NotFinite or Halted is raised on all ranks, by the
        next step before it changes anything, or by `settle`.
        """
        config = self.config.optimizer
        ready = batch if isinstance(batch, Ready) else self.prepare(batch)
        share = rate_share(config, self.step, self.total_steps)
        self.learning_rate = config.learning_rate * share
        set_learning_rate(self.engine, self.learning_rate)
        self.table.set_learning_rate(self.config.table.learning_rate * share)
        # Dropout: from (seed, step, rank), so that a run that is resumed goes on as it would have.
        torch.manual_seed(
            int(
                random_bits(
                    self.config.seed,
                    RandomStream.DROPOUT,
                    self.step,
                    self.ranks.rank,
                )
                >> 1
            )
        )
        self.engine.train()
        before = self._state_of_forward()
        batch, exchange = self._beside.take(ready)
        rows_UR = self.table.look_up(exchange)
        # A leaf for each use: what is clipped is the norm over uses, which does not depend on the rank that a user is on.
        used_NR = batch.vectors_of_uses(rows_UR.detach()).requires_grad_()
        loss, report = self.engine(batch, used_NR, self.reduction)
        if callable(following):
            following = following()
        self.engine.backward(loss)
        if following is not None:
            self._beside.send(following)
        gradient_NR = self._checked(
            used_NR.grad, loss.detach(), report, batch, before, signals
        )
        self.table.update(batch.gradient_of_rows(gradient_NR))
        self.engine.step()
        self.step += 1
        return loss.detach(), report

    @property
    def signals(self) -> tuple[int, Signals]:
        """The newest step of which it is known what the ranks signalled with it, and what. It is the
        last step where there is no device to wait for, otherwise the last that was settled. The same
        on all ranks."""
        if self._unsettled is not None and self._unsettled.outcome.on_host:
            return self._unsettled.number, Signals.of_sums(
                self._unsettled.outcome.value()[1:]
            )
        return self._told

    def settle(self):
        """Waits until it is known that the last step was made; before anything is made of what it left, or of its figures.
        Called on all ranks. Raises NotFinite, and Halted where a rank signalled trouble."""
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        finite, *signals = step.outcome.value()
        self._told = step.number, Signals.of_sums(signals)
        _, told = self._told
        if finite and not told.trouble:
            return
        self.step, self.table.updates = step.number, step.updates
        for module, name, value in step.buffers:
            setattr(module, name, value)
        if told.trouble:
            raise Halted
        raise NotFinite(self._not_finite(step.report))

    def state_figures(self):
        """What a log line shows beside the meter's: α, β, learning rate, gradient norm."""
        correction = self.model.correction
        has_scales = isinstance(correction, LossCorrection)
        return {
            "alpha": correction.alpha.item() if has_scales else None,
            "beta": correction.beta.item() if has_scales else None,
            "learning_rate": self.learning_rate,
            "gradient_norm": self._norm.item(),
        }

    def _state_of_forward(self):
        """What forward itself changes, none of it in place: buffers, and the number of look-ups."""
        buffers = [
            (m, name, value)
            for m in self.model.modules()
            for name, value in m.named_buffers(recurse=False)
        ]
        return buffers, self.table.updates

    def _checked(self, gradient, loss, report, batch, before, signals):
        """The table's gradient, clipped, as it may go into the update; before: what `_state_of_forward` gave.

        The step before this one is settled here: this one's work is queued by now, and nothing of it has been updated. So is
        this step itself where only the host can keep an optimizer from stepping.
        """
        # Shared negatives are scaled too, but not counted: every rank looks them up, and has a part of their gradient.
        counted = (
            gradient if batch.negatives is not None else gradient[: batch.interactions]
        )
        gradient, outcome, self._norm = self._gradients.check(
            gradient, counted, loss, signals()
        )
        this = _Unsettled(self.step, Known(outcome), report, *before)
        self.settle()
        self._unsettled = this
        if not self._held:
            self.settle()
        return gradient

    def _not_finite(self, report):
        """Which part of the loss of step `self.step`, and of which domain, in one line. Called on all ranks."""
        information = report.mutual_information.clone()
        dist.all_reduce(information)
        names = [domain.name for domain in self.dataset.domains]
        views = {
            "single-domain": (report.single_D, report.single_targets_D),
            "cross-domain": (report.cross_D, report.cross_targets_D),
        }
        parts = []
        for view, (
            values_D,
            targets_D,
        ) in views.items():  # a domain without targets has no mean loss
            odd_D = ~values_D.isfinite() & (targets_D > 0)
            bad = [name for name, odd in zip(names, odd_D.tolist(), strict=True) if odd]
            parts += [f"the {view} loss of {', '.join(bad)}"] if bad else []
        parts += [] if information.isfinite() else ["the mutual information"]
        what = " and ".join(parts) or "the gradient"
        epoch, batch = self.plan.locate(self.step)
        return (
            f"step {self.step + 1} (batch {batch} of epoch {epoch}): {what} is not finite; neither weights nor table were "
            "updated, and the last checkpoint stays: lower optimizer.learning_rate or table.learning_rate, set optimizer.clip"
        )
