"""Reading interaction logs: which files, which columns of which types, and one DuckDB view `log` over all of them.

The view has the columns `user_id`, `item_id` (BIGINT if every id in every file is a whole number, else VARCHAR), `domain`
(VARCHAR) and `time` (BIGINT or DOUBLE; dates are microseconds since 1970, UTC where they say no zone).
"""

import csv
import glob
import gzip
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa

from trainer.errors import InputError

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
_WIDE = {
    "UBIGINT",
    "HUGEINT",
    "UHUGEINT",
}  # whole numbers that may not fit int64: decided by what they hold
_FLOAT = {"FLOAT", "DOUBLE"}
_DATE = (
    "DATE",
    "TIMESTAMP",
)  # and its kin: TIMESTAMP_NS, TIMESTAMP WITH TIME ZONE, TIMESTAMPTZ_NS


def find_files(inputs) -> list[Path]:
    """Log files behind paths, folders (searched through, other files in them ignored) and globs, sorted, each once.

    Raises InputError: a path that does not exist, a folder without logs, a named file that is no log, an empty file.
    """
    found = set()
    for given in inputs:
        path = Path(given)
        paths = (
            [path]
            if path.exists()
            else sorted(Path(match) for match in glob.glob(str(given), recursive=True))
        )
        if not paths:
            raise InputError(
                f"input {given} does not exist: give a file, a folder or a glob"
            )
        logs = []
        for path in paths:
            if path.is_dir():
                logs += [
                    child
                    for child in path.rglob("*")
                    if child.is_file() and suffix_of(child) in SUFFIXES
                ]
            elif suffix_of(path) in SUFFIXES:
                logs.append(path)
            elif len(paths) == 1:
                raise InputError(
                    f"input {path} is no log: the name must end in {', '.join(SUFFIXES)}"
                )
        if not logs:
            raise InputError(
                f"input {given} holds no log: names must end in {', '.join(SUFFIXES)}"
            )
        found.update(log.resolve() for log in logs)
    for path in found:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes): remove it or write it again")
    return sorted(found)


def open_log(
    connection, files, columns: dict[str, str], domain: str | None = None, view="log"
) -> bool:
    """Makes the view `log`, or of another name, over the files. Returns whether their times are dates.

    columns: the columns' names by role: user, item, domain, time. domain: the one domain of all rows, in place of a column.
    Raises InputError, naming file and row: a missing column, a file that cannot be read, an empty id, a time that is
    neither number nor date, no rows at all.
    """
    connection.execute("SET TimeZone = 'UTC'")
    groups = _group(connection, files, columns, domain)
    for number, group in enumerate(groups):
        _inspect(connection, group, f"text_{number}")
    groups = [group for group in groups if group.rows]
    if not groups:
        raise InputError(
            f"{files[0]}{f' and {len(files) - 1} more' if files[1:] else ''}: no rows, nothing to prepare"
        )
    ids = {
        role: "BIGINT" if all(group.whole[role] for group in groups) else "VARCHAR"
        for role in ("user", "item")
    }
    times, dates = _times(connection, groups)
    selects = [
        f"""SELECT {group.value["user"]}::{ids["user"]} AS user_id, {group.value["item"]}::{ids["item"]} AS item_id,
            {group.value["domain"]}::VARCHAR AS domain, {time} AS "time" FROM {group.table}"""
        for group, time in zip(groups, times, strict=True)
    ]
    connection.execute(
        f"CREATE OR REPLACE VIEW {view} AS " + " UNION ALL ".join(selects)
    )
    return dates


def open_ids(connection, files, column) -> None:
    """Makes the table `ids` of the different values that a column of the files has: `user_id`, BIGINT or VARCHAR as in `log`.

    Raises InputError as `open_log` does; files without a row are none.
    """
    groups = _group(connection, files, {"user": column}, None)
    for number, group in enumerate(groups):
        _inspect(connection, group, f"ids_{number}")
    kind = (
        "BIGINT"
        if all(group.whole["user"] for group in groups if group.rows)
        else "VARCHAR"
    )
    selects = [
        f"SELECT {group.value['user']}::{kind} AS user_id FROM {group.table}"
        for group in groups
    ]
    connection.execute(
        f"CREATE TABLE ids AS SELECT DISTINCT user_id FROM ({' UNION ALL '.join(selects)})"
    )


@dataclass
class _Group:
    """Files of one format with equal columns, which one table function reads together."""

    files: list[Path]
    options: str  # what the table function gets beside the files
    columns: dict[str, str]  # role → column name, for the roles that the files give
    value: dict[str, str]  # role → SQL expression over `table`
    type: dict[str, str]  # role → DuckDB type
    text: bool  # CSV: every column is text, whatever it holds
    table: str = ""
    rows: int = 0
    whole: dict[str, bool] | None = (
        None  # role → all values are whole numbers that fit int64
    )

    def scan(self, files):
        literals = ", ".join(
            "'" + glob.escape(str(file)).replace("'", "''") + "'" for file in files
        )
        return f"{'read_csv' if self.text else 'read_parquet'}([{literals}], {self.options})"

    def missing(self, role):
        """SQL: the value is not there. An empty text is what CSV has for it; a NaN what a float column has."""
        value, kind = self.value[role], self.type[role]
        empty = (
            f" OR {value} = ''"
            if kind == "VARCHAR"
            else f" OR NOT isfinite({value})"
            if kind in _FLOAT
            else ""
        )
        return f"({value} IS NULL{empty})"

    def is_open(self, role):
        """The type does not say whether the column holds whole numbers that fit int64."""
        return (
            self.text
            or self.type[role] in _WIDE
            or (role == "time" and self.type[role] == "VARCHAR")
        )

    def is_whole(self, role):
        """SQL: the value is a whole number as int64 writes it; '007' and '1e3' are text."""
        value = f"{self.value[role]}::VARCHAR"
        return f"coalesce(TRY_CAST({value} AS BIGINT)::VARCHAR = {value}, false)"


def suffix_of(path) -> str | None:
    """The key of SUFFIXES that a path ends in."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def _quote(name):
    return '"' + name.replace('"', '""') + '"'


def _group(connection, files, columns, domain):
    """Files with equal columns go together, so that a thousand part files are one scan."""
    layouts = defaultdict(list)
    for path in files:
        delimiter = SUFFIXES[suffix_of(path)]
        if delimiter:
            layouts[
                delimiter, tuple((name, "VARCHAR") for name in _header(path, delimiter))
            ].append(path)
        else:
            layouts[None, _parquet_columns(connection, path)].append(path)
    groups = []
    for (delimiter, layout), paths in layouts.items():
        names = [name for name, _ in layout]
        wanted = {
            role: name
            for role, name in columns.items()
            if role != "domain" or domain is None
        }
        check_columns(paths[0], names, wanted)
        types = dict(layout)
        if delimiter:
            listed = ", ".join(
                f"'c{number}': 'VARCHAR'" for number in range(len(names))
            )
            options = f"""auto_detect=false, header=true, delim='{delimiter}', quote='"', escape='"', comment='',
                columns={{{listed}}}"""
        else:  # without can_have_nan DuckDB may answer isfinite() from a column's statistics, which leave NaN out
            options = "can_have_nan=true"
        group = _Group(
            paths,
            options + ", hive_partitioning=false",
            wanted,
            {},
            {},
            text=bool(delimiter),
        )
        for role, name in wanted.items():
            group.value[role] = f"c{names.index(name)}" if delimiter else _quote(name)
            group.type[role] = types[name]
        if domain is not None:
            group.value["domain"], group.type["domain"] = (
                "'" + domain.replace("'", "''") + "'",
                "VARCHAR",
            )
        for name in wanted.values():
            if types[name].endswith("]") or types[name].startswith(
                ("STRUCT", "MAP", "UNION")
            ):
                raise InputError(
                    f"{paths[0]}: column {name!r} holds {types[name]}, not single values"
                )
        groups.append(group)
    return groups


def check_columns(path, names, wanted: dict[str, str]):
    """Raises InputError where a column that is `wanted` (by role) is not among the names, or more than once."""
    for role, name in wanted.items():
        if names.count(name) != 1:
            state = "no column" if name not in names else "more than one column"
            raise InputError(
                f"{path} has {state} {name!r}; it has {', '.join(names)}: name yours with --{role}-column"
            )


def read_text(connection, path, columns: dict[str, str], domain: str | None = None):
    """Yields the rows of one CSV or TSV file in Arrow batches: row (int64, from 1), and by role, all as text, user, item,
    domain, time. Raises InputError, naming the file: a missing column, a file that cannot be read."""
    (group,) = _group(connection, [path], columns, domain)
    values = ", ".join(
        f"{value}::VARCHAR AS {role}" for role, value in group.value.items()
    )
    try:
        yield from connection.sql(
            f"SELECT row_number() OVER () AS row, {values} FROM {group.scan([path])}"
        ).to_arrow_reader()
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        _refuse_unreadable(connection, group, error)


def _header(path, delimiter):
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as stream:
            return next(csv.reader(stream, delimiter=delimiter), [])
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _parquet_columns(connection, path):
    literal = "'" + glob.escape(str(path)).replace("'", "''") + "'"
    try:
        described = connection.execute(
            f"DESCRIBE SELECT * FROM read_parquet({literal}, hive_partitioning=false)"
        )
        return tuple((name, kind) for name, kind, *_ in described.fetchall())
    except duckdb.Error as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from None


def reason(error) -> str:
    """The telling part of a DuckDB message, in one line."""
    lines = []
    for line in str(error).splitlines():
        if line.startswith(("Possible", "LINE ", "  file =")):
            break
        lines.append(line)
    return " ".join(" ".join(lines).split())[:300]


def _inspect(connection, group, name):
    """Fills in table (a copy called `name` for CSV), rows and whole; refuses unreadable files and ids that are not there."""
    group.table = group.scan(group.files)
    roles = tuple(group.value)
    try:
        if group.text:  # parsing is dear: once
            read = dict.fromkeys(
                value for role, value in group.value.items() if role in group.columns
            )
            connection.execute(
                f"CREATE TABLE {name} AS SELECT {', '.join(read)} FROM {group.table}"
            )
            group.table = name
        facts = ["count(*)"]
        facts += [f"count(*) FILTER (WHERE {group.missing(role)})" for role in roles]
        facts += [
            f"bool_and({group.is_whole(role) if group.is_open(role) else group.type[role] in _WHOLE})"
            for role in roles
        ]
        ((group.rows, *found),) = connection.execute(
            f"SELECT {', '.join(facts)} FROM {group.table}"
        ).fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        _refuse_unreadable(connection, group, error)
    for role, missing in zip(roles, found[: len(roles)], strict=True):
        if missing:
            path, row, text = _first(connection, group, role, group.missing(role))
            raise InputError(
                f"{path}: row {row}: {group.columns[role]!r} is {text or 'empty'}: every row needs one"
            )
    group.whole = dict(zip(roles, found[len(roles) :], strict=True))


def _refuse_unreadable(connection, group, error):
    for path in group.files:
        try:
            values = ", ".join(f"max(hash({value}))" for value in group.value.values())
            connection.execute(f"SELECT {values} FROM {group.scan([path])}").fetchall()
        except duckdb.Error as fault:
            raise InputError(f"{path} cannot be read: {reason(fault)}") from None
    raise error


def _first(connection, group, role, condition):
    """File, row (from 1, the header not counted) and value of the first row that meets the condition."""
    for path in group.files:
        found = connection.execute(
            f"""SELECT number, value FROM (SELECT row_number() OVER () AS number, ({condition}) AS bad,
                {group.value[role]}::VARCHAR AS value FROM {group.scan([path])}) WHERE bad ORDER BY number LIMIT 1"""
        ).fetchall()
        if found:
            return path, *found[0]
    raise AssertionError(f"no row with {condition}")


def _times(connection, groups):
    """SQL expressions of the time, one a group, all of one kind: numbers or dates; and whether dates."""
    kinds = [_time_kind(connection, group) for group in groups]
    if len({kind == "date" for kind in kinds}) > 1:
        dated, numbered = (
            groups[[kind == "date" for kind in kinds].index(is_date)]
            for is_date in (True, False)
        )
        raise InputError(
            f"{dated.files[0]} has dates in {dated.columns['time']!r} and {numbered.files[0]} has numbers: write one kind"
        )
    number = "BIGINT" if set(kinds) <= {"whole"} else "DOUBLE"
    read = [
        f"epoch_us({group.value['time']}::TIMESTAMPTZ)"
        if kind == "date"
        else f"{group.value['time']}::{number}"
        for kind, group in zip(kinds, groups, strict=True)
    ]
    return read, "date" in kinds


def _time_kind(connection, group):
    """'whole', 'float' or 'date'; refuses a column that is none of them, naming the first row at fault."""
    value, kind = group.value["time"], group.type["time"]
    if group.whole["time"]:
        return "whole"
    fits = {
        "float": f"coalesce(isfinite(TRY_CAST({value} AS DOUBLE)), false)",
        "date": f"coalesce(isfinite(TRY_CAST({value} AS TIMESTAMPTZ)), false)",
    }
    if kind in _FLOAT or kind in _WIDE or kind.startswith("DECIMAL"):
        del fits["date"]
    elif kind.startswith(_DATE):
        del fits["float"]
    elif kind != "VARCHAR":
        raise InputError(
            f"{group.files[0]}: column {group.columns['time']!r} holds {kind}: a time is a number or a date"
        )
    counts = ", ".join(f"count(*) FILTER (WHERE {fit})" for fit in fits.values())
    (found,) = connection.execute(f"SELECT {counts} FROM {group.table}").fetchall()
    fitting = dict(zip(fits, found, strict=True))
    best = max(fitting, key=fitting.get)
    if fitting[best] == group.rows:
        return best
    path, row, text = _first(connection, group, "time", f"NOT {fits[best]}")
    meant = (
        {"float": "a finite number", "date": "a date"}[best]
        if fitting[best]
        else "a number or a date"
    )
    raise InputError(
        f"{path}: row {row}: {group.columns['time']!r} is {text!r}: a time must be {meant}"
    )
