"""The targets of a part of the split: whose event is ranked, and what an evaluation says of them.

A dataset's split (trainer/data/split.py) has validation and test targets. Leave-one-out has one a
user; a split by time may have several, which are numbered user after user, a user's oldest first:

    user              0    1    2    3
    targets           1    0    2    1
    target's number   0         1 2  3

Where no user has several, a target's number is its user's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data.format.dataset import Dataset, Domain
from trainer.data.loading.histories import UserHistories
from trainer.data.loading.timeline import describe_split
from trainer.evaluation.metrics import Figures

# Of a run's split that an evaluation's record names.
_NAMED = ("kind", "whose", "counts", "validation", "test")


@dataclass(frozen=True)
class Targets:
    """Targets of some users, each int64 (T,).

    user_T: index of the user among them. place_T: of the event in the user's history. number_T: of
    the target in the dataset.
    """

    user_T: np.ndarray
    place_T: np.ndarray
    number_T: np.ndarray

    def __len__(self) -> int:
        return len(self.user_T)

    def choose(self, chosen: slice | np.ndarray) -> "Targets":
        """Some of them."""
        return Targets(
            self.user_T[chosen], self.place_T[chosen], self.number_T[chosen]
        )


def find_targets(dataset: Dataset, part: str, users: UserHistories) -> Targets:
    """The targets of some users. part: "validation" or "test".

    Of leave-one-out's test, with users 7, 3 and 9:

        lengths_B    4    2    5
        user_T       0         2
        place_T      3         4
        number_T     7         9
    """
    user_T, place_T = dataset.split.targets(
        part, users.lengths_B, users.ticks_N
    )
    number_T = users.number_B[user_T]
    if not dataset.split.one_target:
        first_T = np.searchsorted(user_T, user_T)
        before_U = _targets_before(dataset, part)
        number_T = before_U[number_T] + np.arange(len(user_T)) - first_T
    return Targets(user_T, place_T, number_T)


def count_targets(
    dataset: Dataset,
    part: str,
    user_B: np.ndarray,
) -> np.ndarray:
    """How many targets some users have, int64 (B,); at most one where a user has at most one."""
    if dataset.split.one_target:
        return np.ones(len(user_B), np.int64)
    before_U = _targets_before(dataset, part)
    return before_U[user_B + 1] - before_U[user_B]


def highest_target(dataset: Dataset, part: str) -> int:
    """One more than the highest number of a target."""
    if dataset.split.one_target:
        return dataset.users
    return int(_targets_before(dataset, part)[-1])


def users_of_targets(
    dataset: Dataset,
    part: str,
    number_T: np.ndarray,
) -> np.ndarray:
    """The users' numbers of targets, int64 (T,)."""
    if dataset.split.one_target:
        return number_T
    before_U = _targets_before(dataset, part)
    return np.searchsorted(before_U, number_T, side="right") - 1


def _targets_before(dataset: Dataset, part: str) -> np.ndarray:
    """How many targets the users before each user have, int64 (U + 1,)."""
    if dataset.training is None:
        raise AssertionError("a split of several targets has no counts")
    return dataset.training.targets[part]


def describe_part(dataset: Dataset, part: str) -> dict[str, Any] | None:
    """What an evaluation's record says of the split; None of leave-one-out.

    {"kind": "timeline", "whose": "first", "validation": "2014-06-01 00:00", "test": …,
    "without_history": 12}; the last: events with nothing of their user before them, which are not
    ranked.
    """
    split = describe_split(dataset)
    if split is None or dataset.training is None:
        return None
    named = {name: split[name] for name in _NAMED}
    without = dataset.training.without_history[part]
    return named | {"without_history": without}


def count_too_short(dataset: Dataset) -> int | None:
    """Users too short to be split, which a split by time does not know."""
    return dataset.too_short if dataset.training is None else None


def describe_unseen(
    dataset: Dataset, by_system: Mapping[str, Mapping[str, Figures]]
) -> dict[str, Any]:
    """The figures of the targets whose item training has not seen, which count in no others.

    They are ranked among items that it has seen, as all are. by_system: their figures by domain, of
    the model and of what ranks beside it. `items`: such items of each domain.

    {"items": {"Books": 31}, "model": {"Books": {"users": 14, …}}, "recency": {…}}
    """
    items = {}
    for domain in dataset.domains:
        is_trained_N = dataset.is_trained(domain.rows)
        items[domain.name] = int(np.count_nonzero(~is_trained_N))
    return {"items": items, **by_system}


def name_by_domain(
    dataset: Dataset, figures: Sequence[Figures]
) -> dict[str, Figures]:
    """{domain: figures} of one for each domain."""
    names = [domain.name for domain in dataset.domains]
    return dict(zip(names, figures, strict=True))


def ranked_items(dataset: Dataset, domain: Domain) -> np.ndarray | None:
    """Which of a domain's items are ranked, bool (items,); None: all."""
    if dataset.training is None:
        return None
    return dataset.is_trained(domain.rows)


def ranked_rows(dataset: Dataset, domain: Domain) -> np.ndarray:
    """The rows of M of a domain's items that are ranked, rising."""
    rows_N = domain.rows
    return rows_N[dataset.is_trained(rows_N)]
