"""The baseline by recency popularity: items ranked by how often they were touched lately.

An item's score is its faded count as of the day for which is predicted
(trainer/data/recent_counts.py): all interactions of earlier days, whoever's they are, and none of
the day itself or later. Ties are broken by the orders that popularity's are
(trainer/evaluation/popularity.py).
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from trainer.data.format.dataset import Dataset
from trainer.data.recent_counts import RecentCounts
from trainer.evaluation.popularity import (
    break_ties,
    positions_with_ties,
    unique_rivals,
)
from trainer.evaluation.targets import ranked_rows


@dataclass(frozen=True)
class UsersOfStep:
    """Users of one step of ranking, who are ranked later. domain_B: of the held-out item."""

    domain_B: np.ndarray


Step = TypeVar("Step", bound=UsersOfStep)


@dataclass(frozen=True)
class HalfLifeChoice:
    """The half-life that was best on the validation split, and the mean NDCG@10 of those tried.

    unit: of half-lives, "days" or what stands for them (`Days`).
    """

    half_life: int
    unit: str
    validation: dict[int, float]

    def to_record(self) -> dict[str, Any]:
        """{"half_life": 30, "unit": "days", "validation": {"3": 0.21, "7": 0.23, …}}"""
        validation = {}
        for half_life, value in self.validation.items():
            validation[str(half_life)] = value
        return {
            "half_life": self.half_life,
            "unit": self.unit,
            "validation": validation,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "HalfLifeChoice":
        """What `to_record` gave. Raises ValueError, KeyError or TypeError for anything else."""
        validation = {}
        for text, value in dict(record["validation"]).items():
            validation[int(text)] = read_number(value)
        if record["half_life"] not in validation:
            raise ValueError(f"half_life is {record['half_life']!r}")
        return cls(record["half_life"], record["unit"], validation)


def read_number(value: Any) -> float:
    """A finite number of a record. Raises ValueError for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)


class RecencyPopularity:
    """Ranks items by their faded counts as of any moment, with one half-life."""

    def __init__(
        self, counts: RecentCounts, choice: HalfLifeChoice, seed: int
    ) -> None:
        self.counts = counts
        self.choice = choice
        self.seed = seed
        self._faded = counts.fade(choice.half_life)

    def count(self, rows_Q: np.ndarray, day_Q: np.ndarray) -> np.ndarray:
        """The faded count of each row of M as of a day, float64 (Q,).

        rows_Q     7    7    8
        day_Q      7    3    9
        returns    1    0    0.18
        """
        newest = self.counts.newest_before(rows_Q, day_Q)
        return self._faded.at(newest)

    def candidate_scores(
        self,
        user_B: np.ndarray,
        now_B: np.ndarray,
        counts_B: np.ndarray,
        rows_C: np.ndarray,
    ) -> np.ndarray:
        """Whole numbers in the order of the candidates, ties broken: int64 (C,).

        The arguments are those of `Candidates`. Two users, the second one's candidates untouched
        before the day of the tick 90:

            user_B      12              40
            now_B       700             90
            counts_B    3               2
            rows_C      4   9   2       51   60
            counts      2.1 0.0 0.4     0.0  0.0
            scores      4   1   3       2    0
        """
        day_B = self.counts.days.of_ticks(now_B)
        count_C = self.count(rows_C, np.repeat(day_B, counts_B))
        return break_ties(count_C, self.seed, user_B, counts_B, rows_C)


@dataclass(frozen=True)
class _HeldOutCounts(UsersOfStep):
    """Held-out items of one step and, of the user's other items, how many are before them.

    greater_B, equal_B: the user's other items of the domain with a greater and an equal count. Two
    users:

        user_B       12     40
        domain_B     0      1
        day_B        31     4
        count_B      0.7    0
        greater_B    2      0
        equal_B      0      1
    """

    user_B: np.ndarray
    is_trained_B: np.ndarray
    day_B: np.ndarray
    count_B: np.ndarray
    greater_B: np.ndarray
    equal_B: np.ndarray


class FullRecencyRanking:
    """Positions of held-out items among all items of their domain, by recency popularity.

    All items of a domain have other counts on every day. So users are added step by step, and
    ranked in the end, day after day: a domain is counted once for each day that it is asked for.
    """

    def __init__(self, recency: RecencyPopularity, dataset: Dataset) -> None:
        self._recency = recency
        self._dataset = dataset
        self._steps: list[_HeldOutCounts] = []

    def add(
        self,
        user_B: np.ndarray,
        domain_B: np.ndarray,
        row_B: np.ndarray,
        now_B: np.ndarray,
        counts_B: np.ndarray,
        rows_E: np.ndarray,
    ) -> None:
        """Adds the users of a step, jagged as `Popularity.positions` draws it.

        now_B: ticks for which is predicted.
        """
        day_B = self._recency.counts.days.of_ticks(now_B)
        count_B = self._recency.count(row_B, day_B)
        user_E = np.repeat(np.arange(len(user_B)), counts_B)
        user_E, row_E = unique_rivals(
            self._dataset, user_E, rows_E, domain_B, row_B
        )
        count_E = self._recency.count(row_E, day_B[user_E])
        greater_E = count_E > count_B[user_E]
        equal_E = count_E == count_B[user_E]
        users = len(user_B)
        step = _HeldOutCounts(
            user_B=user_B,
            is_trained_B=self._dataset.is_trained(row_B),
            domain_B=domain_B,
            day_B=day_B,
            count_B=count_B,
            greater_B=np.bincount(user_E[greater_E], minlength=users),
            equal_B=np.bincount(user_E[equal_E], minlength=users),
        )
        self._steps.append(step)

    def positions(self) -> list[np.ndarray]:
        """The positions of each step's held-out items, int64, ties by the drawn order."""
        if not self._steps:
            return []
        users = join_steps(self._steps)
        greater_U = -users.greater_B
        equal_U = -users.equal_B
        # A domain on a day after the other.
        order = np.lexsort((users.day_B, users.domain_B))
        group_U = users.domain_B * self._recency.counts.days.count + users.day_B
        _, begins = np.unique(group_U[order], return_index=True)
        for members in np.split(order, begins[1:]):
            if not len(members):
                continue
            first = members[0]
            rising = self._rising_counts(
                users.domain_B[first], users.day_B[first]
            )
            count_M = users.count_B[members]
            left_M = np.searchsorted(rising, count_M, side="left")
            right_M = np.searchsorted(rising, count_M, side="right")
            greater_U[members] += len(rising) - right_M
            equal_U[members] += right_M - left_M
        equal_U -= users.is_trained_B  # without itself
        position_U = positions_with_ties(
            greater_U, equal_U, self._recency.seed, users.user_B
        )
        return split_by_steps(position_U, self._steps)

    def _rising_counts(self, number: int, day: int) -> np.ndarray:
        """The counts of all ranked items of a domain as of a day, rising."""
        domain = self._dataset.domains[number]
        rows_N = ranked_rows(self._dataset, domain)
        count_N = self._recency.count(rows_N, np.full(len(rows_N), day))
        return np.sort(count_N)


def join_steps(steps: Sequence[Step]) -> Step:
    """The users of several steps, whose fields are arrays, as one step."""
    columns = {}
    for field in dataclasses.fields(steps[0]):
        parts = [getattr(step, field.name) for step in steps]
        columns[field.name] = np.concatenate(parts)
    return type(steps[0])(**columns)


def split_by_steps(
    value_U: np.ndarray, steps: Sequence[Step]
) -> list[np.ndarray]:
    """What the users of several steps have, step by step. Of steps of 2 and 1 users:

    value_U    3 1 7
    returns    [3, 1], [7]
    """
    ends = np.cumsum([len(step.domain_B) for step in steps])
    return np.split(value_U, ends[:-1])
