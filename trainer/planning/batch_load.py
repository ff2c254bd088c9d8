"""What a step brings to a rank, by the dataset's own lengths and the run's own batches.

Some batches of the first epoch are taken from the schedule as a run takes them, balanced over the
ranks. No shard is read. Which items a user has is not known then: how many distinct rows a rank looks
up follows from how popular items are.
"""

from dataclasses import dataclass

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule

_BATCHES = 8  # of the first epoch, from its begin to its end


@dataclass(frozen=True)
class BatchLoad:
    """What a step brings to a rank: the mean over ranks and batches, where nothing else is said.

    Attributes:
        users: those of the rank with most.
        interactions: of their training parts, as far as a view reaches.
        tokens: of both views.
        most_tokens: those of the fullest rank of the fullest batch.
        imbalance: tokens of a batch's fullest rank over its mean.
        rows: distinct rows that are looked up.
        steps: steps of an epoch.
        uses_D: interactions of each domain.
        sample: the users of the fullest rank and batch, by which it can be drawn again.
    """

    users: int
    interactions: float
    tokens: float
    most_tokens: int
    imbalance: float
    rows: float
    steps: int
    uses_D: np.ndarray
    sample: np.ndarray

    @property
    def fullness(self) -> float:
        """Tokens of the fullest rank and batch over the mean."""
        return self.most_tokens / max(1.0, self.tokens)


def measure_load(config: RunConfig, dataset: Dataset, ranks: int) -> BatchLoad:
    """What a step of a run on so many ranks brings. Raises InputError as the schedule does."""
    plan = BatchSchedule.of_run(config, dataset, ranks)
    steps = plan.steps(0)
    # An epoch's last batch may be a small one.
    last = max(1, steps - 1)
    numbers = np.unique(np.linspace(0, last - 1, _BATCHES).astype(np.int64))
    users = 1
    tokens = 0
    counted = 0
    most_tokens = -1
    imbalances = []
    sample = np.zeros(0, np.int64)
    uses_D = np.zeros(len(dataset.domains))
    for step in numbers.tolist():
        users_B, _, rank_B = plan.ranks(0, step)
        tokens_B = plan.tokens(users_B)
        tokens_W = np.bincount(rank_B, weights=tokens_B, minlength=ranks)
        users = max(users, plan.users_per_rank(0, step))
        imbalances.append(tokens_W.max() / max(1.0, tokens_W.mean()))
        tokens += int(tokens_B.sum())
        uses_D += reached(dataset, users_B, config.model.max_length).sum(0)
        counted += ranks
        if tokens_W.max() > most_tokens:
            most_tokens = int(tokens_W.max())
            sample = users_B[rank_B == int(tokens_W.argmax())]
    uses_D = uses_D / counted
    return BatchLoad(
        users=users,
        interactions=float(uses_D.sum()),
        tokens=tokens / counted,
        most_tokens=most_tokens,
        imbalance=float(np.mean(imbalances)),
        rows=count_rows(config, dataset, uses_D),
        steps=steps,
        uses_D=uses_D,
        sample=sample,
    )


def reached(
    dataset: Dataset, users_B: np.ndarray, max_length: int
) -> np.ndarray:
    """Interactions of these users that a view of `max_length` tokens reaches, int64 (B, D).

    With max_length 5:

        lengths     [[3, 0], [2, 9]]
        returns     [[3, 0], [2, 6]]
    """
    lengths_BD = dataset.lengths[users_B].astype(np.int64)
    return np.minimum(lengths_BD, max_length + 1)


def count_rows(
    config: RunConfig, dataset: Dataset, uses_D: np.ndarray
) -> float:
    """Distinct rows of so many interactions of each domain and of their negatives, as expected.

    Interactions are drawn as items are popular, negatives uniformly:

        rows = Σ_i 1 − (1 − p_i)^uses · (1 − 1 / items)^negatives
    """
    negatives = config.negatives
    total = 0.0
    for domain, uses in zip(dataset.domains, uses_D.tolist(), strict=True):
        end = domain.start + domain.items
        counts = dataset.item_counts[domain.start : end].astype(np.float64)
        popularity = counts / max(1.0, counts.sum())
        drawn = negatives.shared or negatives.per_target * uses
        missed = np.exp(uses * np.log1p(-np.minimum(popularity, 1 - 1e-12)))
        not_drawn = (1 - 1 / max(2, domain.items)) ** drawn
        total += float((1 - missed * not_drawn).sum())
    return total
