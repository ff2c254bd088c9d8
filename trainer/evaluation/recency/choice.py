"""The choice of recency popularity's half-life: the best of a few on the validation split.

Each user's validation item is ranked among the candidates that the model is validated with. The
half-life with the highest mean NDCG@10 over the domains that count is taken, the shortest of equal
ones, for every split and ranking. No model is needed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.stream import batches_of_workers
from trainer.data.recent_counts import NewestPairs, RecentCounts
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.metrics import (
    candidate_positions,
    count_positions,
    domains_of_mean,
    mean_figures,
    metrics_of_histogram,
)
from trainer.evaluation.popularity import break_ties
from trainer.evaluation.recency.ranking import HalfLifeChoice
from trainer.evaluation.recency.sample import CandidatesAlone
from trainer.evaluation.sampled import Candidates
from trainer.run_files import HEADLINE

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

HALF_LIVES = (3, 7, 14, 30, 90, 365)
# Of more users about so many are ranked.
_MOST_USERS = 20_000


def choose_half_life(
    counts: RecentCounts,
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    beat: Callable[[], None] | None = None,
) -> HalfLifeChoice:
    """The half-life that ranks the validation split best. Called on all ranks.

    counts: of the dataset. beat: called now and then. Raises InputError where a shard cannot be used.
    """
    batches = CandidatesAlone(dataset, ranks, config, _MOST_USERS)
    steps: list[tuple[Candidates, NewestPairs]] = []
    for step in batches_of_workers(batches, config.stream, pin_memory=False):
        day_B = counts.days.of_ticks(step.now_B)
        newest = counts.newest_before(
            step.rows_C, np.repeat(day_B, step.counts_B)
        )
        steps.append((step, newest))
        if beat is not None:
            beat()
    shape = (len(dataset.domains), batches.longest_list())
    validation = {}
    for half_life in HALF_LIVES:
        histogram = np.zeros(shape, np.int64)
        faded = counts.fade(half_life)
        for step, newest in steps:
            _count_step(histogram, dataset, step, faded.at(newest), config.seed)
        total = sum_over_ranks(histogram)
        validation[half_life] = _mean_ndcg(total, config.evaluation.min_users)
    best = max(HALF_LIVES, key=validation.__getitem__)
    return HalfLifeChoice(best, counts.days.unit, validation)


def _count_step(
    histogram_DP: np.ndarray,
    dataset: Dataset,
    step: Candidates,
    count_C: np.ndarray,
    seed: int,
) -> None:
    """Adds the positions of a step's users by their candidates' counts, of items training has seen.

    Two users, of domains 0 and 1, the second one's first candidate behind one other:

        counts_B        3              2
        count_C         2.1 0.0 0.4    0.1 0.3
        histogram_DP    [[1, 0, 0], [0, 1, 0]]
    """
    score_C = break_ties(count_C, seed, step.user_B, step.counts_B, step.rows_C)
    position_B = candidate_positions(score_C, step.counts_B)
    real_B = step.user_B >= 0
    real_B &= dataset.is_trained(step.held_out_row_B)
    count_positions(histogram_DP, step.domain_B[real_B], position_B[real_B])


def _mean_ndcg(histogram_DP: np.ndarray, min_users: int) -> float:
    """The mean NDCG@10 over the domains that count, 0 without users."""
    figures = {}
    users = {}
    for number, histogram_P in enumerate(histogram_DP):
        name = str(number)
        figures[name] = metrics_of_histogram(histogram_P)
        users[name] = int(histogram_P.sum())
    counted = domains_of_mean(users, min_users)
    return mean_figures(figures, counted)[HEADLINE] or 0.0
