"""Reading interaction logs with Spark: the same rows, types and refusals as `logs.py` has, as one DataFrame.

Parquet and tables are read by Spark. CSV and TSV are read by DuckDB in Spark's tasks, a file a task: Spark's own reader takes
an open quote, mixed line ends and bytes that are no UTF-8 for data. Where Spark would write an id otherwise than DuckDB
(a fraction, a TIMESTAMP), or reads fewer ways to write a time, the log is refused: the engines never differ in silence.
"""

import functools
import re
import tempfile
import urllib.parse
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from trainer.data.prepare.logs import (
    SUFFIXES,
    check_columns,
    find_files,
    read_text,
    reason,
    suffix_of,
)
from trainer.data.prepare.pipeline import file_facts
from trainer.data.prepare.shard_writing import connect
from trainer.errors import InputError

TABLE = "table:"
SPARK_ERRORS = (PySparkException, Py4JError)
ROLES = ("user", "item", "domain", "time")
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_TEXT = "file string, row bigint, user string, item string, domain string, time string, fault string"
_TEXT_ARROW = pa.schema(
    [
        (name, pa.int64() if kind == "bigint" else pa.string())
        for name, kind in map(str.split, _TEXT.split(", "))
    ]
)
_WHOLE = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_FLOAT = {
    T.FloatType: 2**24,
    T.DoubleType: 10**15,
}  # up to here a whole float is written in all its digits
_DATE = (T.DateType, T.TimestampType, T.TimestampNTZType)
_NUMBER_TEXT = r"r'\A[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?\z'"
_DATE_TEXT = (
    r"r'\A[0-9]{4}-[0-9]{2}-[0-9]{2}([ T]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,6})?"
    r"(Z|[+-](0[0-9]|1[0-4]):[0-5][0-9])?)?\z'"
)
_SCHEMAS_AT_ONCE = 8


@dataclass(frozen=True)
class Input:
    """A file that Spark can read, or a table. `facts`: what tells one state of it from another."""

    name: str  # a local path, an address, or table:NAME
    facts: tuple

    @property
    def is_table(self):
        """Whether it is a table: whose state is not known."""
        return self.name.startswith(TABLE)

    @property
    def is_text(self):
        """Whether it is a CSV or TSV file."""
        return not self.is_table and SUFFIXES[suffix_of(Path(self.name))] is not None

    @property
    def uri(self):
        """The name in Spark's terms."""
        return self.name if _ADDRESS.match(self.name) else f"file://{self.name}"


def find_inputs(spark: SparkSession, inputs) -> list[Input]:
    """The logs behind paths (see `find_files`), addresses (s3a://bucket/logs: file, folder or glob) and table:NAME, sorted,
    each once. Raises InputError as `find_files` does."""
    found = {}
    for given in inputs:
        if given.startswith(TABLE):
            logs = [Input(given, (given,))]
        elif _ADDRESS.match(given):
            logs = _find_remote(spark, given)
        else:
            logs = [
                Input(str(file), tuple(file_facts(file)))
                for file in find_files([given])
            ]
        found.update((log.name, log) for log in logs)
    for log in found.values():
        if not (log.is_table or log.is_text) and Path(log.name).name.startswith(
            ("_", ".")
        ):
            raise InputError(
                f"{log.name}: Spark leaves out files whose names begin with _ or a dot: rename it"
            )
    return [found[name] for name in sorted(found)]


def _find_remote(spark, given):
    try:
        listed = (
            spark.read.format("binaryFile")
            .options(recursiveFileLookup="true", ignoreMissingFiles="false")
            .load(given)
        )
        files = listed.select(
            "path", "length", F.unix_micros("modificationTime")
        ).collect()
    except SPARK_ERRORS as error:
        raise InputError(
            f"input {given} cannot be listed: {spark_reason(error)}"
        ) from None
    files = [
        (re.sub(r"^([\w+.-]+):/(?!/)", r"\1:///", path), *facts)
        for path, *facts in files
    ]
    logs = [
        Input(path, (path, *facts))
        for path, *facts in files
        if suffix_of(Path(path)) in SUFFIXES
    ]
    if not logs:
        raise InputError(
            f"input {given} holds no log: names must end in {', '.join(SUFFIXES)}"
        )
    for log in logs:
        if log.facts[1] == 0:
            raise InputError(
                f"{log.name} is empty (0 bytes): remove it or write it again"
            )
    return logs


def spark_reason(error) -> str:
    """The telling part of a message of Spark's, in one line."""
    text = str(error)
    caused = re.findall(
        r"^(?:Caused by: )?[\w.$]+(?:Exception|Error): (.+)$", text, re.MULTILINE
    )
    return reason(
        caused[-1] if caused else text.split("\n\n")[0].split("\nJVM stacktrace")[0]
    )


def escaped(path) -> str:
    """A path that Spark does not take for a glob."""
    return re.sub(r"([*?\[\]{}\\])", r"\\\1", str(path))


def open_log(
    spark,
    inputs: list[Input],
    columns: dict[str, str],
    domain: str | None,
    scratch: str,
) -> DataFrame:
    """The rows of all inputs, with the columns user_id, item_id (bigint or string), domain (string) and time (bigint or
    double). scratch: a new folder for what is kept of text files.

    Raises InputError, as `logs.open_log` does.
    """
    groups = _groups(spark, inputs, columns, domain, scratch)
    for group in groups:
        group.inspect()
    groups = [group for group in groups if group.rows]
    if not groups:
        more = f" and {len(inputs) - 1} more" if inputs[1:] else ""
        raise InputError(f"{inputs[0].name}{more}: no rows, nothing to prepare")
    kinds = [group.time_kind() for group in groups]
    if len({kind == "date" for kind in kinds}) > 1:
        dated, numbered = (
            groups[[kind == "date" for kind in kinds].index(is_date)]
            for is_date in (True, False)
        )
        raise InputError(
            f"{dated.inputs[0].name} has dates in {columns['time']!r} and {numbered.inputs[0].name} has numbers: write one kind"
        )
    ids = {
        role: "bigint" if all(group.whole[role] for group in groups) else "string"
        for role in ("user", "item")
    }
    # A negative zero is none: which of two equal times comes first is for the item to say.
    number = (
        "CAST(time AS bigint)"
        if set(kinds) <= {"whole"}
        else "CAST(time AS double) + 0D"
    )
    logs = [
        group.frame.selectExpr(
            *(
                f"CAST({group.text(role) if kind == 'string' else role} AS {kind}) AS {role}_id"
                for role, kind in ids.items()
            ),
            f"{group.text('domain')} AS domain",
            f"{'unix_micros(CAST(time AS timestamp))' if kind == 'date' else number} AS time",
        )
        for group, kind in zip(groups, kinds, strict=True)
    ]
    return functools.reduce(DataFrame.unionAll, logs)


def _groups(spark, inputs, columns, domain, scratch):
    groups, alike = [], defaultdict(list)
    texts = [one for one in inputs if one.is_text]
    if texts:
        kept = _read_texts(spark, texts, columns, domain, scratch)
        groups.append(_Group(texts, lambda _: kept, columns))
    rest = [one for one in inputs if not one.is_text]
    with ThreadPoolExecutor(_SCHEMAS_AT_ONCE) as pool:
        for one, schema in zip(
            rest,
            pool.map(lambda one: _read(spark, [one]).schema.json(), rest),
            strict=True,
        ):
            alike[one.is_table and one.name, schema].append(one)
    read = functools.partial(_read_columns, spark, columns=columns, domain=domain)
    return groups + [_Group(own, read, columns) for own in alike.values()]


def _read_columns(spark, inputs, columns, domain):
    """Of tables or Parquet files: file, row, and the columns by role."""
    frame = _read(spark, inputs)
    wanted = {
        role: name
        for role, name in columns.items()
        if role != "domain" or domain is None
    }
    check_columns(inputs[0].name, frame.columns, wanted)
    file, row = F.lit(inputs[0].name), F.lit(None)
    if not inputs[0].is_table:
        file, row = F.col("_metadata.file_path"), F.col("_metadata.row_index") + 1
    values = {
        role: F.col("`" + name.replace("`", "``") + "`")
        for role, name in wanted.items()
    }
    if domain is not None:
        values["domain"] = F.lit(domain)
    return frame.select(
        file.alias("file"),
        row.cast("bigint").alias("row"),
        *(values[role].alias(role) for role in ROLES),
    )


def _read(spark, inputs):
    """Tables or Parquet files with equal columns."""
    try:
        if inputs[0].is_table:
            return spark.table(inputs[0].name.removeprefix(TABLE))
        options = {
            "recursiveFileLookup": "true",  # folders named key=value are no columns
            "ignoreCorruptFiles": "false",
            "ignoreMissingFiles": "false",
            "mergeSchema": "false",
            "datetimeRebaseMode": "CORRECTED",
            "int96RebaseMode": "CORRECTED",
        }
        return spark.read.options(**options).parquet(
            *(escaped(one.uri) for one in inputs)
        )
    except SPARK_ERRORS as error:
        raise InputError(
            f"{inputs[0].name} cannot be read: {spark_reason(error)}"
        ) from None


def _read_texts(spark, inputs, columns, domain, scratch):
    """CSV and TSV files, read once and kept as Parquet: parsing is dear."""
    local = [one.name for one in inputs if not _ADDRESS.match(one.name)]
    remote = [one.name for one in inputs if _ADDRESS.match(one.name)]
    files = spark.createDataFrame(
        [(file, None) for file in local], "file string, content binary"
    )
    if remote:
        read = spark.read.format("binaryFile").load([escaped(file) for file in remote])
        files = files.unionAll(read.select("path", "content"))
    kept = files.repartition(len(inputs)).mapInArrow(
        functools.partial(_parse, columns, domain), _TEXT
    )
    kept.write.parquet(scratch)
    kept = spark.read.parquet(escaped(scratch))
    faults = kept.filter("fault IS NOT NULL").orderBy("file").select("fault").head(1)
    if faults:
        raise InputError(faults[0].fault)
    return kept.drop("fault")


def _parse(columns, domain, batches):
    """Rows of CSV and TSV files, or what is wrong with a file. Runs in a task."""
    for batch in batches:
        for file, content in zip(
            *(column.to_pylist() for column in batch.columns), strict=True
        ):
            with tempfile.TemporaryDirectory() as folder, connect() as connection:
                connection.execute(f"SET threads = 1; SET temp_directory = '{folder}'")
                path = Path(file)
                if content is not None:
                    path = Path(folder, path.name)
                    path.write_bytes(content)
                try:
                    for rows in read_text(connection, path, columns, domain):
                        named = (
                            pa.array([file] * len(rows)),
                            *(rows[name] for name in ("row", *ROLES)),
                        )
                        yield pa.RecordBatch.from_arrays(
                            [*named, pa.nulls(len(rows), pa.string())],
                            schema=_TEXT_ARROW,
                        )
                except InputError as error:
                    fault = str(error).replace(str(path), file)
                    yield pa.RecordBatch.from_pylist(
                        [{"file": file, "fault": fault}], _TEXT_ARROW
                    )


class _Group:
    """Inputs with equal columns, which one DataFrame reads together: file, row (null for a table), user, item, domain, time."""

    def __init__(self, inputs, read, columns):
        self.inputs, self.read, self.columns = inputs, read, columns
        self.frame = read(inputs)
        self.types = {role: self.frame.schema[role].dataType for role in ROLES}
        self.parsed = inputs[0].is_text
        for role, kind in self.types.items():
            if isinstance(kind, T.ArrayType | T.MapType | T.StructType):
                raise InputError(
                    f"{inputs[0].name}: column {columns[role]!r} holds {kind.simpleString()}, not single values"
                )
            if not (self.is_time(kind) if role == "time" else self.is_id(kind)):
                can = (
                    "a time is a number or a date"
                    if role == "time"
                    else "Spark may write it otherwise than DuckDB"
                )
                way = (
                    ""
                    if role == "time"
                    else "; cast it to BIGINT or text, or use --engine duckdb"
                )
                raise InputError(
                    f"{inputs[0].name}: column {columns[role]!r} holds {kind.simpleString().upper()}: {can}{way}"
                )

    def is_id(self, kind):
        """Whether ids may be of this type."""
        if isinstance(
            kind, T.DecimalType
        ):  # DECIMAL(20, 0) may be what Spark makes of UBIGINT; others lose their zeros
            return (
                kind.scale <= 6
                and kind.scale < kind.precision
                and (kind.precision, kind.scale) != (20, 0)
            )
        return isinstance(
            kind, (*_WHOLE, *_FLOAT, T.StringType, T.BooleanType, T.DateType)
        )

    def is_time(self, kind):
        """Whether times may be of this type."""
        return isinstance(kind, (*_WHOLE, *_FLOAT, *_DATE, T.StringType, T.DecimalType))

    def text(self, role):
        """SQL: the value as DuckDB writes it."""
        kind = self.types[role]
        if isinstance(kind, tuple(_FLOAT)):
            return f"concat(CAST(CAST({role} AS bigint) AS string), '.0')"
        return f"CAST({role} AS string)"

    def missing(self, role):
        """SQL: the value is not there."""
        kind = self.types[role]
        empty = (
            f" OR CAST({role} AS string) = ''" if isinstance(kind, T.StringType) else ""
        )
        empty = f" OR NOT {_finite(role)}" if isinstance(kind, tuple(_FLOAT)) else empty
        return f"({role} IS NULL{empty})"

    def strange(self, role):
        """SQL: the value is one that Spark does not read or write as DuckDB does."""
        kind = self.types[role]
        if isinstance(kind, T.StringType):
            if self.parsed:
                return "false"
            if hasattr(F, "is_valid_utf8"):
                return f"NOT is_valid_utf8({role})"
            return f"CAST(decode(CAST({role} AS binary), 'UTF-8') AS binary) <> CAST({role} AS binary)"
        if isinstance(kind, _DATE):
            return f"NOT {role} BETWEEN DATE'0001-01-01' AND DATE'9999-12-31'"
        if role == "time" and isinstance(kind, T.DecimalType):
            return f"abs(time) >= {2**53}BD / {10**kind.scale}BD"
        if role != "time" and isinstance(kind, tuple(_FLOAT)):
            return f"({role} <> floor({role}) OR abs({role}) >= {_FLOAT[type(kind)]} OR CAST({role} AS string) = '-0.0')"
        return "false"

    def is_whole(self, role):
        """SQL: the value is a whole number as int64 writes it."""
        if self.parsed or (
            role == "time" and isinstance(self.types[role], T.StringType)
        ):
            return (
                f"coalesce(CAST(try_cast({role} AS bigint) AS string) = {role}, false)"
            )
        return str(isinstance(self.types[role], _WHOLE)).lower()

    @property
    def fits(self):
        """SQL by kind of time: the value is one."""
        kind = self.types["time"]
        if isinstance(kind, T.StringType):
            return {
                "float": f"(time RLIKE {_NUMBER_TEXT} AND {_finite('try_cast(time AS double)')})",
                "date": f"(time RLIKE {_DATE_TEXT} AND time >= '0001' AND try_cast(time AS timestamp) IS NOT NULL)",
            }
        return {"date": "true"} if isinstance(kind, _DATE) else {"float": "true"}

    def inspect(self):
        """Fills in rows, whole (by role) and fitting (rows by kind of time); refuses values that are not there."""
        facts = [f"count_if({self.missing(role)})" for role in ROLES]
        facts += [f"count_if({self.strange(role)})" for role in ROLES]
        facts += [f"bool_and({self.is_whole(role)})" for role in ROLES]
        facts += [f"count_if({fit})" for fit in self.fits.values()]
        try:
            self.rows, *found = self.frame.selectExpr("count(*)", *facts).head()
        except SPARK_ERRORS as error:
            self._refuse_unreadable(error)
        for role, missing in zip(ROLES, found[:4], strict=True):
            if missing:
                file, row, text = self._first(role, self.missing(role))
                text = (text or "empty").lower().replace("infinity", "inf")
                raise InputError(
                    f"{file}:{row} {self.columns[role]!r} is {text}: every row needs one"
                )
        for role, strange in zip(ROLES, found[4:8], strict=True):
            if strange:
                file, row, text = self._first(role, self.strange(role))
                raise InputError(
                    f"{file}:{row} {self.columns[role]!r} is {text!r}, which Spark reads or writes otherwise than DuckDB: "
                    "make the column BIGINT or UTF-8 text, or use --engine duckdb"
                )
        self.whole = dict(zip(ROLES, found[8:12], strict=True))
        self.fitting = dict(zip(self.fits, found[12:], strict=True))

    def time_kind(self):
        """'whole', 'float' or 'date'; refuses a column that is none of them, naming the first row at fault."""
        if self.whole["time"]:
            return "whole"
        best = max(self.fitting, key=self.fitting.get)
        if self.fitting[best] == self.rows:
            return best
        file, row, text = self._first("time", f"NOT coalesce({self.fits[best]}, false)")
        meant = {
            "float": "a finite number",
            "date": "a date such as 2024-01-31 or 2024-01-31T23:59:59.5+01:00",
        }[best]
        meant = meant if self.fitting[best] else "a number or a date"
        raise InputError(
            f"{file}:{row} {self.columns['time']!r} is {text!r}: a time must be {meant}"
        )

    def _first(self, role, condition):
        """File, ' row N:' (from 1, the header not counted) and value of the first row that meets the condition."""
        place = f"min(struct(file, row, CAST({role} AS string)))"
        ((file, row, text),) = self.frame.filter(condition).selectExpr(place).head()
        return _plain(file), "" if row is None else f" row {row}:", text

    def _refuse_unreadable(self, error):
        for one in self.inputs:
            try:
                self.read([one]).selectExpr(
                    *(f"max(hash({role}))" for role in ROLES)
                ).head()
            except SPARK_ERRORS as fault:
                raise InputError(
                    f"{one.name} cannot be read: {spark_reason(fault)}"
                ) from None
        raise error


def _finite(value):
    return f"coalesce(abs({value}) < double('Infinity'), false)"


def _plain(file):
    """The name of a file as given, from what Spark calls it."""
    if not re.match(r"file:/", file):
        return urllib.parse.unquote(file) if _ADDRESS.match(file) else file
    return "/" + urllib.parse.unquote(file.removeprefix("file:")).lstrip("/")
