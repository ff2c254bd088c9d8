"""The log that a dataset keeps for its extension, and the window of time that counts.

A dataset that is to be extended keeps every row of its log, also of users and items too rare to
be prepared:

    log/00000.parquet …        user_id, item_id, domain, time, of the logs that came first, …;
                               with `--tie-order file` also position, of the rows in their files
    log/log.json               their kind of times, and the dataset's options (StoredLog)

Sizes are whatever the logs are; everything is DuckDB's, out of core.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from trainer.config.prepare import TIME_UNITS, PrepareConfig
from trainer.data.duckdb_engine import (
    escape_sql,
    parquet_sql,
    query_time_span,
    query_value,
)
from trainer.data.format.dataset import Dataset
from trainer.data.log_times import LogTimes, refuse_other_times
from trainer.data.logs.duckdb_logs import open_log
from trainer.data.logs.files import LogFile
from trainer.data.logs.reading import Reading
from trainer.data.tie_order import FILE
from trainer.errors import InputError

LOG = "log"
_COLUMNS = ("user_id", "item_id", "domain", "time")
_DAY = 86400
_RECORD = "log.json"
_COUNTS = "found.json"  # of the stage: what its logs had
_POSITION = "position"
_LOG_BITS = 40  # of a position among all logs, above those of the row


@dataclass(frozen=True)
class StoredLog:
    """A stored log: its kind of times, and the options that the dataset was made with.

    dates: times are dates (microseconds since 1970), not numbers.
    """

    dates: bool
    min_user: int
    min_item: int
    min_domain: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise TypeError(f"{field.name} is {value!r}")

    @classmethod
    def of(cls, config: PrepareConfig, dates: bool) -> "StoredLog":
        """Makes the record of a preparation."""
        return cls(
            dates=dates,
            min_user=config.min_user,
            min_item=config.min_item,
            min_domain=config.min_domain,
        )

    @classmethod
    def load(cls, dataset: Path) -> "StoredLog | None":
        """Reads the record of a dataset's folder; returns None for one that keeps no log.

        Raises InputError where it cannot be read.
        """
        if not (dataset / LOG / _RECORD).is_file():
            return None
        return cls.read(dataset / LOG)

    @classmethod
    def read(cls, folder: Path) -> "StoredLog":
        """Reads the record in the log's folder. Raises InputError where it cannot be read."""
        file = folder / _RECORD
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return cls(**record)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): copy the dataset again"
            ) from None

    def save(self, folder: Path) -> None:
        """Writes `log.json` into the log's folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1) + "\n"
        (folder / _RECORD).write_text(text, encoding="utf-8")


def store_log(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    files: list[LogFile],
    old: Dataset | None,
    folder: Path,
) -> Reading:
    """Writes the dataset's log into `folder`: the rows that `old` keeps, then new ones.

    New rows that are in the old log to the letter (user, item, domain, time) are left out: they
    were delivered twice. Rows from before the window are left out of both. `found.json` says
    how many there were of either. Returns what became of the new logs' rows.
    Raises InputError: the new logs cannot be read, or have another kind of time; the window is
    none.
    """
    reading = open_log(
        connection,
        files,
        config,
        config.domain,
        view="arrived",
        in_file_order=config.tie_order == FILE,
    )
    dates = reading.dates
    old_files = []
    if old is not None and not config.whole_log:
        old_files = sorted((old.folder / LOG).glob("*.parquet"))
    if old is not None and old_files:
        _check_kind_of_time(connection, config, old, dates, files)
    counts = {
        "arrived": query_value(connection, "SELECT count(*) FROM arrived"),
        "delivered_before": 0,
        "late": 0,
        "before_window": 0,
    }
    new_rows = "arrived"
    views = ["arrived"]
    if old is not None and old_files:
        _drop_delivered_rows(connection, old_files)
        new_rows = "new_rows"
        views = ["old_log", "new_rows"]
        new_count = query_value(connection, "SELECT count(*) FROM new_rows")
        counts["delivered_before"] = counts["arrived"] - new_count
        counts["late"] = _count_before(connection, "new_rows", old.last_time)
    begin = _begin_of_window(connection, config, dates, views)
    if begin is not None:
        counts["before_window"] = _count_before(connection, new_rows, begin)
    _link_files_in_window(connection, old_files, begin, folder)
    new_file = folder / f"{len(old_files):05d}.parquet"
    _write_new_rows(connection, config, new_rows, begin, new_file)
    stored_log = StoredLog.of(config, dates)
    stored_log.save(folder)
    record = {
        "begin": begin,
        "newest": new_file.name,
        **counts,
    }
    text = json.dumps(record)
    (folder / _COUNTS).write_text(text, encoding="utf-8")
    return reading


def _write_new_rows(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    view: str,
    begin: float | None,
    file: Path,
) -> None:
    """Writes the rows of a view that are in the window, with their position where it counts."""
    position = ""
    if config.tie_order == FILE:
        position = f", row_number() OVER (ORDER BY {_POSITION}) AS {_POSITION}"
    columns = ", ".join(_COLUMNS)
    connection.execute(f"""
        COPY (SELECT {columns} {position} FROM {view} {_window_sql(begin)})
        TO '{escape_sql(file)}' (FORMAT parquet, COMPRESSION zstd)""")


def _link_files_in_window(
    connection: DuckDBPyConnection,
    old_files: list[Path],
    begin: float | None,
    folder: Path,
) -> None:
    """Links the old log's files into `folder`, but for those that end before the window."""
    for number, file in enumerate(old_files):
        _, newest = query_time_span(connection, parquet_sql(file))
        if begin is None or newest >= begin:
            _link(file, folder / f"{number:05d}.parquet")


def read_counts(folder: Path) -> dict[str, Any]:
    """Reads what `store_log` counted: arrived, delivered_before, late, before_window rows.

    Besides it has `begin`, of the window, and `newest`, the file of the rows that came last.
    """
    return json.loads((folder / _COUNTS).read_text(encoding="utf-8"))


def open_stored_log(
    connection: DuckDBPyConnection,
    folder: Path,
    old: Dataset | None,
    in_file_order: bool,
) -> bool:
    """Makes the view `log` over the log in `folder`, and `newest` over the rows that came last.

    Ids that are text in `old` are text. in_file_order: `log` has the rows' position among all logs,
    in the order in which they came. Returns whether the times are dates.
    """
    counts = read_counts(folder)
    files = sorted(folder.glob("*.parquet"))
    vocabularies = []
    if old is not None:
        vocabularies = [old.local(domain.vocabulary) for domain in old.domains]
    types = _common_types(connection, files, vocabularies)
    window = _window_sql(counts["begin"])
    log_sql = _rows_sql(files, types, window, in_file_order)
    newest_sql = _rows_sql([folder / counts["newest"]], types)
    connection.execute(f"CREATE OR REPLACE VIEW log AS {log_sql}")
    connection.execute(f"CREATE OR REPLACE VIEW newest AS {newest_sql}")
    if not query_value(connection, "SELECT count(*) FROM log"):
        raise InputError(
            "no rows are left in the window: give an earlier --since or more --days"
        )
    return StoredLog.read(folder).dates


def link_log(log: Path, folder: Path) -> None:
    """Makes the folder `log` of a dataset of the files that `store_log` left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in (*log.glob("*.parquet"), log / _RECORD):
        _link(file, folder / file.name)


def column_type(
    connection: DuckDBPyConnection,
    file: Path,
    column: str,
) -> str:
    """Returns the type of a Parquet file's column."""
    query = f'SELECT "{column}" FROM {parquet_sql(file)}'
    return str(connection.sql(query).types[0])


def has_positions(dataset: Path) -> bool:
    """Returns whether all rows of a dataset's stored log have their position in their files."""
    files = (dataset / LOG).glob("*.parquet")
    return all(_POSITION in pq.read_schema(file).names for file in files)


def _check_kind_of_time(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    old: Dataset,
    dates: bool,
    files: list[LogFile],
) -> None:
    """Raises InputError where new times are dates and old ones numbers, or of another unit."""
    _, newest = query_time_span(connection, "arrived")
    times = LogTimes.of(dates, newest, config.time_unit)
    old_dates = StoredLog.read(old.folder / LOG).dates
    old_times = LogTimes.of(old_dates, old.last_time, old.time_unit)
    refuse_other_times(old.folder, old_times, files[0].path, times)


def _drop_delivered_rows(
    connection: DuckDBPyConnection, old_files: list[Path]
) -> None:
    """Makes the view `old_log`, and the table `new_rows` of arrived rows that it lacks."""
    types = _common_types(connection, old_files)
    connection.execute(
        f"CREATE OR REPLACE VIEW old_log AS {_rows_sql(old_files, types)}"
    )
    conditions = []
    for name in _COLUMNS:
        # An id may be a number in one log and text in another.
        cast = ""
        if name.endswith("_id"):
            cast = "::VARCHAR"
        column = f'"{name}"{cast}'
        conditions.append(f"o.{column} = a.{column}")
    is_delivered = " AND ".join(conditions)
    columns = ", ".join(_COLUMNS)
    delivered = ", ".join(f"a.{name}" for name in _COLUMNS)
    connection.execute(f"""
        CREATE TABLE delivered_before AS
            SELECT DISTINCT {delivered}
            FROM arrived a
            JOIN old_log o ON {is_delivered};
        CREATE TABLE new_rows AS
            SELECT *
            FROM arrived
            ANTI JOIN delivered_before USING ({columns})""")


def _count_before(
    connection: DuckDBPyConnection,
    view: str,
    time: float,
) -> int:
    query = f"SELECT count(*) FROM {view} WHERE time < {time!r}"
    return query_value(connection, query)


def _window_sql(begin: float | None) -> str:
    """Returns the SQL condition of the rows in the window."""
    if begin is None:
        return ""
    return f"WHERE time >= {begin!r}"


def _begin_of_window(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    dates: bool,
    views: list[str],
) -> float | None:
    """Returns the first time that counts, or None if all do."""
    since = config.since
    if since is None and config.days is None:
        return None
    newest_by_view = []
    for view in views:
        _, newest = query_time_span(connection, view)
        if newest is not None:
            newest_by_view.append(newest)
    if config.days is not None:
        unit = "us" if dates else config.time_unit
        if unit is None:
            units = ", ".join(TIME_UNITS)
            raise InputError(
                "--days with times that are numbers: "
                f"say what they are in with --time-unit ({units})"
            )
        second = TIME_UNITS[unit]
        window = config.days * _DAY * second
        return max(newest_by_view) - window
    if since is None:
        return None
    if dates:
        return _parse_date(connection, since)
    try:
        return float(since)
    except ValueError:
        raise InputError(
            f"--since {since!r}: these logs' times are numbers: give one"
        ) from None


def _parse_date(connection: DuckDBPyConnection, text: str) -> int:
    """Returns a date in microseconds since 1970."""
    query = "SELECT epoch_us(TRY_CAST(? AS TIMESTAMPTZ))"
    ((time,),) = connection.execute(query, [text]).fetchall()
    if time is None:
        raise InputError(f"--since {text!r} is no date like 2026-01-31")
    return time


def _common_types(
    connection: DuckDBPyConnection,
    files: Iterable[Path],
    vocabularies: Iterable[Path] = (),
) -> dict[str, str]:
    """Returns the types, by column, of a log whose files may have different ones.

    Item ids are to be like those of the vocabularies, too.
    """
    common_types = {}
    for name in _COLUMNS:
        types = set()
        for file in files:
            types.add(column_type(connection, file, name))
        if name == "item_id":
            for file in vocabularies:
                types.add(column_type(connection, file, name))
        if len(types) == 1:
            common_types[name] = types.pop()
        elif name == "time":
            common_types[name] = "DOUBLE"
        else:
            common_types[name] = "VARCHAR"
    return common_types


def _rows_sql(
    files: list[Path],
    types: dict[str, str],
    condition: str = "",
    in_file_order: bool = False,
) -> str:
    """Returns SQL for the rows of a log's files.

    types: by column. condition: a WHERE clause, if not all rows count. in_file_order: with the
    rows' position among all of the files.
    """
    columns = []
    for name, column in types.items():
        columns.append(f'"{name}"::{column} AS "{name}"')
    selected = ", ".join(columns)
    selects = []
    for number, file in enumerate(files):
        position = ""
        if in_file_order:
            position = f", ({number}::BIGINT << {_LOG_BITS}) + {_POSITION} AS {_POSITION}"
        selects.append(f"""
            SELECT {selected} {position}
            FROM {parquet_sql(file)}
            {condition}""")
    return " UNION ALL ".join(selects)


def _link(file: Path, target: Path) -> None:
    """Links a file to another name, or copies it where the file system knows no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
