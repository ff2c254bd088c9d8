"""One rank of `scaling.py`: a process on the core that it was given, which trains, when told
so, on batches drawn before.

It reads commands, one JSON object a line, and answers each with one. Ranks of a group are told
the same at the same time.

    {"do": "steps", "users": 32, "steps": 3}          seconds of each step after a first one
    {"do": "calls", "users": 32, "exponent": 0.7, …}  every collective of a step (`traffic.Call`)
    {"do": "volume", "users": 32, "exponent": 0.7}    the rows that a step looks up
    {"do": "model"}                                   the dense model's size
    {"do": "link"}                                    what collectives reach that do nothing else
"""

import json
import os
import statistics
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from benchmarks import limits, suite, traffic
from benchmarks.scaling import Settings
from benchmarks.workload import dataset_of, draw
from syncrec.batch.build import build_batch
from trainer.config.run import RunConfig
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.distributed import process_group
from trainer.distributed.process_exit import run_script
from trainer.training.step import Trainer

if TYPE_CHECKING:
    from syncrec.batch.views import Batch
    from trainer.distributed.process_group import Ranks


_STEPS = 10_000  # more than any run takes
_BATCHES = 4  # different ones of each kind, taken in turn
# a step sends about so many
_LINK_WINDOW = 0.05
_LINK_BYTES = 2**23


class Rank:
    """A trainer and its batches."""

    def __init__(self, settings: Settings, ranks: "Ranks"):
        self.settings = settings
        self.ranks = ranks
        users = max(settings.users)
        self.dataset = dataset_of(
            settings.items,
            settings.domains,
            users * ranks.world_size,
            _STEPS,
            ranks.world_size,
        )
        config = RunConfig(
            global_batch_size=users * ranks.world_size,
            model=settings.model,
            table=settings.table,
            negatives=settings.negatives,
            optimizer=settings.optimizer,
            deepspeed=settings.deepspeed,
        )
        plan = BatchSchedule(
            self.dataset,
            config.global_batch_size,
            ranks.world_size,
            config.seed,
        )
        self.trainer = Trainer(config, ranks, self.dataset, plan)
        self._drawn = {}
        self._taken = 0

    def batches(self, users: int, exponent: float = 0.0) -> list:
        """The batches of so many users, the same length in all on every rank."""
        if (users, exponent) not in self._drawn:
            self._drawn[users, exponent] = [
                self._batch(step, users, exponent) for step in range(_BATCHES)
            ]
        return self._drawn[users, exponent]

    def _batch(self, step, users, exponent):
        place = step * self.ranks.world_size + self.ranks.rank
        longest = self.settings.model.max_length
        negatives = self.settings.negatives
        arrays = draw(
            self.dataset,
            place,
            users,
            self.settings.shortest,
            longest,
            negatives,
            exponent,
        )
        return build_batch(
            *arrays, [domain.items for domain in self.dataset.domains], longest
        )

    def step(self, users: int, exponent: float = 0.0) -> "Batch":
        """What the training loop does in a step."""
        self._taken += 1
        batch = self.batches(users, exponent)[self._taken % _BATCHES]
        loss, _ = self.trainer.train_step(batch)
        if not loss.isfinite():
            raise ArithmeticError(f"the loss is {loss}")
        return batch

    def steps(self, users: int, steps: int) -> dict:
        """Seconds of each step; the processor's, of all of them and the one before; and the
        tokens of one.
        """
        seconds = []
        processor = time.process_time()
        for _ in range(1 + steps):
            begin = time.perf_counter()
            batch = self.step(users)
            seconds.append(time.perf_counter() - begin)
        return {
            "seconds": seconds[1:],
            "processor_seconds": time.process_time() - processor,
            "tokens": batch.interactions,
        }

    def calls(
        self,
        users: int,
        exponent: float = 0.0,
        interface: str | None = None,
        meet: bool = False,
    ) -> dict:
        """The collectives of a step on each of the batches, in their order, as `traffic.Call`s,
        and each step's seconds.

        interface: where bytes on the wire are counted. meet: the seconds of each call without
        the wait for the others.
        """
        self.step(users, exponent)
        found = []
        seconds = []
        for _ in range(_BATCHES):
            dist.barrier()
            with traffic.Traffic(interface, meet) as noted:
                begin = time.perf_counter()
                self.step(users, exponent)
                seconds.append(time.perf_counter() - begin)
            found.append([asdict(call) for call in noted.calls])
        return {"calls": found, "seconds": seconds}

    def volume(self, users: int, exponent: float = 0.0) -> dict:
        """Rows of this rank's step, the mean over the batches: how often one is used, how many
        are asked for, and those of them that others hold; of the rows used the distinct ones,
        and those that others hold.
        """
        world = self.ranks.world_size
        scatter = self.trainer.table.scatter
        rank = self.ranks.rank
        found = {
            "used": [],
            "asked": [],
            "foreign": [],
            "distinct": [],
            "distinct_foreign": [],
        }
        for batch in self.batches(users, exponent):
            used = batch.ids.long()
            asked = batch.distinct.long()
            found["used"].append(len(used))
            for names, rows in (
                (("asked", "foreign"), asked),
                (("distinct", "distinct_foreign"), torch.unique(used)),
            ):
                found[names[0]].append(len(rows))
                found[names[1]].append(
                    traffic.foreign(rows, rank, world, scatter)
                )
        return {name: statistics.mean(counts) for name, counts in found.items()}

    def model(self) -> dict:
        """Trained weights of the dense model, the ZeRO stage in force, width, domains, SC-MIM's
        candidates.
        """
        weights = sum(
            parameter.numel()
            for parameter in self.trainer.model.parameters()
            if parameter.requires_grad
        )
        return {
            "weights": weights,
            "zero_stage": self.trainer.engine.zero_optimization_stage(),
            "dim": self.settings.model.dim,
            "domains": self.settings.domains,
            "communication": self.settings.table.communication,
            "candidates": self.settings.model.mutual_information_candidates,
        }

    def link(self) -> dict:
        """`limits.collectives` of this group."""
        return limits.collectives(self.ranks, _LINK_WINDOW, _LINK_BYTES)


def main() -> None:
    """Joins the group, says that it is there, and serves commands until there are none."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    settings, _ = suite.settings("scaling", Settings, sys.argv[1:])
    torch.set_num_threads(1)

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)

    with (
        traffic.watch(),
        process_group.join_process_group(timeout_minutes=5) as ranks,
    ):
        rank = Rank(settings, ranks)
        answer({"there": ranks.rank})
        for line in sys.stdin:
            command = json.loads(line)
            answer(getattr(rank, command.pop("do"))(**command))


if __name__ == "__main__":
    run_script(main)
