"""Metrics of a ranking: HR@k, NDCG@k, MRR, and the rules that give a held-out item its position.

A position is 1-based: 1 is the top of the list. This module needs NumPy alone, so that a peer's
environment can import it.

Tie rule: an item stands before another only if its score is greater. Equal scores, and scores that
are not numbers, count against the held-out item.

    scores of a user's candidates, the held-out item first    0.7   0.9   0.7   0.1
    the held-out item's position                              3

Drawn position: popularity has many equal scores, and by the tie rule it would look worse than it
is. Among all items of a domain, popularity's ties are broken by an order drawn for each user.
"""

from collections.abc import Collection, Mapping
from typing import cast

import numpy as np

from trainer.data.counter_rng import random_below

Figures = dict[str, float | int | None]  # "users" and metrics, or metrics alone

SHORT_CUTOFFS = (5, 10)
CUTOFFS = (1, 5, 10, 20, 50)


def metric_names(cutoffs: tuple[int, ...]) -> tuple[str, ...]:
    """HR and NDCG at each cutoff, and MRR."""
    hit_rates = [f"HR@{k}" for k in cutoffs]
    gains = [f"NDCG@{k}" for k in cutoffs]
    return (*hit_rates, *gains, "MRR")


METRICS = metric_names(SHORT_CUTOFFS)  # of a ranking among drawn candidates
FULL_METRICS = metric_names(CUTOFFS)  # of a ranking among all items


def discounted_gains(position_B: np.ndarray) -> np.ndarray:
    """1 / log2(position + 1), float64 (B,).

    position_B    1    2       3      7
    gain          1    0.63    0.5    0.33
    """
    discount_B = np.log2(position_B + 1)
    return 1 / discount_B


def metric_values(metric: str, position_B: np.ndarray) -> np.ndarray:
    """What each position counts in a metric's mean, float64 (B,).

    metric: "HR@k", "NDCG@k" or "MRR". position_B: 1-based, integers. Of three users:

        position_B    1    4              7
        HR@5          1    1              0
        NDCG@5        1    1 / log2(5)    0
        MRR           1    1 / 4          1 / 7
    """
    position_B = np.asarray(position_B, np.float64)
    if metric == "MRR":
        return 1 / position_B
    name, cutoff = metric.split("@")
    within_B = position_B <= int(cutoff)
    if name == "HR":
        return within_B.astype(np.float64)
    return discounted_gains(position_B) * within_B


def metric_matrix(
    position_B: np.ndarray, cutoffs: tuple[int, ...]
) -> np.ndarray:
    """`metric_values` of all `metric_names` of the cutoffs, float64 (B, metrics).

    Of the cutoffs (1, 5) and two users at positions 1 and 4:

        HR@1    HR@5    NDCG@1    NDCG@5         MRR
        1       1       1         1              1
        0       1       0         1 / log2(5)    1 / 4
    """
    position_B = np.asarray(position_B, np.float64)
    within = [position_B <= k for k in cutoffs]
    gain_B = discounted_gains(position_B)
    gains = [gain_B * within_B for within_B in within]
    reciprocal_B = 1 / position_B
    columns = [*within, *gains, reciprocal_B]
    return np.stack(columns, axis=1)


def metrics_of_histogram(histogram_P: np.ndarray) -> Figures:
    """The number of users and METRICS, None each without users.

    histogram_P: integers (longest list,), how often each position occurred, position 1 first. Of
    four users, two at the top, one second and one seventh:

        histogram_P    [2, 1, 0, 0, 0, 0, 1, 0, 0, 0]
        HR@5           3 / 4
        HR@10          4 / 4
        NDCG@5         (2 + 1 / log2(3)) / 4
        NDCG@10        (2 + 1 / log2(3) + 1 / log2(8)) / 4
        MRR            (2 + 1 / 2 + 1 / 7) / 4
    """
    users = int(histogram_P.sum())
    if users == 0:
        return {"users": 0, **dict.fromkeys(METRICS)}
    position_P = np.arange(1, len(histogram_P) + 1)
    share_P = histogram_P / users
    gain_P = share_P * discounted_gains(position_P)
    figures: Figures = {"users": users}
    for k in SHORT_CUTOFFS:
        hit_rate = share_P[:k].sum()
        figures[f"HR@{k}"] = float(hit_rate)
    for k in SHORT_CUTOFFS:
        gain = gain_P[:k].sum()
        figures[f"NDCG@{k}"] = float(gain)
    reciprocal_P = share_P / position_P
    figures["MRR"] = float(reciprocal_P.sum())
    return figures


def domains_of_mean(users: Mapping[str, int], least: int) -> list[str]:
    """The domains that count in a mean over domains: those with at least `least` users.

    Where no domain has so many, all that have a user count. users: evaluated ones, by domain.

        users                                  least    result
        {"Books": 204, "Noir": 3, "War": 0}    50       ["Books"]
        {"Noir": 3, "War": 0}                  50       ["Noir"]
    """
    large = [name for name, count in users.items() if count >= max(1, least)]
    if large:
        return large
    return [name for name, count in users.items() if count > 0]


def mean_figures(
    by_domain: Mapping[str, Figures], names: Collection[str] | None = None
) -> Figures:
    """The mean of each of METRICS over domains; None where none of them has users.

    names: the domains that count; None: all. One without users does not count.

            users    HR@5    …    MRR
    Books   204      0.80         0.50
    Toys    0        None         None
    Games   79       0.60         0.30
    mean             0.70         0.40
    """
    with_users = []
    for name, figures in by_domain.items():
        if figures["users"] and (names is None or name in names):
            with_users.append(figures)
    if not with_users:
        return dict.fromkeys(METRICS)
    means: Figures = {}
    for metric in METRICS:
        values = [figures[metric] for figures in with_users]
        means[metric] = float(np.mean(cast(list[float], values)))
    return means


def user_mean_figures(
    by_domain: Mapping[str, Figures], metrics: Collection[str] = METRICS
) -> Figures:
    """The mean of each metric over all users; None without users.

            users    HR@5    …    MRR
    Books   300      0.80         0.50
    Toys    0        None         None
    Games   100      0.60         0.30
    mean             0.75         0.45
    """
    with_users = [figures for figures in by_domain.values() if figures["users"]]
    if not with_users:
        return dict.fromkeys(metrics)
    counts = [cast(int, figures["users"]) for figures in with_users]
    means: Figures = {}
    for metric in metrics:
        values = [figures.get(metric) for figures in with_users]
        means[metric] = None
        if None not in values:
            known = cast(list[float], values)
            means[metric] = float(np.average(known, weights=counts))
    return means


def mean_ndcg(
    position_U: np.ndarray,
    domain_U: np.ndarray,
    cutoff: int = 10,
    least: int = 1,
) -> float:
    """The mean over domains of NDCG@cutoff, 0.0 without users.

    position_U, domain_U: int64 (U,), of each user's held-out item. least: users of a domain that
    counts, as `domains_of_mean` has it. Four users of two domains:

        position_U    1     3      2      12
        domain_U      0     0      1      1
        gain          1     0.5    0.63   0       means 0.75 and 0.32, their mean 0.53
    """
    if len(position_U) == 0:
        return 0.0
    gain_U = metric_values(f"NDCG@{cutoff}", position_U)
    numbers, counts = np.unique(domain_U, return_counts=True)
    users = dict(zip(map(str, numbers), counts.tolist(), strict=True))
    counted = domains_of_mean(users, least)
    means = []
    for domain in numbers:
        if str(domain) in counted:
            gains = gain_U[domain_U == domain]
            means.append(gains.mean())
    return float(np.mean(means))


def outscores(score: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The tie rule: where an item's score puts it before another item. Shapes broadcast."""
    return score > other


def candidate_positions(
    scores_C: np.ndarray, counts_B: np.ndarray
) -> np.ndarray:
    """The position of each user's first candidate among the user's candidates, int64 (B,).

    scores_C, counts_B: jagged, user after user. Two users with three and two candidates:

        counts_B     3              2
        scores_C     0.5 0.9 0.1    2.0 1.0
        positions    2              1
    """
    ends_B = np.cumsum(counts_B)
    starts_B = ends_B - counts_B
    first_B = scores_C[starts_B]
    first_C = np.repeat(first_B, counts_B)
    behind_C = outscores(first_C, scores_C).astype(np.int64)
    behind_B = np.add.reduceat(behind_C, starts_B)
    return counts_B - behind_B


def padded_candidate_positions(
    scores_BC: np.ndarray, real_BC: np.ndarray
) -> np.ndarray:
    """`candidate_positions` of lists padded to one length, int64 (B,).

    real_BC: bool, False where an entry is padding. The first one never is. The two users of
    `candidate_positions`:

        scores_BC    [[0.5, 0.9, 0.1],     real_BC    [[True, True, True],
                      [2.0, 1.0, 0.0]]                 [True, True, False]]
    """
    first_B1 = scores_BC[:, :1]
    ahead_BC = ~outscores(first_B1, scores_BC)
    counted_BC = ahead_BC & real_BC
    return counted_BC.sum(1)


def positions_among_all(
    scores_BN: np.ndarray,
    item_B: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The position of item_B among a domain's N items, int64 (B,).

    excluded: (users (E,), items (E,)), int64: pairs that are not compared. A pair may occur twice
    or name the ranked item itself; both change nothing. Two users of a domain of four items:

        scores_BN    [[0.1, 0.4, 0.3, 0.9],    item_B       [2, 0]
                      [0.7, 0.7, 0.2, 0.6]]    excluded     ([0], [3])
        positions    [2, 2]                    item 1 is before user 0's, and user 1's is tied
    """
    user_B = np.arange(len(item_B))
    others_BN = np.ones(scores_BN.shape, bool)
    others_BN[excluded] = False
    others_BN[user_B, item_B] = False
    score_B1 = scores_BN[user_B, item_B, None]
    ahead_BN = ~outscores(score_B1, scores_BN) & others_BN
    return 1 + ahead_BN.sum(1)


def drawn_positions(
    greater_B: np.ndarray, equal_B: np.ndarray, bits_B: np.ndarray
) -> np.ndarray:
    """Positions where ties are broken by a drawn order, int64 (B,).

    greater_B, equal_B: int64, other items with a greater and with an equal score. bits_B: uint64,
    random bits of each user; as many of the equal items come first as they say, from none to all.
    Two users, of whom the second draws that two of four equal items come first:

        greater_B    3    0
        equal_B      0    4
        positions    4    3
    """
    equal_before_B = random_below(bits_B, equal_B + 1)
    return 1 + greater_B + equal_before_B


def count_positions(
    histogram_DP: np.ndarray, domain_B: np.ndarray, position_B: np.ndarray
) -> None:
    """Adds users' positions to int64 (D, longest list): a row for each domain, position 1 first.

    Three users, a histogram of zeros before:

        domain_B        0    1    1
        position_B      1    3    3
        histogram_DP    [[1, 0, 0],
                         [0, 0, 2]]
    """
    np.add.at(histogram_DP, (domain_B, position_B - 1), 1)
