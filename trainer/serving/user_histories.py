"""The users who get recommendations, with their histories as the run's dataset maps them.

    histories/00000.parquet …   user_id (as it came), rows and ticks (lists of int32 and uint16)
    histories/facts.json        HistoryCounts

A part has the same number of users, but for the last. `rows` are rows of M, oldest first; `ticks`
say when. Histories come from logs, mapped through the vocabularies of the run's dataset, or whole
out of that dataset. Users of logs stand in the order of their ids. Users of a dataset stand in
the order of their numbers, and unknown ones (cold start) behind them. A user's events go by time,
and equal times in the order of the dataset (tie_order.py). What is in a part depends on neither ranks nor memory.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.config.prepare import LOG_FORM_SETTINGS, memory_bytes
from trainer.config.serving import HistoriesConfig
from trainer.data.duckdb_engine import (
    escape_sql,
    open_engine,
    parquet_sql,
    query_time_span,
)
from trainer.data.format.dataset import USERS, Dataset
from trainer.data.loading.histories import Histories
from trainer.data.log_times import (
    LogTimes,
    refuse_other_times,
)
from trainer.data.logs.duckdb_logs import open_ids, open_log
from trainer.data.logs.files import LogFile, find_logs
from trainer.data.prepare.extend import refuse_float_texts
from trainer.data.tie_order import (
    FILE,
    HASH,
    break_ties,
    item_key_sql,
    user_key_sql,
)
from trainer.errors import InputError
from trainer.files.progress import Stages

COUNTS_FILE = "facts.json"
# Settings that an earlier version did not have: its outputs are finished ones, too.
_OPTIONAL = (*LOG_FORM_SETTINGS, "bad_rows")
_UNKNOWN_ITEM = -1
_UNKNOWN_DOMAIN = -2
_BATCH = 65536


class UserHistories(NamedTuple):
    """Histories of some users, jagged: raw ids (B,), int64 (B,), int32 (N,) and uint16 (N,).

    Four users and two domains, of rows 0 to 4 and 8 to 11; the second user is new:

        ids        ["ann", "bob", "cat", "dan"]
        lengths_B  [    1,     0,     3,     1]
        rows_N     [    9,            1, 0, 8,   4]
        ticks_N    [  500,        20, 41, 41, 9000]
    """

    ids: pa.Array
    lengths_B: np.ndarray
    rows_N: np.ndarray
    ticks_N: np.ndarray


@dataclass(frozen=True)
class HistoryCounts:
    """How many users get recommendations, and what of their histories was left out.

    without_history: users of whom the run knows no interaction (cold start). unknown_domain,
    unknown_item: interactions that were left out, as the run's dataset does not have them.
    unread: users whose shard is damaged, who are left out.
    """

    users: int
    without_history: int
    unknown_domain: int
    unknown_item: int
    unread: int

    @classmethod
    def load(cls, folder: Path) -> "HistoryCounts":
        """What `write_histories` counted."""
        text = (folder / COUNTS_FILE).read_text(encoding="utf-8")
        return cls(**json.loads(text))


def check_memory(config: HistoriesConfig) -> None:
    """Raises InputError where `memory` is no amount, or too little to read logs with."""
    memory_bytes(config.memory)


def describe_request(config: HistoriesConfig) -> dict[str, Any]:
    """What the histories depend on besides the dataset, by the options' names: JSON values."""
    request = asdict(config)
    for name in _OPTIONAL:
        if not request[name] or (
            name == "bad_rows" and not config.skips_bad_rows
        ):
            del request[name]
    del request["memory"]
    del request["inputs"]
    request["input"] = [log.state for log in find_logs(config.inputs)]
    request["users"] = [log.state for log in find_logs(_user_files(config))]
    if config.items is not None:
        request["items"] = [log.state for log in find_logs([config.items])]
    return request


def write_histories(
    folder: Path,
    config: HistoriesConfig,
    dataset: Dataset,
    scratch: Path,
    stages: Stages,
    threads: int,
    report: Callable[[str], None] | None = None,
) -> HistoryCounts:
    """Writes the parts into an empty folder.

    scratch: gets what does not fit into memory. report: called with a line for each damaged
    shard of the dataset, as `ShardFile` has it; None: a damaged shard is an error.

    Raises InputError for whatever is wrong with the logs or the file of users, and where no user
    is named.
    """
    memory = memory_bytes(config.memory)
    with open_engine(
        scratch,
        memory,
        threads,
        stages,
    ) as connection:
        if config.users:
            open_ids(
                connection,
                find_logs(_user_files(config)),
                config.user_column,
            )
        source: _LogHistories | _DatasetHistories
        if config.inputs:
            source = _LogHistories(
                connection,
                config,
                dataset,
                stages,
            )
        else:
            source = _DatasetHistories(
                connection,
                config,
                dataset,
                report,
            )
        with stages("writing histories", total=source.users) as advance:
            counts = _write_parts(
                folder,
                source,
                config.part_users,
                advance,
            )
    text = json.dumps(asdict(counts), indent=1) + "\n"
    (folder / COUNTS_FILE).write_text(text, encoding="utf-8")
    return counts


def read_histories(
    folder: Path,
    part: int,
) -> UserHistories:
    """The users of one part."""
    table = pq.read_table(_part_file(folder, part)).combine_chunks()
    rows = table["rows"].combine_chunks()
    ticks = table["ticks"].combine_chunks()
    lengths_B = np.diff(rows.offsets.to_numpy()).astype(np.int64)
    rows_N = rows.flatten().to_numpy()
    ticks_N = ticks.flatten().to_numpy()
    return UserHistories(
        table["user_id"],
        lengths_B,
        rows_N,
        ticks_N,
    )


class _LogHistories:
    """Iterates over the users of logs, in the order of their ids; several at a time."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        config: HistoriesConfig,
        dataset: Dataset,
        stages: Stages,
    ) -> None:
        self.connection = connection
        self.dataset = dataset
        self.unknown = {_UNKNOWN_ITEM: 0, _UNKNOWN_DOMAIN: 0}
        self.unread = 0
        with stages("reading the logs"):
            logs = find_logs(config.inputs, verbose=True)
            reading = open_log(
                connection,
                logs,
                config,
                config.log_domain,
                in_file_order=dataset.tie_order == FILE,
            )
            _check_times(connection, dataset, reading.dates, logs)
            wanted = "SELECT DISTINCT user_id FROM log"
            if config.users:
                wanted = "SELECT user_id FROM ids"
            user_key = user_key_sql(dataset.seed, "user_id")
            connection.execute(f"""CREATE TABLE asked AS
                SELECT user_id, (row_number() OVER (ORDER BY user_id) - 1)::INTEGER AS number,
                    {user_key} AS user_key
                FROM ({wanted})""")
            _read_vocabularies(connection, dataset)
        self.users = _count_rows(connection, "asked")
        _require_users(self.users, config)
        _refuse_numbers(connection, dataset, "asked.user_id", "log.item_id")
        connection.execute("SET preserve_insertion_order = true")
        with stages("sorting the logs"):
            self._events = self._sorted_events()

    def _sorted_events(self) -> pa.RecordBatchReader:
        """Events by user number and time; `row` is one of M, or why there is none.

        Equal times stand in the order of the files, or of domain and item, before `break_ties`.
        """
        last_key = "log.domain, log.item_id::VARCHAR"
        if self.dataset.tie_order == FILE:
            last_key = "position"
        same_user = _same_user(
            self.connection,
            "log",
            "asked",
        )
        events = self.connection.sql(f"""
            SELECT number, CASE WHEN i.row IS NOT NULL THEN i.row
                WHEN d.domain IS NULL THEN {_UNKNOWN_DOMAIN}
                ELSE {_UNKNOWN_ITEM} END::INTEGER AS row, "time", user_key,
                coalesce(item_key, 0) AS item_key
            FROM log JOIN asked ON {same_user} LEFT JOIN domains d ON d.domain = log.domain
            LEFT JOIN items i ON i.domain = log.domain AND i.item_id = log.item_id::VARCHAR
            ORDER BY number, "time", {last_key}""")
        return events.to_arrow_reader(_BATCH * 16)

    def __iter__(self) -> Iterator[UserHistories]:
        events = _SortedEvents(self._events)
        cursor = self.connection.cursor()
        users = cursor.sql("SELECT user_id FROM asked ORDER BY number")
        begin = 0
        for ids in users.to_arrow_reader(_BATCH):
            end = begin + len(ids)
            taken = events.take_until(end)
            for kind in self.unknown:
                self.unknown[kind] += int(np.count_nonzero(taken.row_N == kind))
            known = taken.take(taken.row_N >= 0)
            if self.dataset.tie_order == HASH:
                known.break_ties()
            place_N = known.number_N - begin
            lengths_B = np.bincount(place_N, minlength=len(ids))
            ticks_N = self.dataset.ticks(known.time_N)
            yield UserHistories(
                ids["user_id"],
                lengths_B,
                known.row_N,
                ticks_N,
            )
            begin = end


class _DatasetHistories:
    """Iterates over a dataset's users in the order of their numbers, then over unknown ones."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        config: HistoriesConfig,
        dataset: Dataset,
        report: Callable[[str], None] | None,
    ) -> None:
        self.connection = connection
        self.dataset = dataset
        self.report = report
        self.unknown = {_UNKNOWN_ITEM: 0, _UNKNOWN_DOMAIN: 0}
        self.unread = 0
        users = parquet_sql(dataset.local(USERS))
        if config.users:
            connection.execute(f"CREATE TABLE known AS SELECT * FROM {users}")
            same_user = _same_user(connection, "known", "ids")
            self._query = f"""SELECT ids.user_id, coalesce("user", -1)::BIGINT AS number
                FROM ids LEFT JOIN known ON {same_user}
                ORDER BY "user" NULLS LAST, ids.user_id"""
            self.users = _count_rows(connection, "ids")
            _refuse_numbers(connection, dataset, "ids.user_id")
        else:
            self._query = f'SELECT user_id, "user"::BIGINT AS number FROM {users} ORDER BY number'
            self.users = dataset.users
        _require_users(self.users, config)

    def __iter__(self) -> Iterator[UserHistories]:
        # Users come in the order of the blocks: one decoded block is enough.
        histories = Histories(
            self.dataset,
            blocks=1,
            report=self.report,
        )
        self.connection.execute("SET preserve_insertion_order = true")
        try:
            for batch in self.connection.sql(self._query).to_arrow_reader(
                _BATCH
            ):
                yield self._read(histories, batch)
        finally:
            histories.close()

    def _read(
        self,
        histories: Histories,
        batch: pa.RecordBatch,
    ) -> UserHistories:
        """The histories of a batch of users; those whose block is damaged are left out."""
        number_B = batch["number"].to_numpy()
        known_B = number_B >= 0
        read = histories.read(number_B[known_B])
        readable_B = ~known_B | np.isin(number_B, read.number_B)
        self.unread += int(np.count_nonzero(~readable_B))
        lengths_B = np.zeros(len(number_B), np.int64)
        lengths_B[known_B & readable_B] = read.lengths_B
        ids = batch["user_id"].filter(pa.array(readable_B))
        return UserHistories(
            ids,
            lengths_B[readable_B],
            read.items_N,
            read.ticks_N,
        )


class _Events(NamedTuple):
    """Events in the order of users and time: user numbers, rows of M, times, keys; each (N,)."""

    number_N: np.ndarray
    row_N: np.ndarray
    time_N: np.ndarray
    user_key_N: np.ndarray
    item_key_N: np.ndarray

    @classmethod
    def read(cls, batch: pa.RecordBatch) -> "_Events":
        """The events of a batch of `_sorted_events`."""
        columns = []
        for name in ("number", "row", "time", "user_key", "item_key"):
            columns.append(batch[name].to_numpy())
        return cls(*columns)

    def take(self, places: np.ndarray | slice) -> "_Events":
        """The events at some places."""
        return _Events(*(column[places] for column in self))

    def break_ties(self) -> None:
        """Orders equal times by the hash."""
        break_ties(
            self.number_N,
            self.time_N,
            self.row_N,
            lambda tied: (self.user_key_N[tied], self.item_key_N[tied]),
        )


class _SortedEvents:
    """Sorted events out of Arrow batches, taken user by user.

    Batches and users do not match: of the events of users [0, 0, 1], [1, 2, 2],
    take_until(2) gives those of [0, 0, 1, 1], and take_until(3) the rest.
    """

    def __init__(self, reader: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(reader)
        self._rest: list[_Events] = []

    def take_until(self, end: int) -> _Events:
        """The events of users below `end` that have not been taken yet."""
        pieces = self._rest
        while not (pieces and pieces[-1].number_N[-1] >= end):
            batch = next(self._batches, None)
            if batch is None:
                break
            if len(batch):
                pieces.append(_Events.read(batch))
        if not pieces:
            return _NO_EVENTS
        columns = zip(*pieces, strict=True)
        events = _Events(*(np.concatenate(column) for column in columns))
        cut = int(np.searchsorted(events.number_N, end))
        self._rest = []
        if cut < len(events.number_N):
            self._rest = [events.take(slice(cut, None))]
        return events.take(slice(cut))


_NO_EVENTS = _Events(
    np.zeros(0, np.int32),
    np.zeros(0, np.int32),
    np.zeros(0),
    np.zeros(0, np.int64),
    np.zeros(0, np.int64),
)


def _refuse_numbers(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    *columns: str,
) -> None:
    """Raises InputError for numbers where a dataset of before has made texts of floats.

    columns: as TABLE.COLUMN.
    """
    if dataset.tie_order is not None:
        return
    for name in columns:
        table, column = name.split(".")
        (kind,) = connection.sql(f"SELECT {column} FROM {table}").types
        if kind == "BIGINT":
            refuse_float_texts(dataset)


def _check_times(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
    dates: bool,
    logs: list[LogFile],
) -> None:
    """Raises InputError where the logs have another kind or unit of time than the dataset."""
    _, newest = query_time_span(connection, "log")
    refuse_other_times(
        dataset.place,
        dataset.log_times,
        logs[0].path,
        LogTimes.of(dates, newest),
    )


def _user_files(config: HistoriesConfig) -> list[str]:
    if config.users:
        return [config.users]
    return []


def _count_rows(
    connection: duckdb.DuckDBPyConnection,
    table: str,
) -> int:
    (row,) = connection.execute(f"SELECT count(*) FROM {table}").fetchall()
    return row[0]


def _require_users(
    users: int,
    config: HistoriesConfig,
) -> None:
    """Raises InputError where no user is named."""
    if not users:
        raise InputError(
            f"{config.users}: names no user: there is nobody to recommend to"
        )


def _same_user(
    connection: duckdb.DuckDBPyConnection,
    one: str,
    other: str,
) -> str:
    """SQL: the user_id of two tables is the same; by their texts where one is a number."""
    one_type = connection.sql(f"SELECT user_id FROM {one}").types[0]
    other_type = connection.sql(f"SELECT user_id FROM {other}").types[0]
    cast = "" if one_type == other_type else "::VARCHAR"
    return f"{one}.user_id{cast} = {other}.user_id{cast}"


def _read_vocabularies(
    connection: duckdb.DuckDBPyConnection,
    dataset: Dataset,
) -> None:
    """Makes the tables `domains` (domain) and `items` (domain, item_id as text, row, item_key)."""
    names = [[domain.name] for domain in dataset.domains]
    connection.execute("CREATE TABLE domains (domain VARCHAR)")
    connection.executemany("INSERT INTO domains VALUES (?)", names)
    selects = []
    for domain in dataset.domains:
        file = parquet_sql(dataset.local(domain.vocabulary))
        selects.append(
            f"SELECT '{escape_sql(domain.name)}' AS domain, item_id::VARCHAR AS item_id, "
            f"row::INTEGER AS row FROM {file}"
        )
    vocabularies = " UNION ALL ".join(selects)
    key = item_key_sql("domain", "item_id")
    connection.execute(f"""
        CREATE TABLE items AS
            SELECT *, {key} AS item_key
            FROM ({vocabularies})""")


def _write_parts(
    folder: Path,
    source: _LogHistories | _DatasetHistories,
    part_users: int,
    advance: Callable[[int], None],
) -> HistoryCounts:
    """Cuts the source's histories into parts of `part_users` users."""
    waiting: list[pa.Table] = []
    part = 0
    users = 0
    without_history = 0
    for histories in source:
        users += len(histories.ids)
        without_history += int(np.count_nonzero(histories.lengths_B == 0))
        waiting.append(_as_table(histories))
        advance(len(histories.ids))
        while sum(map(len, waiting)) >= part_users:
            table = pa.concat_tables(waiting)
            _write_part(
                folder,
                part,
                table.slice(0, part_users),
            )
            part += 1
            waiting = [table.slice(part_users)]
    if sum(map(len, waiting)) > 0:
        _write_part(
            folder,
            part,
            pa.concat_tables(waiting),
        )
    return HistoryCounts(
        users=users,
        without_history=without_history,
        unknown_domain=source.unknown[_UNKNOWN_DOMAIN],
        unknown_item=source.unknown[_UNKNOWN_ITEM],
        unread=source.unread,
    )


def _as_table(histories: UserHistories) -> pa.Table:
    """As a part's file has them, a line a user."""
    ends = np.cumsum(histories.lengths_B)
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
    rows = pa.array(histories.rows_N.astype(np.int32))
    ticks = pa.array(histories.ticks_N)
    return pa.table(
        {
            "user_id": histories.ids,
            "rows": pa.ListArray.from_arrays(offsets, rows),
            "ticks": pa.ListArray.from_arrays(offsets, ticks),
        }
    )


def _write_part(
    folder: Path,
    part: int,
    table: pa.Table,
) -> None:
    file = _part_file(folder, part)
    pq.write_table(
        table.combine_chunks(),
        file,
        compression="lz4",
    )


def _part_file(
    folder: Path,
    part: int,
) -> Path:
    return folder / f"{part:05d}.parquet"
