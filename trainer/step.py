"""One training step: table and dense model, forward, backward, both updated; and how they are built and brought back."""

import torch
import torch.distributed as dist

from embeddings.table import ItemTable
from syncrec.batch import move
from syncrec.model import SyNCRec
from trainer.checkpoint import restore_model, restore_optimizers
from trainer.data.random import random_bits
from trainer.distributed import RankReduction
from trainer.engine import engine_config, rate_share, set_learning_rate, start_engine
from trainer.errors import InputError, NotFinite


class Trainer:
    """Everything that a training step needs, and how many there have been: `step` is also the position in the data."""

    def __init__(self, config, ranks, dataset, plan, checkpoint=None, step=0):
        """checkpoint: a folder to go on from, made after `step` steps."""
        self.config, self.ranks, self.dataset, self.plan = config, ranks, dataset, plan
        self.step, self.total_steps = step, sum(plan.steps(epoch) for epoch in range(config.epochs))
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        deepspeed = engine_config(
            config.optimizer, config.deepspeed, config.global_batch_size, ranks.world_size, ranks.device.type == "cuda"
        )
        try:
            self.table = ItemTable(dataset.num_embeddings, config.model.dim, config.table, config.seed, ranks.device)
        except ValueError as error:
            raise InputError(str(error)) from None
        torch.manual_seed(config.seed)
        self.model = SyNCRec(config.model, len(dataset.domains))
        self.weights = sum(parameter.numel() for parameter in self.model.parameters())  # ZeRO 3 takes them apart
        if checkpoint is not None:
            restore_model(checkpoint, self.model)
        self.engine = start_engine(self.model, deepspeed)
        if checkpoint is not None:
            restore_optimizers(checkpoint, self.engine, self.table)
        self.reduction = RankReduction()

    def train_step(self, batch):
        """One step of table and dense model; returns this rank's loss and the model's LossReport.

        Raises NotFinite, on all ranks and before anything is updated, where the loss or its gradient is no number.
        """
        config = self.config.optimizer
        share = rate_share(config, self.step, self.total_steps)
        self.learning_rate = config.learning_rate * share
        set_learning_rate(self.engine, self.learning_rate)
        self.table.set_learning_rate(self.config.table.learning_rate * share)
        # Dropout: from (seed, step, rank), so that a run that is resumed goes on as it would have.
        torch.manual_seed(int(random_bits(self.config.seed, self.step, self.ranks.rank) >> 1))
        self.engine.train()
        batch = move(batch, self.ranks.device)
        rows_UR = self.table(batch.distinct)
        # A leaf for each use: what is clipped is the norm over uses, which does not depend on the rank that a user is on.
        used_NR = rows_UR.detach().index_select(0, batch.place).requires_grad_()
        loss, report = self.engine(batch, used_NR, self.reduction)
        self.engine.backward(loss)
        gradient_NR = self._checked(used_NR.grad, loss.detach(), report, batch)
        self.table.update(torch.zeros_like(rows_UR).index_add_(0, batch.place, gradient_NR))
        self.engine.step()
        self.step += 1
        return loss.detach(), report

    def state_figures(self):
        """What a log line shows beside the meter's: α, β, learning rate, gradient norm."""
        correction = self.model.correction
        return {
            "alpha": correction.alpha.item() if correction is not None else None,
            "beta": correction.beta.item() if correction is not None else None,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.engine.get_global_grad_norm(),
        }

    def _checked(self, gradient, loss, report, batch):
        """The looked-up vectors' gradient, scaled where its norm over all ranks is above optimizer.clip.

        Shared negatives are scaled too, but not counted: every rank looks them up, and has a part of their gradient.
        """
        counted = gradient if batch.negatives is not None else gradient[: batch.interactions]
        sums = torch.stack([counted.double().square().sum(), gradient.sum().double() + loss.double()])
        dist.all_reduce(sums)  # what is no number on one rank is none on all
        square, all_of_it = sums
        if not (square + all_of_it).isfinite():
            raise NotFinite(self._not_finite(report))
        limit = self.config.optimizer.clip
        if not limit:
            return gradient
        # The losses carry the number of ranks as a factor, which the table divides by.
        norm = square.sqrt() / self.ranks.world_size
        return gradient * (limit / norm).clamp(max=1).to(gradient.dtype)

    def _not_finite(self, report):
        """Which part of the loss, and of which domain, in one line. Called on all ranks."""
        information = report.mutual_information.clone()
        dist.all_reduce(information)
        names = [domain.name for domain in self.dataset.domains]
        views = {
            "single-domain": (report.single_D, report.single_targets_D),
            "cross-domain": (report.cross_D, report.cross_targets_D),
        }
        parts = []
        for view, (values_D, targets_D) in views.items():  # a domain without targets has no mean loss
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
