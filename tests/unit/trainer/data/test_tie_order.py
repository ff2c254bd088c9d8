"""Equal times: an order that says nothing, the same however the log came, or that of the files."""

import itertools
import random
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest

import trainer.data.tie_order
from tests.unit.trainer.data.prepare.test_extend import extended, told
from tests.unit.trainer.data.prepare.test_pipeline import (
    COLUMNS,
    in_order,
    key_of,
    run,
    write,
)
from trainer.data.tie_order import break_ties
from trainer.errors import InputError

DAYS = ("2024-01-01", "2024-01-02", "2024-01-03")


def shuffled(users, times, items, user_keys=None, item_keys=None):
    """Items in the order of `break_ties`, of events that are sorted by user, time and item."""
    numbers = np.array(users, np.int32)
    rows = np.array(items, np.int32)
    if user_keys is None:
        user_keys = [key_of(f"user {user}") for user in range(max(users) + 1)]
    if item_keys is None:
        item_keys = [key_of(f"item {item}") for item in range(max(items) + 1)]
    user_keys = np.array(user_keys)
    item_keys = np.array(item_keys)
    break_ties(
        numbers,
        np.array(times),
        rows,
        lambda tied: (user_keys[numbers[tied]], item_keys[rows[tied]]),
    )
    return rows.tolist()


def test_only_events_of_one_user_and_time_change_places():
    draw = np.random.default_rng(0)
    events = sorted(
        zip(
            draw.integers(0, 30, 3000).tolist(),
            draw.integers(0, 25, 3000).tolist(),
            draw.integers(0, 12, 3000).tolist(),
            strict=True,
        )
    )
    users, times, items = map(list, zip(*events, strict=True))
    after = shuffled(users, times, items)
    assert after != items
    assert sorted(zip(users, times, after, strict=True)) == events
    alone = shuffled([0, 0, 1, 1], [1, 2, 2, 3], [5, 4, 3, 2])
    assert alone == [5, 4, 3, 2]


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_order_is_the_same_in_chunks_of_any_size(monkeypatch, chunk):
    users = [0] * 40 + [1] * 40
    times = sorted([1, 1, 2, 3] * 10) + [7] * 40
    items = [i % 10 for i in range(80)]
    events = sorted(zip(users, times, items, strict=True))
    columns = list(map(list, zip(*events, strict=True)))
    expected = shuffled(*columns)
    monkeypatch.setattr(trainer.data.tie_order, "_CHUNK", chunk)
    assert shuffled(*columns) == expected


def test_times_tell_apart_what_floats_would_not():
    """Nanoseconds of our days differ where their float64 are equal."""
    time = 1_764_146_000_000_000_000
    items = list(range(30))
    times = [time + place for place in range(30)]
    assert shuffled([0] * 30, times, items) == items
    assert shuffled([0] * 30, [time] * 30, items) != items


def test_each_order_of_three_items_is_as_frequent_as_any_other():
    """Over users, and over the days of one user: nothing in it is to be learned."""
    for users, times in (
        (np.repeat(range(6000), 3).tolist(), [1] * 18000),
        ([0] * 18000, np.repeat(range(6000), 3).tolist()),
    ):
        after = shuffled(users, times, [0, 1, 2] * 6000)
        orders = Counter(
            tuple(after[place : place + 3]) for place in range(0, 18000, 3)
        )
        assert len(orders) == 6
        assert all(abs(count - 1000) < 4 * 29 for count in orders.values())


def test_items_are_neighbours_no_more_often_than_by_chance():
    """An exclusive or of two hashes would keep the same items beside each other for every user."""
    users = np.repeat(range(4000), 10).tolist()
    after = shuffled(users, [1] * 40000, list(range(10)) * 4000)
    pairs = Counter()
    for place in range(0, 40000, 10):
        for pair in itertools.pairwise(after[place : place + 10]):
            pairs[frozenset(pair)] += 1
    expected = 4000 * 9 / 45
    assert len(pairs) == 45
    assert all(abs(count - expected) < 5 * 26 for count in pairs.values())


def drawn_days(names, users=800, seed=3):
    """A log of three days with six events a user: of a quarter of the items each, domains unequal."""
    draw = random.Random(seed)
    rows = []
    for user in range(users):
        for day in DAYS:
            for _ in range(6):
                domain = draw.choices(names, (5, 3, 2))[0]
                rows.append((user, draw.randrange(40), domain, day))
    return rows


@pytest.mark.parametrize("names", [("a", "m", "z"), ("z", "m", "a")])
def test_the_tested_items_are_of_the_domains_of_the_last_day(tmp_path, names):
    """With either order of the names, and a walk through the ties rises as often as it falls."""
    rows = drawn_days(names)
    dataset = run(tmp_path / "out", write(tmp_path / "log.csv", rows))
    histories = told(dataset)
    users = len(histories)
    tested = Counter(history[-1][0] for history in histories.values())
    last_day = [row for row in rows if row[3] == DAYS[-1]]
    for name in names:
        share = sum(row[2] == name for row in last_day) / len(last_day)
        spread = (share * (1 - share) / users) ** 0.5
        assert abs(tested[name] / users - share) < 3 * spread
    rises, falls = 0, 0
    for history in histories.values():
        for (one, item, tick), (
            other,
            next_item,
            next_tick,
        ) in itertools.pairwise(history):
            if tick == next_tick:
                rises += (one, item) < (other, next_item)
                falls += (one, item) > (other, next_item)
    assert abs(rises / (rises + falls) - 0.5) < 0.02
    assert dataset.tied_users == users and dataset.tie_order == "hash"


def test_many_ties_are_warned_of_with_the_way_out(tmp_path, capfd):
    rows = drawn_days(("a", "b", "c"), users=10)
    run(tmp_path / "days", write(tmp_path / "days.csv", rows))
    warning = capfd.readouterr().err
    assert "100% of the users have the same time in their newest two" in warning
    assert "--tie-order file" in warning
    rows = [(*row[:3], place) for place, row in enumerate(rows)]
    fine = run(tmp_path / "fine", write(tmp_path / "fine.csv", rows))
    assert "same time" not in capfd.readouterr().err
    assert fine.tied_users == 0


def test_another_seed_is_another_order(tmp_path):
    log = write(tmp_path / "log.csv", drawn_days(("a", "b", "c"), users=20))
    one = run(tmp_path / "1", log, seed=1)
    other = run(tmp_path / "2", log, seed=2)
    assert told(one) != told(other)


# --- the order of the files ---------------------------------------------------


def by_file(rows):
    """{user: [(domain, item)]}: by time, equal ones as they stand."""
    histories = {}
    for user, item, domain, _ in sorted(rows, key=lambda row: row[3]):
        histories.setdefault(str(user), []).append((domain, str(item)))
    return histories


def without_ticks(dataset):
    return {
        user: [(domain, item) for domain, item, _ in history]
        for user, history in told(dataset).items()
    }


@pytest.mark.parametrize("keep_log", [False, True])
def test_the_order_of_the_files_is_that_of_paths_and_rows(tmp_path, keep_log):
    """Files of other formats and columns lie between those that are read together."""
    rows = drawn_days(("a", "b", "c"), users=40)
    random.Random(0).shuffle(rows)
    names = ("1.csv", "2.parquet", "3.csv", "4.tsv", "5.parquet", "6.csv")
    size = len(rows) // len(names)
    for place, name in enumerate(names):
        part = rows[place * size : (place + 1) * size]
        columns = COLUMNS
        if name == "3.csv":
            columns = COLUMNS[::-1]
            part = [row[::-1] for row in part]
        write(tmp_path / "logs" / name, part, columns)
    dataset = run(
        tmp_path / "out",
        tmp_path / "logs",
        tie_order="file",
        keep_log=keep_log,
        min_user=2,
    )
    assert without_ticks(dataset) == by_file(rows[: size * len(names)])
    assert dataset.tie_order == "file"


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_large_file_is_read_in_its_order_by_many_threads(tmp_path, suffix):
    count = 60_000
    items = np.random.default_rng(0).permutation(count)
    rows = [(place % 3, int(item), "a", 1) for place, item in enumerate(items)]
    log = write(tmp_path / f"log.{suffix}", rows)
    if suffix == "parquet":
        pq.write_table(pq.read_table(log), log, row_group_size=2000)
    dataset = run(
        tmp_path / "out", log, tie_order="file", processes=4, streams=1
    )
    assert without_ticks(dataset) == by_file(rows)


# --- extending ----------------------------------------------------------------


@pytest.mark.parametrize("tie_order", ["hash", "file"])
@pytest.mark.parametrize("seed", range(3))
def test_ties_across_days_extend_to_what_preparing_it_all_gives(
    tmp_path, tie_order, seed
):
    """Rows of one time come on several days, some of them twice."""
    draw = random.Random(seed)
    days = []
    for _ in range(4):
        days.append(
            [
                (
                    draw.randrange(5),
                    draw.randrange(9),
                    draw.choice("abc"),
                    draw.randrange(3),
                )
                for _ in range(40)
            ]
        )
    days[0] += [
        (user, item, d, 1) for user in (8, 9) for item in (0, 1) for d in "abc"
    ]
    dataset = run(
        tmp_path / "0",
        write(tmp_path / "0.csv", days[0]),
        keep_log=True,
        tie_order=tie_order,
        streams=2,
    )
    whole = days[0]
    for number, day in enumerate(days[1:], 1):
        known = set(whole)
        whole = whole + [row for row in day if row not in known]
        log = write(tmp_path / f"{number}.parquet", day)
        dataset = extended(dataset, tmp_path / str(number), log)
        assert dataset.tie_order == tie_order
    at_once = run(
        tmp_path / "whole",
        write(tmp_path / "whole.csv", whole),
        tie_order=tie_order,
        streams=2,
    )
    assert told(dataset) == told(at_once)
    if tie_order == "file":
        assert without_ticks(dataset) == by_file(whole)


def test_a_log_that_was_kept_without_its_order_is_not_extended_in_it(tmp_path):
    rows = drawn_days(("a", "b", "c"), users=5)
    log = write(tmp_path / "log.csv", rows)
    dataset = run(tmp_path / "0", log, keep_log=True)
    with pytest.raises(
        InputError, match=r"without the order of the rows.*--whole-log"
    ):
        extended(dataset, tmp_path / "1", log, tie_order="file")
    assert not (tmp_path / "1").exists()
    whole = extended(
        dataset, tmp_path / "2", log, tie_order="file", whole_log=True
    )
    assert without_ticks(whole) == by_file(rows)


def test_the_hash_is_of_user_time_item_and_occurrence(tmp_path):
    """By another program; the reference of test_pipeline does so for whole datasets."""
    events = [(1, "a", "x"), (1, "a", "x"), (1, "b", "y"), (2, "a", "x")]
    rows = [("u", item, domain, when) for when, domain, item in events]
    rows += [("v", item, domain, 1) for domain in "ab" for item in "xy"]
    dataset = run(tmp_path / "out", write(tmp_path / "log.csv", rows), seed=7)
    expected = [(domain, item) for _, domain, item in in_order(7, "u", events)]
    assert without_ticks(dataset)["u"] == expected
