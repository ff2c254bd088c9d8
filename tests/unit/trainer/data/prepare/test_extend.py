"""A dataset onto which new logs came, against one that was prepared of everything at once."""

import datetime
import hashlib
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data.prepare.pipeline
from tests.unit.trainer.data.prepare.test_pipeline import (
    COLUMNS,
    digests,
    run,
    some_rows,
    timed_histories,
    write,
)
from trainer.data.format.dataset import Dataset
from trainer.data.prepare.extend import read_options
from trainer.data.prepare.stored_log import StoredLog
from trainer.errors import InputError


def extended(old, output, *inputs, **options):
    return run(
        output,
        *inputs,
        extend=str(old.folder),
        **(read_options(old.folder) | options),
    )


def items_of(dataset):
    """{row: (domain, text of the id)}, from places that begin at 0 and leave none out."""
    found = {}
    for domain in dataset.domains:
        table = pq.read_table(dataset.folder / domain.vocabulary)
        assert table["row"].to_pylist() == list(
            range(domain.start, domain.start + domain.items)
        )
        found |= {
            line["row"]: (domain.name, str(line["item_id"]))
            for line in table.to_pylist()
        }
    return found


def told(dataset):
    """{text of a user's id: [(domain, text of the item's id, tick)]}."""
    users = pq.read_table(dataset.folder / "users.parquet")
    names = dict(
        zip(
            users["user"].to_pylist(),
            map(str, users["user_id"].to_pylist()),
            strict=True,
        )
    )
    items = items_of(dataset)
    return {
        names[user]: [
            (*items[row], tick) for row, tick in zip(rows, ticks, strict=True)
        ]
        for user, (rows, ticks) in timed_histories(dataset).items()
    }


def mapping(dataset):
    """{(domain, text of the id): (old row, new row)}."""
    table = pq.read_table(dataset.folder / "extension" / "rows.parquet")
    return {
        (line["domain"], str(line["item_id"])): (
            line["old_row"],
            line["new_row"],
        )
        for line in table.to_pylist()
    }


def facts_of(dataset):
    return json.loads(
        (dataset.folder / "extension" / "extension.json").read_text()
    )


def numbered(count, first=0, domain="shop", users=5):
    """So many items of a domain, each met once."""
    return [
        (number % users, f"{domain}-{first + number}", domain, number)
        for number in range(count)
    ]


row = st.tuples(
    st.integers(0, 5),
    st.integers(0, 9),
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 9),
)
rows = st.lists(row, min_size=1, max_size=60)


any_days = given(
    rows,
    st.lists(rows, min_size=1, max_size=3),
    st.integers(0, 2),
    st.integers(0, 2),
)


@settings(max_examples=4)
@any_days
def test_extending_day_by_day_is_preparing_it_all(
    base, days, min_user, min_item
):
    assert_extending_is_preparing(base, days, min_user, min_item)


@pytest.mark.slow
@settings(max_examples=24)
@any_days
def test_extending_many_days_is_preparing_it_all(
    base, days, min_user, min_item
):
    assert_extending_is_preparing(base, days, min_user, min_item)


def assert_extending_is_preparing(base, days, min_user, min_item):
    """But for the numbers of rows, and for rows that an earlier day had to the letter."""
    base = base + [
        (9, item, domain, 5)
        for item in (0, 1)
        for domain in "abc"
        for _ in range(3)
    ]  # somebody who stays
    with tempfile.TemporaryDirectory() as folder:
        folder, known = Path(folder), Counter(base)
        options = {"min_user": min_user, "min_item": min_item, "streams": 3}
        dataset = run(
            folder / "0",
            write(folder / "0.parquet", base),
            keep_log=True,
            **options,
        )
        for number, day in enumerate(days, 1):
            before = dataset
            dataset = extended(
                before,
                folder / str(number),
                write(folder / f"{number}.csv", day),
            )
            assert Dataset.load(dataset.folder) == dataset
            known += Counter(row for row in day if row not in known)
            whole = list(known.elements())
            log = write(folder / f"whole-{number}.parquet", whole)
            expected = run(folder / f"whole-{number}", log, **options)
            assert told(dataset) == told(expected)
            assert (dataset.users, dataset.interactions) == (
                expected.users,
                expected.interactions,
            )
            rows = mapping(dataset)
            assert {item: new for item, (_, new) in rows.items()} == {
                item: row for row, item in items_of(dataset).items()
            }
            assert {
                item: old for item, (old, _) in rows.items() if old is not None
            } == {item: row for row, item in items_of(before).items()}
            assert all(
                old in (None, new) for old, new in rows.values()
            )  # there is room
            users = pq.read_table(dataset.folder / "users.parquet")[
                "user_id"
            ].to_pylist()
            came = {user for user, *_ in day} & set(users)
            touched = np.load(dataset.folder / "extension" / "users.npy")
            assert {users[user] for user in touched} <= came and len(
                set(touched.tolist())
            ) == len(touched)


def test_the_same_day_again_changes_nothing(tmp_path):
    log = write(tmp_path / "log.csv", some_rows())
    dataset = run(tmp_path / "0", log, keep_log=True)
    again = extended(dataset, tmp_path / "1", log)
    assert told(again) == told(dataset)
    facts = facts_of(again)
    assert (facts["arrived"], facts["delivered_before"], facts["late"]) == (
        300,
        300,
        0,
    )
    assert not len(np.load(again.folder / "extension" / "users.npy"))
    own = {
        name: digest
        for name, digest in digests(again.folder).items()
        if not name.startswith(("log/", "extension/"))
    }
    assert own == {
        name: digest
        for name, digest in digests(dataset.folder).items()
        if not name.startswith("log/")
    }


def test_late_rows_go_to_their_place_in_time(tmp_path):
    base = [
        ("u", "a", "shop", 10),
        ("u", "b", "shop", 30),
        ("v", "a", "shop", 40),
        ("v", "b", "shop", 50),
    ]
    dataset = run(
        tmp_path / "0", write(tmp_path / "0.csv", base), keep_log=True
    )
    late = [("u", "b", "shop", 20), ("u", "a", "shop", 60)]
    dataset = extended(dataset, tmp_path / "1", write(tmp_path / "1.csv", late))
    assert [item for _, item, _ in told(dataset)["u"]] == ["a", "b", "b", "a"]
    assert facts_of(dataset)["late"] == 1


def test_a_domain_that_outgrows_its_room_moves_the_ones_behind_it(tmp_path):
    base = [
        *numbered(5, domain="a"),
        *numbered(7, domain="b"),
        *numbered(3, domain="c"),
    ]
    before = run(tmp_path / "0", write(tmp_path / "0.csv", base), keep_log=True)
    assert [domain.room for domain in before.domains] == [69, 71, 67]
    fits = extended(
        before,
        tmp_path / "fits",
        write(tmp_path / "1.csv", numbered(64, 5, "a")),
    )
    assert [domain.start for domain in fits.domains] == [
        0,
        69,
        140,
    ] and not facts_of(fits)["laid_out_anew"]
    grown = extended(
        before,
        tmp_path / "grown",
        write(tmp_path / "2.csv", numbered(65, 5, "a")),
    )
    assert [
        (domain.start, domain.items, domain.room) for domain in grown.domains
    ] == [
        (0, 70, 134),
        (134, 7, 71),
        (205, 3, 67),
    ]
    assert facts_of(grown)["laid_out_anew"]
    for (domain, _), (old, new) in mapping(grown).items():
        number = "abc".index(domain)
        if old is not None:
            assert (
                new - grown.domains[number].start
                == old - before.domains[number].start
            )
        else:
            assert domain == "a" and 5 <= new < 70


def test_a_new_domain_comes_behind_the_others(tmp_path):
    before = run(
        tmp_path / "0",
        write(tmp_path / "0.csv", numbered(4, domain="m")),
        keep_log=True,
    )
    after = extended(
        before,
        tmp_path / "1",
        write(
            tmp_path / "1.csv",
            numbered(3, domain="z") + numbered(2, domain="a"),
        ),
    )
    assert [(domain.name, domain.start) for domain in after.domains] == [
        ("m", 0),
        ("a", 68),
        ("z", 134),
    ]
    assert all(
        old == new for old, new in mapping(after).values() if old is not None
    )


def test_retired_items_give_their_rows_to_new_ones_and_leave_no_gap(tmp_path):
    old_rows = [
        (user, f"old-{number}", "shop", number)
        for number in range(6)
        for user in range(2)
    ]
    kept_rows = [
        (user, f"kept-{number}", "shop", 100 + number)
        for number in range(6)
        for user in range(3)
    ]
    before = run(
        tmp_path / "0",
        write(tmp_path / "0.csv", old_rows + kept_rows),
        keep_log=True,
    )
    places = {item: row for row, (_, item) in items_of(before).items()}
    assert sorted(places, key=places.get)[0].startswith(
        "kept"
    )  # the more popular ones
    new = write(
        tmp_path / "1.csv",
        [(7, f"new-{number}", "shop", 200) for number in range(4)],
    )
    left = extended(before, tmp_path / "left", new, since="50")
    assert (
        left.domains[0].items == 16
        and facts_of(left)["domains"]["shop"]["retired"] == 0
    )
    counts = pq.read_table(left.folder / left.domains[0].vocabulary).to_pylist()
    assert all(
        line["count"] == 0
        for line in counts
        if line["item_id"].startswith("old")
    )
    assert told(left).keys() == {"0", "1", "2", "7"}
    retired = extended(
        before, tmp_path / "retired", new, since="50", retire=True
    )
    found = mapping(retired)
    assert {item for (_, item), (_, row) in found.items() if row is None} == {
        f"old-{number}" for number in range(6)
    }
    assert all(
        found["shop", f"kept-{number}"] == (places[f"kept-{number}"],) * 2
        for number in range(6)
    )
    assert sorted(found["shop", f"new-{number}"][1] for number in range(4)) == [
        6,
        7,
        8,
        9,
    ]
    facts = facts_of(retired)["domains"]["shop"]
    assert (
        facts["items_before"],
        facts["items"],
        facts["new"],
        facts["retired"],
    ) == (
        12,
        10,
        4,
        6,
    )
    # Fewer new ones than were retired: the last ones move into the gaps.
    few = write(tmp_path / "2.csv", [(7, "old-0", "shop", 200)])
    moved = extended(before, tmp_path / "moved", few, since="103", retire=True)
    found = {item: pair for (_, item), pair in mapping(moved).items()}
    assert found["kept-0"][1] is None and items_of(moved).keys() == {0, 1, 2, 3}
    assert {item for _, item in items_of(moved).values()} == {
        "kept-3",
        "kept-4",
        "kept-5",
        "old-0",
    }


def test_a_window_of_days_ends_with_the_newest_row(tmp_path):
    day = datetime.timedelta(days=1)
    first = datetime.datetime(2026, 1, 1)
    base = [
        ("u", f"i{number}", "shop", (first + number * day).isoformat())
        for number in range(10)
    ]
    before = run(tmp_path / "0", write(tmp_path / "0.csv", base), keep_log=True)
    came = [
        ("u", "i0", "shop", (first + 11 * day).isoformat()),
        ("u", "i9", "shop", first.isoformat()),
    ]
    new = write(tmp_path / "1.csv", came)
    after = extended(before, tmp_path / "1", new, days=3.0)
    assert [item for _, item, _ in told(after)["u"]] == ["i8", "i9", "i0"]
    facts = facts_of(after)
    assert (facts["late"], facts["before_window"]) == (1, 1)
    assert (
        after.first_time
        == (first + 8 * day - datetime.datetime(1970, 1, 1)).total_seconds()
        * 1e6
    )
    since = extended(before, tmp_path / "2", new, since="2026-01-10")
    assert [item for _, item, _ in told(since)["u"]] == ["i9", "i0"]
    seconds = [
        ("u", f"i{number}", "shop", 86_400 * number) for number in range(10)
    ]
    numbers = run(
        tmp_path / "3",
        write(tmp_path / "3.csv", seconds),
        keep_log=True,
        days=1.0,
        time_unit="s",
    )
    assert [item for _, item, _ in told(numbers)["u"]] == ["i8", "i9"]


def test_a_window_of_days_ends_with_the_newest_of_fractional_times(tmp_path):
    """A column of floats could hold NaN, which must not count as the newest time."""
    day = 86400.0
    doubles = {"timestamp": pa.float64()}
    base = [("u", f"i{n}", "shop", n * day + 0.5) for n in range(10)]
    log = write(tmp_path / "0.parquet", base, types=doubles)
    before = run(tmp_path / "0", log, keep_log=True)
    came = [("u", "i0", "shop", 11 * day + 0.5), ("u", "i9", "shop", 0.25)]
    new = write(tmp_path / "1.parquet", came, types=doubles)
    after = extended(before, tmp_path / "1", new, days=3.0, time_unit="s")
    assert [item for _, item, _ in told(after)["u"]] == ["i8", "i9", "i0"]
    assert (after.first_time, after.last_time) == (
        8 * day + 0.5,
        11 * day + 0.5,
    )


def test_files_that_a_window_has_left_are_not_kept(tmp_path):
    before = run(
        tmp_path / "0",
        write(tmp_path / "0.csv", [("u", "a", "x", 1), ("u", "b", "x", 2)]),
        keep_log=True,
    )
    after = extended(
        before,
        tmp_path / "1",
        write(tmp_path / "1.csv", [("u", "a", "x", 8), ("u", "b", "x", 9)]),
        since="5",
    )
    assert [
        path.name for path in sorted((after.folder / "log").glob("*.parquet"))
    ] == ["00001.parquet"]
    third = extended(
        after, tmp_path / "2", write(tmp_path / "2.csv", [("u", "b", "x", 7)])
    )
    assert [item for _, item, _ in told(third)["u"]] == ["b", "a", "b"]
    assert len(list((third.folder / "log").glob("*.parquet"))) == 2


def test_numbers_become_text_once_a_log_has_text(tmp_path):
    types = {"user_id": pa.int64(), "item_id": pa.int64()}
    base = [(7, 1, "shop", 1), (7, 2, "shop", 2), (8, 1, "shop", 3)]
    before = run(
        tmp_path / "0",
        write(tmp_path / "0.parquet", base, types=types),
        keep_log=True,
    )
    texts = extended(
        before,
        tmp_path / "1",
        write(
            tmp_path / "1.csv", [("7", "x", "shop", 4), ("y", "2", "shop", 5)]
        ),
    )
    assert (
        told(texts)["7"][-1][1] == "x"
        and told(texts)["y"][0][1] == "2"
        and len(items_of(texts)) == 3
    )
    came = [(8, 2, "shop", 6), (7, 1, "shop", 1)]
    numbers = extended(
        texts, tmp_path / "2", write(tmp_path / "2.parquet", came, types=types)
    )
    assert facts_of(numbers)["delivered_before"] == 1
    assert [item for _, item, _ in told(numbers)["8"]] == ["1", "2"] and len(
        items_of(numbers)
    ) == 3
    assert (
        pq.read_schema(numbers.folder / "vocabulary/0.parquet")
        .field("item_id")
        .type
        == pa.string()
    )


def test_the_whole_log_may_be_given_in_place_of_a_kept_one(tmp_path):
    log = write(tmp_path / "0.csv", numbered(9))
    before = run(tmp_path / "0", log)
    with pytest.raises(
        InputError,
        match=r"keeps no log: prepare it with --keep-log.*--whole-log",
    ):
        extended(before, tmp_path / "1", log)
    whole = write(tmp_path / "1.csv", numbered(9)[3:] + numbered(12, 20))
    after = extended(before, tmp_path / "1", whole, whole_log=True)
    assert not (after.folder / "log").exists()
    assert told(after) == told(run(tmp_path / "2", whole))
    assert (
        all(old in (None, new) for old, new in mapping(after).values())
        and len(mapping(after)) == 21
    )


@pytest.mark.parametrize("stage", ["log", "ids", "events", "parts", "finish"])
def test_killed_at_any_stage_it_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, stage
):
    dataset = run(
        tmp_path / "0", write(tmp_path / "0.csv", some_rows()), keep_log=True
    )
    day = write(tmp_path / "1.csv", some_rows(80, users=30, items=50, seed=2))
    expected = extended(dataset, tmp_path / "whole", day)

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    place = {
        "log": "open_stored_log",
        "ids": "number_ids",
        "events": "_divide_events",
        "parts": "_make_part",
        "finish": "write_extension",
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.data.prepare.pipeline, place[stage], killed)
        extended(dataset, tmp_path / "killed", day)
    assert not (tmp_path / "killed").exists()
    after = extended(dataset, tmp_path / "killed", day)
    assert told(after) == told(expected) and mapping(after) == mapping(expected)

    def own(folder):
        return {
            name: digest
            for name, digest in digests(folder).items()
            if not name.startswith(("log/", "extension/"))
        }

    assert own(after.folder) == own(expected.folder)


def test_what_it_was_made_with_is_kept(tmp_path):
    options = {"min_user": 2, "min_item": 3, "seed": 5, "streams": 7}
    dataset = run(
        tmp_path / "0",
        write(tmp_path / "0.csv", some_rows()),
        keep_log=True,
        **options,
    )
    assert read_options(dataset.folder) == options | {
        "tie_order": "hash",
        "min_domain": 0,
    }
    after = extended(
        dataset,
        tmp_path / "1",
        write(tmp_path / "1.csv", some_rows(50, seed=9)),
    )
    assert StoredLog.load(after.folder) == StoredLog(False, 2, 3) and (
        after.seed,
        after.streams,
    ) == (5, 7)


def as_before_ties(dataset):
    """The same dataset as format version 4 had it, which does not say the order of equal times."""
    file = dataset.folder / "dataset.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    for name in ("tie_order", "tied_users", "time_kind", "time_unit"):
        del record[name]
    record["format_version"] = 4
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
    return Dataset.load(dataset.folder)


def test_a_dataset_of_before_is_extended_in_the_new_order_and_it_is_said(
    tmp_path, capfd
):
    rows = some_rows()
    before = as_before_ties(
        run(
            tmp_path / "0",
            write(tmp_path / "0.csv", rows),
            keep_log=True,
            streams=3,
        )
    )
    assert before.tie_order is None
    text = (before.folder / "dataset.json").read_bytes()
    assert before.fingerprint == hashlib.sha256(text).hexdigest()
    day = [("new", 3, "shop", 7), ("new", 4, "shop", 7)]
    after = extended(before, tmp_path / "1", write(tmp_path / "1.csv", day))
    assert "a hash orders them, in the old log" in capfd.readouterr().err
    assert after.tie_order == "hash"
    whole = write(tmp_path / "whole.csv", rows + day)
    assert told(after) == told(run(tmp_path / "whole", whole, streams=3))


@pytest.mark.parametrize("column", ["user_id", "item_id", "domain"])
def test_ids_that_were_made_of_floats_before_are_not_extended(tmp_path, column):
    rows = [(user, 2 + user % 2, "shop", 1) for user in range(4)]
    place = COLUMNS.index(column)
    texts = [
        (
            *row[:place],
            f"{row[place]}.0" if place < 2 else "5.0",
            *row[place + 1 :],
        )
        for row in rows
    ]
    log = write(tmp_path / "0.parquet", texts)
    before = as_before_ties(run(tmp_path / "0", log, keep_log=True))
    with pytest.raises(
        InputError, match=rf"has the {column} '\d\.0', which is read as \d now"
    ):
        extended(before, tmp_path / "1", log)
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    "options", [{}, {"days": 400.0}, {"since": "2024-01-01"}]
)
def test_folders_that_are_called_like_columns_are_no_columns(tmp_path, options):
    """Hive's names: below domain=all and user=ann, all files keep their own columns."""
    day = [
        (user, item, domain, f"2024-01-{item + 1:02d}")
        for user in range(4)
        for item, domain in enumerate(("shop", "video", "shop", "video"))
    ]
    below = tmp_path / "domain=all" / "user=ann" / "item_id=7"
    dataset = run(
        below / "time=3",
        write(below / "0.csv", day),
        keep_log=True,
        streams=2,
        **options,
    )
    plain = run(tmp_path / "plain", below / "0.csv", streams=2)
    assert told(dataset) == told(plain)
    after = extended(dataset, below / "row=1", write(below / "1.csv", day[:3]))
    assert told(after) == told(dataset)
    assert facts_of(after)["delivered_before"] == 3
    assert [domain.name for domain in after.domains] == ["shop", "video"]


def dates(_, folder):
    return write(folder / "new.csv", [("u", "a", "shop", "2026-01-01")]), {}


def another_unit(_, folder):
    before = [("u", item, "shop", 1_700_000_000) for item in "ab"]
    dataset = run(folder / "s", write(folder / "s.csv", before), keep_log=True)
    after = [("u", "a", "shop", 1_700_000_001_000)]
    return write(folder / "ms.csv", after), {"extend": str(dataset.folder)}


def days_of_what(_, folder):
    return write(folder / "new.csv", [("u", "a", "shop", 3)]), {"days": 3.0}


def no_number(_, folder):
    return write(folder / "new.csv", [("u", "a", "shop", 3)]), {
        "since": "2026-01-01"
    }


def nothing_left(_, folder):
    return write(folder / "new.csv", [("u", "a", "shop", 3)]), {"since": "1e9"}


def both_windows(_, folder):
    return write(folder / "new.csv", [("u", "a", "shop", 3)]), {
        "since": "1",
        "days": 3.0,
        "time_unit": "s",
    }


def a_log_that_is_none(dataset, folder):
    (dataset.folder / "log" / "log.json").write_text("{")
    return write(folder / "new.csv", [("u", "a", "shop", 3)]), {
        "min_user": 0,
        "min_item": 0,
    }


BAD = {
    dates: "its times are numbers, those of .*new.csv are dates",
    another_unit: r"its times are numbers \(seconds\), those of .*ms.csv are numbers "
    r"\(milliseconds\)",
    days_of_what: "say what they are in with --time-unit",
    no_number: "these logs' times are numbers: give one",
    nothing_left: "no rows are left in the window",
    both_windows: "one of them says where the window begins",
    a_log_that_is_none: r"log\.json cannot be read",
}


@pytest.mark.parametrize(
    ("spoil", "message"), BAD.items(), ids=[spoil.__name__ for spoil in BAD]
)
def test_what_cannot_be_extended_is_named_and_leaves_nothing(
    tmp_path, spoil, message
):
    dataset = run(
        tmp_path / "0", write(tmp_path / "0.csv", numbered(9)), keep_log=True
    )
    log, options = spoil(dataset, tmp_path)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "1", log, **{"extend": str(dataset.folder)} | options)
    assert not (tmp_path / "1").exists()


def test_columns_of_the_new_log_may_have_other_names(tmp_path):
    dataset = run(
        tmp_path / "0", write(tmp_path / "0.csv", numbered(9)), keep_log=True
    )
    names = ("who", "what", "where", "when")
    columns = dict(
        zip(
            (f"{role}_column" for role in ("user", "item", "domain", "time")),
            names,
            strict=True,
        )
    )
    after = extended(
        dataset,
        tmp_path / "1",
        write(tmp_path / "1.csv", [(3, "shop-0", "shop", 77)], names),
        **columns,
    )
    assert told(after)["3"][-1][1] == "shop-0" and names != COLUMNS
