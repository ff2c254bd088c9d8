"""Items handed to other users: which ones, among which candidates, and what the difference is."""

from types import SimpleNamespace

import numpy as np
import pytest

import trainer.evaluation.personalization
from tests.helpers.alone import group_of_one
from trainer.evaluation.evaluation import MODEL
from trainer.evaluation.personalization import (
    UserSample,
    _mean_gain,
    measure_personalization,
)

USERS, NEGATIVES = 30, 4
CONFIG = SimpleNamespace(
    seed=3, evaluation=SimpleNamespace(negatives=NEGATIVES)
)
DATASET = SimpleNamespace(domains=["a", "b"], users=USERS)


def rows_of(user):
    """Its own item and negatives, among them an item that others have."""
    return np.array([100 + user, 1, 2, 100 + (user + 2) % USERS, 3 + user % 3])[
        : 3 + user % 3
    ]


@pytest.fixture
def asked(monkeypatch):
    """What is ranked: a list of {user: (domain, rows)}. Others' items get rank 3."""
    found = []

    def evaluate_split(
        model, table, dataset, ranks, config, split, candidates, visit
    ):
        assert split == "test"
        found.append(candidates)
        for user, (_, rows) in candidates.items():
            assert rows[0] != 100 + user
        user_B = np.array([-1, *candidates])
        step = SimpleNamespace(user_B=user_B)
        visit(step, {MODEL: np.full(len(user_B), 3)}, None)

    monkeypatch.setattr(
        trainer.evaluation.personalization, "evaluate_split", evaluate_split
    )
    with group_of_one():
        yield found


def gains_of(wanted, least):
    """Of users who were ranked first, in several steps, one of which has nobody."""
    wanted_U = np.zeros(USERS, bool)
    wanted_U[wanted] = True
    drawn = UserSample(CONFIG, wanted_U)
    for users in (np.arange(13), np.array([-1]), np.arange(13, USERS)):
        rows = [
            rows_of(user) if user >= 0 else np.zeros(1, np.int64)
            for user in users
        ]
        counts = np.array(list(map(len, rows)))
        step = SimpleNamespace(
            user_B=users,
            domain_B=users % 2,
            counts_B=counts,
            rows_C=np.concatenate(rows),
        )
        drawn.visit(step, {MODEL: np.ones(len(users), np.int64)})
    return measure_personalization(
        None, None, CONFIG, DATASET, None, drawn, least
    )


def test_each_user_is_ranked_with_anothers_item_of_the_same_domain(asked):
    gains = gains_of(np.arange(2, 24), 1)
    for gain in gains:  # NDCG of rank 1 less that of rank 3, of everyone
        assert gain == (pytest.approx(0.5), pytest.approx(0.0), 11)
    (others,) = asked
    assert others.keys() == set(range(2, 24))
    for user, (domain, rows) in others.items():
        item, *negatives = rows.tolist()
        assert domain == user % 2 and item != 100 + user and item % 2 == domain
        assert negatives == [
            row for row in rows_of(user)[1:].tolist() if row != item
        ]
    assert sorted(rows[0] for _, rows in others.values()) == [
        100 + user for user in range(2, 24)
    ]


def test_few_users_say_nothing_and_many_are_thinned_out(asked, monkeypatch):
    first, second = gains_of([0, 2, 4, 1], 3)
    assert first.value == pytest.approx(0.5) and first.users == 3
    assert second is None
    assert gains_of([7], 1) == [None, None]
    monkeypatch.setattr(trainer.evaluation.personalization, "_MOST", 10)
    gains_of(np.arange(USERS), 1)
    assert len(asked[-1]) == 10


def test_the_error_is_that_of_a_mean_over_users():
    found = _mean_gain(np.array([1, 1, 3]), np.array([1, 3, 7]))
    gains = [0, 0.5, 0.5 - 1 / 3]
    assert found.value == pytest.approx(np.mean(gains))
    assert found.error == pytest.approx(np.std(gains, ddof=1) / np.sqrt(3))
    assert _mean_gain(np.array([1]), np.array([3])) == (0.5, None, 1)
    assert _mean_gain(np.array([]), np.array([])) is None
