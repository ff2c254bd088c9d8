import math

import numpy as np
import pytest
import torch

from trainer.evaluation.bootstrap import (
    FEWEST,
    GroupMeans,
    poisson_weights,
    scaled_values,
)
from trainer.evaluation.metrics import CUTOFFS, FULL_METRICS

CPU = torch.device("cpu")


def by_hand(ranks):
    ranks = np.asarray(ranks, float)
    hit = {f"HR@{k}": np.mean(ranks <= k) for k in CUTOFFS}
    gain = {
        f"NDCG@{k}": np.mean(
            [1 / math.log2(rank + 1) if rank <= k else 0 for rank in ranks]
        )
        for k in CUTOFFS
    }
    return hit | gain | {"MRR": np.mean(1 / ranks)}


def drawn(users=300, groups=4, seed=0):
    random = np.random.default_rng(seed)
    ranks_SB = random.integers(1, 90, (2, users))
    groups_BG = np.stack(
        [random.integers(0, 2, users), random.integers(2, groups, users)], 1
    )
    return random.permutation(10 * users)[:users], groups_BG, ranks_SB


def test_values_are_their_definitions():
    found = scaled_values(np.array([1, 2, 10, 11, 60, 10**6])) / 2.0**32
    assert found[:, 0].tolist() == [1] * 6
    for row, rank in zip(found[:, 1:], (1, 2, 10, 11, 60, 10**6), strict=True):
        assert dict(zip(FULL_METRICS, row, strict=True)) == pytest.approx(
            by_hand([rank]), abs=2.0**-32
        )


def test_figures_are_means_over_the_users_of_each_group(ranks):
    user_B, groups_BG, ranks_SB = drawn()
    means = GroupMeans(2, 5, seed=1, replicates=50)
    means.add(user_B, groups_BG, ranks_SB)
    means.reduce(CPU)
    for system in (0, 1):
        for group in range(4):
            own = (groups_BG == group).any(1)
            found = means.figures(system, group)
            assert found["users"] == own.sum()
            assert {
                name: found[name] for name in FULL_METRICS
            } == pytest.approx(by_hand(ranks_SB[system, own]), abs=1e-9)
        mean = means.mean(system, [0, 1, 4])
        both = [
            by_hand(ranks_SB[system, (groups_BG == group).any(1)])["MRR"]
            for group in (0, 1)
        ]
        assert mean["users"] == 300 and mean["MRR"] == pytest.approx(
            np.mean(both)
        )
        everyone = means.user_mean(system, [0, 1, 4])
        assert everyone["users"] == 300 and everyone["interval"]["MRR"]
        assert everyone["MRR"] == pytest.approx(
            by_hand(ranks_SB[system])["MRR"]
        )
    assert means.figures(0, 4) == {"users": 0} | dict.fromkeys(FULL_METRICS) | {
        "interval": None
    }
    assert means.mean(0, [4]) == means.figures(0, 4)
    both = [means.user_mean(system, [0, 1])["MRR"] for system in (0, 1)]
    found = means.user_mean_difference([0, 1, 4], "MRR")
    assert found["value"] == pytest.approx(both[0] - both[1])
    assert found["interval"][0] < found["value"] < found["interval"][1]
    ours, others = (means.figures(system, 1)["NDCG@10"] for system in (0, 1))
    assert means.difference(1, "NDCG@10")["value"] == pytest.approx(
        ours - others
    )
    assert (
        means.difference(4, "MRR")
        == means.mean_difference([4], "MRR")
        == {"value": None, "interval": None}
    )


def test_order_and_batches_do_not_change_a_bit(ranks):
    user_B, groups_BG, ranks_SB = drawn()
    whole = GroupMeans(2, 4, seed=1, replicates=40)
    whole.add(user_B, groups_BG, ranks_SB)
    parts = GroupMeans(2, 4, seed=1, replicates=40)
    for part in np.array_split(np.random.default_rng(2).permutation(300), 7):
        parts.add(user_B[part], groups_BG[part], ranks_SB[:, part])
    parts.add(user_B[:0], groups_BG[:0], ranks_SB[:, :0])
    np.testing.assert_array_equal(parts.sums, whole.sums)


def test_intervals_are_those_of_theory(ranks):
    """Of a share p of n users: p ± 1.96 √(p (1 − p) / n)."""
    users, share = 4000, 0.3
    rank_B = np.where(np.arange(users) < share * users, 1, 100)
    means = GroupMeans(2, 1, seed=5)
    means.add(
        np.arange(users),
        np.zeros((users, 1), np.int64),
        (rank_B, np.full(users, 2)),
    )
    low, high = means.figures(0, 0)["interval"]["HR@1"]
    half = 1.96 * math.sqrt(share * (1 - share) / users)
    assert (low, high) == pytest.approx(
        (share - half, share + half), abs=0.1 * half
    )
    assert means.figures(1, 0)["interval"]["HR@1"] == [
        0,
        0,
    ]  # what does not vary has no width
    difference = means.difference(0, "HR@1")
    assert difference["value"] == pytest.approx(share) and difference[
        "interval"
    ] == pytest.approx([low, high])


def test_few_users_have_no_interval(ranks):
    for users in (FEWEST - 1, FEWEST):
        means = GroupMeans(2, 1, seed=5)
        means.add(
            np.arange(users),
            np.zeros((users, 1), np.int64),
            (np.arange(users) + 1, np.arange(users) + 1),
        )
        assert (
            (means.figures(0, 0)["interval"] is None)
            == (means.difference(0, "MRR")["interval"] is None)
            == (users < FEWEST)
        )


def test_weights_are_poisson_and_depend_on_seed_replicate_and_user():
    found = poisson_weights(3, 50, np.arange(4000))
    for count in range(6):
        assert np.mean(found == count) == pytest.approx(
            math.exp(-1) / math.factorial(count), abs=0.003
        )
    np.testing.assert_array_equal(
        found[:20, 100:130], poisson_weights(3, 20, np.arange(100, 130))
    )
    assert (found[0] != found[1]).any() and (
        found != poisson_weights(4, 50, np.arange(4000))
    ).any()
    assert abs(np.corrcoef(found[0], found[1])[0, 1]) < 0.05
