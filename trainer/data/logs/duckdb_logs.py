"""Reading interaction logs with DuckDB: files, columns, and one view `log` over all of them.

The view has the columns

    user_id, item_id   BIGINT if every id in every file is a whole number, else VARCHAR
    domain             VARCHAR
    time               BIGINT or DOUBLE; dates are microseconds since 1970, UTC if they name
                       no zone
"""

import csv
import glob
import gzip
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection

from trainer.data.duckdb_engine import escape_sql
from trainer.errors import InputError

# The delimiter of each kind of file; Parquet has none.
SUFFIXES = {
    ".parquet": None,
    ".csv": ",",
    ".csv.gz": ",",
    ".tsv": "\t",
    ".tsv.gz": "\t",
}
_WHOLE = {
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
}
# Whole numbers that may not fit int64: their values decide.
_WIDE = {"UBIGINT", "HUGEINT", "UHUGEINT"}
_FLOAT = {"FLOAT", "DOUBLE"}
# And its kin: TIMESTAMP_NS, TIMESTAMP WITH TIME ZONE, TIMESTAMPTZ_NS.
_DATE = ("DATE", "TIMESTAMP")
_NESTED = ("STRUCT", "MAP", "UNION")
_LONGEST_REASON = 300


@dataclass
class _Group:
    """Files of one format with equal columns, which one table function reads together.

    options: what the table function gets beside the files.
    columns: column name by role, for the roles that the files have a column for.
    value: SQL expression over `table` by role. type: DuckDB type by role.
    text: CSV, of which every column is text.
    is_whole: by role, whether all values are whole numbers that fit int64.
    """

    files: list[Path]
    options: str
    columns: dict[str, str]
    text: bool
    value: dict[str, str] = field(default_factory=dict)
    type: dict[str, str] = field(default_factory=dict)
    table: str = ""
    rows: int = 0
    is_whole: dict[str, bool] = field(default_factory=dict)

    def scan_sql(self, files: list[Path]) -> str:
        """Returns SQL that reads some of the files.

        An example: read_parquet(['/logs/1.parquet', '/logs/2.parquet'], can_have_nan=true, …)
        """
        function = "read_parquet"
        if self.text:
            function = "read_csv"
        literals = []
        for file in files:
            literals.append(_path_literal(file))
        paths = ", ".join(literals)
        return f"{function}([{paths}], {self.options})"

    def missing_sql(self, role: str) -> str:
        """Returns SQL for: the value is missing.

        An empty text is what CSV has for it, a NaN what a float column has.

            type       of a column user_id
            VARCHAR    ("user_id" IS NULL OR "user_id" = '')
            DOUBLE     ("user_id" IS NULL OR NOT isfinite("user_id"))
            BIGINT     ("user_id" IS NULL)
        """
        value = self.value[role]
        kind = self.type[role]
        if kind == "VARCHAR":
            return f"({value} IS NULL OR {value} = '')"
        if kind in _FLOAT:
            return f"({value} IS NULL OR NOT isfinite({value}))"
        return f"({value} IS NULL)"

    def whole_sql(self, role: str) -> str:
        """Returns SQL for: the value is a whole number as int64 writes it.

        '007' and '1e3' are text. Where the type decides, no value is looked at.
        """
        kind = self.type[role]
        is_text_time = role == "time" and kind == "VARCHAR"
        values_decide = self.text or kind in _WIDE or is_text_time
        if not values_decide:
            is_whole = kind in _WHOLE
            return str(is_whole)
        value = f"{self.value[role]}::VARCHAR"
        number = f"TRY_CAST({value} AS BIGINT)::VARCHAR"
        return f"coalesce({number} = {value}, false)"


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """Finds the log files behind paths, folders and globs, sorted, each once.

    Folders are searched through, and other files in them ignored.
    Raises InputError: a path that does not exist, a folder without logs, a named file that is
    no log, an empty file.
    """
    files = set()
    for text in inputs:
        for log in _find_logs(text):
            files.add(log.resolve())
    for path in files:
        status = path.stat()
        if status.st_size == 0:
            raise InputError(
                f"{path} is empty (0 bytes): remove it or write it again"
            )
    return sorted(files)


def _find_logs(text: str | Path) -> list[Path]:
    """Finds the logs behind one path, folder or glob."""
    path = Path(text)
    paths = [path]
    if not path.exists():
        matches = glob.glob(str(text), recursive=True)
        paths = [Path(match) for match in matches]
        paths.sort()
    if not paths:
        raise InputError(
            f"input {text} does not exist: give a file, a folder or a glob"
        )
    suffixes = ", ".join(SUFFIXES)
    logs = []
    for path in paths:
        if path.is_dir():
            logs += _find_logs_in(path)
        elif suffix_of(path) in SUFFIXES:
            logs.append(path)
        elif len(paths) == 1:
            raise InputError(
                f"input {path} is no log: the name must end in {suffixes}"
            )
    if not logs:
        raise InputError(
            f"input {text} holds no log: names must end in {suffixes}"
        )
    return logs


def _find_logs_in(folder: Path) -> list[Path]:
    logs = []
    for path in folder.rglob("*"):
        if path.is_file() and suffix_of(path) in SUFFIXES:
            logs.append(path)
    return logs


def suffix_of(path: Path) -> str | None:
    """Returns the key of SUFFIXES that a path ends in."""
    name = path.name.lower()
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    return None


def open_log(
    connection: DuckDBPyConnection,
    files: list[Path],
    columns: dict[str, str],
    domain: str | None = None,
    view: str = "log",
) -> bool:
    """Makes the view `log` over the files. Returns whether their times are dates.

    columns: the columns' names by role: user, item, domain, time.
    domain: the one domain of all rows, in place of a column.
    Raises InputError, naming file and row: a missing column, a file that cannot be read, an
    empty id, a time that is neither number nor date, no rows at all.
    """
    connection.execute("SET TimeZone = 'UTC'")
    groups = []
    all_groups = _group_files(connection, files, columns, domain)
    for number, group in enumerate(all_groups):
        _inspect(connection, group, f"text_{number}")
        if group.rows:
            groups.append(group)
    if not groups:
        logs = str(files[0])
        if len(files) > 1:
            logs += f" and {len(files) - 1} more"
        raise InputError(f"{logs}: no rows, nothing to prepare")
    user_type = _common_id_type(groups, "user")
    item_type = _common_id_type(groups, "item")
    times, dates = _parse_times(connection, groups)
    selects = []
    for group, time in zip(groups, times, strict=True):
        user = group.value["user"]
        item = group.value["item"]
        domain_value = group.value["domain"]
        selects.append(f"""
            SELECT
                {user}::{user_type} AS user_id,
                {item}::{item_type} AS item_id,
                {domain_value}::VARCHAR AS domain,
                {time} AS "time"
            FROM {group.table}""")
    rows = " UNION ALL ".join(selects)
    connection.execute(f"CREATE OR REPLACE VIEW {view} AS {rows}")
    return dates


def open_ids(
    connection: DuckDBPyConnection,
    files: list[Path],
    column: str,
) -> None:
    """Makes the table `ids` of the distinct values of a column: `user_id`, typed as in `log`.

    Raises InputError as `open_log` does; files without a row are allowed.
    """
    groups = _group_files(connection, files, {"user": column}, None)
    groups_with_rows = []
    for number, group in enumerate(groups):
        _inspect(connection, group, f"ids_{number}")
        if group.rows:
            groups_with_rows.append(group)
    user_type = _common_id_type(groups_with_rows, "user")
    selects = []
    for group in groups:
        value = group.value["user"]
        selects.append(f"""
            SELECT {value}::{user_type} AS user_id
            FROM {group.table}""")
    rows = " UNION ALL ".join(selects)
    connection.execute(f"""
        CREATE TABLE ids AS
            SELECT DISTINCT user_id
            FROM ({rows})""")


def _common_id_type(groups: list[_Group], role: str) -> str:
    """Returns BIGINT if all ids of all files are whole numbers, else VARCHAR."""
    for group in groups:
        if not group.is_whole[role]:
            return "VARCHAR"
    return "BIGINT"


def read_text(
    connection: DuckDBPyConnection,
    path: Path,
    columns: dict[str, str],
    domain: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one CSV or TSV file in Arrow batches.

    Their columns are row (int64, from 1), and by role, all as text, user, item, domain, time.
    Raises InputError, naming the file: a missing column, a file that cannot be read.
    """
    (group,) = _group_files(connection, [path], columns, domain)
    columns_sql = ["row_number() OVER () AS row"]
    for role, value in group.value.items():
        columns_sql.append(f"{value}::VARCHAR AS {role}")
    selected = ", ".join(columns_sql)
    source = group.scan_sql([path])
    query = f"""
        SELECT {selected}
        FROM {source}"""
    try:
        rows = connection.sql(query)
        yield from rows.to_arrow_reader()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        _refuse_unreadable(connection, group, error)


def check_columns(
    path: Path | str,
    names: list[str],
    wanted: dict[str, str],
) -> None:
    """Raises InputError where a `wanted` column (by role) is missing, or there twice."""
    for role, name in wanted.items():
        count = names.count(name)
        if count == 1:
            continue
        state = "no column"
        if count:
            state = "more than one column"
        present = ", ".join(names)
        raise InputError(
            f"{path} has {state} {name!r}; "
            f"it has {present}: "
            f"name yours with --{role}-column"
        )


def summarize_error(error: Exception) -> str:
    """Returns the telling part of a DuckDB message, in one line.

    The lines "Parser Error: syntax error" and "LINE 1: SELECT FROM" give the first one alone.
    """
    lines = []
    for line in str(error).splitlines():
        if line.startswith(("Possible", "LINE ", "  file =")):
            break
        lines.append(line)
    text = " ".join(lines)
    text = " ".join(text.split())
    return text[:_LONGEST_REASON]


def _path_literal(path: Path) -> str:
    """Returns the SQL literal of a path that DuckDB does not take for a glob."""
    pattern = glob.escape(str(path))
    escaped = escape_sql(pattern)
    return f"'{escaped}'"


def _quote(name: str) -> str:
    """Quotes a column's name for SQL."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _group_files(
    connection: DuckDBPyConnection,
    files: list[Path],
    columns: dict[str, str],
    domain: str | None,
) -> list[_Group]:
    """Groups files with equal columns, so that a thousand part files are one scan.

    1.csv        user,item,time            a group
    2.csv        user,item,time            the same one
    3.csv        user,time,item            a second one
    4.parquet    user, item, time          a third one
    """
    files_by_layout = defaultdict(list)
    for path in files:
        suffix = suffix_of(path)
        delimiter = SUFFIXES[suffix]
        if delimiter:
            header = _read_header(path, delimiter)
            columns_of_file = []
            for name in header:
                columns_of_file.append((name, "VARCHAR"))
            layout = tuple(columns_of_file)
        else:
            layout = _read_parquet_columns(connection, path)
        files_by_layout[delimiter, layout].append(path)
    wanted = dict(columns)
    if domain is not None:
        wanted.pop("domain", None)
    groups = []
    for (delimiter, layout), paths in files_by_layout.items():
        group = _make_group(delimiter, layout, paths, wanted)
        if domain is not None:
            escaped = escape_sql(domain)
            group.value["domain"] = f"'{escaped}'"
            group.type["domain"] = "VARCHAR"
        groups.append(group)
    return groups


def _make_group(
    delimiter: str | None,
    layout: tuple[tuple[str, str], ...],
    paths: list[Path],
    wanted: dict[str, str],
) -> _Group:
    """Makes the group of files with one layout: (column name, DuckDB type) of each column."""
    names = [name for name, _ in layout]
    check_columns(paths[0], names, wanted)
    # Without can_have_nan DuckDB may answer isfinite() from a column's statistics, which leave
    # NaN out.
    options = "can_have_nan=true"
    if delimiter:
        types = []
        for number in range(len(names)):
            types.append(f"'c{number}': 'VARCHAR'")
        column_types = ", ".join(types)
        options = f"""
            auto_detect=false,
            header=true,
            delim='{delimiter}',
            quote='"',
            escape='"',
            comment='',
            columns={{{column_types}}}"""
    options += ", hive_partitioning=false"
    group = _Group(paths, options, wanted, text=bool(delimiter))
    for role, name in wanted.items():
        number = names.index(name)
        _, column_type = layout[number]
        is_list = column_type.endswith("]")
        if is_list or column_type.startswith(_NESTED):
            raise InputError(
                f"{paths[0]}: column {name!r} holds {column_type}, not single values"
            )
        group.type[role] = column_type
        group.value[role] = _quote(name)
        if delimiter:
            group.value[role] = f"c{number}"
    return group


def _read_header(path: Path, delimiter: str) -> list[str]:
    """Reads the column names of a CSV or TSV file."""
    open_text = open
    if path.suffix.lower() == ".gz":
        open_text = gzip.open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, delimiter=delimiter)
            return next(rows, [])
    except (
        OSError,
        EOFError,
        UnicodeDecodeError,
        zlib.error,
        csv.Error,
    ) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _read_parquet_columns(
    connection: DuckDBPyConnection, path: Path
) -> tuple[tuple[str, str], ...]:
    """Reads the (name, DuckDB type) of a Parquet file's columns."""
    source = f"read_parquet({_path_literal(path)}, hive_partitioning=false)"
    try:
        query = f"DESCRIBE SELECT * FROM {source}"
        rows = connection.execute(query).fetchall()
    except duckdb.Error as error:
        raise InputError(
            f"{path} cannot be read: {summarize_error(error)}"
        ) from None
    columns = []
    for name, column_type, *_ in rows:
        columns.append((name, column_type))
    return tuple(columns)


def _inspect(
    connection: DuckDBPyConnection,
    group: _Group,
    copy_name: str,
) -> None:
    """Fills in table (a copy called `copy_name` for CSV), rows and is_whole.

    Refuses unreadable files and missing ids.
    """
    roles = list(group.value)
    aggregates = ["count(*)"]
    for role in roles:
        missing = group.missing_sql(role)
        aggregates.append(f"count(*) FILTER (WHERE {missing})")
    for role in roles:
        whole = group.whole_sql(role)
        aggregates.append(f"bool_and({whole})")
    group.table = group.scan_sql(group.files)
    try:
        if group.text:  # parsing is dear: once
            _copy_text(connection, group, copy_name)
        results = _query_row(connection, aggregates, group.table)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        _refuse_unreadable(connection, group, error)
    first_flag = 1 + len(roles)
    group.rows = results[0]
    missing_counts = results[1:first_flag]
    whole_flags = results[first_flag:]
    for role, missing in zip(roles, missing_counts, strict=True):
        if missing:
            condition = group.missing_sql(role)
            path, row, text = _first_row(connection, group, role, condition)
            value = text or "empty"
            column = group.columns[role]
            raise InputError(
                f"{path}: row {row}: {column!r} is {value}: every row needs one"
            )
    group.is_whole = dict(zip(roles, whole_flags, strict=True))


def _query_row(
    connection: DuckDBPyConnection,
    expressions: list[str],
    table: str,
) -> tuple[Any, ...]:
    """Returns the one row of a query of aggregates."""
    selected = ", ".join(expressions)
    query = f"""
        SELECT {selected}
        FROM {table}"""
    rows = connection.execute(query).fetchall()
    (row,) = rows
    return row


def _copy_text(
    connection: DuckDBPyConnection,
    group: _Group,
    copy_name: str,
) -> None:
    """Copies the columns of text files into a table, which the group reads from then on."""
    columns = []
    for role in group.columns:
        column = group.value[role]
        if column not in columns:
            columns.append(column)
    selected = ", ".join(columns)
    connection.execute(f"""
        CREATE TABLE {copy_name} AS
            SELECT {selected}
            FROM {group.table}""")
    group.table = copy_name


def _refuse_unreadable(
    connection: DuckDBPyConnection,
    group: _Group,
    error: Exception,
) -> NoReturn:
    """Raises InputError for the first file that cannot be read alone, or else the error."""
    values = []
    for value in group.value.values():
        values.append(f"max(hash({value}))")
    for path in group.files:
        source = group.scan_sql([path])
        try:
            _query_row(connection, values, source)
        except duckdb.Error as file_error:
            reason = summarize_error(file_error)
            raise InputError(f"{path} cannot be read: {reason}") from None
    raise error


def _first_row(
    connection: DuckDBPyConnection,
    group: _Group,
    role: str,
    condition: str,
) -> tuple[Path, int, str | None]:
    """Finds the first row that meets a condition: its file, number and value.

    Rows are numbered from 1, the header not counted.
    """
    column = group.value[role]
    for path in group.files:
        source = group.scan_sql([path])
        query = f"""
            SELECT number, value
            FROM (
                SELECT
                    row_number() OVER () AS number,
                    ({condition}) AS bad,
                    {column}::VARCHAR AS value
                FROM {source}
            )
            WHERE bad
            ORDER BY number
            LIMIT 1"""
        rows = connection.execute(query).fetchall()
        if rows:
            number, value = rows[0]
            return path, number, value
    raise AssertionError(f"no row with {condition}")


def _parse_times(
    connection: DuckDBPyConnection, groups: list[_Group]
) -> tuple[list[str], bool]:
    """Returns SQL of the time, one a group, all of one kind; and whether they are dates.

    kinds              times
    whole, whole       c3::BIGINT, "t"::BIGINT
    whole, float       c3::DOUBLE, "t"::DOUBLE
    date, date         epoch_us(c3::TIMESTAMPTZ), epoch_us("t"::TIMESTAMPTZ)
    """
    kinds = [_kind_of_time(connection, group) for group in groups]
    first_files = [group.files[0] for group in groups]
    refuse_mixed_times(kinds, first_files, groups[0].columns["time"])
    number_type = "DOUBLE"
    if set(kinds) <= {"whole"}:
        number_type = "BIGINT"
    times = []
    for group, kind in zip(groups, kinds, strict=True):
        value = group.value["time"]
        if kind == "date":
            times.append(f"epoch_us({value}::TIMESTAMPTZ)")
        else:
            times.append(f"{value}::{number_type}")
    return times, "date" in kinds


def refuse_mixed_times(
    kinds: Sequence[str], inputs: Sequence[object], column: str
) -> None:
    """Raises InputError where some inputs have dates and others numbers.

    kinds: 'whole', 'float' or 'date', one an input.
    """
    is_date = [kind == "date" for kind in kinds]
    if len(set(is_date)) < 2:
        return
    dated = inputs[is_date.index(True)]
    numbered = inputs[is_date.index(False)]
    raise InputError(
        f"{dated} has dates in {column!r} "
        f"and {numbered} has numbers: write one kind"
    )


def _kind_of_time(connection: DuckDBPyConnection, group: _Group) -> str:
    """Returns 'whole', 'float' or 'date'.

    Refuses a column that is none of them, naming the first row at fault.
    """
    if group.is_whole["time"]:
        return "whole"
    conditions = _time_conditions(group)
    counts = []
    for condition in conditions.values():
        counts.append(f"count(*) FILTER (WHERE {condition})")
    results = _query_row(connection, counts, group.table)
    fitting_rows = dict(zip(conditions, results, strict=True))
    best = max(fitting_rows, key=fitting_rows.get)
    if fitting_rows[best] == group.rows:
        return best
    condition = f"NOT {conditions[best]}"
    path, row, text = _first_row(connection, group, "time", condition)
    expected = "a number or a date"
    if fitting_rows[best] and best == "float":
        expected = "a finite number"
    elif fitting_rows[best]:
        expected = "a date"
    column = group.columns["time"]
    raise InputError(
        f"{path}: row {row}: {column!r} is {text!r}: a time must be {expected}"
    )


def _time_conditions(group: _Group) -> dict[str, str]:
    """Returns SQL for: the value is of the kind, by the kinds of time that the type allows."""
    value = group.value["time"]
    column_type = group.type["time"]
    is_float = f"coalesce(isfinite(TRY_CAST({value} AS DOUBLE)), false)"
    is_date = f"coalesce(isfinite(TRY_CAST({value} AS TIMESTAMPTZ)), false)"
    is_decimal = column_type.startswith("DECIMAL")
    if column_type in _FLOAT | _WIDE or is_decimal:
        return {"float": is_float}
    if column_type.startswith(_DATE):
        return {"date": is_date}
    if column_type == "VARCHAR":
        return {"float": is_float, "date": is_date}
    column = group.columns["time"]
    raise InputError(
        f"{group.files[0]}: column {column!r} holds {column_type}: "
        "a time is a number or a date"
    )
