"""Both engines give the same bytes, or the same refusals. Every test starts real Spark jobs; the session is one for all."""

import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import trainer.data.prepare.pipeline
from tests.helpers.log_forms import FORMS, bad_csv, sample_events
from tests.unit.trainer.data.logs.test_duckdb_logs import UNREADABLE
from tests.unit.trainer.data.prepare.test_pipeline import (
    BAD_ALONE,
    BAD_FILES,
    COLUMNS,
    digests,
    some_rows,
    write,
)
from trainer.config.prepare import PrepareConfig, SyntheticConfig
from trainer.data.prepare.ids import Ids
from trainer.data.prepare.layout import Layout
from trainer.data.synthetic import synthesize_logs
from trainer.errors import InputError

if importlib.util.find_spec("pyspark") is None:
    pytest.skip(
        "PySpark is not installed: pip install -e '.[spark]'",
        allow_module_level=True,
    )
if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
    pytest.skip(
        "Spark needs Java 17, which is not here", allow_module_level=True
    )

from pyspark.sql import SparkSession

import trainer.data.prepare.spark

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[5]


@pytest.fixture(scope="module", autouse=True)
def session(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("PYTHONPATH", str(ROOT))  # of Spark's Python processes
        settings = {
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.sql.shuffle.partitions": "3",
            "spark.sql.session.timeZone": "Asia/Seoul",  # what the session had does not matter, and it gets it back
            "spark.sql.warehouse.dir": str(
                tmp_path_factory.mktemp("warehouse")
            ),
            "spark.local.dir": str(tmp_path_factory.mktemp("local")),
            "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
            # Rows are few: a compiled query takes far longer to make than to run.
            "spark.sql.codegen.wholeStage": "false",
            "spark.sql.codegen.factoryMode": "NO_CODEGEN",
        }
        builder = SparkSession.builder.master("local[2]")
        for name, value in settings.items():
            builder = builder.config(name, value)
        session = builder.getOrCreate()
        session.sparkContext.setLogLevel("OFF")
        yield session
        session.stop()


def run(engine, output, *inputs, **options):
    config = PrepareConfig(
        tuple(str(path) for path in inputs), str(output), **options
    )
    return {
        "duckdb": trainer.data.prepare.pipeline,
        "spark": trainer.data.prepare.spark,
    }[engine].prepare(config)


def both(folder, *inputs, **options):
    """The dataset that both engines make."""
    made = {
        engine: run(engine, folder / engine, *inputs, **options)
        for engine in ("duckdb", "spark")
    }
    assert digests(made["spark"].folder) == digests(made["duckdb"].folder)
    assert (
        sorted(
            path.name for path in folder.iterdir() if path.name.startswith(".")
        )
        == []
    )
    return made["spark"]


# --- the same bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_synthetic_logs_in_several_parts_and_streams(
    tmp_path, monkeypatch, session
):
    synthesize_logs(
        str(tmp_path / "logs"),
        SyntheticConfig(users=300, items=400, domains=3, mean_length=12),
    )
    monkeypatch.setattr(trainer.data.prepare.pipeline, "_EVENT_BYTES", 10**7)
    monkeypatch.setattr(trainer.data.prepare.spark, "_PART_INTERACTIONS", 700)
    dataset = both(
        tmp_path,
        tmp_path / "logs",
        streams=5,
        shard_users=20,
        block_users=7,
        seed=3,
    )
    assert len(dataset.shards) == 15
    assert session.conf.get("spark.sql.session.timeZone") == "Asia/Seoul"


ODD = [
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
    "\r\n",
    "é",
    "e\u0301",
    "日本",
]
ODD += [
    "😀",
    "\uffff",
    "\ue000",
    "a\\",
    "\\N",
    ' "a"',
    "${x}",
    "\u2028",
    "A",
    "a",
    "á",
    "Ⅷ",
]


@pytest.mark.slow
@pytest.mark.parametrize("least", [0, 2])
def test_odd_texts_ties_and_duplicates_in_files_of_all_kinds(tmp_path, least):
    """Folders have odd names too, and one is like a partition's."""
    draw = np.random.default_rng(4)
    rows = [
        (
            ODD[user],
            ODD[item],
            ["shop", "Shop", "ads'", "дом"][domain],
            int(time),
        )
        for user, item, domain, time in draw.integers(
            0, [len(ODD), len(ODD), 4, 5], (400, 4)
        )
    ]
    rows += rows[::3]
    names = [
        "a b%20/[x]{1,2}.parquet",
        "day=1/b_.csv",
        "day=1/c.tsv.gz",
        "d*.csv.gz",
        "day=2/e.parquet",
    ]
    for number, name in enumerate(names):
        part = rows[number :: len(names)]
        if (
            ".tsv" in name
        ):  # has neither quotes nor fields with tabs or line ends
            part = [
                row for row in part if not set("\t\r\n") & set(row[0] + row[1])
            ]
        write(tmp_path / "lo gs" / name, part)
    dataset = both(
        tmp_path, tmp_path / "lo gs", min_user=least, min_item=least, streams=3
    )
    assert (
        pq.read_table(dataset.folder / "users.parquet")["user_id"].type
        == pa.string()
    )


@pytest.mark.slow
def test_whole_numbers_are_told_from_texts_over_all_files(tmp_path):
    rows = some_rows()
    write(
        tmp_path / "one/a.parquet",
        rows[::2],
        types={"user_id": pa.int16(), "item_id": pa.uint32()},
    )
    write(tmp_path / "one/b.csv", rows[1::2])
    dataset = both(
        tmp_path / "one", tmp_path / "one/*.*", min_user=8, min_item=2
    )
    assert (
        pq.read_table(dataset.folder / "users.parquet")["user_id"].type
        == pa.int64()
    )
    write(tmp_path / "two/a.parquet", rows[::2], types={"user_id": pa.int16()})
    write(
        tmp_path / "two/b.csv",
        [(f"0{user}", *rest) for user, *rest in rows[1::2]],
    )
    dataset = both(tmp_path / "two", tmp_path / "two/*.*")
    assert (
        pq.read_table(dataset.folder / "users.parquet")["user_id"].type
        == pa.string()
    )


@pytest.mark.slow
def test_ids_of_other_types_have_the_same_text(tmp_path):
    days = [
        datetime.date(2024, 2, 29),
        datetime.date(1, 1, 1),
        datetime.date(1582, 10, 10),
        datetime.date(9999, 12, 31),
    ]
    values = {
        "float.parquet": (
            [1.0, 2e9, -7.0, 999_999_999_999_999.0],
            pa.float64(),
        ),
        "half.parquet": ([1.0, 16_777_215.0, -8.0, 10_000_000.0], pa.float32()),
        "bool.parquet": ([True, False, True, False], pa.bool_()),
        "date.parquet": (days, pa.date32()),
        "decimal.parquet": ([1, 2, -3, 0], pa.decimal128(12, 3)),
        "decimal6.parquet": ([1, 2, -3, 0], pa.decimal128(38, 6)),
        "decimal0.parquet": ([10**25, 2, -3, 0], pa.decimal128(38, 0)),
        "wide.parquet": ([2**64 - 1, 2, 3, 0], pa.uint64()),
        "zero.parquet": ([1.0, -0.0, 2.0**53, 4.0], pa.float64()),
        "bytes.parquet": ([b"x", "é".encode(), b"1", b"2"], pa.binary()),
        "large.parquet": (["x", "y", "z", "1"], pa.large_string()),
    }
    for name, (ids, kind) in values.items():
        columns = [(one, other, one, 3) for one in ids for other in ids]
        write(
            tmp_path / "logs" / name,
            columns,
            types={"user_id": kind, "item_id": kind, "domain": kind},
        )
    both(tmp_path, tmp_path / "logs")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_floats_in_text_are_whole_numbers_where_all_of_it_is(tmp_path, kind):
    items = ["12.0", "7", "8.00", "3"]
    if kind == "text":
        items.append("1.10")
    rows = [(user, item, "1.0", 3) for user in range(3) for item in items]
    write(tmp_path / "logs/1.csv", rows)
    floats = [(4, item, 1, 3) for item in (12.0, 8.0)]
    write(tmp_path / "logs/2.parquet", floats, types={"domain": pa.float64()})
    dataset = both(tmp_path, tmp_path / "logs")
    (domain,) = dataset.domains
    items = pq.read_table(dataset.folder / domain.vocabulary)["item_id"]
    expected = {12, 7, 8, 3}
    if kind == "text":
        expected = {"12.0", "12", "7", "8.00", "8", "3", "1.10"}
    assert set(items.to_pylist()) == expected and domain.name == "1"


@pytest.mark.slow
@pytest.mark.parametrize("tie_order", ["hash", "file"])
def test_equal_times_stand_in_the_same_order(tmp_path, monkeypatch, tie_order):
    """In several parts; files of text lie between others, and dates are times of their own."""
    monkeypatch.setattr(trainer.data.prepare.pipeline, "_EVENT_BYTES", 10**7)
    monkeypatch.setattr(trainer.data.prepare.spark, "_PART_INTERACTIONS", 100)
    rows = [(*row[:3], f"2024-01-0{row[3] % 3 + 1}") for row in some_rows(400)]
    for place, name in enumerate(
        ("a b.csv", "b.parquet", "c.tsv", "d.parquet")
    ):
        write(tmp_path / "logs" / name, rows[place::4])
    dataset = both(
        tmp_path,
        tmp_path / "logs",
        tie_order=tie_order,
        shard_users=4,
        streams=2,
    )
    assert dataset.tie_order == tie_order and dataset.time_kind == "dates"
    assert dataset.tied_users > 10


def test_rows_of_a_table_have_no_order(tmp_path, session):
    frame = session.createDataFrame(some_rows(), list(COLUMNS))
    frame.createOrReplaceTempView("unordered")
    with pytest.raises(
        InputError, match=r"table:unordered: .*--tie-order file"
    ):
        run("spark", tmp_path / "out", "table:unordered", tie_order="file")


@pytest.mark.slow
def test_units_that_differ_between_domains_are_warned_of(tmp_path, capfd):
    rows = [
        (user, item, "a", 1_700_000_000)
        for user in range(3)
        for item in range(3)
    ]
    rows += [(user, item, "b", 1_700_000_000_000) for user, item, *_ in rows]
    both(tmp_path, write(tmp_path / "log.csv", rows))
    warning = "times look like seconds (a) and milliseconds (b)"
    assert capfd.readouterr().err.count(warning) == 2


WHOLE = ["3", "-2", "0", "9223372036854775807", "5", "3"]
FLOAT = [
    "+1",
    "1.",
    ".5",
    "1e3",
    "1E+3",
    "-.5",
    "007",
    "-0.0",
    "0",
    "1e-400",
    "9007199254740993",
    "-1e308",
]
DATES = [
    "2024-01-01",
    "2024-01-01 00:00:00.1",
    "2024-01-01T00:00:00.000001Z",
    "2024-01-01 09:00:00+09:00",
    "0001-01-01",
]
DATES += [
    "2023-12-31 19:00:00-05:30",
    "9999-12-31 23:59:59",
    "1582-10-10",
    "1969-12-31T23:59:59.999999",
]
DATES += ["2024-02-29T00:00:00+14:59", "2024-01-01T00:00:00-00:30"]
DAYS = [
    datetime.datetime(*day)
    for day in ((2024, 1, 1), (1500, 2, 3), (2262, 1, 1), (1970, 1, 1))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "texts", [WHOLE, FLOAT, DATES], ids=["whole", "float", "date"]
)
def test_times_in_text_go_in_the_same_order(tmp_path, texts):
    """Each time has an item of its own, so that another order is another history."""
    write(
        tmp_path / "log.csv",
        [
            (user, item, "a", text)
            for user in range(3)
            for item, text in enumerate(texts)
        ],
    )
    both(tmp_path, tmp_path / "log.csv")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "values"),
    [
        (
            [
                pa.float32(),
                pa.float64(),
                pa.int64(),
                pa.decimal128(15, 2),
                pa.decimal128(20, 0),
            ],
            [-1, 0, 3, 2**23],
        ),
        (
            [
                pa.date32(),
                pa.timestamp("us"),
                pa.timestamp("ms", "America/Lima"),
                pa.timestamp("us", "UTC"),
            ],
            DAYS,
        ),
    ],
    ids=["numbers", "dates"],
)
def test_times_of_all_types_go_in_the_same_order(tmp_path, kinds, values):
    for number, kind in enumerate(kinds):
        rows = [
            (user, 10 * number + item, "a", value)
            for user in range(3)
            for item, value in enumerate(values)
        ]
        write(
            tmp_path / "logs" / f"{number}.parquet",
            rows,
            types={"timestamp": kind},
        )
    both(tmp_path, tmp_path / "logs")


@pytest.mark.slow
def test_addresses_and_tables_are_read_as_files_are(tmp_path, session):
    """The table compares texts without regard to case, where Spark knows such; the dataset does not."""
    rows = [
        ("Aa"[user % 2] + str(user // 2), item, domain, time)
        for user, item, domain, time in some_rows()
    ]
    write(tmp_path / "logs/a b.parquet", rows[::2])
    write(tmp_path / "logs/c.csv", rows[1::2])
    write(tmp_path / "logs/notes.parquet.txt", rows)
    expected = digests(
        run("duckdb", tmp_path / "duckdb", tmp_path / "logs").folder
    )
    assert (
        digests(
            run("spark", tmp_path / "address", f"file://{tmp_path}/logs").folder
        )
        == expected
    )
    mixed = f"file://{tmp_path}/logs/*.csv", tmp_path / "logs/a b.parquet"
    assert digests(run("spark", tmp_path / "mixed", *mixed).folder) == expected
    kind = "STRING" if session.version < "4" else "STRING COLLATE UTF8_LCASE"
    frame = session.createDataFrame(rows, list(COLUMNS))
    texts = frame.selectExpr(
        f"CAST(user_id AS {kind}) AS user_id", *COLUMNS[1:]
    )
    texts.createOrReplaceTempView("events")
    kinds = run("spark", tmp_path / "table", "table:events").domains
    assert [one.interactions for one in kinds] == [
        sum(row[2] == one.name for row in rows) for one in kinds
    ]
    assert (tmp_path / "table/users.parquet").read_bytes() == (
        tmp_path / "duckdb/users.parquet"
    ).read_bytes()


# --- refusals -----------------------------------------------------------------------------------------------------------


# One of each way in which a file of text or of Parquet is refused.
REFUSED = (
    "missing column",
    "no bytes",
    "a header alone",
    "no Parquet",
    "Parquet spoiled inside",
    "no gzip",
    "not UTF-8",
    "too few fields",
    "no user",
    "no domain",
    "NaN item",
    "null time",
    "NaN time in CSV",
    "date among numbers",
    "time of bool",
    "list of ids",
    "no such date",
    "one item",
)


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        pytest.param(
            *values,
            id=name,
            marks=[] if name in REFUSED else pytest.mark.slow,
        )
        for name, values in (BAD_FILES | BAD_ALONE).items()
    ],
)
def test_what_one_engine_refuses_the_other_does_with_the_same_words(
    tmp_path, name, data, named
):
    if data is None:
        write(tmp_path / name, [], types={name: pa.int64() for name in COLUMNS})
    else:
        (tmp_path / name).write_bytes(data)
    present = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        run("spark", tmp_path / "out", tmp_path)
    other = {
        "'item_id' holds BIGINT[]": "'item_id' holds array<bigint>",
        "'timestamp' holds TIME": "TIME(",
    }
    words = [other.get(word, word) for word in named]
    assert all(word.lower() in str(error.value).lower() for word in words), (
        error.value
    )
    assert not str(error.value).startswith("file:")
    assert sorted(tmp_path.iterdir()) == present


@pytest.mark.slow
@pytest.mark.parametrize(
    ("column", "values", "kind", "named"),
    [
        (
            "item_id",
            [1.0, 2.5, 3.0],
            pa.float64(),
            "row 2: 'item_id' is 2.5: an id is",
        ),
        ("item_id", [1.0, 2.0, 1e17], pa.float64(), "row 3: 'item_id' is"),
        (
            "user_id",
            [1.0, 2.0**25, 3.0],
            pa.float32(),
            "row 2: 'user_id' is",
        ),
        ("item_id", [1, 2, 3], pa.timestamp("us"), "'item_id' holds TIMESTAMP"),
        (
            "item_id",
            [b"1", b"2", b"\xff"],
            pa.binary(),
            "row 3: 'item_id' is FF: bytes that are no UTF-8",
        ),
        (
            "item_id",
            [Decimal(1), Decimal("1.5"), Decimal(2)],
            pa.decimal128(9, 7),
            "row 2: 'item_id' is 1.5000000: an id is",
        ),
        (
            "timestamp",
            [1, 2, 2**53],
            pa.decimal128(20, 2),
            "row 3: 'timestamp' is",
        ),
        (
            "timestamp",
            ["1", "2", "1_0.5"],
            pa.string(),
            "row 3: 'timestamp' is '1_0.5': a time must be a finite number",
        ),
        (
            "timestamp",
            ["2024-01-01", "2024-1-2", "2024-01-02"],
            pa.string(),
            "row 2: 'timestamp' is '2024-1-2': .* such as",
        ),
    ],
)
def test_what_spark_would_write_or_read_otherwise_is_refused(
    tmp_path, column, values, kind, named
):
    table = {
        "user_id": [1, 1, 2],
        "item_id": [1, 2, 3],
        "domain": ["a"] * 3,
        "timestamp": [1, 2, 3],
    }
    pq.write_table(
        pa.table({**table, column: pa.array(values, kind)}),
        tmp_path / "log.parquet",
    )
    with pytest.raises(InputError, match=rf"log\.parquet: .*{named}"):
        run("spark", tmp_path / "out", tmp_path)


def test_nanoseconds_are_read_alike_or_refused(tmp_path):
    times = np.array(
        ["2024-01-01T00:00:00.000000001", "2024-01-01", "2023-01-01"] * 2,
        "datetime64[ns]",
    )
    table = {
        "user_id": [1, 1, 1, 2, 2, 2],
        "item_id": [3, 2, 1, 2, 1, 3],
        "domain": ["a"] * 6,
        "timestamp": times,
    }
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    expected = digests(
        run("duckdb", tmp_path / "duckdb", tmp_path / "log.parquet").folder
    )
    try:
        assert (
            digests(
                run(
                    "spark", tmp_path / "spark", tmp_path / "log.parquet"
                ).folder
            )
            == expected
        )
    except InputError as error:
        assert "log.parquet" in str(error) and "nano" in str(error).lower()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            "file:///nowhere/at/all",
            "input file:///nowhere/at/all cannot be listed",
        ),
        ("table:no_such", "table:no_such cannot be read"),
        ("nowhere.csv", "nowhere.csv does not exist"),
        ("_log.parquet", "begin with _"),
    ],
)
def test_an_input_that_cannot_be_had_is_named(
    tmp_path, given, named, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "_log.parquet", some_rows())
    with pytest.raises(InputError, match=named):
        run("spark", tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_nothing_left_is_refused(tmp_path):
    with pytest.raises(
        InputError, match="nothing is left with --min-user 99 --min-item 0"
    ):
        run(
            "spark",
            tmp_path / "out",
            write(tmp_path / "log.csv", some_rows()),
            min_user=99,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


# --- failed tasks -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_that_dies_leaves_no_half_part_and_the_same_command_goes_on(
    tmp_path, monkeypatch
):
    log = write(tmp_path / "log.parquet", some_rows(users=40))
    expected = digests(
        run("duckdb", tmp_path / "duckdb", log, shard_users=4, streams=2).folder
    )
    monkeypatch.setattr(trainer.data.prepare.spark, "_PART_INTERACTIONS", 60)
    calls = tmp_path / "calls"
    calls.mkdir()

    def watched(die, folder, ids, layout, batches):
        import trainer.data.prepare.spark

        write_part = trainer.data.prepare.spark.write_part

        def write(partial, ids, layout, part, *columns):
            write_part(partial, ids, layout, part, *columns)
            if die and part == 3:
                os._exit(1)
            (calls / f"{die}-{part}").touch()

        trainer.data.prepare.spark.write_part = write
        try:
            yield from trainer.data.prepare.spark._write_parts(
                folder, ids, layout, batches
            )
        finally:
            trainer.data.prepare.spark.write_part = write_part

    for die in (True, False):
        monkeypatch.setattr(
            trainer.data.prepare.spark,
            "_write_parts",
            lambda *given, die=die: watched(die, *given),
        )
        if die:
            with pytest.raises(
                InputError, match=r"Spark gave up.*the same command goes on"
            ):
                run("spark", tmp_path / "spark", log, shard_users=4, streams=2)
            done = {
                path.name
                for path in (tmp_path / ".spark.work/parts").iterdir()
                if path.suffix != ".partial"
            }
            assert "00003" not in done
            assert not (tmp_path / "spark").exists()
        else:
            assert (
                digests(
                    run(
                        "spark",
                        tmp_path / "spark",
                        log,
                        shard_users=4,
                        streams=2,
                    ).folder
                )
                == expected
            )
    again = {
        f"{int(path.name.split('-')[1]):05d}" for path in calls.glob("False-*")
    }
    assert "00003" in again and not again & done
    assert len(again | done) >= 5


def test_of_two_attempts_at_a_part_the_first_to_end_counts(tmp_path):
    ids = Ids(
        users=2,
        interactions=6,
        names=("a",),
        items=(3,),
        rooms=(9,),
        first_time=0.0,
        last_time=9.0,
    )
    layout = Layout.of(ids, 1, 2, 2, 100)
    columns = {
        "part": [0] * 6,
        "user": [0, 0, 0, 1, 1, 1],
        "row": [0, 1, 2, 2, 1, 0],
        "time": [0, 4, 9, 1, 1, 2],
    }
    batch = pa.RecordBatch.from_pydict(
        {name: pa.array(values, pa.int32()) for name, values in columns.items()}
    )

    def late():
        yield batch.slice(0, 2)
        yield batch.slice(2)
        # The other attempt ends while this one has only read.
        assert (
            len(
                list(
                    trainer.data.prepare.spark._write_parts(
                        tmp_path, ids, layout, [batch]
                    )
                )
            )
            == 1
        )

    for _ in range(2):
        assert [
            one["part"].to_pylist()
            for one in trainer.data.prepare.spark._write_parts(
                tmp_path, ids, layout, late()
            )
        ] == [[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["00000"]


# --- the script ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_prepares_on_spark(tmp_path):
    log = write(tmp_path / "log.parquet", some_rows())
    settings = [
        "--master",
        "local[1]",
        "--conf",
        "spark.sql.shuffle.partitions=2",
        "--conf",
        "spark.ui.enabled=false",
    ]
    submit = [Path(sys.executable).with_name("spark-submit"), *settings]
    command = [
        *submit,
        ROOT / "launch/prepare.py",
        "--engine",
        "spark",
        "--input",
        "log.parquet",
        "--output",
        "out",
    ]
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(
        run("duckdb", tmp_path / "duckdb", log).folder
    )


# --- every form of log --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_a_filter_give_the_same_bytes(tmp_path, form):
    given, options = FORMS[form](tmp_path, sample_events())
    where = "user_id != 3 and not item_id in (1, 2)"
    dataset = both(tmp_path, given, where=where, min_domain=2, **options)
    assert (dataset.folder / "preparation.json").is_file()


FILTERS = {
    "rating >= 4.5": "a float with a NaN",
    "rating is null": "missing ones",
    "rating is not null and done = true": "a truth value",
    "day >= '2024-01-03' and day < '2024-01-07T12:00:00Z'": "dates",
    "name like 'a\\%' or name = 'it''s' or name = 'b\\'": "odd texts",
    "price between 1.5 and 3": "decimals",
    "number > 3 or not number <= 5": "whole numbers",
    "text < 5 and text != 1": "numbers in text",
    "done = false or text = 'x'": "truth values and texts",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", FILTERS, ids=list(FILTERS.values()))
def test_a_filter_of_columns_of_any_type_keeps_the_same_rows(tmp_path, where):
    count = 20
    names = ["a\\b", "it's", "b\\", "a_", "", None]
    texts = ["1", "2.5", "x", "", None, "-7", "1e1"]
    table = pa.table(
        {
            "user_id": [number % 4 for number in range(count)],
            "item_id": [number % 3 for number in range(count)],
            "domain": ["a"] * count,
            "timestamp": list(range(count)),
            "rating": pa.array(
                [
                    float("nan") if n % 5 == 4 else n / 2 if n % 7 else None
                    for n in range(count)
                ],
                pa.float64(),
            ),
            "done": [None if n % 6 == 5 else n % 2 == 0 for n in range(count)],
            "day": pa.array(
                [datetime.datetime(2024, 1, n + 1, 9) for n in range(count)],
                pa.timestamp("us"),
            ),
            "name": [names[n % len(names)] for n in range(count)],
            "price": pa.array([n for n in range(count)], pa.decimal128(9, 2)),
            "number": pa.array(range(count), pa.int32()),
            "text": [texts[n % len(texts)] for n in range(count)],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    results = {}
    for engine in ("duckdb", "spark"):
        try:
            made = run(
                engine, tmp_path / engine, tmp_path / "log.parquet", where=where
            )
            results[engine] = digests(made.folder)
        except InputError as error:
            results[engine] = str(error)
    assert results["duckdb"] == results["spark"]
    assert not isinstance(results["spark"], str), results["spark"]


def test_bad_rows_are_the_same(tmp_path):
    """Of text, of JSON, of Parquet, and of a log whose items lack a domain."""
    bad_csv(tmp_path)
    lines = tmp_path / "log.jsonl"
    good = '{"user_id": 1, "item_id": %d, "domain": "a", "timestamp": 5}\n'
    lines.write_text(good % 1 + "[]\n{" + "\n" + good % 2)
    write(
        tmp_path / "log.parquet",
        [
            (1, 1, "a", "7"),
            (1, None, "a", "8"),
            (2, 3, "", "9"),
            (2, 3, "a", "x"),
        ],
    )
    logs = [tmp_path / "bad.csv", lines, tmp_path / "log.parquet"]
    dataset = both(tmp_path, *logs, bad_rows="skip")
    listed = (dataset.folder / "bad_rows.jsonl").read_text()
    assert listed.count("\n") == 7 + 2 + 3


@pytest.fixture
def with_items(tmp_path):
    """A log without domains, and the options that name its items' table."""
    log = write(
        tmp_path / "log.csv", [(n % 5, n % 7, "", n) for n in range(60)]
    )
    items = tmp_path / "items.txt"
    items.write_text(
        "".join(f"{item}|{'ab'[item % 2]}/c\n" for item in range(6))
    )
    options = {
        "items": str(items),
        "items_columns": "item_id,domain",
        "items_delimiter": "|",
        "domain_separator": "/",
    }
    return log, options


@pytest.mark.slow
def test_items_without_a_domain_are_refused_with_the_same_words(
    tmp_path, with_items
):
    log, options = with_items
    for engine in ("duckdb", "spark"):
        with pytest.raises(
            InputError, match="for 1 of the logs' items, which have 8"
        ):
            run(engine, tmp_path / "out", log, **options)


def test_items_without_a_domain_are_the_same(tmp_path, with_items):
    log, options = with_items
    dataset = both(tmp_path, log, bad_rows="skip", **options)
    assert [domain.name for domain in dataset.domains] == ["a", "b"]


@pytest.mark.slow
def test_small_domains_are_the_same(tmp_path):
    rows = some_rows() + [(1, item, "Noir", item) for item in range(5)]
    rows += [(user, 1, "War", user) for user in range(50)]
    log = write(tmp_path / "log.csv", rows)
    dataset = both(tmp_path, log, min_domain=20, min_user=3, min_item=2)
    assert [domain.name for domain in dataset.domains] == [
        "navi",
        "shop",
        "video",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "options", "named"),
    UNREADABLE.values(),
    ids=list(UNREADABLE),
)
def test_what_cannot_be_read_is_refused_with_the_same_words(
    tmp_path, name, text, options, named
):
    (tmp_path / name).write_bytes(text.encode())
    messages = {}
    for engine in ("duckdb", "spark"):
        with pytest.raises(InputError, match=named) as error:
            run(engine, tmp_path / "out", tmp_path / name, **options)
        messages[engine] = str(error.value)
    assert messages["duckdb"] == messages["spark"]


@pytest.mark.slow
def test_killed_on_the_threshold_spark_delivers_too(tmp_path, monkeypatch):
    from trainer.files.staged import StagedOutput

    log = write(tmp_path / "log.csv", some_rows())

    def die(work, stage):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StagedOutput, "deliver", die)
        with pytest.raises(KeyboardInterrupt):
            run("spark", tmp_path / "out", log)
    assert run("spark", tmp_path / "out", log).users
