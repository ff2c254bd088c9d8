"""Means of HR, NDCG and MRR over users, by groups of users, with 95 % confidence intervals.

The intervals come from a Poisson bootstrap. Each replicate counts each user as often as a Poisson
number of mean 1 says, which depends on (seed, replicate, user) alone (Hanley and MacGibbon,
"Creating non-parametric bootstrap samples using Poisson frequencies", 2006). What is summed are
integers (values times 2³²), so neither the number of ranks nor the order of users changes a figure.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.counter_rng import RandomStream, random_bits, random_unit
from trainer.evaluation.metrics import (
    CUTOFFS as CUTS,
)
from trainer.evaluation.metrics import (
    FULL_METRICS as NAMES,
)
from trainer.evaluation.metrics import metric_matrix

# Users of a group for an interval: of fewer it would say less than it seems to.
FEWEST = 10
_SCALE = 2.0**32
_PERCENTILES = (2.5, 97.5)


def _cumulative_poisson(most: int) -> np.ndarray:
    """The probabilities that a Poisson number of mean 1 is at most 0, 1, …, `most`.

    at most          0      1      2      3
    probability      0.37   0.74   0.92   0.98
    """
    chance_of_none = math.exp(-1)
    chances = []
    for count in range(most + 1):
        chance = chance_of_none / math.factorial(count)
        chances.append(chance)
    return np.cumsum(chances)


_CUMULATIVE = _cumulative_poisson(12)


def poisson_weights(
    seed: int, replicates: int, user_B: np.ndarray
) -> np.ndarray:
    """How often each replicate counts each user: whole numbers, float64 (replicates, B).

    A number between 0 and 1 is drawn for each, and the probabilities of `_cumulative_poisson` up
    to it are counted. Two replicates, three users:

        drawn       [[0.20, 0.50, 0.80],
                     [0.95, 0.10, 0.40]]
        weights     [[0, 1, 2],
                     [3, 0, 1]]
    """
    replicate_R1 = np.arange(replicates)[:, None]
    user_1B = np.asarray(user_B)[None]
    bits_RB = random_bits(
        seed, RandomStream.BOOTSTRAP_WEIGHTS, replicate_R1, user_1B
    )
    unit_RB = random_unit(bits_RB)
    count_RB = np.searchsorted(_CUMULATIVE, unit_RB, side="right")
    return count_RB.astype(np.float64)


def scaled_values(position_B: np.ndarray) -> np.ndarray:
    """1 and the metrics of each position, times 2³² and rounded: float64 (B, 1 + metrics).

    Of the positions 1 and 4, before they are multiplied:

        users    HR@1    HR@5    …    NDCG@1    NDCG@5         …    MRR
        1        1       1            1         1                   1
        1        0       1            0         1 / log2(5)         1 / 4
    """
    metrics_BK = metric_matrix(position_B, CUTS)
    ones_B1 = np.ones((len(metrics_BK), 1))
    value_BK = np.concatenate([ones_B1, metrics_BK], axis=1)
    return np.rint(value_BK * _SCALE)


class GroupMeans:
    """Sums over the users of groups, for several systems that rank the same users.

    A user may be in several groups. sums: int64 (systems, groups, 1 + replicates, 1 + metrics), of
    values times 2³². Line 0 counts every user once, and column 0 counts users:

        users     HR@1   HR@5   …   MRR
        4         1      3          1.9     every user once
        5         2      4          2.8     replicate 1, in which one user counts twice
        3         0      2          0.9     replicate 2
    """

    def __init__(
        self, systems: int, groups: int, seed: int, replicates: int = 1000
    ):
        self.seed = seed
        self.replicates = replicates
        shape = (systems, groups, 1 + replicates, 1 + len(NAMES))
        self.sums = np.zeros(shape, np.int64)

    def add(
        self,
        user_B: np.ndarray,
        groups_BG: np.ndarray,
        ranks_SB: Sequence[np.ndarray] | np.ndarray,
    ) -> None:
        """Adds some users. Users occur in one call, on one rank, alone.

        user_B: their numbers. groups_BG: int64, the groups of each, −1 for none. ranks_SB: the position of each
        by each system. Four users, two groups each (the domain, and a bucket), two systems:

            user_B       12      40      7       31
            groups_BG    0 1     3 5     3 4     0 2
            ranks_SB     1       7       2       30      the model's
                         4       9       2       11      popularity's
        """
        if len(user_B) == 0:
            return
        once_1B = np.ones((1, len(user_B)))
        drawn_RB = poisson_weights(self.seed, self.replicates, user_B)
        weight_RB = np.concatenate([once_1B, drawn_RB])
        for system, position_B in enumerate(ranks_SB):
            value_BK = scaled_values(position_B)
            for group in np.unique(groups_BG[groups_BG >= 0]):
                in_group_BG = groups_BG == group
                member_B = in_group_BG.any(1)
                # Whole numbers below 2⁵³ in float64: exact in any order.
                sums_RK = weight_RB[:, member_B] @ value_BK[member_B]
                self.sums[system, group] += sums_RK.astype(np.int64)

    def reduce(self, device: torch.device) -> None:
        """Sums over all ranks. Called on all of them."""
        total = torch.from_numpy(self.sums).to(device)
        dist.all_reduce(total)
        self.sums = total.cpu().numpy()

    def figures(self, system: int, group: int) -> dict[str, Any]:
        """users, the metrics, and `interval`: {metric: [low, high]}.

            {"users": 204, "HR@1": 0.08, …, "MRR": 0.17, "interval": {"HR@1": [0.05, 0.12], …}}

        A metric is None without users; `interval` is None of fewer users than FEWEST.
        """
        users = self.users(group)
        mean_RK = self._means(system, group)
        return _figures(users, mean_RK)

    def mean(self, system: int, groups: Sequence[int]) -> dict[str, Any]:
        """The `figures` of the means over those of the groups that have users."""
        with_users = self._groups_with_users(groups)
        if not with_users:
            return _figures(0, None)
        means = [self._means(system, group) for group in with_users]
        with np.errstate(invalid="ignore"):
            mean_RK = np.mean(means, axis=0)
        users = self._total_users(with_users)
        return _figures(users, mean_RK)

    def user_mean(self, system: int, groups: Sequence[int]) -> dict[str, Any]:
        """The `figures` over all users of groups that share none."""
        users = self._total_users(groups)
        mean_RK = self._user_means(system, groups)
        return _figures(users, mean_RK)

    def difference(
        self, group: int, metric: str, other: int = 1
    ) -> dict[str, Any]:
        """How much more of a metric the first system has than another.

        Returns `value`, and `interval` as in `figures`.
        """
        users = self.users(group)
        difference_R = self._differences(group, metric, other)
        return _difference(users, difference_R)

    def mean_difference(
        self, groups: Sequence[int], metric: str, other: int = 1
    ) -> dict[str, Any]:
        """The `difference` of the means over those of the groups that have users."""
        with_users = self._groups_with_users(groups)
        if not with_users:
            return _difference(0, None)
        differences = []
        for group in with_users:
            differences.append(self._differences(group, metric, other))
        mean_R = np.mean(differences, axis=0)
        users = self._total_users(with_users)
        return _difference(users, mean_R)

    def user_mean_difference(
        self, groups: Sequence[int], metric: str, other: int = 1
    ) -> dict[str, Any]:
        """The `difference` of `user_mean`."""
        column = NAMES.index(metric)
        first_R = self._user_means(0, groups)[:, column]
        other_R = self._user_means(other, groups)[:, column]
        return _difference(self._total_users(groups), first_R - other_R)

    def users(self, group: int) -> int:
        """How many users of the group were added."""
        scaled = self.sums[0, group, 0, 0]
        return int(scaled / _SCALE)

    def _groups_with_users(self, groups: Sequence[int]) -> list[int]:
        return [group for group in groups if self.users(group)]

    def _total_users(self, groups: Sequence[int]) -> int:
        return sum(self.users(group) for group in groups)

    def _differences(self, group: int, metric: str, other: int) -> np.ndarray:
        """The first system's metric less another's, float64 (1 + replicates,).

        Of every user once, then of each replicate.
        """
        column = NAMES.index(metric)
        first_R = self._means(0, group)[:, column]
        other_R = self._means(other, group)[:, column]
        return first_R - other_R

    def _means(self, system: int, group: int) -> np.ndarray:
        """The means of a group, (1 + replicates, metrics).

        Of every user once, then of each replicate; NaN where a replicate counts nobody:

            HR@1    HR@5    …    MRR
            0.25    0.75         0.48    every user once
            0.40    0.80         0.56    replicate 1
            NaN     NaN          NaN     replicate 2, which counts nobody
        """
        return _divide_by_users(self.sums[system, group])

    def _user_means(self, system: int, groups: Sequence[int]) -> np.ndarray:
        """`_means` of the users of all these groups together."""
        return _divide_by_users(self.sums[system, list(groups)].sum(axis=0))


def _divide_by_users(sums_RK: np.ndarray) -> np.ndarray:
    """Means, (1 + replicates, metrics), of sums whose first column counts users."""
    whole_RK = sums_RK.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return whole_RK[:, 1:] / whole_RK[:, :1]


def _figures(users: int, mean_RK: np.ndarray | None) -> dict[str, Any]:
    """users, the metrics and their intervals.

    mean_RK: (1 + replicates, metrics), the means over every user once first; None without users.
    """
    if users == 0 or mean_RK is None:
        return {"users": 0, **dict.fromkeys(NAMES), "interval": None}
    figures: dict[str, Any] = {"users": users}
    means = mean_RK[0].tolist()
    figures |= zip(NAMES, means, strict=True)
    figures["interval"] = None
    if users >= FEWEST:
        figures["interval"] = _intervals(mean_RK[1:])
    return figures


def _intervals(mean_RK: np.ndarray) -> dict[str, list[float]]:
    """The 95 % interval of each metric: {metric: [low, high]}.

    mean_RK: each replicate's means; those that count nobody are NaN and pass over. Of three
    replicates:

        HR@1    …    MRR
        0.10         0.40
        0.20         0.50
        0.30         0.60

        {"HR@1": [0.105, 0.295], …, "MRR": [0.405, 0.595]}
    """
    low_high_2K = np.nanpercentile(mean_RK, _PERCENTILES, axis=0)
    bounds_K2 = low_high_2K.T.tolist()
    return dict(zip(NAMES, bounds_K2, strict=True))


def _difference(users: int, difference_R: np.ndarray | None) -> dict[str, Any]:
    """A difference's value and interval.

    difference_R: (1 + replicates,), of every user once first; None without users.
    """
    if users == 0 or difference_R is None:
        return {"value": None, "interval": None}
    interval = None
    if users >= FEWEST:
        bounds_2 = np.nanpercentile(difference_R[1:], _PERCENTILES)
        interval = bounds_2.tolist()
    value = float(difference_R[0])
    return {"value": value, "interval": interval}
