"""Reading interaction logs with DuckDB: files, columns, and one view `log` over all of them.

The view has the columns

    user_id, item_id   BIGINT if every id in every file is a whole number, else VARCHAR;
                       see id_columns.py
    domain             VARCHAR
    time               BIGINT or DOUBLE; dates are microseconds since 1970, UTC if they name
                       no zone
    position           BIGINT, if asked for: rises with the rows of a file, and from file to file
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import duckdb
import pyarrow as pa
from duckdb import DuckDBPyConnection

from trainer.config.prepare import LogFormat
from trainer.data.duckdb_engine import escape_sql
from trainer.data.id_columns import fault_reason
from trainer.data.logs.duckdb_groups import (
    ROLES,
    Group,
    group_files,
    summarize_error,
)
from trainer.data.logs.files import LogFile
from trainer.data.logs.headers import count_fields, has_two_line_ends
from trainer.data.logs.item_file import count_unknown_items, open_items
from trainer.data.logs.reading import MOST_LISTED, BadRow, Reading
from trainer.data.logs.row_filter import RowFilter, parse_row_filter
from trainer.errors import InputError

# What `read_text` says of a row.
ROW = "row"
BAD = "bad"
FILTERED = "filtered"
_REJECTS = "rejects"


def check_format(connection: DuckDBPyConnection, log_format: LogFormat) -> None:
    """Raises InputError for an expression or a format of times that cannot be."""
    _parse_where(log_format)
    if log_format.time_format is None:
        return
    time_format = escape_sql(log_format.time_format)
    try:
        connection.execute(f"SELECT try_strptime('', '{time_format}')")
    except duckdb.Error:
        raise InputError(
            f"time_format {log_format.time_format!r} is none that strptime knows: "
            "write it as '%d/%m/%Y %H:%M'"
        ) from None


def _parse_where(log_format: LogFormat) -> RowFilter | None:
    if log_format.where is None:
        return None
    return parse_row_filter(log_format.where)


def open_log(
    connection: DuckDBPyConnection,
    files: list[LogFile],
    log_format: LogFormat,
    domain: str | None = None,
    view: str = "log",
    in_file_order: bool = False,
) -> Reading:
    """Makes the view `log` over the files. Returns what became of their rows.

    domain: the one domain of all rows, in place of a column.
    in_file_order: the view has the rows' position, in files that go by their paths.
    Raises InputError, naming file and row: a missing column, a file that cannot be read, an
    empty id, a time that is neither number nor date, no rows at all.
    """
    connection.execute("SET TimeZone = 'UTC'")
    check_format(connection, log_format)
    wanted, constants = columns_to_read(log_format, domain)
    reading = Reading()
    groups = []
    all_groups = group_files(
        connection,
        files,
        log_format,
        wanted,
        constants,
        _parse_where(log_format),
        in_file_order,
    )
    for number, group in enumerate(all_groups):
        inspection = _Inspection(connection, group, log_format, reading)
        inspection.run(f"text_{number}")
        if group.rows:
            groups.append(group)
            reading.rows += group.rows
    reading.require_rows([str(file.path) for file in files])
    user_type = _common_id_type(groups, "user")
    item_type = _common_id_type(groups, "item")
    if log_format.items is None:
        _common_id_type(groups, "domain")
    times, reading.dates = _parse_times(groups)
    selects = []
    for group, time in zip(groups, times, strict=True):
        domain_sql = "NULL::VARCHAR"
        if log_format.items is None:
            domain_sql = group.id_sql("domain", "VARCHAR")
        selects.append(f"""
            SELECT
                {group.id_sql("user", user_type)} AS user_id,
                {group.id_sql("item", item_type)} AS item_id,
                {domain_sql} AS domain,
                {time} AS "time"
                {group.position_sql()}
            FROM {group.table}
            WHERE NOT {group.bad}""")
    rows = " UNION ALL ".join(selects)
    if log_format.items is not None:
        rows = _join_items(connection, rows, log_format, reading)
    connection.execute(f"CREATE OR REPLACE VIEW {view} AS {rows}")
    return reading


def columns_to_read(
    log_format: LogFormat, domain: str | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the columns of the logs by role, and texts by role in place of columns."""
    wanted = log_format.column_by_role
    constants = {}
    if domain is not None or log_format.items is not None:
        del wanted["domain"]
    if domain is not None:
        constants["domain"] = domain
    return wanted, constants


def _join_items(
    connection: DuckDBPyConnection,
    rows: str,
    log_format: LogFormat,
    reading: Reading,
) -> str:
    """Returns a query of the rows with the domains of the file of items."""
    open_items(connection, log_format)
    reading.unknown_items = count_unknown_items(connection, rows)
    if not log_format.skips_bad_rows:
        reading.refuse_unknown_items(str(log_format.items))
    reading.rows -= sum(reading.unknown_items.values())
    reading.require_rows([str(log_format.items)])
    return f"""
        SELECT r.* REPLACE (i.domain AS domain)
        FROM ({rows}) r
        JOIN domain_of_item i ON r.item_id::VARCHAR = i.item"""


def open_ids(
    connection: DuckDBPyConnection,
    files: list[LogFile],
    column: str,
) -> None:
    """Makes the table `ids` of the distinct values of a column: `user_id`, typed as in `log`.

    Raises InputError as `open_log` does; files without a row are allowed.
    """
    log_format = LogFormat(user_column=column)
    groups = group_files(connection, files, log_format, {"user": column}, {})
    groups_with_rows = []
    for number, group in enumerate(groups):
        inspection = _Inspection(connection, group, log_format, Reading())
        inspection.run(f"ids_{number}")
        if group.rows:
            groups_with_rows.append(group)
    user_type = _common_id_type(groups_with_rows, "user")
    selects = [f"SELECT NULL::{user_type} AS user_id WHERE false"]
    for group in groups_with_rows:
        selects.append(f"""
            SELECT {group.id_sql("user", user_type)} AS user_id
            FROM {group.table}""")
    rows = " UNION ALL ".join(selects)
    connection.execute(f"""
        CREATE TABLE ids AS
            SELECT DISTINCT user_id
            FROM ({rows})""")


def _common_id_type(groups: list[Group], role: str) -> str:
    """Returns BIGINT if all ids of all files are whole numbers, else VARCHAR.

    The ids of text files are whole numbers in all of these files, or in none: 12.0 stays text
    beside x, whichever file that is in.
    """
    texts = []
    for group in groups:
        if group.text and role in group.columns:
            texts.append(group)
    texts_are_whole = all(group.is_whole[role] for group in texts)
    for group in texts:
        group.is_whole[role] = texts_are_whole
    for group in groups:
        if not group.is_whole[role]:
            return "VARCHAR"
    return "BIGINT"


def read_text(
    connection: DuckDBPyConnection,
    file: LogFile,
    log_format: LogFormat,
    domain: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one file of text in Arrow batches.

    Their columns are state, row (int64, from 1), user, item, domain, time and fault, all text
    but row. The state says what it is: a row; a bad row, with its fault; or how many rows were
    filtered out, as `row`.
    Raises InputError, naming the file: a missing column, a file that cannot be read.
    """
    wanted, constants = columns_to_read(log_format, domain)
    (group,) = group_files(
        connection,
        [file],
        log_format,
        wanted,
        constants,
        _parse_where(log_format),
    )
    inspection = _Inspection(connection, group, log_format, Reading())
    try:
        inspection.copy_text("text_rows", numbered=True)
        rows = connection.sql(_text_rows_sql(group, inspection))
        yield from rows.to_arrow_reader()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        inspection.refuse_unreadable(error)


def _text_rows_sql(group: Group, inspection: "_Inspection") -> str:
    """Returns the query of `read_text` over the table `text_rows`."""
    columns = []
    for role in ROLES:
        value = f'"{role}"::VARCHAR' if role in group.source else "NULL"
        columns.append(f"{value} AS {role}")
    roles = ", ".join(columns)
    nothing = "NULL, NULL, NULL, NULL"
    bad_rows = ""
    for reject in inspection.rejects:
        bad_rows += f"""
            UNION ALL
            SELECT '{BAD}', {reject.row}, {nothing}, '{escape_sql(reject.reason)}'"""
    return f"""
        SELECT
            CASE WHEN fault THEN '{BAD}' ELSE '{ROW}' END AS state,
            {inspection.row_sql(group.files[0])} AS row,
            {roles},
            CASE WHEN fault THEN 'is no JSON object' END AS fault
        FROM text_rows
        WHERE keep
        {bad_rows}
        UNION ALL
        SELECT '{FILTERED}', count(*), {nothing}, NULL
        FROM text_rows
        WHERE NOT keep"""


class _Inspection:
    """Looks through the rows of a group: which can be used, and what they are."""

    def __init__(
        self,
        connection: DuckDBPyConnection,
        group: Group,
        log_format: LogFormat,
        reading: Reading,
    ):
        self.connection = connection
        self.group = group
        self.log_format = log_format
        self.reading = reading
        self.skips = log_format.skips_bad_rows
        self.rejects: list[BadRow] = []  # lines that could not be copied

    def run(self, copy_name: str) -> None:
        """Fills in table (a copy called `copy_name` for text), rows, is_whole and bad.

        Refuses unreadable files; refuses bad rows, or counts and lists them.
        """
        group = self.group
        try:
            if group.text:  # parsing is dear: once
                self.copy_text(copy_name, group.number is not None)
                all_rows = copy_name
            else:
                numbered = group.number is not None
                all_rows = f"({group.rows_sql(group.files, numbered)})"
            group.table = f"(SELECT * FROM {all_rows} WHERE keep)"
            if group.keep != "true":
                (filtered,) = self._query_row(
                    ["count(*) FILTER (WHERE NOT keep)"], all_rows
                )
                self.reading.filtered += filtered
            self._inspect()
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            self.refuse_unreadable(error)

    def _inspect(self) -> None:
        """Counts the rows, and the bad ones among them."""
        group = self.group
        faults = group.faults()
        aggregates = ["count(*)"]
        for condition in faults.values():
            aggregates.append(f"count(*) FILTER (WHERE {condition})")
        for role in group.roles:
            whole = group.whole_sql(role)
            aggregates.append(f"coalesce(bool_and({whole}), true)")
        results = self._query_row(aggregates, group.table)
        first_flag = 1 + len(faults)
        counts = dict(zip(faults, results[1:first_flag], strict=True))
        group.rows = results[0]
        group.is_whole = dict(
            zip(group.roles, results[first_flag:], strict=True)
        )
        if not self.skips:
            for reason, count in counts.items():
                if count:
                    self._refuse_first(reason, faults[reason])
        if "time" in group.roles and group.rows:
            self._find_kind_of_time(faults)
        if self.skips:
            self._skip(faults)

    def _find_kind_of_time(self, faults: dict[str, str]) -> None:
        """Sets the kind of time: 'whole', 'float' or 'date'.

        Rows whose time is none are refused, or added to the faults.
        """
        group = self.group
        if group.is_whole["time"]:
            group.kind_of_time = "whole"
            return
        conditions = group.time_conditions()
        usable = f"NOT {any_of(faults)}"
        counts = [f"count(*) FILTER (WHERE {usable})"]
        for condition in conditions.values():
            counts.append(f"count(*) FILTER (WHERE {usable} AND {condition})")
        rows, *results = self._query_row(counts, group.table)
        fitting_rows = dict(zip(conditions, results, strict=True))
        best = max(fitting_rows, key=lambda kind: fitting_rows[kind])
        group.kind_of_time = best
        if fitting_rows[best] == rows:
            return
        is_other = f"NOT {conditions[best]}"
        expected = expected_time(best, fitting_rows[best] > 0)
        if group.has_formatted_times:
            expected = f"a date like {group.time_format}"
        if not self.skips or not fitting_rows[best]:
            row = self._first_bad(f"{usable} AND {is_other}", "time")
            column = group.columns["time"]
            raise InputError(
                f"{row} {column!r} is {row.value!r}: a time must be {expected}"
            )
        faults[f"{group.columns['time']!r} is not {expected}"] = is_other

    def _skip(self, faults: dict[str, str]) -> None:
        """Leaves bad rows out, counts and lists them."""
        group = self.group
        for reject in self.rejects:
            self.reading.add_bad(reject.reason, 1)
            self.reading.list_bad([reject])
        # Each bad row is counted for its first fault.
        reason = _first_reason(faults)
        counts = self.connection.execute(f"""
            SELECT {reason} AS reason, count(*)
            FROM {group.table}
            WHERE reason IS NOT NULL
            GROUP BY ALL""").fetchall()
        if not counts:
            return
        for text, count in counts:
            self.reading.add_bad(text, count)
            group.rows -= count
        for file in group.files:
            self.reading.list_bad(self._bad_rows(file, reason))
        group.bad = any_of(faults)
        flags = []
        for role in group.roles:
            whole = group.whole_sql(role)
            flags.append(f"bool_and({whole}) FILTER (WHERE NOT {group.bad})")
        results = self._query_row(flags, group.table)
        group.is_whole = dict(zip(group.roles, results, strict=True))
        if group.is_whole.get("time"):
            group.kind_of_time = "whole"

    def _bad_rows(self, file: LogFile, reason: str) -> Iterator[BadRow]:
        """Yields the bad rows of one file."""
        query = f"""
            SELECT {self.row_sql(file)} AS row_in_file, {reason} AS reason
            FROM ({self._numbered_sql(file)})
            WHERE keep AND reason IS NOT NULL
            ORDER BY row_in_file
            LIMIT {MOST_LISTED}"""
        rows = self.connection.execute(query).fetchall()
        for row, text in rows:
            yield BadRow(str(file.path), row, text)

    def _numbered_sql(self, file: LogFile) -> str:
        """Returns a query of one file's rows with their numbers."""
        options = ", ignore_errors=true" if self._can_reject else ""
        return self.group.rows_sql([file], numbered=True, more_options=options)

    def row_sql(self, file: LogFile) -> str:
        """Returns SQL of a row's number in its file, from that among those that could be read.

        Of the rows 1 to 5, of which 2 and 4 could not, the second is row 3: before it are those
        of [2 - 0, 4 - 1] that are at most 2.
        """
        befores: list[str] = []
        for reject in self.rejects:
            if reject.file == str(file.path) and reject.row is not None:
                befores.append(str(reject.row - len(befores)))
        if not befores:
            return "row"
        gaps = ", ".join(befores)
        return f"row + len(list_filter([{gaps}], lambda gap: gap <= row))"

    @property
    def _can_reject(self) -> bool:
        """Whether lines with another number of fields are left out."""
        return self.skips and self.group.function == "read_csv"

    def copy_text(self, copy_name: str, numbered: bool = False) -> None:
        """Copies the columns of text files into a table."""
        options = ""
        if self._can_reject:
            for name in (_REJECTS, f"{_REJECTS}_scans"):
                self.connection.execute(f"DROP TABLE IF EXISTS {name}")
            options = (
                f", store_rejects=true, rejects_table='{_REJECTS}', "
                f"rejects_scan='{_REJECTS}_scans', rejects_limit=0"
            )
        rows = self.group.rows_sql(self.group.files, numbered, options)
        self.connection.execute(f"CREATE TABLE {copy_name} AS {rows}")
        if self._can_reject:
            self.rejects = self._read_rejects()

    def _read_rejects(self) -> list[BadRow]:
        header = 0 if self.log_format.columns else 1
        rows = self.connection.execute(f"""
            SELECT file_path, line, any_value(error_message)
            FROM {_REJECTS}
            JOIN {_REJECTS}_scans USING (scan_id, file_id)
            GROUP BY ALL
            ORDER BY ALL""").fetchall()
        rejects = []
        for file, line, message in rows:
            reason = _describe_reject(message)
            rejects.append(BadRow(file, line - header, reason))
        return rejects

    def refuse_unreadable(self, error: Exception) -> NoReturn:
        """Raises InputError for the first file that cannot be read alone, or else the error."""
        group = self.group
        values = ["max(hash(fault, keep))"]
        for role in group.roles:
            values.append(f'max(hash("{role}"))')
        for file in group.files:
            try:
                self._query_row(values, f"({self._numbered_sql(file)})")
            except duckdb.Error as file_error:
                reason = summarize_error(file_error)
                if group.text and has_two_line_ends(file):
                    reason = (
                        "some line ends are CR LF and others LF: "
                        "write one kind, e.g. with dos2unix"
                    )
                raise InputError(
                    f"{file.path} cannot be read: {reason}"
                ) from None
        raise error

    def _refuse_first(self, reason: str, condition: str) -> NoReturn:
        """Raises InputError for the first row that has a fault."""
        for role in self.group.roles:
            if condition == self.group.missing_sql(role):
                row = self._first_bad(condition, role)
                column = self.group.columns.get(role, role)
                value = row.value or "empty"
                raise InputError(
                    f"{row} {column!r} is {value}: every row needs one"
                )
            if condition == self.group.fault_sql(role):
                row = self._first_bad(condition, role)
                column = self.group.columns.get(role, role)
                why = fault_reason(self.group.type[role])
                raise InputError(f"{row} {column!r} is {row.value}: {why}")
        row = self._first_bad(condition, None)
        raise InputError(f"{row} {reason}: write one object a line")

    def _first_bad(self, condition: str, role: str | None) -> "_ValueAt":
        """Finds the first row that meets a condition.

        Rows are numbered from 1, the header not counted.
        """
        value = "NULL" if role is None else f'"{role}"::VARCHAR'
        for file in self.group.files:
            query = f"""
                SELECT row, {value}
                FROM ({self._numbered_sql(file)})
                WHERE keep AND {condition}
                ORDER BY row
                LIMIT 1"""
            rows = self.connection.execute(query).fetchall()
            if rows:
                row, text = rows[0]
                return _ValueAt(file, row, text)
        raise AssertionError(f"no row with {condition}")

    def _query_row(
        self, expressions: Sequence[str], table: str
    ) -> tuple[Any, ...]:
        """Returns the one row of a query of aggregates."""
        selected = ", ".join(expressions)
        query = f"SELECT {selected} FROM {table}"
        rows = self.connection.execute(query).fetchall()
        (row,) = rows
        return row


def _describe_reject(message: str) -> str:
    """Returns what is wrong with a line of text, in words."""
    pattern = r"Expected Number of Columns: (\d+) Found: (\d+)"
    match = re.search(pattern, message)
    if match is None:
        return " ".join(message.split()).rstrip(".")
    return f"has {count_fields(int(match[2]))} in place of {match[1]}"


class _ValueAt:
    """A value, and the row of a file that has it."""

    def __init__(self, file: LogFile, row: int, value: str | None):
        self.file = file
        self.row = row
        self.value = value

    def __str__(self) -> str:
        """As a message begins: FILE: row 3:"""
        return f"{self.file.path}: row {self.row}:"


def any_of(conditions: dict[str, str]) -> str:
    """Returns SQL for: one of the conditions holds."""
    return "(" + " OR ".join(conditions.values()) + ")"


def _first_reason(faults: dict[str, str]) -> str:
    """Returns SQL of a row's first fault in words, NULL for none."""
    cases = []
    for reason, condition in faults.items():
        cases.append(f"WHEN {condition} THEN '{escape_sql(reason)}'")
    return f"CASE {' '.join(cases)} END"


def expected_time(best: str, fits: bool) -> str:
    """Returns what a time must be, in words. fits: some times are of the best kind."""
    if fits and best == "float":
        return "a finite number"
    if fits:
        return "a date"
    return "a number or a date; name the format of others with --time-format"


def _parse_times(groups: list[Group]) -> tuple[list[str], bool]:
    """Returns SQL of the time, one a group, all of one kind; and whether they are dates.

    kinds              times
    whole, whole       "time"::BIGINT, "time"::BIGINT
    whole, float       "time"::DOUBLE, "time"::DOUBLE
    date, date         epoch_us("time"::TIMESTAMPTZ), epoch_us("time"::TIMESTAMPTZ)
    """
    kinds = [group.kind_of_time for group in groups]
    first_files = [group.files[0].path for group in groups]
    refuse_mixed_times(kinds, first_files, groups[0].columns["time"])
    number_type = "DOUBLE"
    if set(kinds) <= {"whole"}:
        number_type = "BIGINT"
    times = []
    for group, kind in zip(groups, kinds, strict=True):
        if kind == "date":
            times.append(f"epoch_us({group.date_sql()})")
        else:
            times.append(f'"time"::{number_type}')
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
