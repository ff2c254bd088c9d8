"""The results of a study's runs: metrics by domain and seed, and paired comparisons over users.

Shapes: U users that were ranked, B some of them, D domains, S seeds, R bootstrap replicates. A
position is where a user's test item stands in the ranking, from 1. A system's positions are int32
(S, U), in the order of the users' numbers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.bootstrap import FEWEST, poisson_weights
from trainer.evaluation.metrics import domains_of_mean, metric_values
from trainer.run_files import HEADLINE, full_ranking_file
from trainer.study.baselines import UNTRAINED

RANKINGS = ("sampled", "full")
METRICS = (HEADLINE, "HR@10", "MRR")
_REPLICATES = 1000
_AT_ONCE = 8192


@dataclass(frozen=True)
class RunResult:
    """What one run has left: ranks by user (trainer/evaluation/user_ranks.py), and its training.

    Four users and two domains, of which `full` ranks among more items than `sampled`:

        user     [2, 5, 6,  9]
        domain   [0, 1, 1,  0]
        sampled  [1, 7, 2, 11]
        full     [3, 9, 2, 80]

    target: the targets' numbers (trainer/evaluation/targets.py), where they are known; a user may have
    several. sampled_with_recency, full_with_recency: positions with the recency term, where the run has
    one. validation: the best one's mean of HEADLINE. epochs: that were validated. best_is_last: the best
    validation was the last one, so that more training might be better.
    """

    user: np.ndarray
    domain: np.ndarray
    sampled: np.ndarray
    full: np.ndarray
    validation: float
    seconds: float
    users_per_second: float
    epochs: float
    best_is_last: bool = False
    target: np.ndarray | None = None
    sampled_with_recency: np.ndarray | None = None
    full_with_recency: np.ndarray | None = None

    @property
    def order(self) -> np.ndarray:
        """By which targets of several runs are put in one order."""
        return self.user if self.target is None else self.target

    def positions(self, ranking: str) -> np.ndarray:
        """Positions by one of RANKINGS."""
        return self.sampled if ranking == "sampled" else self.full

    def with_recency(self) -> "RunResult | None":
        """The same of the model with its recency term; None of a run without one."""
        sampled_U = self.sampled_with_recency
        full_U = self.full_with_recency
        if sampled_U is None or full_U is None:
            return None
        if not (sampled_U.all() and full_U.all()):
            return None
        return replace(self, sampled=sampled_U, full=full_U)


@dataclass(frozen=True)
class SystemResults:
    """A system's test positions by seed.

    position: {"sampled" or "full": (S, U)}. domain_U, user_U: int64. validation: the mean by
    seed. seconds, users_per_second, epochs: of training, by seed; over models of single domains,
    seconds are the sum and the others the mean.
    """

    name: str
    user_U: np.ndarray
    domain_U: np.ndarray
    position: dict[str, np.ndarray]
    validation: list[float]
    seconds: list[float]
    users_per_second: list[float]
    epochs: list[float]

    def by_domain(
        self,
        ranking: str,
        metric: str,
        domains: int,
    ) -> np.ndarray:
        """The metric's means, (S, D), NaN where a domain has no user.

        Of one seed, whose users' domains are [0, 1, 1, 0] and positions [1, 1, 20, 30], HR@10 is
        [[0.5, 0.5]].
        """
        value_SU = metric_values(metric, self.position[ranking])
        mean_SD = np.full((len(value_SU), domains), np.nan)
        for domain in np.unique(self.domain_U):
            own_U = self.domain_U == domain
            mean_SD[:, domain] = value_SU[:, own_U].mean(1)
        return mean_SD

    def over_users(self, ranking: str, metric: str) -> np.ndarray:
        """The metric's means over all users, (S,)."""
        return metric_values(metric, self.position[ranking]).mean(1)

    def users_of_domains(self, domains: int) -> np.ndarray:
        """Test users of each domain, int64 (D,)."""
        return np.bincount(self.domain_U, minlength=domains)

    def counted_domains(self, domains: int, min_users: int) -> list[int]:
        """The domains that count in a mean over domains, by their test users."""
        users = {}
        for number, count in enumerate(self.users_of_domains(domains)):
            users[str(number)] = int(count)
        return [int(name) for name in domains_of_mean(users, min_users)]


def collect_results(
    name: str,
    runs: list[list[RunResult]],
) -> SystemResults:
    """A system's results, over its seeds and its models of single domains.

    runs: by seed, one run or one for each domain. Runs of single domains ranked users of their
    own: together they are in the order of the users' numbers.

    Raises InputError where seeds ranked other users.
    """
    seeds = [_Seed.join(parts) for parts in runs]
    first = seeds[0]
    for other in seeds[1:]:
        if not np.array_equal(other.user_U, first.user_U):
            raise InputError(
                f"{name}: its seeds have ranked other users: remove its runs"
            )
    position = {}
    for ranking in RANKINGS:
        position[ranking] = np.stack([seed.position[ranking] for seed in seeds])
    return SystemResults(
        name=name,
        user_U=first.user_U,
        domain_U=first.domain_U,
        position=position,
        validation=_by_seed(runs, "validation", np.mean),
        seconds=_by_seed(runs, "seconds", sum),
        users_per_second=_by_seed(
            runs,
            "users_per_second",
            np.mean,
        ),
        epochs=_by_seed(runs, "epochs", np.mean),
    )


class _Seed(NamedTuple):
    """The runs of one seed together, in the order of the users."""

    user_U: np.ndarray
    domain_U: np.ndarray
    position: dict[str, np.ndarray]

    @classmethod
    def join(cls, runs: list[RunResult]) -> "_Seed":
        """Puts the runs of single domains together."""
        user_U = np.concatenate([run.user for run in runs])
        domain_U = np.concatenate([run.domain for run in runs])
        order_U = np.concatenate([run.order for run in runs])
        order = np.argsort(order_U, kind="stable")
        position = {}
        for ranking in RANKINGS:
            position_U = np.concatenate(
                [run.positions(ranking) for run in runs]
            )
            position[ranking] = position_U[order]
        return cls(
            user_U[order],
            domain_U[order],
            position,
        )


def _by_seed(
    runs: list[list[RunResult]],
    field: str,
    join: Callable[[list[float]], float],
) -> list[float]:
    """A field of each seed's runs, joined."""
    values = []
    for parts in runs:
        values.append(join([getattr(run, field) for run in parts]))
    return values


class BaselineMetrics(NamedTuple):
    """What a baseline that is not trained has: metrics by domain's name, and their means."""

    by_domain: dict[str, dict[str, Any]]
    mean: dict[str, Any]


Baselines = dict[str, dict[str, BaselineMetrics]]  # by name, then by ranking


def read_baselines(run: Path) -> Baselines:
    """The baselines' figures as a run's full evaluation has them; those of UNTRAINED that it has.

    {"popularity": {"full": …, "sampled": …}, "recency popularity": {…}}
    """
    file = run / full_ranking_file("test")
    record = json.loads(file.read_text(encoding="utf-8"))
    parts = {"full": record, "sampled": record["sampled"]}
    baselines: Baselines = {}
    for key, name in UNTRAINED.items():
        if not all(key in part for part in parts.values()):
            continue
        baselines[name] = {}
        for ranking, part in parts.items():
            baselines[name][ranking] = BaselineMetrics(
                by_domain=part[key], mean=part[f"{key}_mean"]
            )
    return baselines


def read_split(run: Path) -> dict[str, Any] | None:
    """The split by time of a run's full evaluation; None of leave-one-out."""
    file = run / full_ranking_file("test")
    return json.loads(file.read_text(encoding="utf-8")).get("split")


@dataclass(frozen=True)
class PairedDifference:
    """One system's mean less another's over the same users.

    low, high: its 95 % confidence interval. p: of the hypothesis of no difference, two-sided.
    users: that they are of.
    """

    value: float
    low: float
    high: float
    p: float
    users: int

    @property
    def is_known(self) -> bool:
        """Whether there are users enough for an interval."""
        return self.users >= FEWEST

    @property
    def is_significant(self) -> bool:
        """Whether the confidence interval leaves 0 out."""
        return self.is_known and self.low * self.high > 0


def paired_difference(
    one: SystemResults,
    other: SystemResults,
    ranking: str,
    metric: str = HEADLINE,
    domain: int | None = None,
    *,
    domains: Sequence[int] | None = None,
    over_users: bool = False,
) -> PairedDifference:
    """`one` less `other`, each the mean over its seeds.

    domain: of its users. Else the mean over `domains` (None: those with users), each alike; or, with
    over_users, the mean over all users. A paired Poisson bootstrap over users
    (trainer/evaluation/bootstrap.py).

    Raises InputError where they have ranked other users.
    """
    same_users = np.array_equal(one.user_U, other.user_U)
    if not same_users or not np.array_equal(one.domain_U, other.domain_U):
        raise InputError(
            f"{one.name} and {other.name} have ranked other users: they cannot be "
            "compared"
        )
    one_U = metric_values(metric, one.position[ranking]).mean(0)
    other_U = metric_values(metric, other.position[ranking]).mean(0)
    difference_U = one_U - other_U
    if over_users:
        mean_R = _bootstrap_means(difference_U, one.user_U)
        return _summarise(mean_R, len(difference_U))
    numbers = np.unique(one.domain_U) if domains is None else domains
    if domain is not None:
        numbers = [domain]
    means = []
    users = 0
    for number in numbers:
        (user_B,) = np.nonzero(one.domain_U == number)
        users += len(user_B)
        difference_B = difference_U[user_B]
        means.append(_bootstrap_means(difference_B, one.user_U[user_B]))
    mean_R = np.mean(means, axis=0)
    return _summarise(mean_R, users)


def _bootstrap_means(
    difference_B: np.ndarray,
    user_B: np.ndarray,
) -> np.ndarray:
    """The mean over users, then that of each replicate, float64 (1 + R,)."""
    sums_R2 = np.zeros((1 + _REPLICATES, 2))  # of differences, and of users
    for first in range(0, len(user_B), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        users = user_B[part]
        every_user_once = np.ones((1, len(users)))
        drawn = poisson_weights(0, _REPLICATES, users)
        counts_RB = np.concatenate([every_user_once, drawn])
        values_B2 = np.stack([difference_B[part], np.ones(len(users))], 1)
        sums_R2 += counts_RB @ values_B2
    difference_R, users_R = sums_R2.T
    return difference_R / np.maximum(users_R, 1)


def _summarise(mean_R: np.ndarray, users: int) -> PairedDifference:
    """The 95 % confidence interval and the p. mean_R: of everyone once, then of each replicate."""
    value = mean_R[0]
    replicates = mean_R[1:]
    low, high = np.percentile(replicates, (2.5, 97.5))
    below = float(np.mean(replicates <= 0))
    above = float(np.mean(replicates >= 0))
    p = 2 * max(1 / _REPLICATES, min(below, above))
    return PairedDifference(
        value=float(value),
        low=float(low),
        high=float(high),
        p=float(min(1.0, p)),
        users=users,
    )
