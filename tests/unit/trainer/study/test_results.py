"""Figures and paired comparisons, against loops and what is known of them."""

import numpy as np
import pytest

from trainer.errors import InputError
from trainer.evaluation.metrics import metric_values
from trainer.study.results import (
    RunResult,
    SystemResults,
    collect_results,
    paired_difference,
)
from trainer.study.runner import _with_recency


def found(rank_SU, domain_U=None, name="one", user_U=None):
    rank_SU = np.atleast_2d(rank_SU)
    users = rank_SU.shape[1]
    domain_U = (
        np.zeros(users, int) if domain_U is None else np.asarray(domain_U)
    )
    user_U = np.arange(users) if user_U is None else user_U
    seeds = [0.0] * len(rank_SU)
    return SystemResults(
        name,
        user_U,
        domain_U,
        {"sampled": rank_SU, "full": rank_SU},
        seeds,
        seeds,
        seeds,
        seeds,
    )


def test_gains_are_their_definitions():
    rank = np.array([1, 2, 10, 11])
    assert metric_values("NDCG@10", rank).tolist() == pytest.approx(
        [1, 1 / np.log2(3), 1 / np.log2(11), 0]
    )
    assert metric_values("HR@10", rank).tolist() == [1, 1, 1, 0]
    assert metric_values("MRR", rank).tolist() == pytest.approx(
        [1, 0.5, 0.1, 1 / 11]
    )


def test_means_are_by_seed_and_domain():
    one = found([[1, 20, 1], [20, 20, 20]], [0, 0, 2])
    np.testing.assert_array_equal(
        one.by_domain("full", "HR@10", 3), [[0.5, np.nan, 1], [0, np.nan, 0]]
    )


def test_a_difference_is_the_mean_over_domains_with_an_interval_that_holds_it():
    rng = np.random.default_rng(0)
    domain_U = rng.choice(2, 4000, p=[0.9, 0.1])
    ranks = rng.integers(1, 30, (2, 4000))
    one, other = (
        found(ranks, domain_U),
        found(ranks + (domain_U == 1), domain_U),
    )
    whole = paired_difference(one, other, "full")
    by_hand = [
        (metric_values("NDCG@10", ranks) - metric_values("NDCG@10", ranks + 1))
        .mean(0)[domain_U == 1]
        .mean()
        / 2
    ]
    assert whole.value == pytest.approx(by_hand[0])
    assert 0 < whole.low < whole.value < whole.high and whole.p <= 0.002
    same = paired_difference(one, other, "full", domain=0)
    assert same.value == same.low == same.high == 0 and same.p == 1


def test_noise_is_not_taken_for_a_difference():
    """Of forty pairs of systems that are alike, about one in twenty leaves 0 out: seen are 2."""
    rng, out = np.random.default_rng(1), 0
    for _ in range(40):
        whole = paired_difference(
            found(rng.integers(1, 30, 300)),
            found(rng.integers(1, 30, 300)),
            "full",
        )
        out += whole.low * whole.high > 0
    assert out <= 6


def test_users_are_put_in_order_and_others_are_refused():
    def part(users, ranks):
        columns = {
            "user": users,
            "domain": [0] * len(users),
            "sampled": ranks,
            "full": ranks,
        }
        facts = {
            "validation": 0.5,
            "seconds": 2.0,
            "users_per_second": 10.0,
            "epochs": 3,
        }
        arrays = {name: np.array(values) for name, values in columns.items()}
        return RunResult(**arrays, **facts)

    whole = collect_results("one", [[part([5, 1], [7, 8]), part([3], [9])]])
    assert whole.user_U.tolist() == [1, 3, 5] and whole.position[
        "full"
    ].tolist() == [[8, 9, 7]]
    assert (
        whole.seconds == [4.0]
        and whole.epochs == [3]
        and whole.validation == [0.5]
    )
    with pytest.raises(InputError, match="its seeds have ranked other users"):
        collect_results("one", [[part([5, 1], [7, 8])], [part([5, 2], [7, 8])]])
    with pytest.raises(
        InputError, match="have ranked other users: they cannot be compared"
    ):
        paired_difference(
            found([1, 2]), found([1, 2], user_U=np.array([0, 2])), "full"
        )


def test_positions_with_the_recency_term_are_results_of_their_own():
    def part(**with_recency):
        columns = {
            "user": np.array([1, 2]),
            "domain": np.array([0, 0]),
            "sampled": np.array([3, 4]),
            "full": np.array([5, 6]),
        }
        arrays = {name: np.array(of) for name, of in with_recency.items()}
        return RunResult(
            **columns,
            **arrays,
            validation=0.5,
            seconds=2.0,
            users_per_second=10.0,
            epochs=3,
        )

    known = part(sampled_with_recency=[1, 2], full_with_recency=[3, 9])
    results = _with_recency("SASRec", [[known], [known]])
    (name,) = results
    assert name == "SASRec + recency"
    assert results[name].position["full"].tolist() == [[3, 9], [3, 9]]
    assert results[name].position["sampled"].tolist() == [[1, 2], [1, 2]]
    unknown = part(sampled_with_recency=[0, 0], full_with_recency=[0, 0])
    assert not _with_recency("SASRec", [[known], [unknown]])
    assert not _with_recency("SASRec", [[part()]])
