"""Fitting a model's recency term: one pass over the validation split, ranked by the model."""

from typing import TYPE_CHECKING

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.jagged import row_begins
from trainer.data.loading.stream import batches_of_workers
from trainer.data.recent_counts import RecentCounts
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.recency.sample import ValidationSample
from trainer.evaluation.recency.term import (
    TERM_HALF_LIVES,
    CandidateLists,
    RecencyFeatures,
    RecencyTerm,
    fit_weights,
    no_weights,
    round_weights,
)
from trainer.evaluation.sampled import (
    Advance,
    Candidates,
    Model,
    Positions,
    rank_candidates,
)

if TYPE_CHECKING:
    from embeddings.table import ItemTable
    from trainer.distributed.process_group import Ranks

# Of more users about so many weigh.
_MOST_USERS = 40_000


def fit_recency_term(
    model: Model,
    table: "ItemTable",
    dataset: Dataset,
    ranks: "Ranks",
    config: RunConfig,
    counts: RecentCounts,
    advance: Advance | None = None,
) -> RecencyTerm:
    """The term that ranks the validation items best beside the model's scores. Called on all ranks.

    advance(done, total): called after every step.
    """
    fit = TermFit(dataset, config, counts)
    batches = ValidationSample(dataset, ranks, config, _MOST_USERS)
    built = batches_of_workers(batches, config.stream, pin_memory=False)
    rank_candidates(
        model, table, batches, built, ranks.device, fit.visit, advance
    )
    return fit.fit()


class TermFit:
    """Takes the candidates of the validation users with the model's scores, and fits the weights."""

    def __init__(
        self, dataset: Dataset, config: RunConfig, counts: RecentCounts
    ) -> None:
        self.features = RecencyFeatures(counts)
        self._dataset = dataset
        self._least = config.evaluation.min_users
        self._domains = len(dataset.domains)
        self._inputs: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._domain: list[np.ndarray] = []

    def visit(
        self,
        candidates: Candidates,
        _positions: Positions,
        scores_C: np.ndarray,
    ) -> None:
        """Keeps one step's users; `rank_candidates` calls it.

        A user one of whose scores is no number is left out, and one whose item training has not
        seen. Three users, of whom the second one is:

            counts_B    3              2          2
            scores_C    0.9 0.1 0.3    0.2 NaN    0.4 0.5
            kept_B      True           False      True
        """
        finite_B = np.logical_and.reduceat(
            np.isfinite(scores_C), row_begins(candidates.counts_B)
        )
        kept_B = (candidates.user_B >= 0) & finite_B
        kept_B &= self._dataset.is_trained(candidates.held_out_row_B)
        kept_C = np.repeat(kept_B, candidates.counts_B)
        x_CK = self.features.inputs(
            candidates.now_B, candidates.counts_B, candidates.rows_C, scores_C
        )
        self._inputs.append(x_CK[kept_C].astype(np.float32))
        self._counts.append(candidates.counts_B[kept_B])
        self._domain.append(candidates.domain_B[kept_B])

    def fit(self) -> RecencyTerm:
        """The weights of every domain. Called on all ranks, after the last step."""
        width = 1 + len(TERM_HALF_LIVES)
        empty = np.zeros((0, width), np.float32)
        no_users = np.zeros(0, np.int64)
        x_CK = np.concatenate([*self._inputs, empty])
        counts_U = np.concatenate([*self._counts, no_users])
        domain_U = np.concatenate([*self._domain, no_users])
        domain_C = np.repeat(domain_U, counts_U)
        weight_DK = no_weights(self._domains)
        users_D = np.zeros(self._domains, np.int64)
        for domain in range(self._domains):
            lists = CandidateLists(
                x_CK[domain_C == domain].astype(np.float64),
                counts_U[domain_U == domain],
            )
            users = int(sum_over_ranks(np.array([len(lists.counts_U)]))[0])
            if users < self._least:
                continue
            weight_DK[domain] = round_weights(fit_weights(lists, users))
            users_D[domain] = users
        return RecencyTerm(self.features, weight_DK, users_D)
