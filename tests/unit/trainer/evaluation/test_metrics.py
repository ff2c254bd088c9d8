"""HR, NDCG and MRR against their definitions, and the rules that give positions against loops."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.counter_rng import random_bits
from trainer.evaluation.metrics import (
    CUTOFFS,
    FULL_METRICS,
    METRICS,
    candidate_positions,
    count_positions,
    domains_of_mean,
    drawn_positions,
    mean_figures,
    mean_ndcg,
    metric_matrix,
    metric_values,
    metrics_of_histogram,
    padded_candidate_positions,
    positions_among_all,
    user_mean_figures,
)


def metrics_by_hand(ranks):
    """The usual definitions, one user after the other."""

    def mean(values):
        return sum(values) / len(ranks)

    hit = {k: mean([float(rank <= k) for rank in ranks]) for k in (5, 10)}
    gain = {
        k: mean(
            [1 / math.log2(rank + 1) if rank <= k else 0.0 for rank in ranks]
        )
        for k in (5, 10)
    }
    return {
        "users": len(ranks), "HR@5": hit[5], "HR@10": hit[10], "NDCG@5": gain[5], "NDCG@10": gain[10],
        "MRR": mean([1 / rank for rank in ranks]),
    }  # fmt: skip


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 120)
)
def test_metrics_are_their_definitions(ranks, longest):
    found = metrics_of_histogram(
        np.bincount(np.array(ranks) - 1, minlength=longest)
    )
    assert found == pytest.approx(metrics_by_hand(ranks), rel=1e-12)
    assert list(found) == ["users", *METRICS]


@pytest.mark.parametrize("longest", [1, 4, 7])
def test_metrics_of_fewer_candidates_than_the_cut(longest):
    ranks = list(range(1, longest + 1))
    assert metrics_of_histogram(np.ones(longest, int)) == pytest.approx(
        metrics_by_hand(ranks)
    )


@given(st.lists(st.integers(1, 80), min_size=1, max_size=40))
def test_values_of_positions_have_the_means_that_histograms_have(positions):
    expected = metrics_of_histogram(
        np.bincount(np.array(positions) - 1, minlength=80)
    )
    for metric in METRICS:
        assert np.mean(metric_values(metric, positions)) == pytest.approx(
            expected[metric], rel=1e-12
        )
    matrix = metric_matrix(positions, CUTOFFS)
    for column, metric in enumerate(FULL_METRICS):
        np.testing.assert_array_equal(
            matrix[:, column], metric_values(metric, positions)
        )


SCORE = st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf])


def by_tie_rule(first, others):
    return 1 + sum(not first > other for other in others)


@given(
    st.lists(st.lists(SCORE, min_size=1, max_size=6), min_size=1, max_size=5)
)
def test_ties_and_nan_count_against_the_first_candidate(lists):
    expected = [by_tie_rule(scores[0], scores[1:]) for scores in lists]
    counts_B = np.array([len(scores) for scores in lists])
    scores_C = np.concatenate(lists)
    assert candidate_positions(scores_C, counts_B).tolist() == expected
    real_BC = np.arange(6) < counts_B[:, None]
    scores_BC = np.full((len(lists), 6), 9.0)
    scores_BC[real_BC] = scores_C
    assert padded_candidate_positions(scores_BC, real_BC).tolist() == expected


@given(
    st.lists(
        st.lists(SCORE, min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4))),
    st.integers(0, 4),
)
def test_positions_among_all_items_skip_the_excluded_ones(rows, pairs, item):
    pairs = [pair for pair in pairs if pair[0] < len(rows)]
    users = np.array(
        [user for user, _ in pairs] * 2, np.int64
    )  # each pair twice
    items = np.array([other for _, other in pairs] * 2, np.int64)
    item_B = np.full(len(rows), item)
    positions = positions_among_all(np.array(rows), item_B, (users, items))
    for user, scores in enumerate(rows):
        others = [
            score
            for other, score in enumerate(scores)
            if other != item and (user, other) not in pairs
        ]
        assert positions[user] == by_tie_rule(scores[item], others)


def test_drawn_positions_are_spread_evenly_over_the_ties():
    users = 4000
    greater_B, equal_B = np.full(users, 2), np.full(users, 3)
    bits_B = random_bits(1, np.arange(users))
    counts = np.bincount(
        drawn_positions(greater_B, equal_B, bits_B), minlength=7
    )
    assert counts[:3].sum() == 0 and len(counts) == 7
    assert abs(counts[3:] - users / 4).max() < 5 * math.sqrt(users * 3 / 16)


def test_counting_positions_adds_users_who_share_one():
    histogram_DP = np.zeros((2, 3), np.int64)
    count_positions(histogram_DP, np.array([0, 1, 0]), np.array([1, 3, 1]))
    assert histogram_DP.tolist() == [[2, 0, 0], [0, 0, 1]]


def test_the_mean_ndcg_is_over_domains_with_users():
    position_U, domain_U = np.array([1, 11, 3]), np.array([0, 0, 2])
    assert mean_ndcg(position_U, domain_U) == pytest.approx((0.5 + 0.5) / 2)
    assert mean_ndcg(position_U[:0], domain_U[:0]) == 0.0


@pytest.mark.parametrize(
    ("users", "least", "counted"),
    [
        ({"a": 50, "b": 49, "c": 0}, 50, ["a"]),
        ({"a": 50, "b": 49, "c": 0}, 51, ["a", "b"]),  # none is large enough
        ({"a": 50, "b": 49, "c": 0}, 1, ["a", "b"]),
        ({"a": 0}, 50, []),
        ({}, 50, []),
    ],
)
def test_domains_count_from_so_many_users_on(users, least, counted):
    assert domains_of_mean(users, least) == counted


def test_a_domain_of_two_users_does_not_move_the_mean():
    large = {"users": 20_000} | dict.fromkeys(METRICS, 0.4)
    small = {"users": 2} | dict.fromkeys(METRICS, 1.0)
    none = {"users": 0} | dict.fromkeys(METRICS)
    by_domain = {"large": large, "small": small, "none": none}
    assert mean_figures(by_domain)["NDCG@10"] == pytest.approx(0.7)
    assert mean_figures(by_domain, ["large", "none"])["NDCG@10"] == 0.4
    assert mean_figures(by_domain, [])["NDCG@10"] is None
    over_users = user_mean_figures(by_domain)["NDCG@10"]
    assert over_users == pytest.approx((20_000 * 0.4 + 2) / 20_002)
    assert user_mean_figures({"none": none}) == dict.fromkeys(METRICS)


def test_the_mean_ndcg_leaves_small_domains_out():
    position_U, domain_U = np.array([1, 1, 11]), np.array([0, 0, 4])
    assert mean_ndcg(position_U, domain_U, least=2) == 1
    assert mean_ndcg(position_U, domain_U, least=3) == 0.5


@pytest.mark.ranks
def test_numpy_is_all_that_metrics_and_the_split_need():
    """A peer's environment has no more."""
    code = (
        "import sys, trainer.evaluation.metrics, trainer.data.split; "
        "print([m for m in ('torch', 'pyarrow', 'duckdb', 'rich', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
