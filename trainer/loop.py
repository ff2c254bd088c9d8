"""The training run: batches through table and model, both updated, validated, logged, the best kept."""

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from embeddings.table import ItemTable
from syncrec.batch import move
from syncrec.model import SyNCRec
from trainer.checkpoint import BEST, load_best, save_best
from trainer.config import RunConfig, to_yaml
from trainer.data.dataset import Dataset
from trainer.data.random import random_bits
from trainer.data.stream import Plan, TrainBatches, ready
from trainer.distributed import RankReduction, Ranks
from trainer.engine import engine_config, rate_share, set_learning_rate, start_engine
from trainer.errors import InputError
from trainer.evaluate import evaluate_split, evaluation_record
from trainer.log import RunLog, evaluation_table
from trainer.meters import IntervalMeter
from trainer.report import write_report


def train(config: RunConfig, ranks: Ranks):
    """Trains, keeps the best model by validation, tests it, and writes the report. Called on all ranks.

    Returns the test record. Raises InputError before anything is written where something given cannot be used.
    """
    if not config.data:
        raise InputError("data=DIR is missing: the prepared dataset, see launch/prepare.py")
    dataset = Dataset.load(config.data)
    plan = Plan(dataset, config.global_batch_size, ranks.world_size, config.seed, config.stream.shuffle)
    run = free_run_folder(config.run)
    trainer = Trainer(config, ranks, dataset, plan)
    dist.barrier()  # every rank has found the folder free before one of them writes
    try:
        if ranks.first:
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_text(to_yaml(config))
        names = [domain.name for domain in dataset.domains]
        with RunLog(run, trainer.total_steps, names, config.log.tensorboard, ranks.first) as log:
            log.message(trainer.describe())
            trainer.fit(run, log)
            record = trainer.test_best(run)
            log.evaluation(record)
            log.message(evaluation_table(record))
    except InputError:
        if not (run / BEST).exists():  # nothing worth keeping, and in the way of the next try
            shutil.rmtree(run, ignore_errors=True)
        raise
    if ranks.first:
        print(f"report: {write_report(run)}", flush=True)
    return record


def free_run_folder(folder) -> Path:
    """The run's folder, which must not hold anything yet. Raises InputError where it does, or is not given."""
    if not folder:
        raise InputError("run=DIR is missing: the folder that gets everything this run writes")
    run = Path(folder)
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: already holds something; give a new folder as run=DIR")
    return run


class Trainer:
    """Everything that a training step needs, and its state: the position in the data is `step`."""

    def __init__(self, config, ranks, dataset, plan):
        self.config, self.ranks, self.dataset, self.plan = config, ranks, dataset, plan
        self.step, self.total_steps = 0, sum(plan.steps(epoch) for epoch in range(config.epochs))
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
        self.engine = start_engine(self.model, deepspeed)
        self.reduction = RankReduction()

    def fit(self, run, log):
        """Trains to the end or until validation stops getting better; the best model is saved in `run`."""
        config = self.config
        batches = TrainBatches(
            self.plan,
            self.ranks.rank,
            self.step,
            config.model.max_length,
            config.model.mutual_information_pooling,
            config.negatives,
            config.stream,
        )
        stream = ready(batches, config.stream, pin_memory=self.ranks.device.type == "cuda")
        meter = IntervalMeter([domain.name for domain in self.dataset.domains])
        best, since_best = -1.0, 0
        while self.step < self.total_steps:
            with meter.waiting():
                batch = next(stream)
            meter.add(batch, *self.train_step(batch))
            self.step += 1
            log.advance(1)
            epoch, epoch_step = self.plan.locate(self.step - 1)
            ended = epoch_step + 1 == self.plan.steps(epoch)
            if self.step % config.log.every == 0 or self.step == self.total_steps:
                log.train(meter.record(self.step, epoch) | self.state_figures())
            last = self.step == self.total_steps
            if last or (ended and (epoch + 1) % config.evaluation.every_epochs == 0):
                with meter.paused():
                    record = self.validate(epoch)
                    log.evaluation(record)
                    value = record["mean"]["NDCG@10"] or 0.0
                    best, since_best = (value, 0) if value > best else (best, since_best + 1)
                    if since_best == 0:
                        save_best(run, self.engine, self.table, self.step, {"epoch": epoch, "NDCG@10": value}, self.ranks)
                if 0 < config.evaluation.patience <= since_best:
                    log.message(f"stopped early: {since_best} validations without a better mean NDCG@10 than {best:.4f}")
                    break

    def train_step(self, batch):
        """One step of table and dense model; returns this rank's loss and the model's LossReport."""
        config = self.config.optimizer
        share = rate_share(config, self.step, self.total_steps)
        self.learning_rate = config.learning_rate * share
        set_learning_rate(self.engine, self.learning_rate)
        self.table.set_learning_rate(self.config.table.learning_rate * share)
        # Dropout: from (seed, step, rank), so that a run that is resumed goes on as it would have.
        torch.manual_seed(int(random_bits(self.config.seed, self.step, self.ranks.rank) >> 1))
        self.engine.train()
        batch = move(batch, self.ranks.device)
        rows = self.table(batch.ids)
        loss, report = self.engine(batch, rows, self.reduction)
        self.engine.backward(loss)
        self.table.update(self._clipped(rows.grad, batch))
        self.engine.step()
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

    def _clipped(self, gradient, batch):
        """The looked-up vectors' gradient, scaled where its norm over all ranks is above optimizer.clip.

        Shared negatives are scaled too, but not counted: every rank looks them up, and has a part of their gradient.
        """
        limit = self.config.optimizer.clip
        if not limit:
            return gradient
        counted = gradient if batch.negatives is not None else gradient[: batch.interactions]
        square = counted.double().square().sum()
        dist.all_reduce(square)
        # The losses carry the number of ranks as a factor, which the table divides by.
        norm = square.sqrt() / self.ranks.world_size
        return gradient * (limit / norm).clamp(max=1).to(gradient.dtype)

    def validate(self, epoch):
        """The validation record of the model as it is."""
        self.engine.eval()
        histogram = evaluate_split(
            self.engine.module, self.table, self.dataset, self.ranks, self.config, "validation"
        )
        return evaluation_record("validation", self.dataset, histogram, step=self.step, epoch=epoch)

    def test_best(self, run):
        """The test record of the best model, read back from disk as `launch/evaluate.py` does."""
        model = SyNCRec(self.config.model, len(self.dataset.domains)).to(self.ranks.device).eval()
        best = load_best(run, model, self.table)
        histogram = evaluate_split(model, self.table, self.dataset, self.ranks, self.config, "test")
        return evaluation_record("test", self.dataset, histogram, step=best["step"], epoch=best["epoch"])

    def describe(self):
        """What runs, in a line or two."""
        return (
            f"{self.dataset.users:,} users, {self.dataset.interactions:,} interactions, "
            f"{len(self.dataset.domains)} domains; table {self.table.rows:,} x {self.table.dim}, dense model "
            f"{self.weights:,} weights; "
            f"{self.ranks.world_size} ranks on {self.ranks.device.type}, ZeRO stage "
            f"{self.engine.zero_optimization_stage()}; {self.total_steps:,} steps of {self.config.global_batch_size} users"
        )
