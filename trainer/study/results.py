"""What a study's runs have found: figures by domain and seed, and paired comparisons over the same users.

Shapes: U users that were ranked, D domains, S seeds. A system's ranks are int32 (S, U) in the order of the users' numbers.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.errors import InputError
from trainer.evaluation.bootstrap import weights
from trainer.reporting.run_log import HEADLINE
from trainer.reporting.run_report import FULL

RANKINGS = ("sampled", "full")
METRICS = (HEADLINE, "HR@10", "MRR")
_REPLICATES, _AT_ONCE = 1000, 8192


@dataclass(frozen=True)
class Found:
    """A system's test ranks by seed. rank: {"sampled" or "full": (S, U)}; domain_U, user_U: int64. validation: mean by seed;
    seconds, users_per_second, epochs: of training by seed, sums over the models of single domains."""

    name: str
    user_U: np.ndarray
    domain_U: np.ndarray
    rank: dict[str, np.ndarray]
    validation: list[float]
    seconds: list[float]
    users_per_second: list[float]
    epochs: list[float]

    def by_domain(self, ranking, metric, domains) -> np.ndarray:
        """The metric's means, (S, D), NaN where a domain has no user."""
        value_SU = gain(self.rank[ranking], metric)
        found = np.full((len(value_SU), domains), np.nan)
        for domain in np.unique(self.domain_U):
            found[:, domain] = value_SU[:, self.domain_U == domain].mean(1)
        return found


def gain(rank, metric):
    """What a user with this 1-based rank counts in a metric's mean."""
    rank = np.asarray(rank, np.float64)
    if metric == "MRR":
        return 1 / rank
    name, at = metric.split("@")
    return np.where(
        rank <= int(at), 1 / np.log2(rank + 1) if name == "NDCG" else 1.0, 0.0
    )


def gathered(name, runs) -> Found:
    """runs: by seed, what `read_run` gives of each run of the system. Raises InputError where seeds ranked other users."""
    joined = []
    for parts in runs:
        columns = {
            key: np.concatenate([part[key] for part in parts])
            for key in ("user", "domain", *RANKINGS)
        }
        order = np.argsort(columns["user"], kind="stable")
        joined.append({key: values[order] for key, values in columns.items()})
    first = joined[0]
    for other in joined[1:]:
        if not np.array_equal(other["user"], first["user"]):
            raise InputError(
                f"{name}: its seeds have ranked other users: remove its runs"
            )

    def values(what, together):
        return [together([part[what] for part in parts]) for parts in runs]

    return Found(
        name=name,
        user_U=first["user"],
        domain_U=first["domain"],
        rank={
            ranking: np.stack([one[ranking] for one in joined]) for ranking in RANKINGS
        },
        validation=values("validation", np.mean),
        seconds=values("seconds", sum),
        users_per_second=values("users_per_second", np.mean),
        epochs=values("epochs", np.mean),
    )


def popularity(run: Path) -> dict:
    """Popularity's figures as a run's full evaluation has them: {"sampled" or "full": (by domain, mean)}."""
    record = json.loads((run / f"{FULL}-test.json").read_text())
    return {
        "full": (record["popularity"], record["popularity_mean"]),
        "sampled": (
            record["sampled"]["popularity"],
            record["sampled"]["popularity_mean"],
        ),
    }


@dataclass(frozen=True)
class Difference:
    """One system's mean less another's over the same users: value, 95 % interval, and the two-sided p of none at all."""

    value: float
    low: float
    high: float
    p: float


def compared(
    one: Found, other: Found, ranking, metric=HEADLINE, domain=None
) -> Difference:
    """`one` less `other`, each the mean over its seeds: of one domain's users, or the mean over domains.

    A Poisson bootstrap over users (trainer/evaluation/bootstrap.py). Raises InputError where they have ranked other users.
    """
    if not np.array_equal(one.user_U, other.user_U) or not np.array_equal(
        one.domain_U, other.domain_U
    ):
        raise InputError(
            f"{one.name} and {other.name} have ranked other users: they cannot be compared"
        )
    difference_U = gain(one.rank[ranking], metric).mean(0) - gain(
        other.rank[ranking], metric
    ).mean(0)
    means = []
    for each in np.unique(one.domain_U) if domain is None else [domain]:
        (own,) = np.nonzero(one.domain_U == each)
        sums = np.zeros((1 + _REPLICATES, 2))
        for first in range(0, len(own), _AT_ONCE):
            part = own[first : first + _AT_ONCE]
            drawn = np.concatenate(
                [np.ones((1, len(part))), weights(0, _REPLICATES, one.user_U[part])]
            )
            sums += drawn @ np.stack([difference_U[part], np.ones(len(part))], 1)
        means.append(sums[:, 0] / np.maximum(sums[:, 1], 1))
    value, *replicates = np.mean(means, axis=0)
    low, high = np.percentile(replicates, (2.5, 97.5))
    below, above = (
        np.mean(np.less_equal(replicates, 0)),
        np.mean(np.greater_equal(replicates, 0)),
    )
    return Difference(
        float(value),
        float(low),
        float(high),
        float(min(1.0, 2 * max(1 / _REPLICATES, min(below, above)))),
    )
