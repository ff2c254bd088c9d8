"""Means of HR, NDCG and MRR over users, by groups of users, with 95 % intervals: a Poisson bootstrap.

Each replicate counts each user so often as a Poisson number of mean 1 says, which depends on (seed, replicate, user) alone
(Hanley and MacGibbon, "Creating non-parametric bootstrap samples using Poisson frequencies", 2006). What is summed are integers
(values times 2³²), so that neither the number of ranks nor the order of users changes a figure.
"""

import math

import numpy as np
import torch
import torch.distributed as dist

from trainer.data.counter_rng import RandomStream, random_bits, random_unit

CUTS = (1, 5, 10, 20, 50)
NAMES = (*(f"HR@{k}" for k in CUTS), *(f"NDCG@{k}" for k in CUTS), "MRR")
FEWEST = (
    10  # users of a group for an interval: of fewer it would say less than it seems to
)
_SCALE = 2.0**32
_CHANCE = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(13)])


def weights(seed, replicates, user_B):
    """How often each replicate counts each user, float64 (replicates, B), whole numbers."""
    unit = random_unit(
        random_bits(
            seed,
            RandomStream.BOOTSTRAP_WEIGHTS,
            np.arange(replicates)[:, None],
            np.asarray(user_B)[None],
        )
    )
    return np.searchsorted(_CHANCE, unit, side="right").astype(np.float64)


def values(rank_B):
    """What is averaged over users, by 1-based ranks: 1 and the NAMES, each times 2³² and rounded; float64 (B, 1 + NAMES)."""
    rank_B = np.asarray(rank_B, np.float64)
    within = [rank_B <= k for k in CUTS]
    gain_B = 1 / np.log2(rank_B + 1)
    columns = [
        np.ones_like(rank_B),
        *within,
        *(gain_B * inside for inside in within),
        1 / rank_B,
    ]
    return np.rint(np.stack(columns, 1) * _SCALE)


class GroupMeans:
    """Sums over the users of any number of groups, of which a user may be in several, for some systems that rank the same."""

    def __init__(self, systems, groups, seed, replicates=1000):
        self.seed, self.replicates = seed, replicates
        self.sums = np.zeros(
            (systems, groups, 1 + replicates, 1 + len(NAMES)), np.int64
        )  # first: every user once

    def add(self, user_B, groups_BG, ranks_SB):
        """Some users: their numbers, the groups of each (int64 (B, G)), and their rank by each system (S, B)."""
        if len(user_B) == 0:
            return
        weight = np.concatenate(
            [np.ones((1, len(user_B))), weights(self.seed, self.replicates, user_B)]
        )
        for system, rank_B in enumerate(ranks_SB):
            value = values(rank_B)
            for group in np.unique(groups_BG):
                own = (groups_BG == group).any(1)
                # Whole numbers below 2⁵³ in float64: exact in any order.
                self.sums[system, group] += (weight[:, own] @ value[own]).astype(
                    np.int64
                )

    def reduce(self, device):
        """Sums over all ranks. Called on all of them."""
        total = torch.from_numpy(self.sums).to(device)
        dist.all_reduce(total)
        self.sums = total.cpu().numpy()

    def figures(self, system, group) -> dict:
        """users, the NAMES, and `interval`: {name: [low, high]}; None where there is no user, or too few."""
        return _figures(self.users(group), self._means(system, group))

    def mean(self, system, groups) -> dict:
        """The same of the means over those of the groups that have users."""
        some = [group for group in groups if self.users(group)]
        if not some:
            return _figures(0, None)
        with np.errstate(invalid="ignore"):
            means = np.mean([self._means(system, group) for group in some], axis=0)
        return _figures(sum(map(self.users, some)), means)

    def difference(self, group, metric) -> dict:
        """How much more the first system has than the second, in one metric: value, and interval as in `figures`."""
        column = NAMES.index(metric)
        ours, others = (self._means(system, group)[:, column] for system in (0, 1))
        return _difference(self.users(group), ours - others)

    def mean_difference(self, groups, metric) -> dict:
        """The same of the means over those of the groups that have users."""
        column, some = (
            NAMES.index(metric),
            [group for group in groups if self.users(group)],
        )
        if not some:
            return _difference(0, None)
        found = [
            self._means(0, group)[:, column] - self._means(1, group)[:, column]
            for group in some
        ]
        return _difference(sum(map(self.users, some)), np.mean(found, axis=0))

    def users(self, group) -> int:
        """How many users of the group were added."""
        return int(self.sums[0, group, 0, 0] / _SCALE)

    def _means(self, system, group):
        """(1 + replicates, NAMES): of every user once, then of each replicate, NaN where it counts nobody."""
        sums = self.sums[system, group].astype(np.float64)
        with np.errstate(invalid="ignore"):
            return sums[:, 1:] / sums[:, :1]


def _figures(users, means):
    if users == 0:
        return {"users": 0} | dict.fromkeys(NAMES) | {"interval": None}
    interval = None
    if users >= FEWEST:
        low, high = np.nanpercentile(means[1:], (2.5, 97.5), axis=0)
        interval = {
            name: [float(low[place]), float(high[place])]
            for place, name in enumerate(NAMES)
        }
    return (
        {"users": users}
        | dict(zip(NAMES, means[0].tolist(), strict=True))
        | {"interval": interval}
    )


def _difference(users, found):
    if users == 0:
        return {"value": None, "interval": None}
    interval = (
        np.nanpercentile(found[1:], (2.5, 97.5)).tolist() if users >= FEWEST else None
    )
    return {"value": float(found[0]), "interval": interval}
