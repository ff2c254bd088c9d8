import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.trainer.data.test_counter_rng import even
from trainer.config.negatives import NegativesConfig
from trainer.data.loading.negative_sampling import (
    draw_evaluation_negatives,
    draw_shared_negatives,
    draw_target_negatives,
)

STARTS, ITEMS = (
    np.array([0, 70, 1200]),
    np.array([2, 1000, 37]),
)  # domains with room after their items


def targets(users, seed=0):
    """Some interactions: user, place in the history, row, domain."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 12, users)
    user_N = np.repeat(random.permutation(10 * users)[:users], lengths)
    position_N = np.concatenate([np.arange(length) for length in lengths])
    domain_N = random.integers(0, 3, len(user_N))
    return (
        user_N,
        position_N,
        STARTS[domain_N] + random.integers(0, ITEMS[domain_N]),
        domain_N,
    )


def draw(user_N, position_N, items_N, domain_N, count=5, seed=1, epoch=2):
    return draw_target_negatives(
        seed, epoch, user_N, position_N, items_N, domain_N, STARTS, ITEMS, count
    )


def test_a_target_is_never_its_own_negative_and_all_are_of_its_domain():
    user_N, position_N, items_N, domain_N = targets(300)
    drawn = draw(user_N, position_N, items_N, domain_N)
    assert drawn.dtype == np.int64 and drawn.shape == (len(items_N), 5)
    assert (drawn != items_N[:, None]).all()
    assert (drawn >= STARTS[domain_N][:, None]).all() and (
        drawn < (STARTS + ITEMS)[domain_N][:, None]
    ).all()
    assert (
        drawn[domain_N == 0] == 1 - items_N[domain_N == 0][:, None]
    ).all()  # two items: the other one


@pytest.mark.parametrize("target", [0, 18, 36])
def test_all_other_items_are_as_likely(target):
    users = np.arange(4000)
    drawn = draw(
        users, users % 7, np.full(4000, STARTS[2] + target), np.full(4000, 2)
    )
    counts = np.bincount((drawn - STARTS[2]).reshape(-1), minlength=37)
    assert counts[target] == 0 and even(np.delete(counts, target))


def test_draws_depend_on_the_user_and_the_place_and_not_on_the_others_in_the_batch():
    interactions = targets(50)
    whole = draw(*interactions)
    order = np.random.default_rng(3).permutation(len(whole))[:20]
    np.testing.assert_array_equal(
        draw(*(values[order] for values in interactions)), whole[order]
    )


@pytest.mark.parametrize("change", ["seed", "epoch", "user", "position"])
def test_each_key_changes_the_draws(change):
    user_N, position_N, items_N, domain_N = targets(100)
    base = draw(user_N, position_N, items_N, domain_N)
    keys = {"seed": 1, "epoch": 2}
    if change in keys:
        keys[change] += 1
    other = draw(
        user_N + (change == "user"),
        position_N + (change == "position"),
        items_N,
        domain_N,
        **keys,
    )
    big = domain_N == 1
    assert (base[big] == other[big]).mean() < 0.02


def test_negatives_of_one_target_differ_from_each_other():
    user_N, position_N, items_N, domain_N = targets(100)
    drawn = draw(user_N, position_N, items_N, domain_N)[domain_N == 1]
    assert (drawn[:, 0] == drawn[:, 1]).mean() < 0.02


def test_shared_negatives_are_all_items_of_a_small_domain_and_even_draws_of_a_large_one():
    counts = np.zeros(1000, int)
    for step in range(300):
        small, large, middle = draw_shared_negatives(
            1, 2, step, STARTS, ITEMS, 37
        )
        assert small.tolist() == [0, 1] and middle.tolist() == list(
            range(1200, 1237)
        )
        assert len(large) == 37 and large.min() >= 70 and large.max() < 1070
        np.add.at(counts, large - 70, 1)
    assert even(counts)


@pytest.mark.parametrize("keys", [(9, 2, 3), (1, 9, 3), (1, 2, 9)])
def test_shared_negatives_follow_seed_epoch_and_step(keys):
    base, other = (
        draw_shared_negatives(*given_keys, STARTS, ITEMS, 30)[1]
        for given_keys in ((1, 2, 3), keys)
    )
    np.testing.assert_array_equal(
        base, draw_shared_negatives(1, 2, 3, STARTS, ITEMS, 30)[1]
    )
    assert (base == other).mean() < 0.2


def test_two_domains_of_one_size_do_not_share_their_draws():
    first, second = draw_shared_negatives(
        1, 2, 3, np.array([0, 1000]), np.array([1000, 1000]), 200
    )
    assert (first == second - 1000).mean() < 0.05


@given(
    items=st.integers(1, 1000),
    count=st.integers(1, 99),
    touched=st.lists(st.integers(0, 1200), max_size=400),
    user=st.integers(0, 2**40),
)
def test_evaluation_candidates_are_different_rows_that_the_user_never_touched(
    items, count, touched, user
):
    start = 100
    drawn = draw_evaluation_negatives(
        7, user, np.array(touched, np.int64), start, items, count
    )
    others = set(range(start, start + items)) - set(touched)
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(others))
    assert set(drawn.tolist()) <= others
    again = draw_evaluation_negatives(
        7, user, np.array(touched[::-1], np.int64), start, items, count
    )
    np.testing.assert_array_equal(again, drawn)


@given(
    drawn_rows=st.sets(st.integers(100, 1100), min_size=1),
    count=st.integers(1, 99),
    touched=st.lists(st.integers(0, 1200), max_size=400),
    user=st.integers(0, 2**40),
)
def test_evaluation_candidates_are_of_the_rows_that_are_drawn_from(
    drawn_rows, count, touched, user
):
    rows = np.array(sorted(drawn_rows))
    drawn = draw_evaluation_negatives(
        7, user, np.array(touched, np.int64), 100, 1001, count, rows
    )
    others = drawn_rows - set(touched)
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(others))
    assert set(drawn.tolist()) <= others


# With 10 candidates: up to 80 items all are ordered, above that they are drawn one by one.
@pytest.mark.parametrize("items", [30, 80, 81, 300])
def test_both_ways_of_drawing_are_even(items):
    touched = np.array([3, 17, 29, 29, 500])
    counts = np.zeros(items, int)
    for user in range(150 * items // 10):
        np.add.at(
            counts, draw_evaluation_negatives(5, user, touched, 0, items, 10), 1
        )
    assert not counts[[3, 17, 29]].any()
    counts = np.delete(counts, [3, 17, 29])
    assert even(counts)


def test_a_user_who_touched_nearly_all_of_a_large_domain_gets_the_rest():
    touched = np.delete(np.arange(1000), np.arange(0, 1000, 50))
    drawn = draw_evaluation_negatives(5, 0, touched, 0, 1000, 19)
    assert len(drawn) == 19 and set(drawn.tolist()) < set(range(0, 1000, 50))


@pytest.mark.parametrize("items", [60, 3000])
def test_evaluation_candidates_follow_seed_and_user(items):
    def drawn(seed, user):
        return set(
            draw_evaluation_negatives(
                seed, user, np.array([1]), 0, items, 20
            ).tolist()
        )

    assert (
        drawn(1, 2) == drawn(1, 2)
        and drawn(1, 2) != drawn(2, 2)
        and drawn(1, 2) != drawn(1, 3)
    )


@pytest.mark.parametrize(
    ("key", "value"), [("per_target", 0), ("per_target", -1), ("shared", -1)]
)
def test_bad_values_name_the_key(key, value):
    with pytest.raises(ValueError, match=rf"negatives\.{key} is {value}"):
        NegativesConfig(**{key: value})
