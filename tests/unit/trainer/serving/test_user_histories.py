import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.serving.user_histories
from tests.helpers.made import draw_histories, spoil_block, write_dataset
from tests.unit.trainer.data.prepare.test_extend import as_before_ties
from trainer.config.prepare import PrepareConfig
from trainer.config.serving import HistoriesConfig
from trainer.data.loading.histories import Histories
from trainer.data.prepare.pipeline import prepare
from trainer.errors import InputError
from trainer.files.progress import Stages
from trainer.serving.user_histories import (
    HistoryCounts,
    check_memory,
    read_histories,
    write_histories,
)

# Rows 0 … 4 and 8 … 11; `both` is an item of either domain.
ITEMS = [["both", "a1", "a2", "a3", "a4"], ["both", "b1", "b2", "b3"]]
LOG = [  # user, item, domain, time
    ("new", "a2", "domain 0", 5),
    ("u0", "b1", "domain 1", 9),
    ("u0", "both", "domain 1", 3),
    ("u0", "both", "domain 0", 3),
    ("u0", "gone", "domain 0", 4),
    ("u0", "a1", "moon", 4),
    ("u0", "a1", "domain 0", -2),
    ("lost", "gone", "domain 1", 1),
    ("alien", "a1", "moon", 1),
    ("new", "a1", "domain 0", 7),
]
EXPECTED = {"alien": [], "lost": [], "new": [2, 1], "u0": [1, 0, 8, 9]}


@pytest.fixture(scope="module")
def histories():
    return draw_histories(20)


@pytest.fixture
def dataset(tmp_path, histories):
    return write_dataset(
        tmp_path / "data", histories, item_ids=ITEMS, cuts=(7,)
    )


def log(folder, rows=LOG, name="log.parquet", **types):
    columns = dict(
        zip(
            ("user_id", "item_id", "domain", "timestamp"),
            zip(*rows, strict=True),
            strict=True,
        )
    )
    path = folder / name
    if path.suffix == ".csv":
        path.write_text(
            "\n".join(
                [",".join(columns), *(",".join(map(str, row)) for row in rows)]
            )
            + "\n"
        )
    else:
        pq.write_table(
            pa.table(
                {
                    key: pa.array(values, types.get(key))
                    for key, values in columns.items()
                }
            ),
            path,
        )
    return str(path)


def given(folder, ids, name="users.parquet"):
    pq.write_table(pa.table({"user_id": ids}), folder / name)
    return str(folder / name)


def found(tmp_path, dataset, report=None, **options):
    """({raw id: history} in its order, HistoryCounts); whenever it was, is with the histories in the order of time."""
    (tmp_path / "out").mkdir()
    (tmp_path / "scratch").mkdir()
    with Stages(False) as stages:
        facts = write_histories(
            tmp_path / "out",
            HistoriesConfig(**options),
            dataset,
            tmp_path / "scratch",
            stages,
            threads=2,
            report=report,
        )
    assert HistoryCounts.load(tmp_path / "out") == facts
    histories, size = {}, HistoriesConfig(**options).part_users
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert [file.name for file in files] == [
        f"{part:05d}.parquet" for part in range(-(-facts.users // size))
    ]
    for part in range(len(files)):
        ids, lengths_B, rows_N, ticks_N = read_histories(tmp_path / "out", part)
        assert (
            len(ids)
            == len(lengths_B)
            == (size if part < len(files) - 1 else facts.users - part * size)
        )
        assert (lengths_B.dtype, rows_N.dtype, ticks_N.dtype) == (
            np.int64,
            np.int32,
            np.uint16,
        )
        assert len(ticks_N) == len(rows_N)
        ends = np.cumsum(lengths_B)
        for user, end, length in zip(
            ids.to_pylist(), ends, lengths_B, strict=True
        ):
            assert user not in histories
            histories[user] = rows_N[end - length : end].tolist()
            assert (np.diff(ticks_N[end - length : end].astype(int)) >= 0).all()
    return histories, facts


@pytest.mark.parametrize("part_users", [1, 2, 3, 100])
@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_logs_are_mapped_and_what_is_not_known_is_counted(
    tmp_path, dataset, part_users, name
):
    histories, facts = found(
        tmp_path,
        dataset,
        inputs=(log(tmp_path, name=name),),
        part_users=part_users,
    )
    assert list(histories.items()) == list(EXPECTED.items())
    assert facts == HistoryCounts(
        users=4, without_history=2, unknown_domain=2, unknown_item=2, unread=0
    )


def test_times_come_along_in_the_datasets_ticks(tmp_path, dataset):
    """The dataset's time goes from 0 to 65,535; what is later, as a log of today is, counts as its end."""
    rows = [
        ("x", "a1", "domain 0", 7),
        ("x", "a1", "domain 0", 70_000),
        ("y", "b1", "domain 1", 300),
    ]
    logs = log(tmp_path, [*rows, ("y", "no", "domain 1", 9)])
    for name, options in (
        ("logs", {"inputs": (logs,)}),
        ("own", {"users": given(tmp_path, ["u3", "u9"])}),
    ):
        (tmp_path / name / "scratch").mkdir(parents=True)
        with Stages(False) as stages:
            write_histories(
                tmp_path / name,
                HistoriesConfig(**options),
                dataset,
                tmp_path / name / "scratch",
                stages,
                threads=2,
            )
    assert read_histories(tmp_path / "logs", 0)[3].tolist() == [7, 65_535, 300]
    own = Histories(dataset, 1).read(np.array([3, 9])).ticks_N
    assert (
        own.any()
        and read_histories(tmp_path / "own", 0)[3].tolist() == own.tolist()
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_users_and_events_come_in_batches_that_do_not_match(
    tmp_path, dataset, monkeypatch, batch
):
    monkeypatch.setattr(trainer.serving.user_histories, "_BATCH", batch)
    histories, facts = found(tmp_path, dataset, inputs=(log(tmp_path),))
    assert histories == EXPECTED and facts == HistoryCounts(4, 2, 2, 2, 0)


def test_given_users_alone_also_such_that_no_log_has(tmp_path, dataset):
    users = given(tmp_path, ["u0", "zero", "u0", "new"])
    histories, facts = found(
        tmp_path, dataset, inputs=(log(tmp_path),), users=users
    )
    assert list(histories.items()) == [
        ("new", [2, 1]),
        ("u0", [1, 0, 8, 9]),
        ("zero", []),
    ]
    assert facts == HistoryCounts(
        users=3, without_history=1, unknown_domain=1, unknown_item=1, unread=0
    )


@pytest.mark.parametrize("kind", [pa.int32(), pa.string()])
def test_ids_are_the_same_whatever_they_are_written_as(tmp_path, dataset, kind):
    logs = log(
        tmp_path,
        [(7, "a1", "domain 0", 1), (10, "b1", "domain 1", 1)],
        user_id=pa.int64(),
    )
    users = given(tmp_path, pa.array([10, 9, 7]).cast(kind))
    histories, _ = found(tmp_path, dataset, inputs=(logs,), users=users)
    expected = (
        {7: [1], 9: [], 10: [9]}
        if kind == pa.int32()
        else {"10": [9], "7": [1], "9": []}
    )
    assert list(histories.items()) == list(expected.items())


def daily_rows(users=40, seed=4):
    draw = np.random.default_rng(seed)
    rows = []
    for place in draw.permutation(users * 12).tolist():
        item = int(draw.integers(0, 9))
        day = f"2024-01-0{int(draw.integers(1, 4))}"
        rows.append((place % users, item, ("a", "b", "c")[item % 3], day))
    return rows


@pytest.mark.parametrize("batch", [1, 65536])
@pytest.mark.parametrize("tie_order", ["hash", "file", None])
def test_the_log_of_a_dataset_gives_its_histories_with_equal_times_too(
    tmp_path, monkeypatch, tie_order, batch
):
    """None: a dataset of before, whose equal times are in the order of domain and item."""
    rows = daily_rows()
    for place in range(3):
        log(tmp_path, rows[place * 160 : (place + 1) * 160], f"{place}.csv")
    logs = str(tmp_path / "*.csv")
    prepared = prepare(
        PrepareConfig(
            (logs,), str(tmp_path / "data"), tie_order=tie_order or "hash"
        )
    )
    if tie_order is None:
        prepared = as_before_ties(prepared)
    (tmp_path / "1").mkdir()
    monkeypatch.setattr(trainer.serving.user_histories, "_BATCH", batch)
    of_logs, _ = found(tmp_path / "1", prepared, inputs=(logs,))
    if tie_order is None:
        items = {}
        for domain in prepared.domains:
            table = pq.read_table(prepared.folder / domain.vocabulary)
            for item, row in zip(table["item_id"], table["row"], strict=True):
                items[domain.name, item.as_py()] = row.as_py()
        expected = {user: [] for user in range(40)}
        for user, item, domain, _ in sorted(rows, key=lambda row: row[::-1]):
            expected[user].append(items[domain, item])
    else:
        (tmp_path / "2").mkdir()
        expected, _ = found(tmp_path / "2", prepared)
    assert of_logs == expected


KINDS = {
    "dates for seconds": ("1700000000", "2024-01-01", "numbers (seconds)", "dates"),
    "seconds for dates": ("2024-01-01", "1700000000", "dates", "numbers (seconds)"),
    "milliseconds": ("1700000000", "1700000000000", "numbers (seconds)", "numbers (milliseconds)"),
    "seconds for nanoseconds": ("1700000000000000000", "1700000000", "numbers (nanoseconds)", "numbers (seconds)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "named", "other"), KINDS.values(), ids=KINDS
)
def test_logs_with_another_kind_of_time_are_refused(
    tmp_path, ours, theirs, named, other
):
    rows = [("u", item, "a", ours) for item in range(3)]
    source = log(tmp_path, rows, "data.csv")
    prepared = prepare(PrepareConfig((source,), str(tmp_path / "data")))
    asked = log(tmp_path, [("u", 1, "a", theirs)], "asked.csv")
    with pytest.raises(InputError) as error:
        found(tmp_path, prepared, inputs=(asked,))
    assert str(error.value) == (
        f"{prepared.folder}: its times are {named}, those of {asked} are {other}: "
        "write one kind"
    )
    if "numbers" in named and other != "dates":
        for name in ("out", "scratch"):
            shutil.rmtree(tmp_path / name)
        with pytest.raises(InputError, match="write one kind"):
            found(tmp_path, as_before_ties(prepared), inputs=(asked,))


def test_a_dataset_in_a_folder_called_like_a_column_is_read(tmp_path):
    rows = daily_rows(5)
    source = log(tmp_path, rows, "data.csv")
    below = tmp_path / "user=alice" / "user_id=3" / "row=1"
    prepared = prepare(PrepareConfig((source,), str(below / "domain=a")))
    (tmp_path / "logs").mkdir()
    of_dataset, _ = found(tmp_path, prepared)
    of_logs, counts = found(tmp_path / "logs", prepared, inputs=(source,))
    assert of_dataset == of_logs and list(of_logs) == list(range(5))
    assert counts.unknown_item == counts.unknown_domain == 0


@pytest.mark.parametrize("part_users", [6, 100])
def test_without_logs_the_dataset_has_the_histories_whole(
    tmp_path, dataset, histories, part_users
):
    read, facts = found(tmp_path, dataset, part_users=part_users)
    assert list(read.items()) == [
        (f"u{user}", history.tolist()) for user, history in enumerate(histories)
    ]
    assert facts == HistoryCounts(20, 0, 0, 0, 0)


def test_given_users_of_the_dataset_come_before_those_that_it_does_not_know(
    tmp_path, dataset, histories
):
    users = given(tmp_path, ["u11", "x", "u2", "nobody", "u2"])
    read, facts = found(tmp_path, dataset, users=users)
    assert list(read) == ["u2", "u11", "nobody", "x"]
    assert [read["u2"], read["u11"], read["x"]] == [
        histories[2].tolist(),
        histories[11].tolist(),
        [],
    ]
    assert facts == HistoryCounts(4, 2, 0, 0, 0)


@pytest.mark.parametrize("given_too", [False, True])
def test_users_of_a_damaged_block_are_refused_or_left_out_and_counted(
    tmp_path, dataset, given_too
):
    spoil_block(dataset, 0, 1)  # users 3, 4, 5
    options = {"users": given(tmp_path, ["u1", "u4", "x"])} if given_too else {}
    with pytest.raises(InputError, match=r"000000\.tar"):
        found(tmp_path, dataset, **options)
    for name in ("out", "scratch"):
        for file in (tmp_path / name).iterdir():
            file.unlink()
        (tmp_path / name).rmdir()
    lines = []
    read, facts = found(tmp_path, dataset, lines.append, **options)
    left = (
        ["u1", "x"]
        if given_too
        else [f"u{user}" for user in range(20) if user not in (3, 4, 5)]
    )
    assert (
        list(read) == left
        and facts.unread == (1 if given_too else 3)
        and facts.users == len(left)
        and lines
    )


def test_a_domain_is_given_where_logs_have_none(tmp_path, dataset):
    pq.write_table(
        pa.table({"who": ["x", "x"], "what": ["b2", "b1"], "when": [2, 1]}),
        tmp_path / "log.parquet",
    )
    columns = {
        "user_column": "who",
        "item_column": "what",
        "time_column": "when",
        "log_domain": "domain 1",
    }
    histories, _ = found(
        tmp_path, dataset, inputs=(str(tmp_path / "log.parquet"),), **columns
    )
    assert histories == {"x": [9, 10]}


def nobody(folder):
    return {"users": given(folder, pa.array([], pa.string()))}, "names no user"


def no_user_column(folder):
    pq.write_table(pa.table({"uid": ["u1"]}), folder / "users.parquet")
    return {
        "users": str(folder / "users.parquet")
    }, "no column 'user_id'; it has uid"


def an_empty_id(folder):
    return {
        "users": given(folder, ["u1", None])
    }, "users.parquet: row 2: 'user_id' is empty"


def no_such_file(folder):
    return {
        "users": str(folder / "users.parquet")
    }, "users.parquet does not exist"


def a_log_without_items(folder):
    return {
        "inputs": (given(folder, ["u1"], "log.parquet"),)
    }, "no column 'item_id'"


BAD = [nobody, no_user_column, an_empty_id, no_such_file, a_log_without_items]


@pytest.mark.parametrize("spoil", BAD, ids=[spoil.__name__ for spoil in BAD])
def test_what_cannot_be_read_is_named(tmp_path, dataset, spoil):
    options, message = spoil(tmp_path)
    with pytest.raises(InputError) as error:
        found(tmp_path, dataset, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part_users": 0}, "part_users is 0"),
        ({"log_domain": ""}, "log_domain is empty"),
        ({"memory": "much"}, "'much' is no amount"),
        ({"memory": "1MB"}, "too little"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        check_memory(HistoriesConfig(**options))
