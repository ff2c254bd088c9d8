"""Where a batch's users are cut into micro-batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from syncrec.batch.micro_batches import cut_micro_batches


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 12)
)
def test_every_user_is_in_one_micro_batch(lengths, count):
    ranges = cut_micro_batches(np.array(lengths), count)
    assert len(ranges) == min(count, len(lengths))
    users = [user for one in ranges for user in range(one.start, one.stop)]
    assert users == list(range(len(lengths)))
    assert all(one.stop > one.start for one in ranges)


@given(st.lists(st.integers(1, 9), min_size=30, max_size=60))
def test_micro_batches_have_about_equally_many_interactions(lengths):
    """Each cut is at most half a history from where it should be, after those before it."""
    ranges = cut_micro_batches(np.array(lengths), 4)
    share = sum(lengths) / 4
    for one in ranges:
        assert abs(sum(lengths[one]) - share) <= 1.5 * max(lengths)


def test_the_example():
    ranges = cut_micro_batches(np.array([6, 1, 1, 2, 1, 1]), 3)
    assert ranges == [slice(0, 1), slice(1, 4), slice(4, 6)]


def test_nobody_is_one_micro_batch():
    assert cut_micro_batches(np.zeros(0, np.int64), 4) == [slice(0, 0)]
