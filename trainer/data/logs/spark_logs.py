"""Reading interaction logs with Spark: the rows, types and refusals of `duckdb_logs.py`.

Parquet and tables are read by Spark. CSV and TSV are read by DuckDB in Spark's tasks, a file a
task: Spark's own reader takes an open quote, mixed line ends and bytes that are no UTF-8 for
data.

Spark writes some ids otherwise than DuckDB (a TIMESTAMP), and reads fewer ways to
write a time. Such a log is refused: the engines never differ in silence.
"""

import dataclasses
import functools
import json
import re
import tempfile
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from trainer.config.prepare import LogFormat
from trainer.data.duckdb_engine import escape_sql, open_connection
from trainer.data.id_columns import fault_reason
from trainer.data.logs.duckdb_groups import (
    FILE_BITS,
    check_columns,
    summarize_error,
)
from trainer.data.logs.duckdb_logs import (
    BAD,
    FILTERED,
    ROW,
    any_of,
    check_format,
    columns_to_read,
    expected_time,
    read_text,
    refuse_mixed_times,
)
from trainer.data.logs.files import (
    ENDINGS,
    LogFile,
    find_logs,
    format_of,
    partitions_of,
)
from trainer.data.logs.headers import list_columns
from trainer.data.logs.item_file import open_items
from trainer.data.logs.reading import MOST_LISTED, BadRow, Reading
from trainer.data.logs.row_filter import (
    NUMBER,
    Kind,
    RowFilter,
    filter_sql,
    parse_row_filter,
)
from trainer.data.logs.row_filter import Column as FilterColumn
from trainer.errors import InputError

TABLE = "table:"
SPARK_ERRORS = (PySparkException, Py4JError)
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# The rows of a text file, see `read_text`; or what is wrong with the file, whose state is FAULT.
_FAULT = "fault"
_TEXT_SCHEMA = """
    file string,
    state string,
    row bigint,
    user string,
    item string,
    domain string,
    time string,
    fault string"""
_TEXT_ARROW_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "state": pa.string(),
        "row": pa.int64(),
        "user": pa.string(),
        "item": pa.string(),
        "domain": pa.string(),
        "time": pa.string(),
        "fault": pa.string(),
    }
)
_WHOLE = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
# The largest whole number up to which a float tells every one from the next.
_FLOAT: dict[type[T.DataType], int] = {T.FloatType: 2**24, T.DoubleType: 2**53}
_DATE = (T.DateType, T.TimestampType, T.TimestampNTZType)
_NESTED = (T.ArrayType, T.MapType, T.StructType)
_ID_TYPES: tuple[type[T.DataType], ...] = (
    *_WHOLE,
    *_FLOAT,
    T.DecimalType,
    T.StringType,
    T.BinaryType,
    T.BooleanType,
    T.DateType,
)
_TIME_TYPES: tuple[type[T.DataType], ...] = (
    *_WHOLE,
    *_FLOAT,
    *_DATE,
    T.StringType,
    T.DecimalType,
)
_NUMBER_TEXT = rf"r'\A{NUMBER}\z'"
_DATE_TEXT = (
    r"r'\A[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([ T]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,6})?"
    r"(Z|[+-](0[0-9]|1[0-4]):[0-5][0-9])?)?\z'"
)
_SCHEMAS_AT_ONCE = 8


@dataclass(frozen=True)
class Input:
    """A file that Spark can read, or a table.

    name: a local path, an address, or table:NAME. facts: what tells one state of it from
    another. partitions: see `LogFile`.
    """

    name: str
    facts: tuple
    partitions: tuple[tuple[str, str | None], ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether it is a table, whose state is not known."""
        return self.name.startswith(TABLE)

    @property
    def is_text(self) -> bool:
        """Whether it is a file of text, which DuckDB reads."""
        if self.is_table:
            return False
        file_format = format_of(Path(self.name))
        return file_format is not None and file_format.kind != "parquet"

    @property
    def is_remote(self) -> bool:
        """Whether it is an address."""
        return _ADDRESS.match(self.name) is not None

    @property
    def uri(self) -> str:
        """The name in Spark's terms."""
        if self.is_remote:
            return self.name
        return f"file://{self.name}"


def find_inputs(spark: SparkSession, inputs: Iterable[str]) -> list[Input]:
    """Finds the logs behind paths, addresses and table:NAME, sorted, each once.

    Paths: see `find_logs`. An address is a file, a folder or a glob, like s3a://bucket/logs.
    Raises InputError as `find_logs` does.
    """
    logs_by_name = {}
    for text in inputs:
        for log in _find_logs(spark, text):
            logs_by_name[log.name] = log
    names = sorted(logs_by_name)
    for log in logs_by_name.values():
        if log.is_table or log.is_text:
            continue
        file_name = Path(log.name).name
        if file_name.startswith(("_", ".")):
            raise InputError(
                f"{log.name}: Spark leaves out files "
                "whose names begin with _ or a dot: rename it"
            )
    return [logs_by_name[name] for name in names]


def _find_logs(spark: SparkSession, text: str) -> list[Input]:
    """Finds the logs behind one path, address or table:NAME."""
    if text.startswith(TABLE):
        return [Input(text, (text,))]
    if _ADDRESS.match(text):
        return _find_remote_logs(spark, text)
    logs = []
    for file in find_logs([text], verbose=True):
        state = tuple(file.state)
        logs.append(Input(str(file.path), state, file.partitions))
    return logs


def _find_remote_logs(spark: SparkSession, address: str) -> list[Input]:
    """Lists the logs behind an address."""
    reader = spark.read.format("binaryFile")
    reader = reader.options(
        recursiveFileLookup="true",
        ignoreMissingFiles="false",
    )
    time = F.unix_micros("modificationTime")
    try:
        listing = reader.load(address)
        listing = listing.select("path", "length", time)
        files = listing.collect()
    except SPARK_ERRORS as error:
        reason = spark_reason(error)
        raise InputError(
            f"input {address} cannot be listed: {reason}"
        ) from None
    logs = []
    for path, size, microseconds in files:
        # Spark writes file:/path.
        name = re.sub(r"^([\w+.-]+):/(?!/)", r"\1:///", path)
        if format_of(Path(name), named=len(files) == 1) is not None:
            state = (name, size, microseconds)
            logs.append(Input(name, state, partitions_of(Path(name))))
    if not logs:
        raise InputError(
            f"input {address} holds no log: names must end in {ENDINGS}"
        )
    for log in logs:
        _, size, _ = log.facts
        if size == 0:
            raise InputError(
                f"{log.name} is empty (0 bytes): remove it or write it again"
            )
    return logs


def spark_reason(error: Exception) -> str:
    """Returns the telling part of a message of Spark's, in one line.

        An error occurred while calling o7.count.
        org.apache.spark.SparkException: Job aborted
        Caused by: java.io.IOException: no such file

    gives "no such file", the reason of the last cause.
    """
    text = str(error)
    pattern = r"^(?:Caused by: )?[\w.$]+(?:Exception|Error): (.+)$"
    causes = re.findall(pattern, text, re.MULTILINE)
    if causes:
        return summarize_error(causes[-1])
    first_paragraph = text.split("\n\n")[0]
    before_trace = first_paragraph.split("\nJVM stacktrace")[0]
    return summarize_error(before_trace)


def escape_glob(path: str | Path) -> str:
    """Escapes a path, so that Spark does not take it for a glob.

    /logs/a[1].parquet becomes /logs/a\\[1\\].parquet.
    """
    return re.sub(r"([*?\[\]{}\\])", r"\\\1", str(path))


@dataclass(frozen=True)
class _Request:
    """What is read of the logs: their format, columns by role, and texts by role in their place."""

    log_format: LogFormat
    wanted: dict[str, str]
    constants: dict[str, str]
    row_filter: RowFilter | None

    @classmethod
    def of(cls, log_format: LogFormat, domain: str | None) -> "_Request":
        """Makes the request. Raises InputError where the format cannot be."""
        with open_connection() as connection:
            check_format(connection, log_format)
        row_filter = None
        if log_format.where is not None:
            row_filter = parse_row_filter(log_format.where)
        wanted, constants = columns_to_read(log_format, domain)
        return cls(log_format, wanted, constants, row_filter)

    @property
    def roles(self) -> list[str]:
        """The roles that the logs give."""
        return [*self.wanted, *self.constants]

    @property
    def names(self) -> set[str]:
        """The columns that are looked at."""
        names = set(self.wanted.values())
        if self.row_filter is not None:
            names |= {column.name for column in self.row_filter.columns}
        return names


def open_log(
    spark: SparkSession,
    inputs: list[Input],
    log_format: LogFormat,
    domain: str | None,
    scratch: str,
    in_file_order: bool = False,
) -> tuple[DataFrame, Reading]:
    """Returns the rows of all inputs: user_id, item_id, domain and time; and what became of them.

    Ids are bigint or string, domain is string, time bigint or double.
    in_file_order: the rows have their position too, see `logs.py`.
    scratch: a new folder for copies of text files.
    Raises InputError, as `duckdb_logs.open_log` does.
    """
    request = _Request.of(log_format, domain)
    reading = Reading()
    groups = []
    for group in _group_inputs(spark, inputs, request, reading, scratch):
        group.inspect()
        if group.rows:
            groups.append(group)
            reading.rows += group.rows
    reading.require_rows([one.name for one in inputs])
    kinds, times = _time_expressions(groups)
    reading.dates = "date" in kinds
    positions = {one.name: number for number, one in enumerate(inputs)}
    user_type = _common_id_type(groups, "user")
    item_type = _common_id_type(groups, "item")
    logs = []
    for group, time in zip(groups, times, strict=True):
        user = group.id_sql("user", user_type)
        item = group.id_sql("item", item_type)
        domain_value = "CAST(NULL AS string)"
        if "domain" in group.roles:
            domain_value = group.id_sql("domain", "string")
        columns = [
            f"{user} AS user_id",
            f"{item} AS item_id",
            f"{domain_value} AS domain",
            f"{time} AS time",
        ]
        frame = group.frame
        if in_file_order:
            frame = group.with_positions(spark, positions)
            columns.append("position")
        logs.append(frame.selectExpr(*columns))
    rows = functools.reduce(DataFrame.unionAll, logs)
    if log_format.items is not None:
        rows = _join_items(spark, rows, log_format, reading, scratch)
    return rows, reading


def _join_items(
    spark: SparkSession,
    rows: DataFrame,
    log_format: LogFormat,
    reading: Reading,
    scratch: str,
) -> DataFrame:
    """Returns the rows with the domains of the file of items, which DuckDB reads."""
    folder = Path(scratch.removeprefix("file://") + "-items")
    folder.mkdir()
    with open_connection() as connection:
        open_items(connection, log_format)
        target = escape_sql(folder / "0.parquet")
        connection.execute(
            f"COPY domain_of_item TO '{target}' (FORMAT parquet)"
        )
    items = spark.read.parquet(escape_glob(f"file://{folder}"))
    rows = rows.drop("domain")
    rows = rows.withColumn("item", F.col("item_id").cast("string"))
    strangers = rows.join(items, "item", "left_anti").groupBy("item").count()
    ordered = strangers.orderBy(F.desc("count"), "item")
    reading.unknown_items = dict(map(tuple, ordered.collect()))
    if not log_format.skips_bad_rows:
        reading.refuse_unknown_items(str(log_format.items))
    reading.rows -= sum(reading.unknown_items.values())
    reading.require_rows([str(log_format.items)])
    return rows.join(items, "item").drop("item")


def _time_expressions(groups: "list[_Group]") -> tuple[list[str], list[str]]:
    """Returns the kind of time and its SQL, one a group, all of one kind: numbers or dates.

    kinds           each group's time
    whole, whole    CAST(time AS bigint)
    whole, float    CAST(time AS double) + 0D
    date, date      unix_micros(CAST(time AS timestamp))
    """
    kinds = [group.kind_of_time for group in groups]
    first_inputs = [group.inputs[0].name for group in groups]
    refuse_mixed_times(kinds, first_inputs, groups[0].columns["time"])
    if "date" in kinds:
        times = []
        for group in groups:
            time = "unix_micros(CAST(time AS timestamp))"
            times.append("date" if group.has_formatted_times else time)
        return kinds, times
    if "float" in kinds:
        # Without negative zeros, which would not be equal to zeros.
        time = "CAST(time AS double) + 0D"
    else:
        time = "CAST(time AS bigint)"
    return kinds, [time] * len(groups)


def _common_id_type(groups: "list[_Group]", role: str) -> str:
    """Returns bigint if all ids of all inputs are whole numbers, else string."""
    for group in groups:
        if not group.is_whole[role]:
            return "string"
    return "bigint"


def _group_inputs(
    spark: SparkSession,
    inputs: list[Input],
    request: _Request,
    reading: Reading,
    scratch: str,
) -> "list[_Group]":
    """Groups inputs with equal columns, so that a thousand part files are one scan.

    All text files are one group. A table is a group of its own.
    """
    groups = []
    texts = []
    others = []
    for one in inputs:
        if one.is_text:
            texts.append(one)
        else:
            others.append(one)
    if texts:
        frame = _read_texts(spark, texts, request, reading, scratch)
        groups.append(_Group(texts, lambda _: frame, request, reading))

    def read_schema(one: Input) -> T.StructType:
        frame_of_one = _read_frame(spark, [one])
        return frame_of_one.schema

    inputs_by_layout = defaultdict(list)
    with ThreadPoolExecutor(_SCHEMAS_AT_ONCE) as pool:
        schemas = pool.map(read_schema, others)
        for one, schema in zip(others, schemas, strict=True):
            table = ""
            if one.is_table:
                table = one.name
            added = []
            for name, value in one.partitions:
                if name in request.names and name not in schema.names:
                    added.append((name, value))
            key = (table, schema.json(), tuple(added))
            inputs_by_layout[key].append(one)
    for (_, _, partitions), alike in inputs_by_layout.items():
        read = functools.partial(
            _read_columns,
            spark,
            request=request,
            partitions=dict(partitions),
        )
        names = {name for name, _ in partitions}
        groups.append(_Group(alike, read, request, reading, names))
    return groups


def _read_columns(
    spark: SparkSession,
    inputs: list[Input],
    request: _Request,
    partitions: dict[str, str | None],
) -> DataFrame:
    """Reads file, row, keep and the columns by role of tables or Parquet files."""
    frame = _read_frame(spark, inputs)
    first = inputs[0]
    names = [*frame.columns, *partitions]
    check_columns(first.name, names, request.wanted)
    file = F.lit(first.name)
    row = F.lit(None)
    if not first.is_table:
        file = F.col("_metadata.file_path")
        row = F.col("_metadata.row_index") + 1
    row = row.cast("bigint")
    keep = F.lit(True)
    if request.row_filter is not None:
        condition = _filter_sql(first, frame, request.row_filter, partitions)
        keep = F.expr(condition)
    selected = [file.alias("file"), row.alias("row"), keep.alias("keep")]
    for role, name in request.wanted.items():
        column = F.lit(partitions.get(name)).cast("string")
        if name in frame.columns:
            column = _quoted_column(name)
        separator = request.log_format.domain_separator
        if role == "domain" and separator is not None:
            column = F.split_part(
                column.cast("string"), F.lit(separator), F.lit(1)
            )
        selected.append(column.alias(role))
    for role, text in request.constants.items():
        selected.append(F.lit(text).alias(role))
    return frame.select(*selected)


def _filter_sql(
    first: Input,
    frame: DataFrame,
    row_filter: RowFilter,
    partitions: dict[str, str | None],
) -> str:
    """Returns SQL over a frame for: the row counts."""
    dialect = _SparkDialect()

    def find_column(column: FilterColumn) -> tuple[str, Kind]:
        name = column.name
        if name in frame.columns:
            escaped = name.replace("`", "``")
            return f"`{escaped}`", _kind_of(frame.schema[name].dataType)
        if name not in partitions:
            names = list_columns([*frame.columns, *partitions])
            row_filter.refuse(
                column.position,
                f"{first.name} has no column {name!r}; it has {names}",
            )
        value = partitions[name]
        if value is None:
            return "CAST(NULL AS string)", "text"
        return dialect.quote_text(value), "text"

    return filter_sql(row_filter, dialect, find_column)


def _kind_of(kind: T.DataType) -> Kind:
    """Returns what a Spark type means in a row filter."""
    if isinstance(kind, T.StringType):
        return "text"
    if isinstance(kind, _WHOLE):
        return "whole"
    if isinstance(kind, tuple(_FLOAT)):
        return "float"
    if isinstance(kind, T.DecimalType):
        return "decimal"
    if isinstance(kind, T.BooleanType):
        return "boolean"
    if isinstance(kind, _DATE):
        return "date"
    return "other"


class _SparkDialect:
    """The SQL of Spark, for row filters."""

    def quote_text(self, text: str) -> str:
        """Returns the literal of a text."""
        escaped = text.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"

    def as_text(self, value: str) -> str:
        """Returns SQL of the value as text."""
        return f"CAST({value} AS string)"

    def as_number(self, value: str, kind: Kind) -> str:
        """Returns SQL of the value as a finite double, NULL for what is none."""
        number = f"try_cast({value} AS double)"
        if kind == "text":
            return f"(CASE WHEN {value} RLIKE {_NUMBER_TEXT} THEN {number} END)"
        if kind == "float":
            return f"(CASE WHEN {_finite_sql(value)} THEN {number} END)"
        return number

    def as_microseconds(self, value: str) -> str:
        """Returns SQL of a date in microseconds since 1970."""
        return f"unix_micros(CAST({value} AS timestamp))"


def _quoted_column(name: str) -> Column:
    escaped = name.replace("`", "``")
    return F.col(f"`{escaped}`")


def _read_frame(spark: SparkSession, inputs: list[Input]) -> DataFrame:
    """Reads tables or Parquet files with equal columns."""
    options = {
        "recursiveFileLookup": "true",  # folders named key=value are no columns
        "ignoreCorruptFiles": "false",
        "ignoreMissingFiles": "false",
        "mergeSchema": "false",
        "datetimeRebaseMode": "CORRECTED",
        "int96RebaseMode": "CORRECTED",
    }
    first = inputs[0]
    try:
        if first.is_table:
            return spark.table(first.name.removeprefix(TABLE))
        paths = [escape_glob(one.uri) for one in inputs]
        reader = spark.read.options(**options)
        return reader.parquet(*paths)
    except SPARK_ERRORS as error:
        reason = spark_reason(error)
        raise InputError(f"{first.name} cannot be read: {reason}") from None


def _read_texts(
    spark: SparkSession,
    inputs: list[Input],
    request: _Request,
    reading: Reading,
    scratch: str,
) -> DataFrame:
    """Parses text files once, into Parquet, since parsing is dear; reads that."""
    local = []
    remote = []
    for one in inputs:
        if one.is_remote:
            remote.append(escape_glob(one.name))
        else:
            local.append((one.name, None, json.dumps(one.partitions)))
    schema = "file string, content binary, partitions string"
    files = spark.createDataFrame(local, schema)
    if remote:
        reader = spark.read.format("binaryFile")
        contents = reader.load(remote)
        no_partitions = F.lit(None).cast("string")
        contents = contents.select("path", "content", no_partitions)
        files = files.unionAll(contents)
    parse = functools.partial(_parse_texts, request)
    files = files.repartition(len(inputs))
    rows = files.mapInArrow(parse, _TEXT_SCHEMA)
    rows.write.parquet(scratch)
    rows = spark.read.parquet(escape_glob(scratch))
    faulty = rows.filter(f"state = '{_FAULT}'")
    faulty = faulty.orderBy("file")
    faults = faulty.select("fault").head(1)
    if faults:
        raise InputError(faults[0].fault)
    _add_bad_texts(rows, request, reading)
    is_row = rows.filter(f"state = '{ROW}'")
    return is_row.select(
        "file", "row", F.lit(True).alias("keep"), *request.roles
    )


def _add_bad_texts(
    rows: DataFrame, request: _Request, reading: Reading
) -> None:
    """Counts the rows of text files that were filtered out, or are none."""
    filtered = rows.filter(f"state = '{FILTERED}'").agg(F.sum("row"))
    reading.filtered += filtered.collect()[0][0] or 0
    bad = rows.filter(f"state = '{BAD}'")
    if not request.log_format.skips_bad_rows:
        firsts = bad.selectExpr("min(struct(file, row, fault))").collect()
        first = firsts[0][0]
        if first is not None:
            file, row, fault = first
            raise InputError(
                f"{_file_name(file)}: row {row}: {fault}: "
                "write one object a line"
            )
        return
    for fault, count in bad.groupBy("fault").count().collect():
        reading.add_bad(fault, count)
    listed = bad.orderBy("file", "row").limit(MOST_LISTED)
    for file, row, fault in listed.select("file", "row", "fault").collect():
        reading.list_bad([BadRow(_file_name(file), row, fault)])


def _parse_texts(
    request: _Request,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of text files, or what is wrong with a file. Runs in a task."""
    for batch in batches:
        for record in batch.to_pylist():
            path = Path(record["file"])
            partitions = partitions_of(path)
            if record["partitions"] is not None:
                pairs = json.loads(record["partitions"])
                partitions = tuple((name, value) for name, value in pairs)
            yield from _parse_text(
                LogFile(path, partitions),
                record["file"],
                record["content"],
                request,
            )


def _parse_text(
    log: LogFile,
    file: str,
    content: bytes | None,
    request: _Request,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one file. file: its name. content: of a remote one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_connection() as connection,
    ):
        scratch = escape_sql(folder)
        connection.execute(f"""
            SET threads = 1;
            SET temp_directory = '{scratch}'""")
        path = log.path
        if content is not None:
            path = Path(folder, path.name)
            path.write_bytes(content)
        log = dataclasses.replace(log, path=path)
        domain = request.constants.get("domain")
        try:
            batches = read_text(connection, log, request.log_format, domain)
            for rows in batches:
                names = [file] * len(rows)
                arrays = [pa.array(names, pa.string())]
                for field in _TEXT_ARROW_SCHEMA.names[1:]:
                    arrays.append(
                        rows[field].cast(_TEXT_ARROW_SCHEMA.field(field).type)
                    )
                yield pa.RecordBatch.from_arrays(
                    arrays,
                    schema=_TEXT_ARROW_SCHEMA,
                )
        except InputError as error:
            fault = str(error).replace(str(path), file)
            record = {"file": file, "state": _FAULT, "fault": fault}
            yield pa.RecordBatch.from_pylist([record], _TEXT_ARROW_SCHEMA)


def _parse_formatted_times(
    time_format: str, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """Adds `date`, the time in microseconds since 1970, to rows whose times have a format.

    DuckDB parses them, so that both engines know the same formats. Runs in a task.
    """
    escaped = escape_sql(time_format)
    with open_connection() as connection:
        connection.execute("SET TimeZone = 'UTC'; SET threads = 1")
        for batch in batches:
            texts = pa.table({"time": batch["time"]})
            dates = connection.sql(f"""
                SELECT epoch_us(
                    try_strptime("time", '{escaped}')::TIMESTAMPTZ
                ) AS date
                FROM texts""").to_arrow_table()
            date = dates["date"].combine_chunks().cast(pa.int64())
            del texts
            yield batch.append_column("date", date)


class _Group:
    """Inputs with equal columns, which one DataFrame reads together.

    Its columns are file, row (null for a table), keep, and user, item, domain, time as far as the
    logs give them; and date, where times have a format.
    """

    def __init__(
        self,
        inputs: list[Input],
        read: Callable[[list[Input]], DataFrame],
        request: _Request,
        reading: Reading,
        partitions: Set[str] = frozenset(),
    ):
        """partitions: columns that the folders' names give."""
        self.inputs = inputs
        self.partitions = partitions
        self.read = read
        self.reading = reading
        self.roles = request.roles
        self.skips = request.log_format.skips_bad_rows
        self.time_format = request.log_format.time_format
        self.columns = request.wanted
        self.all_rows = self._add_dates(read(inputs))
        self.frame = self.all_rows.filter("keep")
        self.parsed = inputs[0].is_text
        self.types: dict[str, T.DataType] = {}  # by role
        self.kind_of_time = ""  # whole, float or date
        self.rows = 0
        self.is_whole: dict[str, bool] = {}  # by role
        self.fitting_rows: dict[str, int] = {}  # by kind of time
        for role in self.roles:
            self.types[role] = self.frame.schema[role].dataType
        for role in self.roles:
            self._check_type(role)

    def _add_dates(self, frame: DataFrame) -> DataFrame:
        """Adds the column `date` where times are text of the given format."""
        is_text = isinstance(frame.schema["time"].dataType, T.StringType)
        time_format = self.time_format
        self.has_formatted_times = time_format is not None and is_text
        if time_format is None or not is_text:
            return frame
        parse = functools.partial(_parse_formatted_times, time_format)
        schema = T.StructType([*frame.schema.fields])
        return frame.mapInArrow(parse, schema.add("date", T.LongType()))

    def _check_type(self, role: str) -> None:
        """Raises InputError where the engines could read a column's type differently."""
        kind = self.types[role]
        name = self.inputs[0].name
        column = f"{name}: column {self.columns.get(role, role)!r}"
        if isinstance(kind, _NESTED):
            raise InputError(
                f"{column} holds {kind.simpleString()}, not single values"
            )
        type_name = kind.simpleString()
        type_name = type_name.upper()
        if role == "time":
            if not isinstance(kind, _TIME_TYPES):
                raise InputError(
                    f"{column} holds {type_name}: a time is a number or a date"
                )
        elif not isinstance(kind, _ID_TYPES):
            raise InputError(
                f"{column} holds {type_name}: Spark may write it otherwise than DuckDB; "
                "cast it to BIGINT or text, or use --engine duckdb"
            )

    def id_sql(self, role: str, id_type: str) -> str:
        """Returns SQL for the id as bigint or string, see `IdColumn`.

        type of user     string
        DOUBLE           CAST(CAST(user AS bigint) AS string)
        DECIMAL(30, 2)   CAST(CAST(user AS decimal(38, 0)) AS string), if some are too large
        BOOLEAN          CAST(user AS string)
        """
        value = role
        if self.is_whole[role]:
            if self._is_parsed(role):
                value = _digits_sql(role)
            value = f"CAST({value} AS bigint)"
        elif isinstance(self.types[role], T.DecimalType):
            value = f"CAST({role} AS decimal(38, 0))"
        return f"CAST({value} AS {id_type})"

    def missing_sql(self, role: str) -> str:
        """Returns SQL for: the value is missing.

        type of user    SQL
        STRING          (user IS NULL OR CAST(user AS string) = '')
        DOUBLE          (user IS NULL OR NOT coalesce(abs(user) < double('Infinity'), false))
        BIGINT          (user IS NULL)
        """
        if self._is_string(role) or self._is_binary(role):
            return f"({role} IS NULL OR CAST({role} AS string) = '')"
        if self._is_float(role):
            return f"({role} IS NULL OR NOT {_finite_sql(role)})"
        return f"({role} IS NULL)"

    def strange_sql(self, role: str) -> str:
        """Returns SQL for: Spark does not read or write the value as DuckDB does."""
        kind = self.types[role]
        if self._is_string(role):
            if self.parsed:
                return "false"
            return _no_utf8_sql(role)
        if isinstance(kind, _DATE):
            return f"NOT {role} BETWEEN DATE'0001-01-01' AND DATE'9999-12-31'"
        if role == "time" and isinstance(kind, T.DecimalType):
            least_inexact = 2**53
            unit = 10**kind.scale
            return f"abs(time) >= {least_inexact}BD / {unit}BD"
        return "false"

    def fault_sql(self, role: str) -> str:
        """Returns SQL for: the value is no id, see `IdColumn.fault_sql`."""
        kind = self.types[role]
        if role == "time":
            return "false"
        if self._is_float(role):
            largest = _FLOAT[type(kind)]
            return f"({role} <> floor({role}) OR abs({role}) > {largest})"
        if isinstance(kind, T.DecimalType):
            return f"{role} <> floor({role})"
        if self._is_binary(role):
            return _no_utf8_sql(f"CAST({role} AS string)")
        return "false"

    def whole_sql(self, role: str) -> str:
        """Returns SQL for: the value is a whole number as int64 writes it."""
        if role == "time" and self.has_formatted_times:
            return "false"
        if role == "time":
            if self._is_string(role):
                number = "CAST(try_cast(time AS bigint) AS string)"
                return f"coalesce({number} = time, false)"
            return str(isinstance(self.types[role], _WHOLE)).lower()
        if self._is_parsed(role):
            digits = _digits_sql(role)
            number = f"CAST(try_cast({digits} AS bigint) AS string)"
            return f"coalesce({number} = {digits}, false)"
        if isinstance(self.types[role], T.DecimalType):
            return f"try_cast({role} AS bigint) IS NOT NULL"
        is_number = isinstance(self.types[role], _WHOLE) or self._is_float(role)
        return str(is_number).lower()

    @property
    def time_conditions(self) -> dict[str, str]:
        """SQL by kind of time: the value is of the kind."""
        kind = self.types["time"]
        if isinstance(kind, _DATE):
            return {"date": "true"}
        if self.has_formatted_times:
            return {"date": "date IS NOT NULL"}
        if not isinstance(kind, T.StringType):
            return {"float": "true"}
        is_finite = _finite_sql("try_cast(time AS double)")
        is_date = "try_cast(time AS timestamp) IS NOT NULL"
        return {
            "float": f"(time RLIKE {_NUMBER_TEXT} AND {is_finite})",
            "date": f"(time RLIKE {_DATE_TEXT} AND time >= '0001' AND {is_date})",
        }

    def inspect(self) -> None:
        """Fills in rows, is_whole and kind_of_time; refuses bad rows, or leaves them out."""
        conditions = self.time_conditions
        faults = self._faults()
        usable = f"NOT {any_of(faults)}"
        aggregates = ["count(*)"]
        for missing in faults.values():
            aggregates.append(f"count_if({missing})")
        for role in self.roles:
            strange = self.strange_sql(role)
            aggregates.append(f"count_if({usable} AND {strange})")
        for role in self.roles:
            whole = self.whole_sql(role)
            aggregates.append(f"bool_and({whole})")
        for condition in conditions.values():
            aggregates.append(f"count_if({usable} AND {condition})")
        aggregates.append(f"count_if({usable})")
        results = self._query_row(aggregates)
        roles = len(self.roles)
        missing_counts = results[1 : 1 + roles]
        fault_counts = results[1 + roles : 1 + 2 * roles]
        strange_counts = results[1 + 2 * roles : 1 + 3 * roles]
        whole_flags = results[1 + 3 * roles : 1 + 4 * roles]
        *time_counts, usable_rows = results[1 + 4 * roles :]
        self.rows = results[0]
        self._count_filtered()
        if not self.skips:
            self._refuse_missing(missing_counts)
            self._refuse_faults(fault_counts)
        self._refuse_strange(strange_counts)
        self.is_whole = dict(zip(self.roles, whole_flags, strict=True))
        self.fitting_rows = dict(zip(conditions, time_counts, strict=True))
        if self.rows:
            self._find_kind_of_time(faults, usable_rows)
        if self.skips:
            self._skip(faults)

    def _query_row(self, aggregates: list[str]) -> list[Any]:
        """Returns the one row of a query of aggregates over the rows that count."""
        try:
            (row,) = self.frame.selectExpr(*aggregates).collect()
        except SPARK_ERRORS as error:
            self._refuse_unreadable(error)
        return list(row)

    def _count_filtered(self) -> None:
        """Counts the rows that the expression leaves out."""
        if not self.parsed:
            counts = self.all_rows.selectExpr("count_if(NOT keep)")
            self.reading.filtered += counts.collect()[0][0]

    def with_positions(
        self, spark: SparkSession, numbers: dict[str, int]
    ) -> DataFrame:
        """Returns the frame with the rows' position among all inputs. numbers: of these, by name.

        Raises InputError for a table, whose rows have no order.
        """
        first = self.inputs[0]
        if first.is_table:
            raise InputError(
                f"{first.name}: the rows of a table have no order: "
                "leave out --tie-order file"
            )
        files = []
        for (file,) in self.frame.select("file").distinct().collect():
            files.append((file, numbers[_file_name(file)]))
        schema = "file string, number bigint"
        numbered = spark.createDataFrame(files, schema)
        frame = self.frame.join(F.broadcast(numbered), "file")
        position = f"shiftleft(number, {FILE_BITS}) + row AS position"
        return frame.selectExpr("*", position)

    def _faults(self) -> dict[str, str]:
        """Returns SQL by reason, for: the row has no value where it needs one."""
        faults = {}
        for role in self.roles:
            column = self.columns.get(role, role)
            faults[f"{column!r} is empty"] = self.missing_sql(role)
        for role in self.roles:
            column = self.columns.get(role, role)
            fault = self.fault_sql(role)
            faults[f"{column!r} is no id"] = f"coalesce({fault}, false)"
        return faults

    def _find_kind_of_time(self, faults: dict[str, str], rows: int) -> None:
        """Sets the kind of time.

        rows: those that can be used but for their time. Rows whose time is none are refused,
        naming the first, or added to the faults.
        """
        if self.is_whole["time"]:
            self.kind_of_time = "whole"
            return
        best = max(self.fitting_rows, key=lambda kind: self.fitting_rows[kind])
        self.kind_of_time = best
        if self.fitting_rows[best] == rows:
            return
        is_best = self.time_conditions[best]
        is_other = f"NOT coalesce({is_best}, false)"
        fits = self.fitting_rows[best] > 0
        expected = expected_time(best, fits)
        if self.has_formatted_times:
            expected = f"a date like {self.time_format}"
        column = self.columns["time"]
        if self.skips and fits:
            faults[f"{column!r} is not {expected}"] = is_other
            return
        if fits and best == "date" and not self.has_formatted_times:
            expected = (
                "a date such as 2024-01-31 or 2024-01-31T23:59:59.5+01:00"
            )
        usable = f"NOT {any_of(faults)}"
        row, text = self._first_row("time", f"{usable} AND {is_other}")
        raise InputError(
            f"{row} {column!r} is {text!r}: a time must be {expected}"
        )

    def _skip(self, faults: dict[str, str]) -> None:
        """Leaves bad rows out, counts and lists them."""
        cases = []
        for reason, condition in faults.items():
            literal = _SparkDialect().quote_text(reason)
            cases.append(f"WHEN {condition} THEN {literal}")
        first_reason = F.expr(f"CASE {' '.join(cases)} END").alias("reason")
        bad = self.frame.select("file", "row", first_reason)
        bad = bad.filter("reason IS NOT NULL")
        counts = bad.groupBy("reason").count().collect()
        for text, count in counts:
            self.reading.add_bad(text, count)
            self.rows -= count
        if not counts:
            return
        listed = bad.orderBy("file", "row").limit(MOST_LISTED)
        for file, row, text in listed.collect():
            self.reading.list_bad([BadRow(_file_name(file), row, text)])
        self.frame = self.frame.filter(f"NOT {any_of(faults)}")
        flags = []
        for role in self.roles:
            flags.append(f"bool_and({self.whole_sql(role)})")
        results = self._query_row(flags)
        self.is_whole = dict(zip(self.roles, results, strict=True))
        if self.is_whole["time"]:
            self.kind_of_time = "whole"

    def _is_string(self, role: str) -> bool:
        return isinstance(self.types[role], T.StringType)

    def _is_float(self, role: str) -> bool:
        return isinstance(self.types[role], tuple(_FLOAT))

    def _is_binary(self, role: str) -> bool:
        return isinstance(self.types[role], T.BinaryType)

    def _is_parsed(self, role: str) -> bool:
        """Whether the text says no type, as in CSV. That of --domain does."""
        name = self.columns.get(role)
        if name is None:
            return False
        return self.parsed or name in self.partitions

    def _refuse_missing(self, counts: list[int]) -> None:
        """Raises InputError for the first role with missing values."""
        for role, count in zip(self.roles, counts, strict=True):
            if count:
                condition = self.missing_sql(role)
                row, text = self._first_row(role, condition)
                value = text or "empty"
                value = value.lower()
                value = value.replace("infinity", "inf")
                column = self.columns.get(role, role)
                raise InputError(
                    f"{row} {column!r} is {value}: every row needs one"
                )

    def _refuse_faults(self, counts: list[int]) -> None:
        """Raises InputError for the first role with values that are no ids."""
        for role, count in zip(self.roles, counts, strict=True):
            if count:
                condition = self.fault_sql(role)
                row, text = self._first_row(role, condition)
                reason = fault_reason(self.types[role].simpleString())
                column = self.columns.get(role, role)
                raise InputError(f"{row} {column!r} is {text}: {reason}")

    def _refuse_strange(self, counts: list[int]) -> None:
        """Raises InputError for the first role with values that the engines read otherwise."""
        for role, count in zip(self.roles, counts, strict=True):
            if count:
                condition = self.strange_sql(role)
                row, text = self._first_row(role, condition)
                column = self.columns.get(role, role)
                raise InputError(
                    f"{row} {column!r} is {text!r}, "
                    "which Spark reads or writes otherwise than DuckDB: "
                    "make the column BIGINT or UTF-8 text, or use --engine duckdb"
                )

    def _first_row(self, role: str, condition: str) -> tuple[str, str | None]:
        """Finds the first row in a condition; returns "FILE: row N:" and the value.

        Rows are numbered from 1, the header not counted. A table's have no number.
        """
        value = f"CAST({role} AS string)"
        if self._is_binary(role):
            value = f"hex({role})"
        first = f"min(struct(file, row, {value}))"
        rows = self.frame.filter(condition)
        selected = rows.selectExpr(first)
        (values,) = selected.collect()[0]
        file, number, text = values
        file_name = _file_name(file)
        name = f"{file_name}:"
        if number is not None:
            name += f" row {number}:"
        return name, text

    def _refuse_unreadable(self, error: Exception) -> NoReturn:
        """Raises InputError for the first input that cannot be read, or else the error."""
        values = [f"max(hash({role}))" for role in self.roles]
        for one in self.inputs:
            try:
                frame = self.read([one])
                hashes = frame.selectExpr(*values)
                hashes.head()
            except SPARK_ERRORS as input_error:
                reason = spark_reason(input_error)
                raise InputError(
                    f"{one.name} cannot be read: {reason}"
                ) from None
        raise error


def _digits_sql(value: str) -> str:
    """Returns SQL for parsed text without the .0 of a float."""
    return f"regexp_replace({value}, '[.]0+$', '')"


def _no_utf8_sql(value: str) -> str:
    """Returns SQL for: the text's bytes are no UTF-8."""
    if hasattr(F, "is_valid_utf8"):
        return f"NOT is_valid_utf8({value})"
    binary = f"CAST({value} AS binary)"
    return f"CAST(decode({binary}, 'UTF-8') AS binary) <> {binary}"


def _finite_sql(value: str) -> str:
    return f"coalesce(abs({value}) < double('Infinity'), false)"


def _file_name(file: str) -> str:
    """Returns the name of a file as given, from Spark's name of it.

    file:///logs/a%20b.parquet    /logs/a b.parquet
    s3a://bucket/a%20b.parquet    s3a://bucket/a b.parquet
    table:events                  table:events
    """
    if re.match(r"file:/", file):
        quoted_path = file.removeprefix("file:")
        path = urllib.parse.unquote(quoted_path)
        return "/" + path.lstrip("/")
    if _ADDRESS.match(file):
        return urllib.parse.unquote(file)
    return file
