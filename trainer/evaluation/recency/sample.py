"""Validation users and their candidates, of whom a share is drawn where they are many.

A half-life and a few weights need no millions of users. Who is drawn depends on the seed and the
user's number alone.
"""

from typing import TYPE_CHECKING, Any

from trainer.config.run import RunConfig
from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.data.format.dataset import Dataset
from trainer.evaluation.sampled import RankingBatches

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks


class ValidationSample(RankingBatches):
    """The validation split as a run ranks it, of all users, or of about `most` who are drawn."""

    def __init__(
        self, dataset: Dataset, ranks: "Ranks", config: RunConfig, most: int
    ) -> None:
        super().__init__(
            dataset,
            ranks.rank,
            ranks.world_size,
            config.evaluation,
            config.model.max_length,
            "validation",
            config.seed,
            stream=config.stream,
            both_views=config.model.predicts_by_both,
        )
        self._share = most / dataset.users

    def _candidates(self, user: int, *history: Any) -> Any:
        if self._share < 1:
            bits = random_bits(
                self.plan.seed, RandomStream.VALIDATION_SAMPLE, user
            )
            if random_unit(bits) >= self._share:
                return None
        return super()._candidates(user, *history)


class CandidatesAlone(ValidationSample):
    """The same without the histories, for what needs no model."""

    def query(self, *_: Any) -> Any:
        """None."""
        return None
