"""Leave-one-out and the timeline, against loops over the histories."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.split import (
    HELD_OUT,
    LEAVE_ONE_OUT,
    SPLIT_LENGTH,
    SPLITS,
    TEST,
    VALIDATION,
    Timeline,
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


HISTORY = st.lists(st.integers(0, 12), min_size=1, max_size=7).map(sorted)


def slow_timeline(histories, validation, test, whose, part):
    """By plain Python: (training lengths, [(user, place)] with a history, how many without)."""
    training = [
        sum(tick < validation for tick in history) for history in histories
    ]
    targets = []
    without = 0
    for user, history in enumerate(histories):
        held_out = [
            place
            for place, tick in enumerate(history)
            if (validation <= tick < test and part == "validation")
            or (tick >= test and part == "test")
        ]
        chosen = {
            "first": held_out[:1],
            "newest": held_out[-1:],
            "all": held_out,
        }[whose]
        targets += [(user, place) for place in chosen if place > 0]
        without += sum(place == 0 for place in chosen)
    return training, targets, without


@given(
    histories=st.lists(HISTORY, max_size=6),
    cuts=st.lists(st.integers(0, 13), min_size=2, max_size=2, unique=True).map(
        sorted
    ),
    whose=st.sampled_from(["first", "newest", "all"]),
    part=st.sampled_from(["validation", "test"]),
)
def test_a_timeline_is_that_of_loops(histories, cuts, whose, part):
    split = Timeline(*cuts, whose)
    lengths_B = np.array([len(history) for history in histories], np.int64)
    ticks_N = np.array(list(chain(*histories)), np.uint16)
    training, targets, without = slow_timeline(histories, *cuts, whose, part)
    found_B = split.training_lengths(lengths_B, ticks_N)
    assert found_B.tolist() == training
    user_T, place_T = split.targets(part, lengths_B, ticks_N)
    pairs = list(zip(user_T.tolist(), place_T.tolist(), strict=True))
    assert pairs == targets
    found = split.count_without_history(part, lengths_B, ticks_N)
    assert found == without
    if split.one_target:
        assert len(set(user_T.tolist())) == len(user_T)


def test_the_past_is_counted_until_the_cut_or_the_day():
    ticks_T = np.array([82, 95])
    by_cut = Timeline(50, 80)
    assert by_cut.counted_until("test", ticks_T).tolist() == [80, 80]
    assert by_cut.counted_until("validation", ticks_T - 30).tolist() == [50, 50]
    by_day = Timeline(50, 80, counts="day")
    assert by_day.counted_until("test", ticks_T).tolist() == [82, 95]
    assert LEAVE_ONE_OUT.counted_until("test", ticks_T).tolist() == [82, 95]


@given(histories=st.lists(HISTORY, max_size=6))
def test_leave_one_out_takes_no_notice_of_times(histories):
    lengths_B = np.array([len(history) for history in histories], np.int64)
    ticks_N = np.zeros(lengths_B.sum(), np.uint16)
    found_B = LEAVE_ONE_OUT.training_lengths(lengths_B, ticks_N)
    assert found_B.tolist() == training_lengths(lengths_B).tolist()
    for part, back in (("validation", 2), ("test", 1)):
        user_T, place_T = LEAVE_ONE_OUT.targets(part, lengths_B, ticks_N)
        assert list(zip(user_T.tolist(), place_T.tolist(), strict=True)) == [
            (user, len(history) - back)
            for user, history in enumerate(histories)
            if len(history) >= SPLIT_LENGTH
        ]
