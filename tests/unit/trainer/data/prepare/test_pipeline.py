import contextlib
import csv
import datetime
import errno
import gzip
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data.duckdb_engine
import trainer.data.prepare.ids
import trainer.data.prepare.pipeline
import trainer.files.lock
from trainer.config.prepare import PrepareConfig
from trainer.data.counter_rng import RandomStream, random_bits
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import read_blocks
from trainer.data.prepare.assembly import assemble
from trainer.data.prepare.pipeline import prepare
from trainer.errors import InputError

COLUMNS = ("user_id", "item_id", "domain", "timestamp")


def write(path, rows, columns=COLUMNS, types=None):
    """Writes rows as what the path's ending says; `types` are Arrow types by column name."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        types = types or {}
        arrays = [
            pa.array([row[index] for row in rows], types.get(name))
            for index, name in enumerate(columns)
        ]
        pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), path)
        return path
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as stream:
        if ".tsv" in path.name:  # has no quotes
            for row in [columns, *rows]:
                stream.write("\t".join(map(str, row)) + "\n")
        else:
            writer = csv.writer(stream)
            writer.writerow(columns)
            writer.writerows(rows)
    return path


def run(output, *inputs, **options):
    return prepare(
        PrepareConfig(
            tuple(str(path) for path in inputs), str(output), **options
        )
    )


def histories(dataset):
    """Rows of M by user number."""
    return {user: rows for user, (rows, _) in timed_histories(dataset).items()}


def timed_histories(dataset):
    """Rows of M and ticks by user number."""
    found = {}
    for shard in dataset.shards:
        for first, block in read_blocks(dataset, shard):
            ends = np.cumsum(block.lengths_B)
            for user, (start, end) in enumerate(
                zip(ends - block.lengths_B, ends, strict=True), start=first
            ):
                found[user] = (
                    block.items_N[start:end].tolist(),
                    block.ticks_N[start:end].tolist(),
                )
    return found


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def some_rows(count=300, users=23, items=40, seed=1):
    """Rows with ties in time and exact duplicates; every domain has the same raw ids."""
    draw = random.Random(seed)
    return [
        (
            draw.randrange(users),
            draw.randrange(items),
            draw.choice(["shop", "video", "navi"]),
            draw.randrange(20),
        )
        for _ in range(count)
    ]


# --- against a plain reference ------------------------------------------------------------------------------------------


def key_of(text):
    return int(hashlib.md5(text.encode()).hexdigest()[:15], 16)


def in_order(seed, user, events):
    """A user's (time, domain, text of the item's id), by time, equal ones by their hash."""
    occurrences = Counter()
    keyed = []
    for when, domain, item in sorted(events):
        domain_digits = hashlib.md5(domain.encode()).hexdigest()
        bits = random_bits(
            key_of(f"{seed}:{user}"),
            RandomStream.TIME_TIES,
            np.array([when], np.float64).view(np.uint64),
            key_of(domain_digits + item),
            occurrences[when, domain, item],
        )
        occurrences[when, domain, item] += 1
        keyed.append((when, int(bits[0]), domain, item))
    return [(when, domain, item) for when, _, domain, item in sorted(keyed)]


def reference(rows, min_user, min_item, seed):
    """Histories by raw user, vocabulary and counts, by sorting and counting in plain Python; None if nothing is left."""
    rows = [
        (str(user), str(item), domain, time)
        for user, item, domain, time in rows
    ]
    while True:
        users = Counter(row[0] for row in rows)
        items = Counter((row[2], row[1]) for row in rows)
        kept = [
            row
            for row in rows
            if users[row[0]] >= min_user and items[row[2], row[1]] >= min_item
        ]
        if len(kept) == len(rows):
            break
        rows = kept
    by_user = defaultdict(list)
    for user, item, domain, when in rows:
        by_user[user].append((when, domain, item))
    events = {
        user: [event[1:] for event in in_order(seed, user, found)]
        for user, found in by_user.items()
    }
    order = sorted(
        events,
        key=lambda user: (key_of(f"{seed}:{user}"), user),
    )
    training = Counter(
        event
        for found in events.values()
        for event in (found[:-2] if len(found) >= 3 else found)
    )
    vocabulary, start, row_of = {}, 0, {}
    for domain in sorted({domain for domain, _ in items}):
        mine = sorted(
            (item for name, item in items if name == domain),
            key=lambda item: (-items[domain, item], item),
        )
        for place, item in enumerate(mine):
            row_of[domain, item] = start + place
        vocabulary[domain] = [
            (item, row_of[domain, item], training[domain, item])
            for item in mine
        ]
        start += len(mine) + max(64, len(mine) // 10)
    return (
        order,
        {
            user: [row_of[event] for event in found]
            for user, found in events.items()
        },
        vocabulary,
    )


def ticks_of(rows, order, events, vocabulary, seed):
    """By raw user, from the first time of all rows to the last."""
    first, last = min(row[3] for row in rows), max(row[3] for row in rows)
    row_of = {
        (domain, item): row
        for domain, lines in vocabulary.items()
        for item, row, _ in lines
    }
    found = {}
    for user in order:
        own = [
            (when, domain, str(item))
            for name, item, domain, when in rows
            if str(name) == user
        ]
        own = [event for event in own if event[1:] in row_of]
        own = in_order(seed, user, own)
        assert [row_of[event[1:]] for event in own] == events[user]
        found[user] = [
            int((when - first) / max(last - first, 1) * 65535)
            for when, _, _ in own
        ]
    return found


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"),
    min_size=1,
    max_size=3,
)
odd_ids = st.sampled_from(
    [
        "007",
        "7",
        "-0",
        "1e3",
        "NULL",
        "nan",
        "'",
        '"',
        '""',
        "a,b",
        "a\tb",
        "#x",
        " ",
        "\n",
        "é",
        "e\u0301",
        "日本",
    ]
)
formats = st.lists(
    st.sampled_from(["a.parquet", "b.csv", "c.tsv", "d.csv.gz", "e.parquet"]),
    min_size=1,
    unique=True,
)


@st.composite
def logs(draw):
    ids = (
        st.one_of(odd_ids, texts)
        if draw(st.booleans())
        else st.integers(-3, 12)
    )
    user_ids, item_ids = (
        draw(st.lists(ids, min_size=2, max_size=6, unique=True))
        for _ in range(2)
    )
    domains = draw(
        st.lists(
            st.sampled_from(["shop", "Shop", "ads'", "дом", "a b"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    row = st.tuples(
        *map(st.sampled_from, (user_ids, item_ids, domains)), st.integers(-2, 4)
    )
    return (
        draw(st.lists(row, min_size=1, max_size=40)),
        draw(st.randoms(use_true_random=False)),
        draw(formats),
    )


@settings(max_examples=20)
@given(
    logs(),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 5),
    st.integers(1, 5),
)
def test_prepare_agrees_with_plain_python(
    log, min_user, min_item, seed, streams
):
    rows, shuffle, names = log
    order, events, vocabulary = reference(rows, min_user, min_item, seed)
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: [] for name in names}
        for row in rows:
            name = shuffle.choice(names)
            if name.endswith(".tsv") and set("\t\r\n") & set(
                f"{row[0]}{row[1]}"
            ):
                name = "b.csv"  # a TSV has no such fields
            parts.setdefault(name, []).append(row)
        kind = pa.scalar(rows[0][0]).type
        types = dict(
            zip(COLUMNS, (kind, kind, pa.string(), pa.int64()), strict=True)
        )
        for name, part in parts.items():
            write(Path(folder, "logs", name), part, types=types)
        options = dict(
            min_user=min_user,
            min_item=min_item,
            seed=seed,
            streams=streams,
            shard_users=2,
            block_users=2,
        )
        if not events or any(len(found) == 1 for found in vocabulary.values()):
            with pytest.raises(
                InputError,
                match="nothing is left" if not events else "one item",
            ):
                run(Path(folder, "out"), Path(folder, "logs"), **options)
            assert not Path(folder, "out").exists()
            return
        dataset = run(Path(folder, "out"), Path(folder, "logs"), **options)
        assert Dataset.load(dataset.folder) == dataset

        users = pq.read_table(dataset.folder / "users.parquet")
        assert users["user"].to_pylist() == list(range(len(order)))
        assert [str(user) for user in users["user_id"].to_pylist()] == order
        found, ticks = (
            timed_histories(dataset),
            ticks_of(rows, order, events, vocabulary, seed),
        )
        assert [found[number] for number in range(len(order))] == [
            (events[user], ticks[user]) for user in order
        ]
        assert [domain.name for domain in dataset.domains] == list(vocabulary)
        for domain in dataset.domains:
            table = pq.read_table(
                dataset.folder / domain.vocabulary
            ).to_pylist()
            assert [
                (str(line["item_id"]), line["row"], line["count"])
                for line in table
            ] == vocabulary[domain.name]
        check_facts(dataset, events)


def check_facts(dataset, events):
    lengths = [len(found) for found in events.values()]
    assert (dataset.users, dataset.interactions, dataset.max_length) == (
        len(lengths),
        sum(lengths),
        max(lengths),
    )
    assert dataset.too_short == sum(length < 3 for length in lengths)
    training = [
        rows[:-2] if len(rows) >= 3 else rows
        for rows in histories(dataset).values()
    ]
    own = [
        np.bincount(
            dataset.domain_of(np.array(rows)), minlength=len(dataset.domains)
        ).tolist()
        for rows in training
    ]
    assert dataset.lengths.tolist() == own
    for number, domain in enumerate(dataset.domains):
        counts = (
            sum(dataset.domain_of(np.array(rows)) == number)
            for rows in events.values()
        )
        mine = np.array(sorted(count for count in counts if count))
        assert (domain.users, domain.interactions) == (len(mine), mine.sum())
        wanted = np.quantile(
            mine, [0.05, 0.5, 0.95, 1], method="inverted_cdf"
        ).tolist()
        assert list(domain.length_percentiles.items()) == list(
            zip(["p5", "p50", "p95", "max"], wanted, strict=True)
        )


# --- the same logs, the same bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [int, str])
def test_format_order_and_engine_settings_do_not_change_a_byte(tmp_path, kind):
    rows, types = some_rows(), {"user_id": pa.int32()}
    if kind is str:
        rows, types = (
            [
                (f"u{user}", f"é\"{item}'", domain, time)
                for user, item, domain, time in rows
            ],
            {},
        )
    shuffled = random.Random(5).sample(rows, len(rows))
    write(tmp_path / "one/all.parquet", rows, types=types)
    write(tmp_path / "two/all.csv", shuffled)
    # Columns in another order, one too many, and files of several kinds in one set.
    turned = [
        (time, "x", domain, user, item) for user, item, domain, time in shuffled
    ]
    columns = ("timestamp", "extra", "domain", "user_id", "item_id")
    for number, name in enumerate(
        ["a.parquet", "b/c.tsv.gz", "b/d.csv.gz", "e.tsv", "f.CSV"]
    ):
        write(tmp_path / "three" / name, turned[number::5], columns)
    expected = digests(run(tmp_path / "out1", tmp_path / "one").folder)
    assert len(expected) > 12
    assert (
        digests(run(tmp_path / "out2", tmp_path / "two" / "*.csv").folder)
        == expected
    )
    third = run(
        tmp_path / "out3",
        tmp_path / "three/f.CSV",
        tmp_path / "three",
        tmp_path / "three/*",
    )
    assert digests(third.folder) == expected


def test_rare_users_and_items_are_dropped_until_none_is_left_to_drop(tmp_path):
    """User n shares item n with user n + 1: the first, with one item, takes all the others along, one a round."""
    chain = [
        (user, item, "a", 0)
        for user in range(9)
        for item in (user - 1, user)
        if item >= 0
    ]
    kept = [(user, item, "a", 0) for user in (100, 101) for item in (100, 101)]
    dataset = run(
        tmp_path / "out",
        write(tmp_path / "log.csv", chain + kept),
        min_user=2,
        min_item=2,
    )
    assert sorted(
        pq.read_table(dataset.folder / "users.parquet")["user_id"].to_pylist()
    ) == [100, 101]
    assert pq.read_table(dataset.folder / "vocabulary/0.parquet")[
        "item_id"
    ].to_pylist() == [100, 101]


def test_items_of_equal_count_go_by_the_text_of_their_ids(tmp_path):
    items = [item for item in range(20_000) for _ in range(1 + item % 2)]
    random.Random(2).shuffle(items)
    dataset = run(
        tmp_path / "out",
        write(tmp_path / "log.csv", [(0, item, "a", 0) for item in items]),
    )
    found = pq.read_table(dataset.folder / "vocabulary/0.parquet")[
        "item_id"
    ].to_pylist()
    assert found == [
        *sorted(range(1, 20_000, 2), key=str),
        *sorted(range(0, 20_000, 2), key=str),
    ]


def test_another_seed_only_shuffles_the_users(tmp_path):
    """And equal times, of which there are none here."""
    rows = [(*row[:3], place) for place, row in enumerate(some_rows())]
    log = write(tmp_path / "log.csv", rows)
    datasets = [run(tmp_path / f"out{seed}", log, seed=seed) for seed in (0, 1)]
    raw = []
    for dataset in datasets:
        users = pq.read_table(dataset.folder / "users.parquet")[
            "user_id"
        ].to_pylist()
        raw.append(
            {users[number]: rows for number, rows in histories(dataset).items()}
        )
    assert raw[0] == raw[1] and list(raw[0]) != list(raw[1])
    assert datasets[0].fingerprint != datasets[1].fingerprint


def test_processes_map_the_rows_of_items_in_place_of_a_copy_each(
    tmp_path, monkeypatch
):
    log = write(tmp_path / "log.csv", some_rows())
    several_parts(monkeypatch)
    write_part, maps = trainer.data.prepare.pipeline.write_part, []

    def looking(*arguments, **options):
        maps.append(Path("/proc/self/maps").read_text())
        return write_part(*arguments, **options)

    monkeypatch.setattr(trainer.data.prepare.pipeline, "write_part", looking)
    run(tmp_path / "out", log, processes=1)
    assert len(maps) > 2
    for text in maps:
        lines = [
            line
            for line in text.splitlines()
            if line.endswith("/rows/row_of.npy")
        ]
        assert lines and all(line.split()[1].startswith("r-") for line in lines)


@pytest.fixture(scope="module")
def large_log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    count = 3_000_000
    index = np.arange(count)
    columns = {
        "user_id": index * 7919 % 20_000,
        "item_id": index * 104_729 % 5_000,
        "domain": pa.array(["a", "b"]).take(pa.array(index % 2)),
        "timestamp": index * 15_485_863 % 1_000_003,
    }
    pq.write_table(pa.table(columns), folder / "log.parquet")
    return folder / "log.parquet"


@pytest.fixture(scope="module")
def whole(large_log):
    """The dataset of the large log that one process makes in one part."""
    return run(large_log.parent / "whole", large_log, processes=1)


@pytest.mark.ranks
def test_neither_processes_nor_parts_change_a_byte(
    tmp_path, large_log, whole, monkeypatch
):
    layouts = []

    def look(folder, ids, parts, layout, *rest):
        layouts.append(layout)
        return assemble(folder, ids, parts, layout, *rest)

    monkeypatch.setattr(trainer.data.prepare.pipeline, "assemble", look)
    divided = run(tmp_path / "divided", large_log, memory="720MB", processes=2)
    assert layouts[0].parts > 2 and divided.interactions == 3_000_000
    assert digests(divided.folder) == digests(whole.folder)


def test_what_does_not_fit_the_memory_goes_to_the_disk_and_gives_the_same(
    tmp_path, large_log, whole, monkeypatch
):
    """An engine that has 60 MB for everything sorts 48 MB of events."""
    monkeypatch.setattr(trainer.data.duckdb_engine, "ENGINE_SHARE", 0.12)
    monkeypatch.setattr(trainer.data.prepare.pipeline, "_EVENT_BYTES", 1)
    small = run(tmp_path / "small", large_log, memory="700MB", processes=1)
    assert digests(small.folder) == digests(whole.folder)


# --- layout -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("users", "options", "shards", "streams"),
    [
        (23, dict(streams=4, shard_users=32), 4, 4),
        (23, dict(streams=4, shard_users=3), 8, 4),
        (23, dict(streams=4, shard_users=2), 12, 4),
        (23, dict(streams=23, shard_users=2), 23, 23),
        (23, dict(streams=22, shard_users=2), 22, 22),
        (5, dict(streams=64), 5, 5),
        (1, dict(streams=64), 1, 1),
    ],
)
def test_users_are_spread_evenly_over_a_multiple_of_the_streams(
    tmp_path, users, options, shards, streams
):
    rows = [
        (user, item, "a", item)
        for user in range(users)
        for item in range(2 + user % 3)
    ]
    dataset = run(
        tmp_path / "out",
        write(tmp_path / "log.csv", rows),
        block_users=2,
        **options,
    )
    assert (len(dataset.shards), dataset.streams) == (shards, streams)
    sizes = [shard.users for shard in dataset.shards]
    assert (
        min(sizes) >= 1
        and max(sizes) <= options.get("shard_users", 32768)
        and max(sizes) - min(sizes) <= 1
    )
    blocks = [
        [len(block.lengths_B) for _, block in read_blocks(dataset, shard)]
        for shard in dataset.shards
    ]
    assert all(
        max(found) <= 2 and min(found[:-1], default=2) == 2 for found in blocks
    )
    assert sorted(histories(dataset)) == list(range(users))


def test_a_domain_has_room_for_a_tenth_more_items(tmp_path):
    rows = [
        (0, item, domain, item)
        for domain, items in (("big", 1005), ("small", 3))
        for item in range(items)
    ]
    big, small = run(
        tmp_path / "out", write(tmp_path / "log.csv", rows)
    ).domains
    assert (big.start, big.items, big.room) == (0, 1005, 1105)
    assert (small.start, small.items, small.room) == (1105, 3, 67)


def test_a_log_without_domains_gets_the_one_that_is_named(tmp_path):
    rows = [(1, 5, 0), (1, 6, 1), (2, 5, 2)]
    log = write(tmp_path / "log.csv", rows, ("u", "i", "t"))
    dataset = run(
        tmp_path / "out",
        log,
        user_column="u",
        item_column="i",
        time_column="t",
        domain="it's",
    )
    assert [domain.name for domain in dataset.domains] == ["it's"]
    assert dataset.interactions == 3


def test_a_folder_is_searched_through_and_other_files_are_passed_over(tmp_path):
    rows = some_rows(30)
    write(tmp_path / "logs/year=2024/it's*.csv", rows[:4])
    write(
        tmp_path / "logs/year=2024/it's one.csv", rows[4:10]
    )  # the name before, taken as a glob, is this file too
    write(tmp_path / "logs/[1]/day.parquet", rows[10:])
    (tmp_path / "logs/_truth.json").write_text("{}")
    (tmp_path / "logs/readme.md").write_text("x")
    assert run(tmp_path / "out", tmp_path / "logs").interactions == 30


def test_an_empty_output_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    run(tmp_path / "out", write(tmp_path / "log.csv", some_rows()))
    assert (tmp_path / "out/dataset.json").is_file()


# --- types --------------------------------------------------------------------------------------------------------------

WORDS = ["x", "y", "z"]
ID_TYPES = {
    "int16": (pa.array([3, 10, 2], pa.int16()), pa.int64(), [10, 2, 3]),
    "uint64 that fits": (
        pa.array([3, 10, 2], pa.uint64()),
        pa.int64(),
        [10, 2, 3],
    ),
    "uint64 that does not": (
        pa.array([3, 2**63, 2], pa.uint64()),
        pa.string(),
        ["2", "3", str(2**63)],
    ),
    "text": (pa.array(["3", "10", "2"]), pa.string(), ["10", "2", "3"]),
    "large text": (pa.array(WORDS, pa.large_string()), pa.string(), WORDS),
    "dictionary": (pa.array(WORDS).dictionary_encode(), pa.string(), WORDS),
    "bytes": (pa.array([b"x", b"y", b"z"]), pa.string(), WORDS),
    "uuid": (
        pa.array([uuid.UUID(int=n).bytes for n in (1, 2, 3)], pa.uuid()),
        pa.string(),
        [str(uuid.UUID(int=n)) for n in (1, 2, 3)],
    ),
    "float": (pa.array([1.0, 10.0, 3.0]), pa.int64(), [1, 10, 3]),
    "date": (
        pa.array([0, 1, 2], pa.date32()),
        pa.string(),
        ["1970-01-01", "1970-01-02", "1970-01-03"],
    ),
}


@pytest.mark.parametrize(
    ("ids", "kind", "values"), ID_TYPES.values(), ids=ID_TYPES
)
def test_ids_of_any_type_are_kept_as_whole_numbers_or_as_text(
    tmp_path, ids, kind, values
):
    log = tmp_path / "log.parquet"
    pq.write_table(
        pa.table(
            {
                "user_id": ids,
                "item_id": ids,
                "domain": ["a"] * 3,
                "timestamp": [1, 2, 3],
            }
        ),
        log,
    )
    dataset = run(tmp_path / "out", log)
    items = pq.read_table(dataset.folder / "vocabulary/0.parquet")
    users = pq.read_table(dataset.folder / "users.parquet")
    assert items.schema.types == [kind, pa.int64(), pa.int64()]
    assert users.schema.types == [kind, pa.int64()]
    assert (
        items["item_id"].to_pylist() == values
        and sorted(users["user_id"].to_pylist(), key=str) == values
    )


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (["1", "-5", "9223372036854775807"], pa.int64()),
        (["1", "07", "2"], pa.string()),
        (["1", "9223372036854775808", "2"], pa.string()),
        (["1", "1.50", "2"], pa.string()),
        (["1", "+2", "3"], pa.string()),
        (["1", "x", "2"], pa.string()),
    ],
)
def test_ids_of_a_csv_are_numbers_only_where_no_digit_is_lost(
    tmp_path, texts, kind
):
    log = write(tmp_path / "log.csv", [("u", text, "a", 0) for text in texts])
    items = pq.read_table(
        run(tmp_path / "out", log).folder / "vocabulary/0.parquet"
    )["item_id"]
    assert items.type == kind
    assert sorted(map(str, items.to_pylist())) == sorted(texts)


def test_numbers_in_one_file_and_text_in_another_are_text(tmp_path):
    write(tmp_path / "a.csv", [(7, 1, "a", 0), (8, 2, "a", 0)])
    write(tmp_path / "b.csv", [("07", 1, "a", 0), ("7", "x", "a", 1)])
    write(tmp_path / "c.parquet", [(7, 2, "a", 2)])
    dataset = run(tmp_path / "out", tmp_path)
    assert sorted(
        pq.read_table(dataset.folder / "users.parquet")["user_id"].to_pylist()
    ) == ["07", "7", "8"]
    assert dataset.max_length == 3


UTC = datetime.UTC
TIMES = {
    "csv whole": ("csv", ["5", "-1", "40"]),
    "csv beyond double": (
        "csv",
        ["9007199254740993", "9007199254740992", "9007199254740994"],
    ),
    "csv float": ("csv", ["0.5", "-1e9", "1e3"]),
    "csv dates": ("csv", ["2024-01-02", "2023-12-31", "2024-01-10"]),
    "csv iso with zones": (
        "csv",
        [
            "2024-01-01T01:00:00Z",
            "2024-01-01T02:30:00+02:00",
            "2024-01-01 00:30:00-02:00",
        ],
    ),
    "csv without zone is UTC": (
        "csv",
        [
            "2024-01-01T00:00:01Z",
            "2024-01-01 00:00:00",
            "2024-01-01T00:00:02.5Z",
        ],
    ),
    "double": (pa.float64(), [0.5, -1e9, 1e3]),
    "decimal": (pa.decimal128(5, 2), [5, -1, 40]),
    "uint64": (pa.uint64(), [5, 1, 40]),
    "text of numbers": (pa.string(), ["5", "-1", "40"]),
    "text of dates": (pa.string(), ["2024-01-02", "2023-12-31", "2024-01-10"]),
    "date": (pa.date32(), [5, -1, 40]),
    "timestamp[ns, Berlin]": (
        pa.timestamp("ns", "Europe/Berlin"),
        [5000, -1000, 40000],
    ),
    **{
        f"timestamp[{unit}]": (pa.timestamp(unit), [5000, -1000, 40000])
        for unit in ("s", "ms", "us", "ns")
    },
}


@pytest.mark.parametrize(("kind", "times"), TIMES.values(), ids=TIMES)
def test_times_of_any_kind_order_the_events(tmp_path, kind, times):
    """Item 10 comes at the second time, 30 at the first, 20 at the third: neither order of rows nor of ids."""
    rows = [
        ("u", 30, "a", times[0]),
        ("u", 10, "a", times[1]),
        ("u", 20, "a", times[2]),
    ]
    log = write(
        tmp_path / ("log.csv" if kind == "csv" else "log.parquet"),
        rows,
        types={"timestamp": kind},
    )
    dataset = run(tmp_path / "out", log)
    items = pq.read_table(dataset.folder / "vocabulary/0.parquet")[
        "item_id"
    ].to_pylist()
    assert [items[row] for row in histories(dataset)[0]] == [10, 30, 20]


SPANS = {
    "int64": (pa.int64(), [7, 5, 40], (5.0, 40.0)),
    "int32": (pa.int32(), [7, -5, 40], (-5.0, 40.0)),
    "double": (pa.float64(), [86.4, 43.2, 345.6], (43.2, 345.6)),
    "double from 0": (pa.float64(), [1.5, 0.0, 2.5], (0.0, 2.5)),
    "float": (pa.float32(), [1.5, 0.25, 8.0], (0.25, 8.0)),
    "decimal": (pa.decimal128(5, 2), [5, -1, 40], (-1.0, 40.0)),
    "text of numbers": (pa.string(), ["5.5", "-1", "40"], (-1.0, 40.0)),
    "date": (pa.date32(), [1, 0, 3], (0.0, 3 * 86_400_000_000.0)),
    "timestamp": (pa.timestamp("ms"), [5000, 1000, 9000], (1e6, 9e6)),
}


@pytest.mark.parametrize(
    ("kind", "times", "span"), SPANS.values(), ids=list(SPANS)
)
def test_the_span_of_a_log_is_its_first_and_last_time(
    tmp_path, kind, times, span
):
    """Of any type, also where a column of floats could hold NaN: the first tick is 0, the last the largest."""
    items = [10, 20, 30]
    rows = [
        ("u", item, "a", time) for item, time in zip(items, times, strict=True)
    ]
    log = write(tmp_path / "log.parquet", rows, types={"timestamp": kind})
    dataset = run(tmp_path / "out", log)
    assert (dataset.first_time, dataset.last_time) == span
    assert dataset.ticks(np.array(span)).tolist() == [0, 65535]


def test_dates_of_several_kinds_are_one_time(tmp_path):
    write(tmp_path / "a.csv", [("u", 1, "a", "2024-01-02")])
    write(
        tmp_path / "b.parquet",
        [("u", 2, "a", datetime.datetime(2024, 1, 1, 12, tzinfo=UTC))],
    )
    write(tmp_path / "c.parquet", [("u", 3, "a", datetime.date(2024, 1, 3))])
    dataset = run(tmp_path / "out", tmp_path)
    items = pq.read_table(dataset.folder / "vocabulary/0.parquet")[
        "item_id"
    ].to_pylist()
    assert [items[row] for row in histories(dataset)[0]] == [2, 1, 3]


# --- what is refused ----------------------------------------------------------------------------------------------------

GOOD = [(1, 5, "a", 0), (1, 6, "a", 1), (2, 5, "a", 2)]
HEADER = b"user_id,item_id,domain,timestamp\n"


def parquet(column=None, values=None, kind=None):
    """A good log of three rows, one column of it put in another's place."""
    table = {
        name: pa.array([row[index] for row in GOOD])
        for index, name in enumerate(COLUMNS)
    }
    if column:
        table[column] = pa.array(values, kind)
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table(table), stream, compression="none")
    return stream.getvalue().to_pybytes()


def spoiled():
    """A Parquet file whose footer is whole and whose first pages are not."""
    data = bytearray(parquet())
    data[4:60] = b"\xff" * 56
    return bytes(data)


BAD_FILES = {
    "missing column": (
        "log.csv",
        b"user_id,item,domain,timestamp\n1,2,a,3\n",
        ["'item_id'", "user_id, item", "--item-column"],
    ),
    "another delimiter": (
        "log.csv",
        b"user_id;item_id;domain;timestamp\n1;2;a;3\n",
        ["'user_id'", "user_id;item_id"],
    ),
    "a column twice": (
        "log.csv",
        b"user_id,item_id,domain,timestamp,item_id\n1,2,a,3,4\n",
        ["more than one column 'item_id'"],
    ),
    "no bytes": ("log.csv", b"", ["log.csv", "0 bytes"]),
    "a header alone": ("log.csv", HEADER, ["log.csv", "no rows"]),
    "no row in Parquet": ("log.parquet", None, ["log.parquet", "no rows"]),
    "no Parquet": (
        "log.parquet",
        b"hello world, this is text",
        ["log.parquet", "cannot be read"],
    ),
    "Parquet cut short": (
        "log.parquet",
        parquet()[:-30],
        ["log.parquet", "cannot be read"],
    ),
    "Parquet spoiled inside": (
        "log.parquet",
        spoiled(),
        ["log.parquet", "cannot be read"],
    ),
    "no gzip": (
        "log.csv.gz",
        HEADER + b"1,2,a,3\n",
        ["log.csv.gz", "cannot be read"],
    ),
    "gzip cut short": (
        "log.csv.gz",
        gzip.compress(HEADER + b"1,2,a,3\n" * 9999)[:-20],
        ["log.csv.gz", "cannot be read"],
    ),
    "not UTF-8": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,\xff\xfe,a,3\n",
        ["log.csv", "cannot be read"],
    ),
    "too few fields": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,a\n",
        ["log.csv", "Line: 3"],
    ),
    "too many fields": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,a,3,4\n",
        ["log.csv", "Line: 3"],
    ),
    "an open quote": (
        "log.csv",
        HEADER + b'1,2,a,3\n1,"2,a,3\n',
        ["log.csv", "Line: 3"],
    ),
    "no user": (
        "log.csv",
        HEADER + b"1,2,a,3\n,2,a,3\n",
        ["log.csv: row 2: 'user_id' is empty"],
    ),
    "no item, quoted": (
        "log.csv",
        HEADER + b'1,"",a,3\n',
        ["log.csv: row 1: 'item_id' is empty"],
    ),
    "no domain": (
        "log.tsv",
        HEADER.replace(b",", b"\t") + b"1\t2\t\t3\n",
        ["log.tsv: row 1: 'domain' is empty"],
    ),
    "no time": (
        "log.csv",
        HEADER + b"1,2,a,\n",
        ["log.csv: row 1: 'timestamp' is empty"],
    ),
    "null user": (
        "log.parquet",
        parquet("user_id", [1, None, 2]),
        ["log.parquet: row 2: 'user_id' is empty"],
    ),
    "empty user": (
        "log.parquet",
        parquet("user_id", ["1", "2", ""]),
        ["log.parquet: row 3: 'user_id' is empty"],
    ),
    "NaN item": (
        "log.parquet",
        parquet("item_id", [1.0, 2.0, float("nan")]),
        ["log.parquet: row 3: 'item_id' is nan"],
    ),
    "null domain": (
        "log.parquet",
        parquet("domain", [None] * 3),
        ["log.parquet: row 1: 'domain' is empty"],
    ),
    "null time": (
        "log.parquet",
        parquet("timestamp", [1, 2, None]),
        ["log.parquet: row 3: 'timestamp' is empty"],
    ),
    "NaN time": (
        "log.parquet",
        parquet("timestamp", [1.0, float("nan"), 2.0]),
        ["row 2: 'timestamp' is nan"],
    ),
    "NaN time in CSV": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,a,NaN\n",
        ["log.csv: row 2: 'timestamp' is 'NaN'", "finite number"],
    ),
    "infinite time": (
        "log.parquet",
        parquet("timestamp", [1.0, 2.0, float("-inf")]),
        ["row 3: 'timestamp' is -inf"],
    ),
    "time of words": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,a,soon\n",
        ["log.csv: row 2: 'timestamp' is 'soon'", "number"],
    ),
    "date among numbers": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,a,2024-01-01\n1,3,a,4\n",
        ["row 2", "'2024-01-01'"],
    ),
    "time of bool": (
        "log.parquet",
        parquet("timestamp", [True] * 3),
        ["'timestamp' holds BOOLEAN"],
    ),
    "time of day": (
        "log.parquet",
        parquet("timestamp", [1, 2, 3], pa.time32("s")),
        ["'timestamp' holds TIME"],
    ),
    "list of ids": (
        "log.parquet",
        parquet("item_id", [[1], [2], [3]]),
        ["'item_id' holds BIGINT[]"],
    ),
}


BAD_ALONE = {
    "number among dates": (
        "log.csv",
        HEADER + b"1,2,a,2024-01-01\n1,2,a,3\n1,3,a,2024-01-01\n",
        ["row 2", "'3'", "a date"],
    ),
    "no such date": (
        "log.csv",
        HEADER + b"1,2,a,2024-01-01\n1,2,a,2024-02-30\n",
        ["row 2", "'2024-02-30'"],
    ),
    "one item": (
        "log.csv",
        HEADER + b"1,2,a,3\n1,2,b,3\n1,3,b,3\n",
        ["domain 'a' has one item", "negatives"],
    ),
}


@pytest.mark.parametrize("company", [True, False])
@pytest.mark.parametrize(
    ("name", "data", "named"), BAD_FILES.values(), ids=BAD_FILES
)
def test_a_log_that_cannot_be_used_is_refused_and_nothing_is_left(
    tmp_path, name, data, named, company
):
    """In company: beside a good file of the same columns, read in the same scan, that the message must not name."""
    if data is None:
        write(tmp_path / name, [], types={name: pa.int64() for name in COLUMNS})
    else:
        (tmp_path / name).write_bytes(data)
    good = "zz" + name.removeprefix("log")
    if company:
        write(tmp_path / good, GOOD if "no rows" not in named else [])
    present = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", tmp_path)
    assert all(word in str(error.value) for word in named), error.value
    assert good not in str(error.value)
    assert sorted(tmp_path.iterdir()) == present


@pytest.mark.parametrize(
    ("name", "data", "named"), BAD_ALONE.values(), ids=BAD_ALONE
)
def test_a_log_that_no_other_file_mends_is_refused(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        run(tmp_path / "out", tmp_path)
    assert all(word in str(error.value) for word in named), error.value


def test_the_row_at_fault_is_found_in_a_large_file(tmp_path):
    count = 400_000
    times = np.arange(count, dtype=np.float64)
    times[[333_333, 399_999]] = np.nan
    columns = {
        "user_id": np.arange(count),
        "item_id": np.arange(count),
        "domain": pa.array(["a"] * count),
        "timestamp": times,
    }
    pq.write_table(
        pa.table(columns), tmp_path / "log.parquet", row_group_size=10_000
    )
    with pytest.raises(
        InputError, match=r"log\.parquet: row 333334: 'timestamp' is nan"
    ):
        run(tmp_path / "out", tmp_path / "log.parquet")


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (["nowhere.csv"], "nowhere.csv does not exist"),
        (["log.csv", "no*.csv"], r"no\*.csv does not exist"),
        (["notes.md"], r"notes.md is no log.*\.parquet"),
        (["empty"], "empty holds no log"),
    ],
)
def test_an_input_that_is_not_there_is_named(tmp_path, inputs, named):
    write(tmp_path / "log.csv", GOOD)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=named):
        run(tmp_path / "out", *(tmp_path / name for name in inputs))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(min_user=-1), "min_user is -1"),
        (dict(streams=0), "streams is 0"),
        (dict(shard_users=1), "shard_users is 1: it must be at least 2"),
        (dict(block_users=0), "block_users is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(domain=""), "domain is empty"),
        (dict(memory="lots"), "memory 'lots'"),
        (dict(memory="1MB"), "memory 1MB is too little"),
        (dict(user_column="who"), "no column 'who'.*--user-column"),
        (dict(min_user=4), "nothing is left with --min-user 4 --min-item 0"),
        (dict(min_item=3), "nothing is left"),
        (dict(min_item=2), "domain 'a' has one item"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path, options, named):
    log = write(tmp_path / "log.csv", GOOD)
    with pytest.raises(InputError, match=named):
        run(tmp_path / "out", log, **options)
    assert list(tmp_path.iterdir()) == [log]


def test_numbers_and_dates_in_two_files_are_told_apart(tmp_path):
    write(tmp_path / "a.csv", GOOD)
    write(tmp_path / "b.parquet", [(1, 2, "a", datetime.date(2024, 1, 1))])
    with pytest.raises(
        InputError, match=r"b\.parquet has dates.*a\.csv has numbers"
    ):
        run(tmp_path / "out", tmp_path)


def test_more_rows_than_int32_numbers_are_refused(tmp_path, monkeypatch):
    log = write(tmp_path / "log.csv", some_rows())
    monkeypatch.setattr(trainer.data.prepare.ids, "INT32_MAX", 200)
    with pytest.raises(
        InputError, match="rows of the item matrix are more than int32"
    ):
        run(tmp_path / "out", log)
    monkeypatch.setattr(trainer.data.prepare.ids, "INT32_MAX", 50)
    with pytest.raises(InputError, match="items are more than int32"):
        run(tmp_path / "out", log)


@pytest.mark.parametrize("kind", ["a file", "a folder with something"])
def test_an_output_that_holds_something_is_left_alone(tmp_path, kind):
    log = write(tmp_path / "log.csv", GOOD)
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("precious")
    else:
        out.mkdir()
        (out / "precious").write_text("precious")
    with pytest.raises(InputError, match="already holds something"):
        run(out, log)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["log.csv", "out"] + ["precious"] * out.is_dir()
    )


# --- killed, gone on with -----------------------------------------------------------------------------------------------


def several_parts(monkeypatch):
    """A part of few events, so that a small log has several, made one by one."""
    monkeypatch.setattr(trainer.data.prepare.pipeline, "_EVENT_BYTES", 10**8)


def crash(*_, **__):
    raise RuntimeError("pulled the plug")


def counted(monkeypatch, name, fail_at=None):
    """Lets a function of prepare run, counts its calls, and has the call number `fail_at` (from 0) fail."""
    function, calls = getattr(trainer.data.prepare.pipeline, name), []

    def called(*arguments, **options):
        calls.append(arguments)
        return (
            crash()
            if len(calls) - 1 == fail_at
            else function(*arguments, **options)
        )

    monkeypatch.setattr(trainer.data.prepare.pipeline, name, called)
    return calls


@pytest.mark.parametrize(
    ("name", "fail_at", "done"),
    [
        ("number_ids", 0, []),
        ("_divide_events", 0, ["ids"]),
        ("_write_arrays", 0, ["ids", "events"]),
        ("write_part", 2, ["ids", "events", "rows"]),
        ("assemble", 0, ["ids", "events", "rows"]),
    ],
)
def test_a_failed_preparation_goes_on_from_what_was_finished(
    tmp_path, monkeypatch, name, fail_at, done
):
    log = write(tmp_path / "log.csv", some_rows())
    expected = digests(run(tmp_path / "whole", log).folder)
    several_parts(monkeypatch)
    with monkeypatch.context() as failing:
        counted(failing, name, fail_at)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            run(tmp_path / "out", log, processes=1)
    work = tmp_path / ".out.work"
    assert not (tmp_path / "out").exists() and all(
        (work / stage).is_dir() for stage in done
    )
    parts = [path for path in work.glob("parts/*") if path.suffix != ".partial"]
    calls = {
        stage: counted(monkeypatch, stage)
        for stage in ("number_ids", "_divide_events", "write_part")
    }
    dataset = run(tmp_path / "out", log, processes=1)
    assert digests(dataset.folder) == expected
    assert len(calls["number_ids"]) == ("ids" not in done) and len(
        calls["_divide_events"]
    ) == ("events" not in done)
    assert len(parts) + len(calls["write_part"]) > 3 and len(parts) >= fail_at
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.csv",
        "out",
        "whole",
    ]


def test_one_part_can_be_made_again_alone(tmp_path, monkeypatch):
    log = write(tmp_path / "log.csv", some_rows())
    expected = digests(run(tmp_path / "whole", log).folder)
    several_parts(monkeypatch)
    with monkeypatch.context() as failing:
        counted(failing, "assemble", 0)
        with pytest.raises(RuntimeError):
            run(tmp_path / "out", log, processes=1)
    shutil.rmtree(tmp_path / ".out.work/parts/00002")
    made = counted(monkeypatch, "write_part")
    dataset = run(tmp_path / "out", log, processes=1)
    assert [arguments[3] for arguments in made] == [2] and digests(
        dataset.folder
    ) == expected


def test_other_logs_or_options_begin_anew_and_so_does_fresh(
    tmp_path, monkeypatch, capsys
):
    log = write(tmp_path / "log.csv", some_rows())

    def leave_work(**options):
        with monkeypatch.context() as failing:
            counted(failing, "assemble", 0)
            with pytest.raises(RuntimeError):
                run(tmp_path / "out", log, **options)

    numbered = counted(monkeypatch, "number_ids")
    leave_work(seed=1)
    leave_work(seed=1, memory="1GB", processes=1)  # these decide nothing
    assert len(numbered) == 1 and capsys.readouterr().err == ""
    leave_work(seed=2)
    assert len(numbered) == 2 and "begins anew" in capsys.readouterr().err
    write(tmp_path / "log.csv", some_rows(seed=2))
    leave_work(seed=2)
    assert len(numbered) == 3
    prepare(
        PrepareConfig((str(log),), str(tmp_path / "out"), seed=2), fresh=True
    )
    assert len(numbered) == 4
    expected = digests(run(tmp_path / "whole", log, seed=2).folder)
    assert digests(tmp_path / "out") == expected


@pytest.mark.slow
def test_killed_processes_leave_what_the_same_command_goes_on_from(
    tmp_path, large_log, whole
):
    """SIGKILL to the whole group as soon as a part is finished, again and again until none is left to kill."""
    command = [
        sys.executable,
        "launch/prepare.py",
        "--input",
        large_log,
        "--output",
        tmp_path / "out",
    ]
    command += ["--memory", "720MB", "--processes", "2"]
    root, parts = Path(__file__).parents[5], tmp_path / ".out.work/parts"

    def finished():
        return {
            path.name for path in parts.glob("*") if path.suffix != ".partial"
        }

    seen = []
    while not (tmp_path / "out").exists():
        assert len(seen) < 20
        before = finished()
        process = subprocess.Popen(
            [*map(str, command)],
            cwd=root,
            env={"PYTHONPATH": str(root)},
            start_new_session=True,
        )
        while process.poll() is None and finished() <= before:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(finished())
        assert seen[-1] >= before or (tmp_path / "out").exists()
    assert len(seen) > 2 and digests(tmp_path / "out") == digests(whole.folder)


def test_two_at_once_on_one_output_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.files.lock, "PATIENCE", 0.0)
    log = write(tmp_path / "log.csv", GOOD)

    def meanwhile(*arguments, **options):
        with pytest.raises(
            InputError, match="out is being written by another process"
        ):
            run(tmp_path / "out", log)
        return number_ids(*arguments, **options)

    number_ids = trainer.data.prepare.pipeline.number_ids
    with monkeypatch.context() as patched:
        patched.setattr(trainer.data.prepare.pipeline, "number_ids", meanwhile)
        run(tmp_path / "out", log)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log.csv",
        "out",
    ]


def test_a_full_disk_is_an_input_error_and_the_work_is_kept(
    tmp_path, monkeypatch
):
    log = write(tmp_path / "log.csv", some_rows())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(trainer.data.prepare.pipeline, "assemble", full)
        with pytest.raises(
            InputError,
            match=r"\.out\.work cannot be written: .*No space left.*the same command goes on",
        ):
            run(tmp_path / "out", log)
    assert (tmp_path / ".out.work/parts/00000").is_dir()
    assert run(tmp_path / "out", log).interactions == 300


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("8GB", 8e9),
        ("500 mb", 5e8),
        ("1.5GiB", 1.5 * 2**30),
        ("2T", 2e12),
        ("700000000", 7e8),
    ],
)
def test_amounts_of_memory(text, amount):
    assert PrepareConfig((), "", memory=text).memory_bytes == amount
