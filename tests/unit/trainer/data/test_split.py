"""Leave-one-out, against the histories that it is drawn with."""

import numpy as np
import pytest

from trainer.data.split import (
    HELD_OUT,
    SPLIT_LENGTH,
    SPLITS,
    TEST,
    VALIDATION,
    can_be_split,
    training_lengths,
)


@pytest.mark.parametrize(
    ("history", "training"),
    [("abcde", "abc"), ("abc", "a"), ("ab", "ab"), ("a", "a")],
)
def test_a_history_is_trained_on_but_for_the_newest_two(history, training):
    lengths_B = np.array([len(history)])
    assert history[: training_lengths(lengths_B)[0]] == training
    assert can_be_split(lengths_B)[0] == (len(history) >= SPLIT_LENGTH)


def test_each_split_holds_one_interaction_out():
    history, lengths_B = "abcde", np.array([5])
    assert history[TEST.history_lengths(lengths_B)[0]] == "e"
    assert history[VALIDATION.history_lengths(lengths_B)[0]] == "d"
    assert SPLITS == {"validation": VALIDATION, "test": TEST}
    assert {split.offset for split in SPLITS.values()} == set(
        range(1, HELD_OUT + 1)
    )
