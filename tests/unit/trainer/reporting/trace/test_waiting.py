"""Who waits for whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.reporting.trace.records import RankPhases, Span
from trainer.reporting.trace.waiting import (
    align_clocks,
    common_steps,
    find_waits,
    sum_times,
)


def rank_of(rank, spans, host="a", step=7, ranks=2):
    spans = [Span(*span) for span in spans]
    return RankPhases(rank, ranks, host, "cpu", {step: spans})


SLOW = [("forward", 0.0, 5.0), ("sums", 5.0, 6.0), ("backward", 6.0, 9.0)]
FAST = [("forward", 0.0, 2.0), ("sums", 2.0, 6.0), ("backward", 6.0, 9.0)]


def test_the_rank_that_comes_first_waits_for_the_last():
    ranks = [rank_of(0, FAST), rank_of(1, SLOW)]
    (wait,) = find_waits(ranks, 7)
    assert (wait.rank, wait.other, wait.phase) == (0, 1, "sums")
    assert (wait.begin, wait.end) == (2.0, 5.0)
    times = sum_times(ranks, [7])
    assert times.waited == {(0, 1): 3.0}
    assert (times.waits(0), times.waits(1)) == (3.0, 0.0)
    assert (times.delays(0), times.delays(1)) == (0.0, 3.0)
    assert times.seconds == [9.0, 9.0]
    assert times.by_phase[0] == {"forward": 2.0, "sums": 4.0, "backward": 3.0}


def test_what_is_between_two_steps_is_no_part_of_a_step():
    spans = [("between", -4.0, 0.0), *FAST]
    times = sum_times([rank_of(0, spans), rank_of(1, SLOW)], [7])
    assert times.seconds == [9.0, 9.0] and times.by_phase[0]["between"] == 4.0


def test_phases_without_others_and_unequal_ones_are_no_waits():
    alone = [("sums", 0.0, 1.0), ("sums", 2.0, 6.0)]
    assert find_waits([rank_of(0, alone), rank_of(1, SLOW)], 7) == []
    assert find_waits([rank_of(0, FAST)], 7) == []
    # A rank that left before the last one came did not wait for it.
    early = [("sums", 0.0, 1.0)]
    (wait,) = find_waits([rank_of(0, early), rank_of(1, SLOW)], 7)
    assert wait.end == 1.0


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=6
    )
)
def test_nobody_waits_longer_than_its_phase_and_the_last_not_at_all(bounds):
    ranks = []
    for number, (begin, length) in enumerate(bounds):
        ranks.append(rank_of(number, [("rows", begin, begin + length)]))
    waits = find_waits(ranks, 7)
    last = max(begin for begin, _ in bounds)
    for wait in waits:
        begin, length = bounds[wait.rank]
        assert 0 < wait.seconds <= length + 1e-9
        assert bounds[wait.other][0] == last > begin
        assert wait.end <= last


def test_clocks_of_other_hosts_are_set_by_the_sums():
    late = [(phase, begin + 3600, end + 3600) for phase, begin, end in SLOW]
    ranks = [
        rank_of(0, FAST, ranks=3),
        rank_of(1, late, "b", ranks=3),
        rank_of(2, late, "b", ranks=3),
    ]
    aligned = align_clocks(ranks)
    assert aligned[0] == ranks[0]
    for rank in aligned[1:]:
        for span, expected in zip(rank.steps[7], SLOW, strict=True):
            assert span.begin == pytest.approx(expected[1])
    assert sum_times(aligned, [7]).waits(0) == pytest.approx(3.0)


def test_ranks_of_one_host_have_one_clock():
    later = [(phase, begin + 2, end + 2) for phase, begin, end in SLOW]
    ranks = [rank_of(0, FAST), rank_of(1, later)]
    assert align_clocks(ranks) == ranks


def test_steps_that_some_rank_lacks_are_left_out():
    ranks = [rank_of(0, FAST), rank_of(1, SLOW)]
    ranks[0].steps[8] = []
    assert common_steps(ranks) == [7]
