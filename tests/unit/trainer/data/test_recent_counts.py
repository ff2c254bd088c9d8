"""Faded counts of the days before a moment, against a loop over all events."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import trainer.data.recent_counts
from tests.helpers.made import write_dataset
from trainer.data.recent_counts import (
    ALL_TIME,
    DAYS,
    HUNDREDTHS,
    Days,
    PairCounter,
    RecentCounts,
    count_pairs,
    merge_pairs,
)

DAY = 86_400
START = 1_400_000_000 // DAY * DAY  # a midnight
LAST = 12  # the last day of `ten_ticks_a_day`

ten_ticks_a_day = Days(np.arange(10 * (LAST + 1), dtype=np.int32) // 10, DAYS)
events = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 10 * (LAST + 1) - 1)),
    max_size=60,
)


def counts_of(days, drawn):
    rows = np.array([row for row, _ in drawn], np.int32)
    ticks = np.array([tick for _, tick in drawn], np.uint16)
    return RecentCounts(days, count_pairs(days, rows, ticks))


def by_hand(days, drawn, row, day, half_life):
    """The definition, event after event."""
    return sum(
        0.5 ** ((day - int(days.number_T[tick])) / half_life)
        for event_row, tick in drawn
        if event_row == row and days.number_T[tick] < day
    )


def asked(recent, half_life, row, day):
    newest = recent.newest_before(np.array([row]), np.array([day]))
    return recent.fade(half_life).at(newest)[0]


@given(events, st.sampled_from([0.7, 3.0, 90.0, ALL_TIME]), st.integers(1, 8))
def test_counts_are_those_of_a_loop_over_events(drawn, half_life, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.data.recent_counts, "_PAIRS_AT_ONCE", at_once)
        recent = counts_of(ten_ticks_a_day, drawn)
        rows, days = np.divmod(np.arange(5 * (LAST + 2)), LAST + 2)
        # Also after the last day, which is not in the counts' own range.
        newest = recent.newest_before(rows, np.minimum(days, LAST))
        found = recent.fade(half_life).at(newest)
    expected = [
        by_hand(ten_ticks_a_day, drawn, row, min(day, LAST), half_life)
        for row, day in zip(rows, days, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(events, st.integers(0, 10 * (LAST + 1) - 1), st.data())
def test_an_event_of_the_day_itself_or_later_changes_nothing(
    drawn, moment, data
):
    """It may move to any later time of its own, or to another item."""
    day = int(ten_ticks_a_day.number_T[moment])
    later = data.draw(
        st.lists(
            st.tuples(
                st.integers(0, 4),
                st.integers(10 * day, 10 * (LAST + 1) - 1),
            )
        )
    )
    past = [
        event for event in drawn if ten_ticks_a_day.number_T[event[1]] < day
    ]
    for row in range(5):
        one = asked(counts_of(ten_ticks_a_day, past), 3.0, row, day)
        other = asked(counts_of(ten_ticks_a_day, past + later), 3.0, row, day)
        assert one == other


@given(st.lists(events, max_size=6), st.integers(0, 30))
def test_counting_in_pieces_is_counting_at_once(pieces, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.data.recent_counts, "_PAIRS_AT_ONCE", at_once)
        counter = PairCounter(ten_ticks_a_day)
        for piece in pieces:
            rows = np.array([row for row, _ in piece], np.int32)
            counter.add(rows, np.array([tick for _, tick in piece], np.uint16))
        found = counter.pairs()
    whole = counts_of(
        ten_ticks_a_day, [event for piece in pieces for event in piece]
    )
    np.testing.assert_array_equal(found[0], whole.key_K)
    np.testing.assert_array_equal(found[1], whole.events_K)


def test_pairs_of_several_counts_are_added():
    one = (np.array([73, 84]), np.array([2, 1]))
    other = (np.array([73, 75]), np.array([1, 4]))
    keys, counts = merge_pairs([one, other])
    assert keys.tolist() == [73, 75, 84] and counts.tolist() == [3, 4, 1]
    assert [len(part) for part in merge_pairs([])] == [0, 0]


@pytest.fixture(scope="module")
def ticks_are_times(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days") / "data"
    return write_dataset(folder, [np.array([0, 1, 2])])


def of_clock(dataset, first, last, unit="s"):
    return dataclasses.replace(
        dataset,
        first_time=float(first),
        last_time=float(last),
        tie_order="hash",
        time_kind="numbers",
        time_unit=unit,
    )


@pytest.mark.parametrize("span", [14, 85, 255, 1000, 6570])
@pytest.mark.parametrize("scale", [("s", 1), ("us", 10**6)])
def test_clock_times_have_the_days_of_utc(ticks_are_times, span, scale):
    """Dates, which are midnights, each have a day of their own."""
    unit, factor = scale
    dataset = of_clock(
        ticks_are_times, START * factor, (START + span * DAY) * factor, unit
    )
    days = Days.of(dataset)
    assert days.unit == DAYS and days.count == span + 1
    midnights = (START + DAY * np.arange(span + 1)) * factor
    found = days.of_ticks(dataset.ticks(midnights))
    np.testing.assert_array_equal(found, np.arange(span + 1))
    assert (np.diff(days.number_T) >= 0).all()
    # A tick is a part of a day: noon is never of another one.
    noons = midnights[:-1] + DAY // 2 * factor
    found = days.of_ticks(dataset.ticks(noons))
    np.testing.assert_array_equal(found, np.arange(span))


def test_the_first_day_may_begin_at_any_time(ticks_are_times):
    first, last = START + 20 * 3600, START + 40 * DAY + 60
    days = Days.of(of_clock(ticks_are_times, first, last))
    assert days.count == 41
    hour = 65535 * 3600 // (last - first)
    assert days.of_ticks(np.array([0, 3 * hour, 5 * hour, 65535])).tolist() == [
        0,
        0,
        1,
        40,
    ]


@pytest.mark.parametrize(
    ("first", "last"), [(1, 5000), (START, START + 13 * DAY), (START, START)]
)
def test_other_times_and_short_logs_are_cut_into_hundredths(
    ticks_are_times, first, last
):
    unit = "unknown" if first == 1 else "s"
    days = Days.of(of_clock(ticks_are_times, first, last, unit))
    assert days.unit == HUNDREDTHS and days.count == 100
    assert np.bincount(days.number_T).min() == 655
    assert np.bincount(days.number_T).max() == 656


def test_a_million_items_take_what_the_page_says():
    keys = np.arange(1000) * 3
    recent = RecentCounts(ten_ticks_a_day, (keys, np.ones(1000, np.int64)))
    assert recent.bytes == 12 * 1000
    assert recent.fade(30).sums.nbytes == 4 * 1001
