"""Counts of the recent past: how often each item was touched on the days before a moment.

Older interactions count less. With a half-life of h days,

    count(item, t) = Σ 0.5 ^ ((day(t) − day(event)) / h)    over its events on days before t's day

This is what a nightly job knows: nothing of the day itself, and nothing later. All interactions of
the dataset count, whatever part of the split they are in, as long as they are earlier. Days are
those of UTC. Where times are no clock times, or all within two weeks, a hundredth of their span
stands for a day (`Days`).

Kept is one entry, a pair, for each item and day that it was touched on. Memory grows with these
pairs, not with events: 12 bytes each, and 4 more for each half-life. A million items that were
touched on 50 days each take 600 MB, and 200 MB a half-life. This module needs NumPy alone.

An item of row 7 that was touched twice on day 3 and once on day 5, and one of row 8, on day 4:

    key_K       73 75 84     row · days + day, with 10 days in all
    events_K    2  1  1
    sums_K      2  2  1      of half-life 2: of row 7 on day 5, 1 + 2 · 0.5 ^ (2 / 2)

Asked for day 7, row 7 has 2 · 0.5 ^ (2 / 2) = 1, and row 8 has 0.5 ^ (3 / 2) = 0.35.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.config.prepare import TIME_UNITS, UNKNOWN

if TYPE_CHECKING:
    from trainer.data.format.dataset import Dataset

ALL_TIME = float("inf")  # the half-life with which every earlier event counts 1
DAYS = "days"
HUNDREDTHS = "hundredths of the log's time"
_SECONDS_OF_DAY = 86_400
_LEAST_DAYS = 14  # of clock times; a shorter span is cut into hundredths
_PARTS = 100
# Of a tick. A tick is rounded down, so that midnight may come out just before itself.
_SLACK = 1e-3
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Days:
    """The day of each tick (see `Dataset.ticks`).

    number_T: int32, from 0 on, never falling. unit: DAYS, or HUNDREDTHS of the time from the first
    interaction to the last. Of two ticks on different days the later one is later: to count earlier
    days never looks ahead, however coarse ticks are.
    """

    number_T: np.ndarray
    unit: str

    @classmethod
    def of(cls, dataset: "Dataset") -> "Days":
        """The days of a dataset's ticks."""
        unit = dataset.log_times.unit
        last_tick = int(dataset.ticks(np.array(np.inf)))
        tick_T = np.arange(last_tick + 1)
        if unit != UNKNOWN:
            seconds = TIME_UNITS[unit] * _SECONDS_OF_DAY
            first = dataset.first_time / seconds
            last = dataset.last_time / seconds
            if last - first >= _LEAST_DAYS:
                # Where a tick ends: what is at midnight is of the day that begins.
                share_T = (tick_T + 1 + _SLACK) / last_tick
                day_T = np.floor(first + (last - first) * share_T)
                day_T = np.minimum(day_T, np.floor(last))
                number_T = (day_T - day_T[0]).astype(np.int32)
                return cls(number_T, DAYS)
        number_T = tick_T * _PARTS // (last_tick + 1)
        return cls(number_T.astype(np.int32), HUNDREDTHS)

    @property
    def count(self) -> int:
        """How many days there are from the first tick to the last."""
        return int(self.number_T[-1]) + 1

    def of_ticks(self, ticks_N: np.ndarray) -> np.ndarray:
        """The day of each tick, int64 (N,).

        Of ticks of which ten are a day:

            ticks_N    0  9  10  11  42
            returns    0  0  1   1   4
        """
        return self.number_T[ticks_N].astype(np.int64)


Pairs = tuple[np.ndarray, np.ndarray]


def count_pairs(days: Days, rows_N: np.ndarray, ticks_N: np.ndarray) -> Pairs:
    """The pairs of some events, and how many events each has: (key_K, events_K), int64.

    rows_N, ticks_N: of each event, in any order. With 10 days in all:

        rows_N      7  8  7  7
        day         3  4  5  3
        key_K       73 75 84
        events_K    2  1  1
    """
    key_N = rows_N.astype(np.int64) * days.count + days.of_ticks(ticks_N)
    key_K, events_K = np.unique(key_N, return_counts=True)
    return key_K, events_K


def merge_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several counts together, rising.

    parts       [73 84 | 2 1]    [73 75 | 1 4]
    key_K       73 75 84
    events_K    3  4  1
    """
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    keys = [key_K for key_K, _ in parts]
    events = [events_K for _, events_K in parts]
    key_N = np.concatenate(keys)
    events_N = np.concatenate(events)
    order = np.argsort(key_N, kind="stable")
    key_N = key_N[order]
    first_N = np.diff(key_N, prepend=-1) > 0
    (begins,) = np.nonzero(first_N)
    if not len(begins):
        return key_N, events_N
    return key_N[begins], np.add.reduceat(events_N[order], begins)


class PairCounter:
    """Counts events piece by piece, in memory for the pairs that there are."""

    def __init__(self, days: Days) -> None:
        self._days = days
        self._parts: list[Pairs] = []
        self._waiting = 0  # pairs that are not merged yet
        self._merged = 0

    def add(self, rows_N: np.ndarray, ticks_N: np.ndarray) -> None:
        """Counts some events, as `count_pairs` draws them."""
        pairs = count_pairs(self._days, rows_N, ticks_N)
        self._parts.append(pairs)
        self._waiting += len(pairs[0])
        # Merged as often as the pairs double, so that each is moved a few times.
        if self._waiting > max(self._merged, _PAIRS_AT_ONCE):
            self.pairs()

    def pairs(self) -> Pairs:
        """All pairs so far."""
        merged = merge_pairs(self._parts)
        self._parts = [merged]
        self._merged = len(merged[0])
        self._waiting = 0
        return merged


@dataclass(frozen=True)
class NewestPairs:
    """The newest pair of some items before some days; `RecentCounts.newest_before` draws one.

    pair_Q: int64, 1 + its index, 0 where an item has none. age_Q: int64, days since then.
    """

    pair_Q: np.ndarray
    age_Q: np.ndarray


class RecentCounts:
    """The pairs of a dataset; the head of this module draws an example."""

    def __init__(self, days: Days, pairs: Pairs):
        """pairs: of all events, rising."""
        self.days = days
        key_K, events_K = pairs
        # No item's key before the first one, for queries without a pair.
        self._keys = np.concatenate([[-1], key_K])
        self.key_K = self._keys[1:]
        self.events_K = events_K.astype(np.int32)

    @property
    def bytes(self) -> int:
        """What the pairs take, without sums."""
        return self.key_K.nbytes + self.events_K.nbytes

    def newest_before(
        self, row_Q: np.ndarray, day_Q: np.ndarray
    ) -> NewestPairs:
        """The newest pair of each row of M before a day, of any number of queries.

        Of the example in the module's head:

            row_Q     7  7  7  8
            day_Q     7  5  3  9
            pair_Q    2  1  0  3
            age_Q     2  2  0  5
        """
        first_Q = row_Q.astype(np.int64) * self.days.count
        before_Q = np.searchsorted(self.key_K, first_Q + day_Q)
        key_Q = self._keys[before_Q]
        is_own_Q = key_Q >= first_Q
        age_Q = first_Q + day_Q - key_Q
        return NewestPairs(
            pair_Q=np.where(is_own_Q, before_Q, 0),
            age_Q=np.where(is_own_Q, age_Q, 0),
        )

    def fade(self, half_life: float) -> "FadedCounts":
        """The counts with one half-life, in days; ALL_TIME: every earlier event counts 1."""
        sums = np.zeros(1 + len(self.key_K), np.float32)
        for begin, end in self._row_ranges():
            sums[1 + begin : 1 + end] = self._sum_faded(half_life, begin, end)
        return FadedCounts(half_life, sums)

    def _row_ranges(self) -> Iterable[tuple[int, int]]:
        """Ranges of pairs that cut no item in two, of _PAIRS_AT_ONCE pairs or an item's."""
        begin = 0
        while begin < len(self.key_K):
            last = min(begin + _PAIRS_AT_ONCE, len(self.key_K)) - 1
            next_row = self.key_K[last] // self.days.count + 1
            next_key = next_row * self.days.count
            end = int(np.searchsorted(self.key_K, next_key))
            yield begin, end
            begin = end

    def _sum_faded(self, half_life: float, begin: int, end: int) -> np.ndarray:
        """Each pair's events and the faded ones of its item's earlier pairs, float64.

        Each pair takes over what the one before it has, then what the one two before it has by
        now, then four before it, and so on (a scan by Hillis and Steele).

            events    2  1  4    of one item, a half-life between them
            step 1    2  2  4.5
            step 2    2  2  5
        """
        row_K, day_K = np.divmod(self.key_K[begin:end], self.days.count)
        gap_K = np.diff(day_K, prepend=0)
        is_first_K = np.diff(row_K, prepend=-1) > 0
        place_K = np.arange(len(row_K))
        begins = place_K[is_first_K]
        # A pair's place among its item's.
        place_K -= np.repeat(begins, np.diff(begins, append=len(row_K)))
        value_K = self.events_K[begin:end].astype(np.float64)
        gap_K[begins] = 0  # not to be read, and not to overflow either
        decay_K = np.exp2(-gap_K / half_life)
        step = 1
        (later,) = np.nonzero(place_K >= step)
        while len(later):
            before = later - step
            value_K[later] += decay_K[later] * value_K[before]
            decay_K[later] *= decay_K[before]
            step *= 2
            later = later[place_K[later] >= step]
        return value_K


@dataclass(frozen=True)
class FadedCounts:
    """Counts with one half-life.

    sums: float32 (1 + K,), 0 and each pair's, as of its own day. Of the example in the module's
    head, with half-life 2:

        sums    0  2  2  1
    """

    half_life: float
    sums: np.ndarray

    def at(self, newest: NewestPairs) -> np.ndarray:
        """The count of each query, float64 (Q,).

        Of the queries that `RecentCounts.newest_before` draws, with half-life 2:

            pair_Q    2  1  0  3
            age_Q     2  2  0  5
            counts    1  1  0  0.18
        """
        age_Q = newest.age_Q / self.half_life
        return self.sums[newest.pair_Q] * np.exp2(-age_Q)
