"""Sharded ranking is what NumPy makes of all scores, at any number of ranks, block and number of users at a time."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embeddings.topk import bounds, chunks
from embeddings.topk.ranking import ExactRanking, Excluded
from tests.helpers import ranking_worker
from tests.helpers.alone import group_of_one
from tests.helpers.rank_processes import run_on_cpu_ranks
from tests.helpers.ranking_cases import CASES, Case, brute_force
from tests.helpers.ranking_worker import WAYS

pytestmark = pytest.mark.ranks  # they start processes

RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the worker finds at each number of ranks."""
    folder, found = tmp_path_factory.mktemp("ranking"), {}
    for ranks in RANKS:
        if ranks == 1:
            with group_of_one():
                ranking_worker.main(folder)
        else:
            run_on_cpu_ranks(ranks, "tests.helpers.ranking_worker", folder)
        found[ranks] = dict(np.load(folder / f"ranks-{ranks}.npz"))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_and_best_items_are_those_of_a_brute_force(
    results, ranks, way, name
):
    for what, expected in brute_force(CASES[name]).items():
        np.testing.assert_array_equal(
            results[ranks][f"{way}_{name}_{what}"],
            expected,
            f"{what} of {name}",
        )


@pytest.fixture
def group():
    with group_of_one():
        yield


@pytest.fixture(params=WAYS)
def way(request):
    with ranking_worker.by(request.param):
        yield request.param


def assert_brute_force(case):
    found = ranking_worker.ranked(case, ranking_worker.table_of(case.m_NR))
    for what, expected in brute_force(case).items():
        np.testing.assert_array_equal(found[what], expected, what)


@pytest.mark.parametrize(
    "name", ["middle", "almost_equal", "wild_users", "all_had"]
)
def test_users_may_be_scored_side_by_side(group, way, monkeypatch, name):
    """In threads, as where there are many; the number of PyTorch's own is as before afterwards."""
    monkeypatch.setattr(chunks, "_FEWEST", 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert len(chunks.split_users(7, torch.device("cpu"), 1)) == 3
        assert_brute_force(CASES[name])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_neither_autocast_nor_a_coarser_product_changes_anything(group, way):
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_brute_force(CASES["almost_equal"])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# Few values, so that there are ties; and those at which products overflow, vanish or cancel.
NUMBERS = st.sampled_from(
    [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.1,
        3.0,
        1 + 2.0**-23,
        2.0**-140,
        1e20,
        -3e38,
        np.inf,
        -np.inf,
        np.nan,
    ]
)


TAME = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 0.1, 3.0, 1 + 2.0**-23, 2.0**-140, 1e15]
)


@st.composite
def any_case(draw):
    rows, users = draw(st.integers(1, 90)), draw(st.integers(0, 4))
    first = draw(st.integers(0, rows - 1))
    items = draw(st.integers(1, rows - first))
    excluded = st.lists(st.integers(0, rows - 1), max_size=2 * rows)
    return Case(
        draw(arrays(np.float32, (rows, 4), elements=NUMBERS)),
        draw(
            arrays(
                np.float32,
                (users, 4),
                elements=draw(st.sampled_from([TAME, NUMBERS])),
            )
        ),
        first,
        items,
        np.array(
            draw(
                st.lists(
                    st.integers(first, first + items - 1),
                    min_size=users,
                    max_size=users,
                )
            ),
            np.int64,
        ),
        draw(st.none() | st.lists(excluded, min_size=users, max_size=users)),
        k=draw(st.integers(1, 100)),
        block=draw(st.integers(1, 40)),
        users=draw(st.integers(1, 5)),
        ranked_N=draw(st.none() | arrays(np.bool_, items)),
    )


@settings(
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
    max_examples=100,
)
@given(case=any_case())
def test_any_numbers_are_ranked(group, way, case):
    assert_brute_force(case)


@pytest.mark.parametrize("dim", [4, 64, 132])
def test_a_product_is_never_further_from_the_score_than_the_error(dim):
    """Also for vectors that nearly cancel, and of lengths far apart."""
    generator = torch.Generator().manual_seed(dim)
    y_UR, m_NR = (
        torch.randn(200, dim, generator=generator)
        * torch.randn(200, 1, generator=generator).exp()
        for _ in "ym"
    )
    m_NR[::2] -= (
        y_UR[:100]
        * (m_NR[::2] * y_UR[:100]).sum(1, True)
        / y_UR[:100].square().sum(1, True)
    )
    users = bounds.Vectors(y_UR)
    for item in range(
        200
    ):  # one by one: the error of a block is that of its longest vector
        items = bounds.Vectors(m_NR[item : item + 1])
        found_U = bounds.product(users, items, torch.empty(200, 1))[:, 0]
        exact_U = bounds.exact_scores(
            y_UR, torch.arange(200), m_NR, torch.full((200,), item)
        )
        assert (
            (found_U.double() - exact_U.double()).abs()
            <= bounds.error(users, items)
        ).all()


NOTHING = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda table: ExactRanking(table, 90, 11),
            "rows 90 to 100 are not rows of a table of 100",
        ),
        (lambda table: ExactRanking(table, 0, 0), "rows 0 to -1 are not rows"),
        (lambda table: ExactRanking(table, 0, 9, block=0), "block is 0"),
        (
            lambda table: ExactRanking(table, 0, 9).top_k(torch.zeros(1, 4), 0),
            "k is 0: give at least 1",
        ),
        (
            lambda table: ExactRanking(table, 9, 9).positions(
                torch.zeros(1, 4), torch.tensor([18])
            ),
            "is not one of rows 9 to 17",
        ),
        (
            lambda table: ExactRanking(table, 0, 9).top_k(
                torch.zeros(1, 4), 3, Excluded(NOTHING, NOTHING)
            ),
            "1 users, and what",
        ),
        (
            lambda table: Excluded(NOTHING, torch.ones(2, dtype=torch.int64)),
            "0 excluded rows, but counts of them",
        ),
    ],
)
def test_what_cannot_be_ranked_is_refused(group, call, message):
    with pytest.raises(ValueError, match=message):
        call(ranking_worker.table_of(np.zeros((100, 4), np.float32)))
