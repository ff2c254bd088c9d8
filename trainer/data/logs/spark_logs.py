"""Reading interaction logs with Spark: the rows, types and refusals of `duckdb_logs.py`.

Parquet and tables are read by Spark. CSV and TSV are read by DuckDB in Spark's tasks, a file a
task: Spark's own reader takes an open quote, mixed line ends and bytes that are no UTF-8 for
data.

Spark writes some ids otherwise than DuckDB (a fraction, a TIMESTAMP), and reads fewer ways to
write a time. Such a log is refused: the engines never differ in silence.
"""

import functools
import re
import tempfile
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from trainer.data.duckdb_engine import escape_sql, open_connection
from trainer.data.logs.duckdb_logs import (
    SUFFIXES,
    check_columns,
    find_files,
    read_text,
    refuse_mixed_times,
    suffix_of,
    summarize_error,
)
from trainer.data.prepare.pipeline import file_state
from trainer.errors import InputError

TABLE = "table:"
SPARK_ERRORS = (PySparkException, Py4JError)
ROLES = ("user", "item", "domain", "time")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
# The rows of a text file, or what is wrong with it.
_TEXT_SCHEMA = """
    file string,
    row bigint,
    user string,
    item string,
    domain string,
    time string,
    fault string"""
_TEXT_ARROW_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "user": pa.string(),
        "item": pa.string(),
        "domain": pa.string(),
        "time": pa.string(),
        "fault": pa.string(),
    }
)
_WHOLE = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
# Up to here a whole float is written in all its digits.
_FLOAT = {T.FloatType: 2**24, T.DoubleType: 10**15}
_DATE = (T.DateType, T.TimestampType, T.TimestampNTZType)
_NESTED = (T.ArrayType, T.MapType, T.StructType)
_ID_TYPES = (
    *_WHOLE,
    *_FLOAT,
    T.StringType,
    T.BooleanType,
    T.DateType,
)
_TIME_TYPES = (
    *_WHOLE,
    *_FLOAT,
    *_DATE,
    T.StringType,
    T.DecimalType,
)
_NUMBER_TEXT = r"r'\A[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?\z'"
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
    another.
    """

    name: str
    facts: tuple

    @property
    def is_table(self) -> bool:
        """Whether it is a table, whose state is not known."""
        return self.name.startswith(TABLE)

    @property
    def is_text(self) -> bool:
        """Whether it is a CSV or TSV file."""
        if self.is_table:
            return False
        suffix = suffix_of(Path(self.name))
        return SUFFIXES[suffix] is not None

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

    Paths: see `find_files`. An address is a file, a folder or a glob, like s3a://bucket/logs.
    Raises InputError as `find_files` does.
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
    for file in find_files([text]):
        state = tuple(file_state(file))
        logs.append(Input(str(file), state))
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
        suffix = suffix_of(Path(name))
        if suffix in SUFFIXES:
            state = (name, size, microseconds)
            logs.append(Input(name, state))
    if not logs:
        suffixes = ", ".join(SUFFIXES)
        raise InputError(
            f"input {address} holds no log: names must end in {suffixes}"
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


def open_log(
    spark: SparkSession,
    inputs: list[Input],
    columns: dict[str, str],
    domain: str | None,
    scratch: str,
) -> DataFrame:
    """Returns the rows of all inputs: user_id, item_id, domain and time.

    Ids are bigint or string, domain is string, time bigint or double.
    scratch: a new folder for copies of text files.
    Raises InputError, as `duckdb_logs.open_log` does.
    """
    groups = []
    for group in _group_inputs(spark, inputs, columns, domain, scratch):
        group.inspect()
        if group.rows:
            groups.append(group)
    if not groups:
        logs = inputs[0].name
        if len(inputs) > 1:
            logs += f" and {len(inputs) - 1} more"
        raise InputError(f"{logs}: no rows, nothing to prepare")
    times = _time_expressions(groups)
    user_type = _common_id_type(groups, "user")
    item_type = _common_id_type(groups, "item")
    logs = []
    for group, time in zip(groups, times, strict=True):
        user = group.id_sql("user", user_type)
        item = group.id_sql("item", item_type)
        domain_value = group.text_sql("domain")
        log = group.frame.selectExpr(
            f"{user} AS user_id",
            f"{item} AS item_id",
            f"{domain_value} AS domain",
            f"{time} AS time",
        )
        logs.append(log)
    return functools.reduce(DataFrame.unionAll, logs)


def _time_expressions(groups: "list[_Group]") -> list[str]:
    """Returns SQL of the time, one a group, all of one kind: numbers or dates.

    kinds           each group's time
    whole, whole    CAST(time AS bigint)
    whole, float    CAST(time AS double) + 0D
    date, date      unix_micros(CAST(time AS timestamp))
    """
    kinds = [group.kind_of_time() for group in groups]
    first_inputs = [group.inputs[0].name for group in groups]
    refuse_mixed_times(kinds, first_inputs, groups[0].columns["time"])
    if "date" in kinds:
        time = "unix_micros(CAST(time AS timestamp))"
    elif "float" in kinds:
        # Without negative zeros: the item decides which of two equal times comes first.
        time = "CAST(time AS double) + 0D"
    else:
        time = "CAST(time AS bigint)"
    return [time] * len(groups)


def _common_id_type(groups: "list[_Group]", role: str) -> str:
    """Returns bigint if all ids of all inputs are whole numbers, else string."""
    for group in groups:
        if not group.is_whole[role]:
            return "string"
    return "bigint"


def _group_inputs(
    spark: SparkSession,
    inputs: list[Input],
    columns: dict[str, str],
    domain: str | None,
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
        frame = _read_texts(spark, texts, columns, domain, scratch)
        groups.append(_Group(texts, lambda _: frame, columns))

    def read_schema(one: Input) -> str:
        frame_of_one = _read_frame(spark, [one])
        return frame_of_one.schema.json()

    inputs_by_layout = defaultdict(list)
    with ThreadPoolExecutor(_SCHEMAS_AT_ONCE) as pool:
        schemas = pool.map(read_schema, others)
        for one, schema in zip(others, schemas, strict=True):
            table = ""
            if one.is_table:
                table = one.name
            inputs_by_layout[table, schema].append(one)
    read = functools.partial(
        _read_columns,
        spark,
        columns=columns,
        domain=domain,
    )
    for alike in inputs_by_layout.values():
        groups.append(_Group(alike, read, columns))
    return groups


def _read_columns(
    spark: SparkSession,
    inputs: list[Input],
    columns: dict[str, str],
    domain: str | None,
) -> DataFrame:
    """Reads file, row, and the columns by role of tables or Parquet files."""
    frame = _read_frame(spark, inputs)
    wanted = dict(columns)
    if domain is not None:
        wanted.pop("domain", None)
    first = inputs[0]
    check_columns(first.name, frame.columns, wanted)
    file = F.lit(first.name)
    row = F.lit(None)
    if not first.is_table:
        file = F.col("_metadata.file_path")
        row = F.col("_metadata.row_index") + 1
    row = row.cast("bigint")
    selected = [file.alias("file"), row.alias("row")]
    for role in ROLES:
        if role in wanted:
            column = _quoted_column(wanted[role])
        else:
            column = F.lit(domain)
        selected.append(column.alias(role))
    return frame.select(*selected)


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
    columns: dict[str, str],
    domain: str | None,
    scratch: str,
) -> DataFrame:
    """Parses CSV and TSV files once, into Parquet, since parsing is dear; reads that."""
    local = []
    remote = []
    for one in inputs:
        if one.is_remote:
            remote.append(escape_glob(one.name))
        else:
            local.append((one.name, None))
    files = spark.createDataFrame(local, "file string, content binary")
    if remote:
        reader = spark.read.format("binaryFile")
        contents = reader.load(remote)
        contents = contents.select("path", "content")
        files = files.unionAll(contents)
    parse = functools.partial(_parse_texts, columns, domain)
    files = files.repartition(len(inputs))
    rows = files.mapInArrow(parse, _TEXT_SCHEMA)
    rows.write.parquet(scratch)
    rows = spark.read.parquet(escape_glob(scratch))
    faulty = rows.filter("fault IS NOT NULL")
    faulty = faulty.orderBy("file")
    faults = faulty.select("fault").head(1)
    if faults:
        raise InputError(faults[0].fault)
    return rows.drop("fault")


def _parse_texts(
    columns: dict[str, str],
    domain: str | None,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of CSV and TSV files, or what is wrong with a file. Runs in a task."""
    for batch in batches:
        files = batch.column(0).to_pylist()
        contents = batch.column(1).to_pylist()
        for file, content in zip(files, contents, strict=True):
            yield from _parse_text(file, content, columns, domain)


def _parse_text(
    file: str,
    content: bytes | None,
    columns: dict[str, str],
    domain: str | None,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one file. content: of a remote one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open_connection() as connection,
    ):
        scratch = escape_sql(folder)
        connection.execute(f"""
            SET threads = 1;
            SET temp_directory = '{scratch}'""")
        path = Path(file)
        if content is not None:
            path = Path(folder, path.name)
            path.write_bytes(content)
        try:
            for rows in read_text(connection, path, columns, domain):
                names = [file] * len(rows)
                arrays = [pa.array(names)]
                for name in ("row", *ROLES):
                    arrays.append(rows[name])
                no_faults = pa.nulls(len(rows), pa.string())
                arrays.append(no_faults)
                yield pa.RecordBatch.from_arrays(
                    arrays,
                    schema=_TEXT_ARROW_SCHEMA,
                )
        except InputError as error:
            fault = str(error).replace(str(path), file)
            record = {"file": file, "fault": fault}
            yield pa.RecordBatch.from_pylist([record], _TEXT_ARROW_SCHEMA)


class _Group:
    """Inputs with equal columns, which one DataFrame reads together.

    Its columns are file, row (null for a table), user, item, domain, time.
    """

    def __init__(
        self,
        inputs: list[Input],
        read: Callable[[list[Input]], DataFrame],
        columns: dict[str, str],
    ):
        self.inputs = inputs
        self.read = read
        self.columns = columns
        self.frame = read(inputs)
        self.parsed = inputs[0].is_text
        self.types: dict[str, T.DataType] = {}  # by role
        self.rows = 0
        self.is_whole: dict[str, bool] = {}  # by role
        self.fitting_rows: dict[str, int] = {}  # by kind of time
        for role in ROLES:
            self.types[role] = self.frame.schema[role].dataType
        for role in ROLES:
            self._check_type(role)

    def _check_type(self, role: str) -> None:
        """Raises InputError where the engines could read a column's type differently."""
        kind = self.types[role]
        name = self.inputs[0].name
        column = f"{name}: column {self.columns[role]!r}"
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
        elif not _is_id_type(kind):
            raise InputError(
                f"{column} holds {type_name}: Spark may write it otherwise than DuckDB; "
                "cast it to BIGINT or text, or use --engine duckdb"
            )

    def text_sql(self, role: str) -> str:
        """Returns SQL for the value as DuckDB writes it.

        type of user    SQL
        DOUBLE          concat(CAST(CAST(user AS bigint) AS string), '.0')
        BIGINT          CAST(user AS string)
        """
        if self._is_float(role):
            return f"concat(CAST(CAST({role} AS bigint) AS string), '.0')"
        return f"CAST({role} AS string)"

    def id_sql(self, role: str, id_type: str) -> str:
        """Returns SQL for the id as bigint or string."""
        value = role
        if id_type == "string":
            value = self.text_sql(role)
        return f"CAST({value} AS {id_type})"

    def missing_sql(self, role: str) -> str:
        """Returns SQL for: the value is missing.

        type of user    SQL
        STRING          (user IS NULL OR CAST(user AS string) = '')
        DOUBLE          (user IS NULL OR NOT coalesce(abs(user) < double('Infinity'), false))
        BIGINT          (user IS NULL)
        """
        if self._is_string(role):
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
            if hasattr(F, "is_valid_utf8"):
                return f"NOT is_valid_utf8({role})"
            binary = f"CAST({role} AS binary)"
            return f"CAST(decode({binary}, 'UTF-8') AS binary) <> {binary}"
        if isinstance(kind, _DATE):
            return f"NOT {role} BETWEEN DATE'0001-01-01' AND DATE'9999-12-31'"
        if role == "time" and isinstance(kind, T.DecimalType):
            least_inexact = 2**53
            unit = 10**kind.scale
            return f"abs(time) >= {least_inexact}BD / {unit}BD"
        if role != "time" and self._is_float(role):
            bound = _FLOAT[type(kind)]
            return (
                f"({role} <> floor({role}) "
                f"OR abs({role}) >= {bound} "
                f"OR CAST({role} AS string) = '-0.0')"
            )
        return "false"

    def whole_sql(self, role: str) -> str:
        """Returns SQL for: the value is a whole number as int64 writes it."""
        is_text_time = role == "time" and self._is_string(role)
        if self.parsed or is_text_time:
            number = f"CAST(try_cast({role} AS bigint) AS string)"
            return f"coalesce({number} = {role}, false)"
        if isinstance(self.types[role], _WHOLE):
            return "true"
        return "false"

    @property
    def time_conditions(self) -> dict[str, str]:
        """SQL by kind of time: the value is of the kind."""
        kind = self.types["time"]
        if isinstance(kind, _DATE):
            return {"date": "true"}
        if not isinstance(kind, T.StringType):
            return {"float": "true"}
        is_finite = _finite_sql("try_cast(time AS double)")
        is_date = "try_cast(time AS timestamp) IS NOT NULL"
        return {
            "float": f"(time RLIKE {_NUMBER_TEXT} AND {is_finite})",
            "date": f"(time RLIKE {_DATE_TEXT} AND time >= '0001' AND {is_date})",
        }

    def inspect(self) -> None:
        """Fills in rows, is_whole and fitting_rows; refuses missing values."""
        conditions = self.time_conditions
        aggregates = ["count(*)"]
        for role in ROLES:
            missing = self.missing_sql(role)
            aggregates.append(f"count_if({missing})")
        for role in ROLES:
            strange = self.strange_sql(role)
            aggregates.append(f"count_if({strange})")
        for role in ROLES:
            whole = self.whole_sql(role)
            aggregates.append(f"bool_and({whole})")
        for condition in conditions.values():
            aggregates.append(f"count_if({condition})")
        try:
            counts = self.frame.selectExpr(*aggregates)
            row = counts.head()
            results = list(row)
        except SPARK_ERRORS as error:
            self._refuse_unreadable(error)
        self.rows = results[0]
        missing_counts = results[1:5]
        strange_counts = results[5:9]
        whole_flags = results[9:13]
        time_counts = results[13:]
        self._refuse_missing(missing_counts)
        self._refuse_strange(strange_counts)
        self.is_whole = dict(zip(ROLES, whole_flags, strict=True))
        self.fitting_rows = dict(zip(conditions, time_counts, strict=True))

    def kind_of_time(self) -> str:
        """Returns 'whole', 'float' or 'date'.

        Refuses a column that is none of them, naming the first row at fault.
        """
        if self.is_whole["time"]:
            return "whole"
        best = max(self.fitting_rows, key=self.fitting_rows.get)
        if self.fitting_rows[best] == self.rows:
            return best
        is_best = self.time_conditions[best]
        condition = f"NOT coalesce({is_best}, false)"
        row, text = self._first_row("time", condition)
        expected = "a number or a date"
        if self.fitting_rows[best] and best == "float":
            expected = "a finite number"
        elif self.fitting_rows[best]:
            expected = (
                "a date such as 2024-01-31 or 2024-01-31T23:59:59.5+01:00"
            )
        column = self.columns["time"]
        raise InputError(
            f"{row} {column!r} is {text!r}: a time must be {expected}"
        )

    def _is_string(self, role: str) -> bool:
        return isinstance(self.types[role], T.StringType)

    def _is_float(self, role: str) -> bool:
        return isinstance(self.types[role], tuple(_FLOAT))

    def _refuse_missing(self, counts: list[int]) -> None:
        """Raises InputError for the first role with missing values."""
        for role, count in zip(ROLES, counts, strict=True):
            if count:
                condition = self.missing_sql(role)
                row, text = self._first_row(role, condition)
                value = text or "empty"
                value = value.lower()
                value = value.replace("infinity", "inf")
                column = self.columns[role]
                raise InputError(
                    f"{row} {column!r} is {value}: every row needs one"
                )

    def _refuse_strange(self, counts: list[int]) -> None:
        """Raises InputError for the first role with values that the engines read otherwise."""
        for role, count in zip(ROLES, counts, strict=True):
            if count:
                condition = self.strange_sql(role)
                row, text = self._first_row(role, condition)
                column = self.columns[role]
                raise InputError(
                    f"{row} {column!r} is {text!r}, "
                    "which Spark reads or writes otherwise than DuckDB: "
                    "make the column BIGINT or UTF-8 text, or use --engine duckdb"
                )

    def _first_row(self, role: str, condition: str) -> tuple[str, str | None]:
        """Finds the first row in a condition; returns "FILE: row N:" and the value.

        Rows are numbered from 1, the header not counted. A table's have no number.
        """
        first = f"min(struct(file, row, CAST({role} AS string)))"
        rows = self.frame.filter(condition)
        selected = rows.selectExpr(first)
        (values,) = selected.head()
        file, number, text = values
        file_name = _file_name(file)
        name = f"{file_name}:"
        if number is not None:
            name += f" row {number}:"
        return name, text

    def _refuse_unreadable(self, error: Exception) -> NoReturn:
        """Raises InputError for the first input that cannot be read, or else the error."""
        values = [f"max(hash({role}))" for role in ROLES]
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


def _is_id_type(kind: T.DataType) -> bool:
    """Returns whether ids may be of this type."""
    if not isinstance(kind, T.DecimalType):
        return isinstance(kind, _ID_TYPES)
    # DECIMAL(20, 0) may be what Spark makes of UBIGINT; others lose their zeros.
    if kind.precision == 20 and kind.scale == 0:
        return False
    return kind.scale <= 6 and kind.scale < kind.precision


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
