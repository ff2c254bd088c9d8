"""The split: how much of each history is trained on, and which of its events are held out.

Leave-one-out, by the place in a user's merged history:

    history of five, oldest first    a  b  c  d  e
    training                         a  b  c
    validation                                d       ranked by a model that has seen a b c
    test                                         e    ranked by a model that has seen a b c d

A history of fewer than SPLIT_LENGTH interactions is not split: all of it is trained on, and its
user is never evaluated (SyNCRec, section 5.3).

The timeline, by two moments that hold for all users, here the ticks 50 and 80:

    history           a   b   c   d   e   f
    ticks             10  40  55  70  80  95
    training          a   b
    validation                c                    of "first": after a b
    test                              e            of "first": after a b c d

A target is a held-out event that is ranked; its history is everything of the user before it, by
place. A user with no event before it has no target: there is nothing to predict from.

Both kinds have the same methods, of B users and N events, user after user: `training_lengths` and
`targets`. This module needs NumPy alone, so that a peer's environment can import it.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

SPLIT_LENGTH = 3  # interactions of the shortest history that is split
HELD_OUT = 2  # interactions that are not trained on: validation and test


@dataclass(frozen=True)
class Split:
    """A part of every split history that is held out from training.

    offset: the held-out interaction counted from the end of the history, 1 for the newest.
    """

    name: str
    offset: int

    def history_lengths(self, lengths_B: np.ndarray) -> np.ndarray:
        """How many interactions precede the held-out one, int64 (B,).

        This is the held-out interaction's index in the history too. lengths_B: int64, of whole
        histories, each at least SPLIT_LENGTH.
        """
        return lengths_B - self.offset


VALIDATION = Split("validation", 2)
TEST = Split("test", 1)
SPLITS = {split.name: split for split in (VALIDATION, TEST)}


def can_be_split(lengths_B: np.ndarray) -> np.ndarray:
    """Whether histories of these lengths are split, bool (B,)."""
    return lengths_B >= SPLIT_LENGTH


def training_lengths(lengths_B: np.ndarray) -> np.ndarray:
    """How many interactions of each history, from its oldest on, are trained on, int64 (B,)."""
    return np.where(can_be_split(lengths_B), lengths_B - HELD_OUT, lengths_B)


@dataclass(frozen=True)
class LeaveOneOut:
    """The newest two interactions of each history that can be split are held out."""

    name: ClassVar[str] = "leave_one_out"
    # The newest that is trained on; None: any.
    newest_tick: ClassVar[int | None] = None
    # Targets of a user in a part, at most.
    one_target: ClassVar[bool] = True

    def training_lengths(
        self,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> np.ndarray:
        """How many interactions of each history, from its oldest on, are trained on, int64 (B,)."""
        return training_lengths(lengths_B)

    def targets(
        self,
        part: str,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Index of the user and place in the history of each target, int64 (T,), (T,).

        part: "validation" or "test". Of histories of 5 and 2 interactions, of "test":

            user_T     0
            place_T    4
        """
        (user_T,) = np.nonzero(can_be_split(lengths_B))
        return user_T, SPLITS[part].history_lengths(lengths_B[user_T])

    def counted_until(self, part: str, ticks_T: np.ndarray) -> np.ndarray:
        """The ticks as of which the recent past is counted for targets: their own."""
        return ticks_T


@dataclass(frozen=True)
class Timeline:
    """What comes before a moment is trained on; what comes after it is held out.

    validation_tick, test_tick: validation is of the events from the first one on and before the
    second one, test of those from the second one on. whose: of each user's events there, the
    "first", the "newest" or "all". counts: as of when the recent past is counted, the part's "cut",
    or each target's "day".
    """

    validation_tick: int
    test_tick: int
    whose: str = "first"
    counts: str = "cut"

    name: ClassVar[str] = "timeline"

    @property
    def newest_tick(self) -> int:
        """The newest that is trained on."""
        return self.validation_tick - 1

    @property
    def one_target(self) -> bool:
        """Whether a user has at most one target in a part."""
        return self.whose != "all"

    def training_lengths(
        self,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> np.ndarray:
        """How many interactions of each history, from its oldest on, are trained on, int64 (B,).

        lengths_B: int64, of whole histories. ticks_N: rising within a history. With the
        validation's tick at 50:

            lengths_B    3            2        1
            ticks_N      10 40 55     70 80    5
            returns      2            0        1
        """
        return _count_before(self.validation_tick, lengths_B, ticks_N)

    def targets(
        self,
        part: str,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Index of the user and place in the history of each target, int64 (T,), (T,).

        User after user, a user's oldest first. part: "validation" or "test". With the ticks 50
        and 80, of "all":

            lengths_B    4              3          1
            ticks_N      10 40 55 70    70 75 90   60

                         validation     test
            user_T       0  0  1        1
            place_T      2  3  1        2

        The second user's first event, and the third user's only one, have nothing before them.
        """
        user_T, place_T = self._held_out(part, lengths_B, ticks_N)
        has_history_T = place_T > 0
        return user_T[has_history_T], place_T[has_history_T]

    def counted_until(self, part: str, ticks_T: np.ndarray) -> np.ndarray:
        """The ticks as of which the recent past is counted for targets at these ticks.

        With the ticks 50 and 80:

            ticks_T            82 95
            of test, "cut"     80 80
            of test, "day"     82 95
        """
        if self.counts == "day":
            return ticks_T
        cut = self.test_tick if part == TEST.name else self.validation_tick
        return np.minimum(ticks_T, cut)

    def count_without_history(
        self,
        part: str,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> int:
        """How many events would be targets, if anything of the user came before them."""
        _, place_T = self._held_out(part, lengths_B, ticks_N)
        return int(np.count_nonzero(place_T == 0))

    def _held_out(
        self,
        part: str,
        lengths_B: np.ndarray,
        ticks_N: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`targets`, and the events that have nothing before them."""
        validation_B = _count_before(self.validation_tick, lengths_B, ticks_N)
        test_B = _count_before(self.test_tick, lengths_B, ticks_N)
        if part == VALIDATION.name:
            begin_B = validation_B
            end_B = test_B
        else:
            begin_B = test_B
            end_B = lengths_B
        if self.whose == "first":
            end_B = np.minimum(end_B, begin_B + 1)
        elif self.whose == "newest":
            begin_B = np.maximum(begin_B, end_B - 1)
        count_B = end_B - begin_B
        user_T = np.repeat(np.arange(len(lengths_B)), count_B)
        targets_before_B = np.cumsum(count_B) - count_B
        shift_B = begin_B - targets_before_B
        place_T = np.arange(len(user_T)) + shift_B[user_T]
        return user_T, place_T


AnySplit = LeaveOneOut | Timeline
LEAVE_ONE_OUT = LeaveOneOut()


def _count_before(
    tick: int,
    lengths_B: np.ndarray,
    ticks_N: np.ndarray,
) -> np.ndarray:
    """How many events of each history come before a tick, int64 (B,)."""
    ends_B = np.cumsum(lengths_B)
    earlier_N = np.cumsum(ticks_N < tick)
    earlier = np.concatenate([[0], earlier_N])
    return earlier[ends_B] - earlier[ends_B - lengths_B]
