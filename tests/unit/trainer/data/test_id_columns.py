"""Ids of every type: what comes out of a dataset joins what went into it."""

import datetime
import uuid
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer
from tests.unit.trainer.data.prepare.test_pipeline import run, write
from trainer.config.serving import HistoriesConfig
from trainer.data.duckdb_engine import open_connection
from trainer.data.format.vocabulary import read_item_ids
from trainer.data.id_columns import IdColumn
from trainer.errors import InputError
from trainer.evaluation.candidate_files import read_candidates
from trainer.files.progress import Stages
from trainer.serving.user_histories import read_histories, write_histories

UUIDS = [uuid.UUID(int=place) for place in range(1, 4)]
DAYS = [datetime.date(2024, 1, day) for day in range(1, 4)]
DIGITS = 10**25
# The values of a column, its type, and the ids that they are.
COLUMNS = {
    "int8": ([-1, 2, 127], pa.int8(), [-1, 2, 127]),
    "int16": ([-1, 2, 3], pa.int16(), [-1, 2, 3]),
    "int32": ([-1, 2, 3], pa.int32(), [-1, 2, 3]),
    "int64": ([-1, 2, 2**62 + 1], pa.int64(), [-1, 2, 2**62 + 1]),
    "uint8": ([1, 2, 255], pa.uint8(), [1, 2, 255]),
    "uint16": ([1, 2, 3], pa.uint16(), [1, 2, 3]),
    "uint32": ([1, 2, 2**32 - 1], pa.uint32(), [1, 2, 2**32 - 1]),
    "uint64": ([1, 2, 3], pa.uint64(), [1, 2, 3]),
    "a large uint64": ([1, 2, 2**64 - 1], pa.uint64(), ["1", "2", str(2**64 - 1)]),
    "float16": ([1.0, 2.0, 3.0], pa.float32(), [1, 2, 3]),
    "float32": ([1.0, -0.0, 2.0**24], pa.float32(), [1, 0, 2**24]),
    "float64": ([56.0, -7.0, 2.0**53], pa.float64(), [56, -7, 2**53]),
    "decimal": ([Decimal("5.00"), Decimal(6), Decimal(-7)], pa.decimal128(9, 2), [5, 6, -7]),
    "a database's number": ([Decimal(5), Decimal(6), Decimal(7)], pa.decimal128(20, 0), [5, 6, 7]),
    "a large decimal": ([Decimal(DIGITS), Decimal(1), Decimal(2)], pa.decimal128(38, 1), [str(DIGITS), "1", "2"]),
    "text": (["7", "007", "7.0"], pa.string(), ["7", "007", "7.0"]),
    "large text": (["a", "b", "é"], pa.large_string(), ["a", "b", "é"]),
    "categories": (["a", "b", "c"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "c"]),
    "bytes": (["a", "b", "é"], pa.binary(), ["a", "b", "é"]),
    "bytes of one length": (["aa", "bb", "é"], pa.binary(2), ["aa", "bb", "é"]),
    "UUID": (UUIDS, pa.uuid(), [str(one) for one in UUIDS]),
    "bool": ([True, False, True], pa.bool_(), ["true", "false", "true"]),
    "date": (DAYS, pa.date32(), [str(day) for day in DAYS]),
}  # fmt: skip


def column(name):
    values, kind, _ = COLUMNS[name]
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_binary(kind):
        values = [value.encode() for value in values]
    if pa.types.is_dictionary(kind):
        return pa.array(values).dictionary_encode()
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(
            kind, pa.array([value.bytes for value in values], pa.binary(16))
        )
    return pa.array(values, kind)


def log_of(name):
    """Each of three users has the three items, in the order of time."""
    ids = column(name)
    places = [(user, item) for user in range(3) for item in range(3)]
    return pa.table(
        {
            "user_id": ids.take(pa.array([user for user, _ in places])),
            "item_id": ids.take(pa.array([item for _, item in places])),
            "domain": ["shop"] * 9,
            "timestamp": [3 * user + item for user, item in places],
        }
    )


def ids_of(dataset):
    """The ids of its users and items, each sorted by its text."""
    users = pq.read_table(dataset.folder / "users.parquet")["user_id"]
    (domain,) = dataset.domains
    items = read_item_ids(dataset, domain)
    return sorted(users.to_pylist(), key=str), sorted(
        items.to_pylist(), key=str
    )


def histories_of(folder, dataset, **options):
    """{raw id: rows of M} of what `recommend` asks for."""
    for name in ("histories", "scratch"):
        (folder / name).mkdir()
    with Stages(False) as stages:
        counts = write_histories(
            folder / "histories",
            HistoriesConfig(**options),
            dataset,
            folder / "scratch",
            stages,
            threads=1,
        )
    histories = read_histories(folder / "histories", 0)
    ends = np.cumsum(histories.lengths_B)
    found = {}
    for user, length, end in zip(
        histories.ids.to_pylist(), histories.lengths_B, ends, strict=True
    ):
        found[user] = histories.rows_N[end - length : end].tolist()
    return found, counts


@pytest.mark.parametrize("name", COLUMNS)
def test_the_ids_of_a_column_are_the_same_all_the_way_to_who_asks(
    tmp_path, name
):
    """Parquet into a dataset; users, logs and candidates of the same type find themselves in it."""
    log = tmp_path / "log.parquet"
    pq.write_table(log_of(name), log)
    dataset = run(tmp_path / "data", log)
    distinct = sorted(set(COLUMNS[name][2]), key=str)
    assert ids_of(dataset) == (distinct, distinct)
    users = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": column(name)}), users)
    for place, options in enumerate(
        ({"users": str(users)}, {"inputs": (str(log),)})
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        histories, counts = histories_of(folder, dataset, **options)
        assert sorted(histories, key=str) == distinct
        assert (counts.without_history, counts.unknown_item) == (0, 0)
        assert all(len(rows) >= 3 for rows in histories.values())
    if len(distinct) == 3:
        candidates = tmp_path / "candidates.parquet"
        ids = column(name)
        offsets = pa.array([0, 2, 4, 6], pa.int32())
        others = ids.take(pa.array([1, 2, 0, 2, 0, 1]))
        lists = pa.ListArray.from_arrays(offsets, others)
        pq.write_table(
            pa.table({"user_id": ids, "positive": ids, "negatives": lists}),
            candidates,
        )
        assert len(read_candidates(dataset, candidates)) == 3


@pytest.mark.parametrize(
    "name", ["int64", "float64", "text", "categories", "UUID", "decimal"]
)
def test_a_data_frame_gives_the_same_ids(tmp_path, name):
    frame = log_of(name).to_pandas()
    dataset = trainer.prepare(frame, tmp_path / "data")
    distinct = sorted(COLUMNS[name][2], key=str)
    assert ids_of(dataset) == (distinct, distinct)
    if name in ("int64", "float64", "text"):
        users = pq.read_table(dataset.folder / "users.parquet").to_pandas()
        joined = frame.merge(users, on="user_id")
        assert len(joined) == len(frame)


def test_a_csv_of_whole_numbers_that_pandas_made_floats_has_whole_numbers(
    tmp_path,
):
    frame = log_of("float64").to_pandas()
    frame.to_csv(tmp_path / "log.csv", index=False)
    assert "56.0" in (tmp_path / "log.csv").read_text()
    dataset = run(tmp_path / "data", tmp_path / "log.csv")
    assert set(ids_of(dataset)[0]) == {-7, 56, 2**53}


@pytest.mark.parametrize(
    "other", ["int64.parquet", "decimal.parquet", "csv", "text.parquet"]
)
def test_floats_in_one_file_are_the_numbers_of_another(tmp_path, other):
    """A column that once had a missing value; beside text they are the texts of numbers."""
    logs = tmp_path / "logs"
    rows = [("u", item, "shop", item) for item in range(5, 9)]
    floats = {"item_id": pa.float64()}
    write(
        logs / "1.parquet",
        [(u, float(i), d, t) for u, i, d, t in rows],
        types=floats,
    )
    kinds = {
        "int64.parquet": {"item_id": pa.int64()},
        "decimal.parquet": {"item_id": pa.decimal128(9, 3)},
        "text.parquet": {"item_id": pa.string()},
    }
    if other == "csv":
        write(logs / "2.csv", [(u, f"{i}.0", d, t) for u, i, d, t in rows])
    elif other == "text.parquet":
        texts = [(u, str(i), d, t) for u, i, d, t in rows]
        write(logs / "2.parquet", texts, types=kinds[other])
    else:
        write(logs / "2.parquet", rows, types=kinds[other])
    dataset = run(tmp_path / "data", logs)
    expected = [5, 6, 7, 8]
    if other == "text.parquet":
        expected = ["5", "6", "7", "8"]
    assert ids_of(dataset)[1] == expected


@pytest.mark.parametrize(
    "columns", [None, ("timestamp", "domain", "item_id", "user_id")]
)
def test_text_beside_a_column_like_floats_leaves_it_text(tmp_path, columns):
    """1.0 and 1.10 may be versions; in whichever file of texts the other one is."""
    rows = [("u", item, "shop", 1) for item in ("1.0", "2.0", "1.10")]
    write(tmp_path / "logs/1.csv", rows[:2])
    names = ("user_id", "item_id", "domain", "timestamp")
    if columns:
        rows = [row[::-1] for row in rows]
        names = columns
    write(tmp_path / "logs/2.csv", rows[2:], names)
    dataset = run(tmp_path / "data", tmp_path / "logs")
    assert ids_of(dataset)[1] == ["1.0", "1.10", "2.0"]


def test_domains_are_read_as_ids_are(tmp_path):
    rows = [("u", item, 1.0, item) for item in range(3)]
    write(tmp_path / "logs/1.parquet", rows, types={"domain": pa.float64()})
    write(tmp_path / "logs/2.csv", [("v", 1, 1, 3)])
    dataset = run(tmp_path / "data", tmp_path / "logs")
    assert [domain.name for domain in dataset.domains] == ["1"]
    named = run(
        tmp_path / "named",
        write(
            tmp_path / "3.csv", [("u", item, "x", item) for item in range(3)]
        ),
        domain="12.0",
    )
    assert [domain.name for domain in named.domains] == ["12.0"]


FAULTS = {
    "a fraction": ([56.0, 56.5], pa.float64(), "row 2: 'item_id' is 56.5: an id is"),
    "beyond 2^53": ([1.0, 2.0**53 + 2], pa.float64(), "row 2: 'item_id' is 9007199254740994.0"),
    "beyond 2^24": ([1.0, 2.0**24 + 2], pa.float32(), "row 2: 'item_id' is 16777218.0"),
    "no number": ([1.0, float("nan")], pa.float64(), "row 2: 'item_id' is nan"),
    "a fraction of a decimal": ([Decimal(1), Decimal("1.50")], pa.decimal128(9, 2), "row 2: 'item_id' is 1.50"),
    "no UTF-8": ([b"a", b"\xff"], pa.binary(), r"row 2: 'item_id' is \\xFF: bytes that are no UTF-8"),
    "no bytes": ([b"a", b""], pa.binary(), "row 2: 'item_id' is empty"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind", "named"), FAULTS.values(), ids=FAULTS
)
def test_what_is_no_id_is_refused_by_name(tmp_path, values, kind, named):
    rows = [("u", value, "shop", 1) for value in values]
    log = write(tmp_path / "log.parquet", rows, types={"item_id": kind})
    with pytest.raises(InputError, match=rf"log\.parquet: {named}"):
        run(tmp_path / "out", log)
    assert not (tmp_path / "out").exists()


def test_candidates_that_are_no_ids_are_refused_by_name(tmp_path):
    rows = [("u", item, "shop", item) for item in range(4)]
    dataset = run(tmp_path / "data", write(tmp_path / "log.csv", rows))
    given = {"user_id": ["u"], "positive": [1.0], "negatives": [[2.0, 2.5]]}
    pq.write_table(pa.table(given), tmp_path / "candidates.parquet")
    with pytest.raises(InputError, match=r"row 0: item 2\.5 is not in"):
        read_candidates(dataset, tmp_path / "candidates.parquet")


def test_the_text_of_an_id_does_not_depend_on_the_others():
    with open_connection() as connection:
        for kind, value, text in (
            ("DOUBLE", "7.0", "7"),
            ("DOUBLE", "7.5", "7.5"),
            ("DOUBLE", "'inf'", "inf"),
            ("DECIMAL(9, 2)", "7.00", "7"),
            ("DECIMAL(9, 2)", "7.50", "7.50"),
            ("BLOB", "'caf\\xC3\\xA9'", "café"),
            ("BLOB", "'\\xFF'", "\\xFF"),
            ("VARCHAR", "'7.0'", "7.0"),
        ):
            sql_type = kind.replace(" ", "")
            column = IdColumn(f"({value}::{kind})", sql_type)
            query = f"SELECT {column.text_sql()}"
            assert connection.execute(query).fetchone() == (text,)


def test_users_of_a_data_frame_are_found(tmp_path):
    """NumPy, pandas and lists of floats, as `Run.recommend(users=…)` takes them."""
    dataset = trainer.prepare(log_of("float64").to_pandas(), tmp_path / "data")
    for place, users in enumerate(
        (
            [56.0],
            np.array([56.0, -7.0]),
            pd.Series([56.0, 2.0**53]),
            [56],
            ["56"],
        )
    ):
        folder = tmp_path / str(place)
        folder.mkdir()
        file = trainer.api._file_of_users(users, "user_id", folder)
        _, counts = histories_of(folder, dataset, users=file)
        assert (counts.users, counts.without_history) == (len(users), 0)
