"""Items handed to other users: which ones, among which candidates, and what the difference is."""

from types import SimpleNamespace

import numpy as np
import pytest

import trainer.exchanged
from tests.alone import group_of_one
from trainer.exchanged import own_item_gains

USERS, NEGATIVES = 30, 4
CONFIG = SimpleNamespace(seed=3, evaluation=SimpleNamespace(negatives=NEGATIVES))
DATASET = SimpleNamespace(domains=["a", "b"], users=USERS)


def rows_of(user):
    """Its own item and negatives, among them an item that others have."""
    return np.array([100 + user, 1, 2, 100 + (user + 2) % USERS, 3 + user % 3])[: 3 + user % 3]


@pytest.fixture
def asked(monkeypatch):
    """What is ranked: a list of {user: (domain, rows)}. Own items get rank 1, others rank 3."""
    found = []

    def evaluate_split(model, table, dataset, ranks, config, split, given=None, visit=None):
        assert split == "test"
        if visit is not None:
            users = np.append(np.arange(0, USERS), -1)
            rows = [*map(rows_of, users[:-1]), np.zeros(1, np.int64)]
            counts = np.array(list(map(len, rows)))
            visit(SimpleNamespace(user_B=users, domain_B=users % 2, counts_B=counts, rows_C=np.concatenate(rows)), None, None)
            return None
        found.append(given)
        histogram = np.zeros((2, 2, 1 + NEGATIVES), np.int64)
        for user, (domain, rows) in given.items():
            histogram[0, domain, 0 if rows[0] == 100 + user else 2] += 1
        return SimpleNamespace(histogram=histogram)

    monkeypatch.setattr(trainer.exchanged, "evaluate_split", evaluate_split)
    monkeypatch.setattr(trainer.exchanged, "best_model", lambda *given: (None, None, None))
    with group_of_one():
        yield found


def test_every_user_gets_another_ones_item_of_the_same_domain(asked):
    gains = own_item_gains("run", CONFIG, DATASET, None, np.arange(2, 24), 1)
    assert gains == [pytest.approx(0.5)] * 2  # NDCG of rank 1 less that of rank 3
    own, others = asked
    assert own.keys() == others.keys() == set(range(2, 24))
    for user, (domain, rows) in own.items():
        assert domain == user % 2 and rows.tolist() == rows_of(user).tolist()
        item, *negatives = others[user][1].tolist()
        assert item != 100 + user and item % 2 == domain and others[user][0] == domain
        assert negatives == [row for row in rows_of(user)[1:].tolist() if row != item]
    assert sorted(rows[0] for _, rows in others.values()) == [100 + user for user in range(2, 24)]


def test_few_users_say_nothing_and_many_are_thinned_out(asked, monkeypatch):
    assert own_item_gains("run", CONFIG, DATASET, None, np.array([0, 2, 4, 1]), 3) == [pytest.approx(0.5), None]
    assert own_item_gains("run", CONFIG, DATASET, None, np.array([7]), 1) == [None, None]
    monkeypatch.setattr(trainer.exchanged, "_MOST", 10)
    own_item_gains("run", CONFIG, DATASET, None, np.arange(USERS), 1)
    assert len(asked[-1]) == 10
