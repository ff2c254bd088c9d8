"""The recency term, in its late form: what counts of the recent past add to a finished model's scores.

    score(item) = a · s(item) + Σ_j w_j · log(count_j(item) + ε)

s is the model's score, count_j the faded count with the j-th of TERM_HALF_LIVES as of the day for
which is predicted. Every domain has weights of its own, a and w. They are those that make the
validation items the likeliest of their candidates (softmax), by Newton's method. The model is left as
it is. The score stays an inner product: a · y and w for the user, the logarithms for the item.

What is summed over users is rounded to whole multiples of 2⁻³² and added as integers, and weights
have four digits, so that they do not depend on the number of ranks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.format.dataset import Dataset
from trainer.data.loading.jagged import row_begins
from trainer.data.recent_counts import ALL_TIME, RecentCounts
from trainer.distributed.process_group import sum_over_ranks
from trainer.evaluation.recency.ranking import read_number

TERM_HALF_LIVES = (7.0, 30.0, 90.0, 365.0, ALL_TIME)
OFFSET = 0.05  # ε
_SCALE = 2.0**32
_MOST_OF_USER = 2.0**45  # so that the users' sum is an int64
_RIDGE = 1.0  # as strong as a user or so: weights of features that say nothing stay small
_MOST_STEPS = 50
_DIGITS = 4  # of a weight: the last bits of scores depend on the ranks
_ENOUGH = 1e-9  # less is not gained by a further step, a user


class RecencyFeatures:
    """Logarithms of faded counts, as of any day."""

    def __init__(self, counts: RecentCounts) -> None:
        self.counts = counts
        self._faded = [counts.fade(half_life) for half_life in TERM_HALF_LIVES]

    def of(self, rows_Q: np.ndarray, day_Q: np.ndarray) -> np.ndarray:
        """The features of each row of M before a day, float64 (Q, J).

        Untouched items have log(ε). Of three items, with ε = 0.05:

            counts      0    0.20  3      features    −3.0  −1.4   1.1
                        0    0     1                  −3.0  −3.0   0.05
                        8    9     9                   2.1   2.2   2.2
        """
        return np.log(self.counts_before(rows_Q, day_Q) + OFFSET)

    def counts_before(
        self, rows_Q: np.ndarray, day_Q: np.ndarray
    ) -> np.ndarray:
        """The faded counts of each row of M before a day, float64 (Q, J); `of` draws them."""
        newest = self.counts.newest_before(rows_Q, day_Q)
        columns = [faded.at(newest) for faded in self._faded]
        return np.stack(columns, axis=1)

    def inputs(
        self,
        now_B: np.ndarray,
        counts_B: np.ndarray,
        rows_C: np.ndarray,
        scores_C: np.ndarray,
    ) -> np.ndarray:
        """The model's score and the features of each candidate, float64 (C, 1 + J).

        now_B, counts_B, rows_C: as `Candidates` has them. scores_C: the model's.
        """
        day_B = self.counts.days.of_ticks(now_B)
        x_CJ = self.of(rows_C, np.repeat(day_B, counts_B))
        score_C1 = scores_C.astype(np.float64)[:, None]
        return np.concatenate([score_C1, x_CJ], axis=1)


@dataclass(frozen=True)
class RecencyTerm:
    """The fitted weights. weight_DK: float64 (D, 1 + J), a and w of each domain.

    users_D: validation users whom they are fitted to, 0 of a domain that had too few: its scores
    are the model's.
    """

    features: RecencyFeatures
    weight_DK: np.ndarray
    users_D: np.ndarray

    def scores(
        self,
        domain_B: np.ndarray,
        now_B: np.ndarray,
        counts_B: np.ndarray,
        rows_C: np.ndarray,
        scores_C: np.ndarray,
    ) -> np.ndarray:
        """Each candidate's score with the term, float64 (C,).

        scores_C: the model's. The others are as `Candidates` has them.
        """
        x_CK = self.features.inputs(now_B, counts_B, rows_C, scores_C)
        domain_C = np.repeat(domain_B, counts_B)
        return (x_CK * self.weight_DK[domain_C]).sum(1)

    def biases(self, domain: int, rows_N: np.ndarray, day: int) -> np.ndarray:
        """What the term adds to the scores of a domain's items on a day, float64 (N,).

        Of two half-lives with the weights 0.5 and 0.1, and three items:

            features    −3.0 −1.4    −3.0 −3.0    2.1 2.2
            returns     −1.64        −1.8         1.27
        """
        x_NJ = self.features.of(rows_N, np.full(len(rows_N), day))
        return (x_NJ * self.weight_DK[domain, 1:]).sum(1)

    def to_record(self, dataset: Dataset) -> dict[str, Any]:
        """{"half_lives": [7, …, "all"], "offset": 0.05, "domains": {"Books": {"users": 812, …}}}

        score: a; weights: w, in the order of the half-lives.
        """
        domains = {}
        for domain, weights, users in zip(
            dataset.domains,
            self.weight_DK.tolist(),
            self.users_D.tolist(),
            strict=True,
        ):
            score, *others = weights
            domains[domain.name] = {
                "users": users,
                "score": score,
                "weights": others,
            }
        return {
            "half_lives": record_half_lives(),
            "offset": OFFSET,
            "domains": domains,
        }


def read_weights(
    record: dict[str, Any], dataset: Dataset
) -> tuple[np.ndarray, np.ndarray]:
    """weight_DK and users_D of what `RecencyTerm.to_record` gave, by the domains' names.

    A domain that the record does not have keeps the model's scores. Raises ValueError, KeyError or
    TypeError for a record of other half-lives, or that is none.
    """
    if record["half_lives"] != record_half_lives():
        raise ValueError(f"its half_lives are {record['half_lives']!r}")
    if record["offset"] != OFFSET:
        raise ValueError(f"its offset is {record['offset']!r}")
    entries = dict(record["domains"])
    weight_DK = no_weights(len(dataset.domains))
    users_D = np.zeros(len(dataset.domains), np.int64)
    for number, domain in enumerate(dataset.domains):
        if domain.name not in entries:
            continue
        entry = entries[domain.name]
        weights = [entry["score"], *entry["weights"]]
        if len(weights) != weight_DK.shape[1]:
            raise ValueError(f"{domain.name!r} has {len(weights)} weights")
        weight_DK[number] = [read_number(weight) for weight in weights]
        users_D[number] = int(read_number(entry["users"]))
    return weight_DK, users_D


def record_half_lives() -> list[Any]:
    """The half-lives as records have them: [7, 30, 90, 365, "all"]."""
    half_lives: list[Any] = list(TERM_HALF_LIVES)
    half_lives[half_lives.index(ALL_TIME)] = "all"
    return half_lives


def no_weights(domains: int) -> np.ndarray:
    """The weights with which the scores are the model's, float64 (D, 1 + J): 1 and zeros."""
    weight_DK = np.zeros((domains, 1 + len(TERM_HALF_LIVES)))
    weight_DK[:, 0] = 1
    return weight_DK


def round_weights(weight_K: np.ndarray) -> list[float]:
    """Weights with _DIGITS digits, as a record shows them: 0.41237 becomes 0.4124."""
    return [float(f"{weight:.{_DIGITS}g}") for weight in weight_K]


@dataclass(frozen=True)
class CandidateLists:
    """Candidate lists of a domain's users, jagged, the validation item first of each.

    x_CK: float64 (C, K). counts_U: candidates of each user. Two users with two features:

        counts_U    3                    2
        x_CK        9 0    1 1    0 2    3 0    4 1
    """

    x_CK: np.ndarray
    counts_U: np.ndarray


def fit_weights(lists: CandidateLists, users: int) -> np.ndarray:
    """The weights that make the first candidates likeliest, float64 (K,). Called on all ranks.

    They maximise Σ log softmax(x · weights) of the users' first candidates, less _RIDGE / 2 times
    the square of each weight, of features scaled to unit spread within a user's candidates. users:
    of all ranks.
    """
    lists, spread_K = _scale(lists, users)
    weight_K = np.zeros(len(spread_K))
    loss, gradient_K, curvature_KK = _derivatives(lists, weight_K)
    for _ in range(_MOST_STEPS):
        step_K = np.linalg.solve(curvature_KK, gradient_K)
        length = 1.0
        while True:
            tried_K = weight_K - length * step_K
            tried = _derivatives(lists, tried_K)
            if tried[0] <= loss or length < _ENOUGH:
                break
            length /= 2
        gained = loss - tried[0]
        if gained <= 0:
            break
        weight_K = tried_K
        loss, gradient_K, curvature_KK = tried
        if gained < _ENOUGH * users:
            break
    return weight_K / spread_K


def _scale(
    lists: CandidateLists, users: int
) -> tuple[CandidateLists, np.ndarray]:
    """The lists with features around 0 within each user, of unit spread, and their spread, (K,).

    The spread is the root of the mean variance within a user. Of one feature and two users:

        x           1   3      5   5
        variance    1          0          so the spread is 0.71
        returns     −1.4 1.4   0   0
    """
    begins_U = row_begins(lists.counts_U)
    x_CK = lists.x_CK
    width = x_CK.shape[1]
    square_UK = np.zeros((0, width))
    if len(begins_U):
        mean_UK = np.add.reduceat(x_CK, begins_U) / lists.counts_U[:, None]
        x_CK = x_CK - np.repeat(mean_UK, lists.counts_U, axis=0)
        square_UK = np.add.reduceat(x_CK * x_CK, begins_U)
        square_UK /= users * lists.counts_U[:, None]
    variance_K = _sum_over_users(square_UK)
    # A feature that is the same for all candidates has no weight.
    spread_K = np.sqrt(np.where(variance_K > 0, variance_K, 1))
    return CandidateLists(x_CK / spread_K, lists.counts_U), spread_K


def _derivatives(
    lists: CandidateLists, weight_K: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss, its gradient (K,) and its curvature (K, K), over all ranks' users."""
    width = len(weight_K)
    value_UV = np.zeros((0, 1 + width + width * width))
    if len(lists.counts_U):
        value_UV = _derivatives_of_users(lists, weight_K)
    total_V = _sum_over_users(value_UV)
    loss = float(total_V[0])
    gradient_K = total_V[1 : 1 + width]
    curvature_KK = total_V[1 + width :].reshape(width, width)
    return (
        loss + _RIDGE / 2 * float(weight_K @ weight_K),
        gradient_K + _RIDGE * weight_K,
        curvature_KK + _RIDGE * np.eye(width),
    )


def _derivatives_of_users(
    lists: CandidateLists, weight_K: np.ndarray
) -> np.ndarray:
    """Each user's loss, gradient and curvature side by side, float64 (U, 1 + K + K²).

    The loss is −log p of the first candidate; the gradient the mean feature less that candidate's;
    the curvature the covariance of the features, by p. Of one feature and weight 1, a user with
    three candidates and one with two:

        x           0    0    0      0     1
        p           1/3  1/3  1/3    0.27  0.73
        loss        1.10             1.31
        gradient    0                0.73
        curvature   0                0.20
    """
    begins_U = row_begins(lists.counts_U)
    x_CK = lists.x_CK
    # No matrix product: its sums may depend on how many rows there are.
    logit_C = (x_CK * weight_K).sum(1)
    most_U = np.maximum.reduceat(logit_C, begins_U)
    share_C = np.exp(logit_C - np.repeat(most_U, lists.counts_U))
    total_U = np.add.reduceat(share_C, begins_U)
    share_C /= np.repeat(total_U, lists.counts_U)
    loss_U = most_U + np.log(total_U) - logit_C[begins_U]
    weighted_CK = share_C[:, None] * x_CK
    mean_UK = np.add.reduceat(weighted_CK, begins_U)
    columns = [loss_U[:, None], mean_UK - x_CK[begins_U]]
    for column in range(x_CK.shape[1]):
        product_CK = weighted_CK * x_CK[:, column, None]
        square_UK = np.add.reduceat(product_CK, begins_U)
        columns.append(square_UK - mean_UK * mean_UK[:, column, None])
    return np.concatenate(columns, axis=1)


def _sum_over_users(value_UV: np.ndarray) -> np.ndarray:
    """The sum over all ranks' users, float64 (V,): the same however they are distributed.

    rank 0    [[0.5, 1], [0.25, 2]]
    rank 1    [[2.0, 4]]                →    [2.75, 7] on both
    """
    scaled_UV = np.rint(value_UV * _SCALE)
    scaled_UV = np.clip(scaled_UV, -_MOST_OF_USER, _MOST_OF_USER)
    total_V = sum_over_ranks(scaled_UV.astype(np.int64).sum(0))
    return total_V / _SCALE
