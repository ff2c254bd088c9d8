"""Leave-one-out: which interaction of a user's merged history is for testing, validation, training.

    history of five, oldest first    a  b  c  d  e
    training                         a  b  c
    validation                                d       ranked by a model that has seen a b c
    test                                         e    ranked by a model that has seen a b c d

A history of fewer than SPLIT_LENGTH interactions is not split: all of it is trained on, and its
user is never evaluated (SyNCRec, section 5.3). This module needs NumPy alone, so that a peer's
environment can import it.
"""

from dataclasses import dataclass

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
