"""Files of logs with equal columns, which DuckDB reads together.

1.csv                     user,item,time       a group
2.csv                     user,item,time       the same one
3.csv                     user,time,item       a second one
4.parquet                 user, item, time     a third one
domain=a/5.parquet        user, item, time     a fourth one, where the domain is wanted
"""

import glob
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
from duckdb import DuckDBPyConnection

from trainer.config.prepare import LogFormat
from trainer.data.duckdb_engine import escape_sql
from trainer.data.id_columns import WHOLE_TYPES, WIDE_TYPES, IdColumn
from trainer.data.logs.files import LogFile
from trainer.data.logs.headers import (
    hint_of_delimiter,
    hint_of_header,
    list_columns,
    quote_of,
    read_header,
    read_json_keys,
)
from trainer.data.logs.row_filter import (
    NUMBER,
    Column,
    Kind,
    RowFilter,
    filter_sql,
)
from trainer.errors import InputError

ROLES = ("user", "item", "domain", "time")
FLOAT = {"FLOAT", "DOUBLE"}
# And its kin: TIMESTAMP_NS, TIMESTAMP WITH TIME ZONE, TIMESTAMPTZ_NS.
DATE = ("DATE", "TIMESTAMP")
_NESTED = ("STRUCT", "MAP", "UNION")
FILE_BITS = 40  # of a position, above those of the row
_LONGEST_REASON = 300
_LONGEST_LINE = 60  # letters of a line in a message
_NO_JSON = "is no JSON object"
# A JSON text has no such sign, so it divides nothing.
_NO_DELIMITER = "\x01"
_LONGEST_JSON = 1 << 24  # bytes of a line


@dataclass(frozen=True)
class Layout:
    """The columns of a file: their names, SQL and DuckDB types over the table function.

    is_list: JSON as one list.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    types: tuple[str, ...]
    is_list: bool = False


@dataclass
class Group:
    """Files of one format with equal columns, which one table function reads together.

    function, options: the table function, and what it gets beside the files.
    columns: column name by role, for the roles that the files have a column for.
    source: SQL over the table function by role. type: DuckDB type by role.
    text: every column is text. constants: roles whose value is the same in all rows.
    keep: SQL over the table function: the row counts. fault: SQL for: the row is none.
    table: what the rows are read from, with a column by each role, and `fault`.
    is_whole: by role, whether all values are whole numbers that fit int64.
    bad: SQL over `table`: the row cannot be used and is skipped.
    kind_of_time: whole, float or date.
    number: of the file among all, where the order of the rows is asked for; else None.
    """

    files: list[LogFile]
    function: str
    options: str
    columns: dict[str, str]
    text: bool
    source: dict[str, str] = field(default_factory=dict)
    type: dict[str, str] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    keep: str = "true"
    fault: str = "false"
    time_format: str | None = None
    table: str = ""
    rows: int = 0
    is_whole: dict[str, bool] = field(default_factory=dict)
    bad: str = "false"
    kind_of_time: str = ""
    number: int | None = None

    @property
    def roles(self) -> list[str]:
        """The roles that have a value."""
        return list(self.source)

    def scan_sql(self, files: list[LogFile], more_options: str = "") -> str:
        """Returns SQL that reads some of the files.

        An example: read_parquet(['/logs/1.parquet', '/logs/2.parquet'], can_have_nan=true, …)
        """
        literals = []
        for file in files:
            literals.append(path_literal(file.path))
        paths = ", ".join(literals)
        return f"{self.function}([{paths}], {self.options}{more_options})"

    def rows_sql(
        self,
        files: list[LogFile],
        numbered: bool = False,
        more_options: str = "",
    ) -> str:
        """Returns a query of all rows of some files, by role.

        Besides it has fault, keep (NULL for what is no row) and, if numbered, row from 1.
        """
        selected = []
        if numbered:
            selected.append("row_number() OVER () AS row")
        for role, value in self.source.items():
            selected.append(f'{value} AS "{role}"')
        selected.append(f"{self.fault} AS fault")
        selected.append(f"{self.keep} AS keep")
        columns = ", ".join(selected)
        source = self.scan_sql(files, more_options)
        return f"SELECT {columns} FROM {source}"

    def missing_sql(self, role: str) -> str:
        """Returns SQL for: the value is missing.

        An empty text is what CSV has for it, a NaN what a float column has.

            type       of a column user_id
            VARCHAR    ("user" IS NULL OR "user" = '')
            DOUBLE     ("user" IS NULL OR NOT isfinite("user"))
            BIGINT     ("user" IS NULL)
        """
        value = f'"{role}"'
        kind = self.type[role]
        if kind == "VARCHAR":
            return f"({value} IS NULL OR {value} = '')"
        if kind == "BLOB":
            return f"({value} IS NULL OR octet_length({value}) = 0)"
        if kind in FLOAT:
            return f"({value} IS NULL OR NOT isfinite({value}))"
        return f"({value} IS NULL)"

    def position_sql(self) -> str:
        """Returns SQL for the column of positions, with a comma; nothing where none are asked for."""
        if self.number is None:
            return ""
        return f", ({self.number}::BIGINT << {FILE_BITS}) + row AS position"

    def id_column(self, role: str) -> IdColumn:
        """Returns how the ids of a role are read."""
        says_no_type = self.text or role in self.constants
        is_parsed = says_no_type and role in self.columns
        return IdColumn(f'"{role}"', self.type[role], is_parsed)

    def fault_sql(self, role: str) -> str:
        """Returns SQL for: the value is no id."""
        if role == "time":
            return "false"
        return f"coalesce({self.id_column(role).fault_sql()}, false)"

    def id_sql(self, role: str, id_type: str) -> str:
        """Returns SQL for the id, as `id_type`."""
        return self.id_column(role).id_sql(self.is_whole[role], id_type)

    def whole_sql(self, role: str) -> str:
        """Returns SQL for: the value is a whole number as int64 writes it.

        Where the type decides, no value is looked at. A time 12.0 is a float.
        """
        if role != "time":
            return self.id_column(role).whole_sql()
        if self.has_formatted_times:
            return "false"
        kind = self.type[role]
        values_decide = self.text or kind in WIDE_TYPES or kind == "VARCHAR"
        if not values_decide:
            is_whole = kind in WHOLE_TYPES
            return str(is_whole)
        value = f'"{role}"::VARCHAR'
        number = f"TRY_CAST({value} AS BIGINT)::VARCHAR"
        return f"coalesce({number} = {value}, false)"

    @property
    def has_formatted_times(self) -> bool:
        """Whether times are text of the given format."""
        return self.time_format is not None and self.type["time"] == "VARCHAR"

    def date_sql(self) -> str:
        """Returns SQL of the time as a date, NULL for what is none."""
        if self.has_formatted_times:
            time_format = escape_sql(str(self.time_format))
            parsed = f"try_strptime(\"time\", '{time_format}')"
            return f"{parsed}::TIMESTAMPTZ"
        return 'TRY_CAST("time" AS TIMESTAMPTZ)'

    def time_conditions(self) -> dict[str, str]:
        """Returns SQL for: the time is of the kind, by the kinds that the type allows."""
        column_type = self.type["time"]
        is_float = 'coalesce(isfinite(TRY_CAST("time" AS DOUBLE)), false)'
        is_date = f"coalesce(isfinite({self.date_sql()}), false)"
        is_decimal = column_type.startswith("DECIMAL")
        if column_type in FLOAT | WHOLE_TYPES | WIDE_TYPES or is_decimal:
            return {"float": is_float}
        if column_type.startswith(DATE) or self.has_formatted_times:
            return {"date": is_date}
        if column_type == "VARCHAR":
            return {"float": is_float, "date": is_date}
        column = self.columns["time"]
        raise InputError(
            f"{self.files[0].path}: column {column!r} holds {column_type}: "
            "a time is a number or a date"
        )

    def faults(self) -> dict[str, str]:
        """Returns SQL by reason, for: the row has no value where it needs one."""
        faults = {}
        if self.fault != "false":
            faults[_NO_JSON] = "fault"
        for role in self.roles:
            column = self.columns.get(role, role)
            faults[f"{column!r} is empty"] = self.missing_sql(role)
        for role in self.roles:
            column = self.columns.get(role, role)
            fault = self.fault_sql(role)
            if fault != "coalesce(false, false)":
                faults[f"{column!r} is no id"] = fault
        return faults


class DuckDBDialect:
    """The SQL of DuckDB, for row filters."""

    def quote_text(self, text: str) -> str:
        """Returns the literal of a text."""
        return f"'{escape_sql(text)}'"

    def as_text(self, value: str) -> str:
        """Returns SQL of the value as text."""
        return f"CAST({value} AS VARCHAR)"

    def as_number(self, value: str, kind: Kind) -> str:
        """Returns SQL of the value as a finite double, NULL for what is none."""
        number = f"TRY_CAST({value} AS DOUBLE)"
        if kind == "text":
            is_number = f"regexp_full_match({value}, '{NUMBER}')"
            return f"(CASE WHEN {is_number} THEN {number} END)"
        if kind == "float":
            return f"(CASE WHEN isfinite({value}) THEN {number} END)"
        return number

    def as_microseconds(self, value: str) -> str:
        """Returns SQL of a date in microseconds since 1970."""
        return f"epoch_us(CAST({value} AS TIMESTAMPTZ))"


def group_files(
    connection: DuckDBPyConnection,
    files: list[LogFile],
    log_format: LogFormat,
    wanted: Mapping[str, str],
    constants: Mapping[str, str],
    row_filter: RowFilter | None = None,
    in_file_order: bool = False,
) -> list[Group]:
    """Groups files with equal columns, so that a thousand part files are one scan.

    in_file_order: each file is a group of its own.
    wanted: the columns by role. constants: texts by role, in place of columns.
    """
    names = set(wanted.values())
    if row_filter is not None:
        names |= {column.name for column in row_filter.columns}
    files_by_layout = defaultdict(list)
    for file in files:
        layout = _read_layout(connection, file, log_format, names)
        added = []
        for name, value in file.partitions:
            if name in names and name not in layout.names:
                added.append((name, value))
        alone = file if in_file_order else None
        key = (file.format, layout, tuple(added), alone)
        files_by_layout[key].append(file)
    groups = []
    for (_, layout, partitions, alone), paths in files_by_layout.items():
        group = _make_group(log_format, layout, paths)
        if alone is not None:
            group.number = files.index(alone)
        find = _ColumnFinder(paths[0], layout, dict(partitions), log_format)
        for role, name in wanted.items():
            find.check(role, name)
            group.columns[role] = name
            value, column_type = find.column(name)
            if role == "domain" and log_format.domain_separator is not None:
                separator = escape_sql(log_format.domain_separator)
                value = f"split_part({value}::VARCHAR, '{separator}', 1)"
                column_type = "VARCHAR"
            group.source[role] = value
            group.type[role] = column_type
            if name not in layout.names:
                group.constants.add(role)
        for role, text in constants.items():
            group.source[role] = f"'{escape_sql(text)}'"
            group.type[role] = "VARCHAR"
            group.constants.add(role)
        if row_filter is not None:
            _set_filter(group, row_filter, find)
        groups.append(group)
    return groups


def _set_filter(
    group: Group, row_filter: RowFilter, find: "_ColumnFinder"
) -> None:
    """Sets the rows that count."""

    def find_column(column: Column) -> tuple[str, Kind]:
        if not find.has(column.name):
            row_filter.refuse(
                column.position,
                f"{find.file.path} has no column {column.name!r}; "
                f"it has {find.list_names()}",
            )
        value, column_type = find.column(column.name)
        return value, _kind_of(column_type)

    condition = filter_sql(row_filter, DuckDBDialect(), find_column)
    if group.fault == "false":
        group.keep = condition
    else:
        # What is no row is not left out in silence.
        group.keep = f"""
            CASE
                WHEN {group.keep} IS NULL THEN NULL
                WHEN {group.fault} THEN true
                ELSE {condition}
            END"""


def _kind_of(column_type: str) -> Kind:
    """Returns what a DuckDB type means in a row filter."""
    if column_type == "VARCHAR" or column_type.startswith("ENUM"):
        return "text"
    if column_type in WHOLE_TYPES | WIDE_TYPES:
        return "whole"
    if column_type in FLOAT:
        return "float"
    if column_type.startswith("DECIMAL"):
        return "decimal"
    if column_type == "BOOLEAN":
        return "boolean"
    if column_type.startswith(DATE):
        return "date"
    return "other"


class _ColumnFinder:
    """Finds the columns of a file: its own, and those of its folders' names."""

    def __init__(
        self,
        file: LogFile,
        layout: Layout,
        partitions: dict[str, str | None],
        log_format: LogFormat,
    ):
        self.file = file
        self.layout = layout
        self.partitions = partitions
        self.log_format = log_format

    def has(self, name: str) -> bool:
        return name in self.layout.names or name in self.partitions

    def list_names(self) -> str:
        return list_columns([*self.layout.names, *self.partitions])

    def column(self, name: str) -> tuple[str, str]:
        """Returns the SQL and the type of a column."""
        if name in self.layout.names:
            number = self.layout.names.index(name)
            return self.layout.values[number], self.layout.types[number]
        value = self.partitions[name]
        if value is None:
            return "NULL::VARCHAR", "VARCHAR"
        return f"'{escape_sql(value)}'", "VARCHAR"

    def check(self, role: str, name: str) -> None:
        """Raises InputError where a column is missing, there twice, or nested."""
        names = [*self.layout.names, *self.partitions]
        hint = ""
        if self.file.format.kind == "delimited":
            delimiter = delimiter_of(self.file, self.log_format)
            hint = hint_of_delimiter(self.layout.names, delimiter)
            hint = hint or hint_of_header(self.layout.names)
        check_columns(self.file.path, names, {role: name}, hint)
        _, column_type = self.column(name)
        is_list = column_type.endswith("]")
        if is_list or column_type.startswith(_NESTED):
            raise InputError(
                f"{self.file.path}: column {name!r} holds {column_type}, not single values"
            )


def check_columns(
    path: Path | str,
    names: list[str],
    wanted: dict[str, str],
    hint: str = "",
) -> None:
    """Raises InputError where a `wanted` column (by role) is missing, or there twice."""
    for role, name in wanted.items():
        count = names.count(name)
        if count == 1:
            continue
        state = "no column"
        if count:
            state = "more than one column"
        present = list_columns(names)
        way_out = hint.removeprefix("; ")
        if not way_out:
            way_out = f"name yours with --{role}-column"
        if not hint and role == "domain" and not count:
            way_out += ", or the one domain with --domain"
        raise InputError(
            f"{path} has {state} {name!r}; it has {present}: {way_out}"
        )


def delimiter_of(file: LogFile, log_format: LogFormat) -> str:
    """Returns what divides the fields of a delimited file."""
    return log_format.delimiter or file.format.delimiter


def summarize_error(error: Exception | str) -> str:
    """Returns the telling part of a DuckDB message, in one line.

    The lines "Parser Error: syntax error" and "LINE 1: SELECT FROM" give the first one alone.
    A line of a log that is quoted is cut, so that the reason behind it is seen.
    """
    lines = []
    for line in str(error).splitlines():
        if line.startswith(("Possible", "LINE ", "  file =")):
            break
        is_quoted = line.startswith("Original Line:")
        if is_quoted and len(line) > _LONGEST_LINE:
            line = line[:_LONGEST_LINE] + "…"
        lines.append(line)
    text = " ".join(lines)
    text = " ".join(text.split())
    return text[:_LONGEST_REASON]


def path_literal(path: Path) -> str:
    """Returns the SQL literal of a path that DuckDB does not take for a glob."""
    pattern = glob.escape(str(path))
    escaped = escape_sql(pattern)
    return f"'{escaped}'"


def _quote(name: str) -> str:
    """Quotes a column's name for SQL."""
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _make_group(
    log_format: LogFormat, layout: Layout, files: list[LogFile]
) -> Group:
    """Makes the group of files with one layout."""
    file_format = files[0].format
    # Folders' names are read here; without can_have_nan DuckDB may answer isfinite() from a
    # column's statistics, which leave NaN out.
    function = "read_parquet"
    options = "can_have_nan=true, hive_partitioning=false"
    if file_format.kind == "delimited":
        function = "read_csv"
        options = _delimited_options(log_format, layout, files[0])
    elif layout.is_list:
        function = "read_json"
        options = (
            f"format='array', records='false', columns={{'line': 'JSON'}}, "
            f"compression='{_json_compression(file_format.compression)}', "
            f"maximum_object_size={_LONGEST_JSON}, hive_partitioning=false"
        )
    elif file_format.kind == "json":
        function = "read_csv"
        options = _csv_options(
            _NO_DELIMITER, "", False, ["line"], file_format.compression
        )
        options += f", max_line_size={_LONGEST_JSON}"
    group = Group(
        files,
        function,
        options,
        {},
        text=file_format.kind != "parquet",
        time_format=log_format.time_format,
    )
    if file_format.kind == "json":
        group.keep = "CASE WHEN trim(line, ' \t\r') <> '' THEN true END"
        group.fault = """
            (CASE
                WHEN json_valid(line) THEN json_type(line) <> 'OBJECT'
                ELSE true
            END)"""
    return group


def _json_compression(compression: str) -> str:
    """Returns a compression as read_json names it."""
    return "uncompressed" if compression == "none" else compression


def _delimited_options(
    log_format: LogFormat, layout: Layout, file: LogFile
) -> str:
    delimiter = delimiter_of(file, log_format)
    return _csv_options(
        delimiter,
        quote_of(delimiter),
        not log_format.columns,
        list(layout.values),
        file.format.compression,
    )


def _csv_options(
    delimiter: str,
    quote: str,
    header: bool,
    columns: list[str],
    compression: str,
) -> str:
    """Returns options of read_csv that leave nothing to be guessed. All columns are text."""
    types = []
    for name in columns:
        types.append(f"'{name}': 'VARCHAR'")
    column_types = ", ".join(types)
    return f"""
        auto_detect=false,
        header={str(header).lower()},
        delim='{escape_sql(delimiter)}',
        quote='{quote}',
        escape='{quote}',
        comment='',
        compression='{compression}',
        hive_partitioning=false,
        columns={{{column_types}}}"""


def _read_layout(
    connection: DuckDBPyConnection,
    file: LogFile,
    log_format: LogFormat,
    names: set[str],
) -> Layout:
    """Reads the columns of a file. names: those that are looked for."""
    if file.format.kind == "parquet":
        return _read_parquet_layout(connection, file.path)
    if file.format.kind == "json":
        return _read_json_layout(file, names)
    delimiter = delimiter_of(file, log_format)
    header = read_header(file, delimiter, log_format.columns)
    values = []
    for number in range(len(header)):
        values.append(f"c{number}")
    types = ("VARCHAR",) * len(header)
    return Layout(tuple(header), tuple(values), types)


def _read_json_layout(file: LogFile, wanted: set[str]) -> Layout:
    keys = read_json_keys(file)
    names = list(keys.names)
    if wanted <= set(names):
        # Whatever else the objects have, it is one group.
        names = sorted(wanted)
    values = []
    types = []
    for name in names:
        values.append(_json_value_sql(name))
        types.append("STRUCT" if name in keys.nested else "VARCHAR")
    return Layout(tuple(names), tuple(values), tuple(types), keys.is_list)


def _json_value_sql(name: str) -> str:
    """Returns SQL of a key's value as text."""
    pointer = name.replace("~", "~0").replace("/", "~1")
    path = f"'/{escape_sql(pointer)}'"
    value = f"json_extract_string(line, {path})"
    return f"""
        (CASE
            WHEN NOT coalesce(json_valid(line), false) THEN NULL
            ELSE {value}
        END)"""


def _read_parquet_layout(connection: DuckDBPyConnection, path: Path) -> Layout:
    """Reads the columns of a Parquet file, whose names may differ in case alone."""
    literal = path_literal(path)
    source = f"read_parquet({literal}, hive_partitioning=false)"
    try:
        described = connection.execute(
            f"DESCRIBE SELECT * FROM {source}"
        ).fetchall()
        schema = connection.execute(
            f"SELECT name, num_children FROM parquet_schema({literal})"
        ).fetchall()
    except duckdb.Error as error:
        raise InputError(
            f"{path} cannot be read: {summarize_error(error)}"
        ) from None
    columns = [(name, column_type) for name, column_type, *_ in described]
    names = _top_level_names(schema)
    if len(names) != len(columns):
        names = [name for name, _ in columns]
    values = [_quote(name) for name, _ in columns]
    types = [column_type for _, column_type in columns]
    return Layout(tuple(names), tuple(values), tuple(types))


def _top_level_names(schema: list[tuple[str, int | None]]) -> list[str]:
    """Returns the columns' names as the file has them. schema: depth first, the root first.

    DuckDB calls the second of User_ID and user_id user_id_1.
    """
    names = []
    left = 0  # nodes below the column that came last
    for name, children in schema[1:]:
        if left:
            left -= 1
        else:
            names.append(name)
        left += children or 0
    return names
