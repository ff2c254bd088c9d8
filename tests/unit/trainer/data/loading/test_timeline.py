"""The split by time of a dataset, against loops over all its events."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.alone import group_of_one
from tests.helpers.made import (
    draw_histories,
    draw_ticks,
    spoil_block,
    write_dataset,
)
from trainer.config.load import load_config
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.negative_sampling import (
    draw_shared_negatives,
    draw_target_negatives,
)
from trainer.data.loading.stream import TrainBatches
from trainer.data.loading.timeline import describe_split, split_dataset
from trainer.data.split import LEAVE_ONE_OUT
from trainer.distributed.process_group import Ranks
from trainer.errors import InputError

STARTS = (0, 8)
DAY = 86_400
FIRST = 1_400_000_000.0  # of a log in seconds
WHOSE = ("first", "newest", "all")
ALONE = Ranks(0, 1, 0, "cpu")


@pytest.fixture(scope="module")
def ranks():
    with group_of_one():
        yield ALONE


@pytest.fixture(scope="module")
def histories():
    return draw_histories(40, longest=8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories):
    """Of 100 days, in seconds."""
    folder = tmp_path_factory.mktemp("timeline") / "data"
    written = write_dataset(folder, histories, cuts=(9, 10, 31), streams=3)
    return in_seconds(written)


def in_seconds(dataset, days=100):
    return dataclasses.replace(
        dataset,
        first_time=FIRST,
        last_time=FIRST + days * DAY,
        tie_order="hash",
        tied_users=0,
        time_kind="numbers",
        time_unit="s",
    )


def split(dataset, ranks, *keys, recorded=None):
    config = load_config([], ["split.kind=timeline", *keys])
    return split_dataset(dataset, config, ranks, recorded)


def events_of(histories, ticks):
    """[(user, place, row, tick)] of all."""
    found = []
    for user, (rows, times) in enumerate(zip(histories, ticks, strict=True)):
        pairs = zip(rows, times, strict=True)
        for place, (row, tick) in enumerate(pairs):
            found.append((user, place, int(row), int(tick)))
    return found


def test_leave_one_out_is_what_a_dataset_has(dataset, ranks):
    assert split_dataset(dataset, load_config([], []), ranks) is dataset
    assert dataset.split is LEAVE_ONE_OUT
    assert describe_split(dataset) is None
    assert dataset.drawn_rows is None
    assert dataset.drawn_items.tolist() == [5, 4]


@pytest.mark.parametrize("whose", WHOSE)
def test_counts_are_those_of_loops(dataset, histories, ranks, whose):
    found = split(
        dataset, ranks, "split.validation=20d", "split.test=15d",
        f"split.whose={whose}",
    )  # fmt: skip
    validation, test = found.split.validation_tick, found.split.test_tick
    events = events_of(histories, draw_ticks(histories))
    lengths = np.zeros((len(histories), 2), int)
    counts = np.zeros(dataset.num_embeddings, int)
    for user, _, row, tick in events:
        if tick < validation:
            lengths[user, int(row >= STARTS[1])] += 1
            counts[row] += 1
    assert found.lengths.tolist() == lengths.tolist()
    assert found.lengths.dtype == dataset.lengths.dtype
    assert found.item_counts.tolist() == counts.tolist()
    assert found.item_counts.dtype == dataset.item_counts.dtype
    for part, first, end in (
        ("validation", validation, test),
        ("test", test, 1 << 16),
    ):
        held_out = {}
        for user, place, _, tick in events:
            if first <= tick < end:
                held_out.setdefault(user, []).append(place)
        chosen = {"first": slice(1), "newest": slice(-1, None)}.get(
            whose, slice(None)
        )
        places = [
            place for user in held_out for place in held_out[user][chosen]
        ]
        assert found.training.without_history[part] == places.count(0)
        if whose == "all":
            before = found.training.targets[part]
            for user in range(len(histories)):
                targets = [p for p in held_out.get(user, []) if p]
                assert before[user + 1] - before[user] == len(targets)
    assert found.fingerprint == dataset.fingerprint
    assert dataset.lengths.tolist() != lengths.tolist()


@given(
    drawn=st.lists(
        st.lists(st.integers(0, 400), min_size=1, max_size=9).map(sorted),
        min_size=3,
        max_size=12,
    ),
    validation=st.floats(0.05, 0.4),
    test=st.floats(0.05, 0.4),
)
@settings(max_examples=25, deadline=None)
def test_a_share_is_of_the_events(ranks, drawn, validation, test):
    """At least the share is held out, and without the oldest tick of it less."""
    ticks = [np.array(times, np.uint16) for times in drawn]
    histories = [np.zeros(len(times), np.int64) for times in drawn]
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(
            Path(folder) / "data", histories, (5,), ticks=ticks
        )
        keys = [f"split.validation={validation}", f"split.test={test}"]
        try:
            found = split(dataset, ranks, *keys).split
        except InputError as error:
            message = str(error)
            assert "has no events for" in message or "leaves nothing" in message
            return
    all_N = np.concatenate(ticks).astype(int)
    for first, end, share in (
        (found.test_tick, 1 << 16, test),
        (found.validation_tick, found.test_tick, validation),
    ):
        inside = (all_N >= first) & (all_N < end)
        assert inside.sum() >= share * len(all_N) - 1e-3
        later = inside & (all_N > first)
        assert later.sum() < share * len(all_N)


@pytest.mark.parametrize(
    ("keys", "validation", "test"),
    [
        (("validation=2014-07-02", "test=2014-08-01"), 49.3, 79.3),
        (("validation=30d", "test=2014-08-01"), 49.3, 79.3),
        (("validation=30d", "test=20d"), 50, 80),
        (("validation=0.2", "test=20d"), None, 80),
    ],
)
def test_nothing_from_the_moment_on_is_trained_on(
    dataset, ranks, keys, validation, test
):
    """A cut is at the beginning of a tick, at most two ticks too early: here 2.2 minutes each."""
    found = split(dataset, ranks, *(f"split.{key}" for key in keys))
    tick = 100 / 65535
    for part, days in (("validation", validation), ("test", test)):
        if days is None:
            continue
        moment = describe_split(found)[f"{part}_time"]
        asked = round(days * DAY, -3)
        exact = {49.3: 1404259200, 79.3: 1406851200}.get(days, FIRST + asked)
        assert exact - 2 * tick * DAY <= moment <= exact


def test_a_tick_begins_with_its_first_time(dataset):
    for tick in (0, 1, 7, 32768, 65534, 65535):
        time = dataset.time_of(tick)
        before = np.nextafter(time, -np.inf)
        assert dataset.ticks(np.array([before, time])).tolist() == [
            max(0, tick - 1),
            tick,
        ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["split.test=2013-01-01"], "split.test=2013-01-01 leaves nothing"),
        (["split.test=2015-01-01"], "from 2014-05-13 16:53 to 2014-08-21"),
        (["split.test=200d"], "split.test=200d leaves nothing before"),
        (
            ["split.test=50d", "split.validation=60d"],
            "split.validation=60d leaves nothing before",
        ),
        (
            ["split.test=0.6", "split.validation=0.6"],
            "split.validation=0.6 leaves nothing before",
        ),
        (
            ["split.test=2014-07-01", "split.validation=2014-07-02"],
            "does not begin before the test, 2014-06-30 23:5",
        ),
    ],
)
def test_a_cut_outside_of_the_log_is_refused(dataset, ranks, keys, message):
    with pytest.raises(InputError) as refusal:
        split(dataset, ranks, *keys)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("ticks", "part"),
    [
        ([60, 80], "training"),
        ([10, 80], "validation"),
        ([10, 60], "test"),
    ],
)
def test_a_domain_without_events_of_a_part_is_refused_by_name(
    tmp_path, ranks, ticks, part
):
    all_parts = np.array([10, 60, 80, 99], np.uint16)
    written = write_dataset(
        tmp_path / "data",
        [np.array([0, 1, 2, 3]), np.array([8, 9])],
        ticks=[all_parts, np.array(ticks, np.uint16)],
    )
    dated = in_seconds(written)
    keys = []
    for name, tick in (("validation", 50), ("test", 70)):
        time = np.datetime64(int(np.ceil(dated.time_of(tick))), "s")
        keys.append(f"split.{name}={time}")
    with pytest.raises(InputError) as refusal:
        split(dated, ranks, *keys)
    message = str(refusal.value)
    assert f"domain 'domain 1' has no events for {part}" in message
    assert "\n" not in message


def test_days_and_dates_need_a_unit(tmp_path, ranks, histories):
    dataset = write_dataset(tmp_path / "data", histories)
    for value in ("7d", "2014-07-01"):
        with pytest.raises(InputError, match="no known unit: give a share"):
            split(dataset, ranks, f"split.test={value}")
    found = split(dataset, ranks)
    record = describe_split(found)
    assert float(record["test"]) == pytest.approx(record["test_time"])


def test_a_record_holds_by_its_ticks_and_elsewhere_by_its_times(
    dataset, ranks, tmp_path, histories
):
    found = split(dataset, ranks, "split.test=20d", "split.validation=30d")
    record = describe_split(found)
    again = split(dataset, ranks, recorded=record)
    assert again.split == found.split
    longer = in_seconds(write_dataset(tmp_path / "data", histories), 130)
    later = split(longer, ranks, recorded=record)
    for name in ("validation", "test"):
        moment = describe_split(later)[f"{name}_time"]
        tick = 130 * DAY / 65535
        assert moment - tick < record[f"{name}_time"] <= moment
    early = dataclasses.replace(
        longer, first_time=FIRST + 90 * DAY, last_time=FIRST + 190 * DAY
    )
    with pytest.raises(InputError, match="leaves nothing of"):
        split(early, ranks, recorded=record)


def test_a_damaged_block_is_refused_or_skipped(tmp_path, ranks, histories):
    dataset = write_dataset(tmp_path / "data", histories, cuts=(9,))
    spoil_block(dataset, shard=0, block=1)
    with pytest.raises(InputError, match=r"000000\.tar"):
        split(Dataset.load(dataset.folder, False), ranks)
    found = split(dataset, ranks, "stream.damaged=skip")
    assert not found.lengths[3:6].any()
    assert found.lengths[:3].any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "limits", [{}, {"max_length": 9, "tokens_per_batch": 30}]
)
def test_batches_have_what_is_before_the_cut_on_any_number_of_ranks(
    dataset, histories, ranks, world_size, limits
):
    """Every user once who has any of it, beside fillers; equally many places on all ranks."""
    found = split(dataset, ranks, "split.validation=45d", "split.test=25d")
    ticks = draw_ticks(histories)
    plan = BatchSchedule(found, 4, world_size, 5, **limits)
    steps = plan.steps(0)
    seen = []
    places = []
    for rank in range(world_size):
        batches = TrainBatches(
            plan, rank, 0, 100, "mean", NegativesConfig(shared=3), StreamConfig()
        )  # fmt: skip
        places.append([])
        for fed in itertools.islice(batches, steps):
            expected = []
            users = []
            for user in fed.users_B.tolist():
                before = ticks[user] < found.split.validation_tick
                expected += histories[user][before].tolist()
                users += [user] * bool(before.any())
            rows = fed.batch.ids[: len(expected)].tolist()
            assert rows == expected
            places[-1].append(len(fed.batch.weight_B))
            assert fed.batch.weight_B.sum() == len(users)
            seen += users
    assert all(own == places[0] for own in places)
    early = [
        user
        for user, times in enumerate(ticks)
        if times[0] < found.split.validation_tick
    ]
    assert sorted(seen) == early
    assert len(early) < len(histories)


def test_negatives_are_items_of_the_training_part(tmp_path, ranks):
    """Rows 2 and 10 come after the cut alone."""
    histories = [np.array([0, 1, 4, 2]), np.array([8, 9, 11, 8, 10, 3])]
    ticks = [np.array([1, 2, 60, 90]), np.array([1, 2, 3, 60, 90, 91])]
    dataset = write_dataset(
        tmp_path / "data",
        histories,
        ticks=[times.astype(np.uint16) for times in ticks],
    )
    recorded = {
        "dataset": dataset.fingerprint,
        "validation_tick": 50,
        "test_tick": 70,
        "whose": "first",
        "counts": "cut",
    }
    found = split(dataset, ranks, recorded=recorded)
    assert [rows.tolist() for rows in found.drawn_rows] == [[0, 1], [8, 9, 11]]
    assert found.drawn_items.tolist() == [2, 3]
    items_N = np.repeat([0, 1, 8, 9, 11], 40)
    rows = draw_target_negatives(
        1, 0, np.arange(200), np.zeros(200, int), items_N,
        np.repeat([0, 0, 1, 1, 1], 40), found.starts, found.drawn_items, 3,
        found.drawn_rows,
    )  # fmt: skip
    for item, drawn in zip(items_N.tolist(), rows, strict=True):
        domain = {0, 1} if item < 8 else {8, 9, 11}
        assert set(drawn.tolist()) <= domain - {item}
    assert {row for row in rows[80:120].ravel().tolist()} == {9, 11}
    for count, expected in ((2, [2, 2]), (50, [2, 3])):
        shared = draw_shared_negatives(
            1, 0, 0, found.starts, found.drawn_items, count, found.drawn_rows
        )
        assert [len(drawn) for drawn in shared] == expected
        for drawn, allowed in zip(shared, found.drawn_rows, strict=True):
            assert set(drawn.tolist()) <= set(allowed.tolist())
