"""The users that somebody asks for and their histories as the run knows them, in parts of so many users on disk.

    histories/00000.parquet …   user_id (as it came), rows and ticks (lists of int32 and uint16: rows of M, oldest
                                first, and when)
    histories/facts.json        Asked

Histories come from logs, mapped through the vocabularies of the run's dataset, or whole out of that dataset. The order is that
of the ids, or, out of a dataset, of its users' numbers with users that it does not know behind them. A user's events go by
time, domain and item id, as in a prepared dataset. What is in a part depends on neither ranks nor memory.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.format.dataset import USERS, Dataset
from trainer.data.loading.histories import Histories
from trainer.data.prepare.logs import find_files, open_ids, open_log
from trainer.data.prepare.pipeline import engine, file_facts, memory_bytes
from trainer.data.prepare.shard_writing import escape
from trainer.errors import InputError

FACTS = "facts.json"
_UNKNOWN_ITEM, _UNKNOWN_DOMAIN = -1, -2
_BATCH = 65536


@dataclass(frozen=True)
class AskedConfig:
    """Who is asked for. inputs: logs; without any, the histories of the run's dataset, validation and test items included.

    users: one file (Parquet, CSV or TSV) whose `user_column` has the only users that are wanted. log_domain: the one domain of
    logs without a domain column.
    """

    inputs: tuple[str, ...] = ()
    users: str | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    domain_column: str = "domain"
    time_column: str = "timestamp"
    log_domain: str | None = None
    memory: str = "8GB"  # that reading logs keeps to
    part_users: int = 65536

    def __post_init__(self):
        if self.part_users < 1:
            raise InputError(f"part_users is {self.part_users}: it must be at least 1")
        if self.log_domain == "":
            raise InputError(
                "log_domain is empty: give the one domain of these logs a name"
            )
        memory_bytes(self.memory)

    def facts(self) -> dict:
        """What the histories depend on besides the dataset, by the names of the options: JSON values."""
        facts = asdict(self)
        del facts["memory"], facts["inputs"]
        return facts | {
            "input": [file_facts(file) for file in find_files(self.inputs)],
            "users": [
                file_facts(file)
                for file in find_files([self.users] if self.users else [])
            ],
        }


@dataclass(frozen=True)
class Asked:
    """How many users, how many of them have no history that the run knows, and how many interactions of theirs were left out:
    of domains and of items that the run's dataset does not have. unread: users whose shard is damaged, who are left out."""

    users: int
    without_history: int
    unknown_domain: int
    unknown_item: int
    unread: int

    @classmethod
    def load(cls, folder: Path) -> "Asked":
        """What `write_histories` found."""
        return cls(**json.loads((folder / FACTS).read_text(encoding="utf-8")))


def write_histories(
    folder: Path,
    config: AskedConfig,
    dataset: Dataset,
    scratch: Path,
    stages,
    threads,
    report=None,
) -> Asked:
    """Writes the parts into an empty folder. scratch: gets what does not fit into memory. stages: a `Stages`.

    report: as `ShardFile` has it, for damaged shards of the dataset.
    Raises InputError for whatever is wrong with the logs or the file of users, and where nobody is asked for.
    """
    with engine(scratch, memory_bytes(config.memory), threads, stages) as connection:
        if config.users:
            open_ids(connection, find_files([config.users]), config.user_column)
        source = _FromLogs if config.inputs else _FromDataset
        source = source(connection, config, dataset, stages, report)
        with stages("writing histories", total=source.users) as advance:
            found = _write_parts(folder, source, config.part_users, advance)
    (folder / FACTS).write_text(
        json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8"
    )
    return found


def read_histories(folder: Path, part):
    """(raw ids, lengths int64 (B,), rows int32 (N,), ticks uint16 (N,)) of one part."""
    table = pq.read_table(folder / f"{part:05d}.parquet").combine_chunks()
    rows, ticks = (table[name].combine_chunks() for name in ("rows", "ticks"))
    lengths_B = np.diff(rows.offsets.to_numpy()).astype(np.int64)
    return (
        table["user_id"],
        lengths_B,
        rows.flatten().to_numpy(),
        ticks.flatten().to_numpy(),
    )


class _FromLogs:
    """Yields (raw ids, lengths, rows, ticks) of the users of logs, in the order of their ids."""

    def __init__(self, connection, config, dataset, stages, report):
        self.connection, self.dataset = connection, dataset
        self.left_out = {_UNKNOWN_ITEM: 0, _UNKNOWN_DOMAIN: 0}
        self.unread = 0
        with stages("reading the logs"):
            open_log(
                connection,
                find_files(config.inputs),
                _columns(config),
                config.log_domain,
            )
            wanted = (
                "SELECT user_id FROM ids"
                if config.users
                else "SELECT DISTINCT user_id FROM log"
            )
            connection.execute(f"""CREATE TABLE asked AS
                SELECT user_id, (row_number() OVER (ORDER BY user_id) - 1)::INTEGER AS number FROM ({wanted})""")
            _read_vocabularies(connection, dataset)
        ((self.users,),) = connection.execute("SELECT count(*) FROM asked").fetchall()
        _refuse_nobody(self.users, config)
        connection.execute("SET preserve_insertion_order = true")
        with stages("sorting the logs"):
            self._events = connection.sql(f"""
                SELECT number, CASE WHEN i.row IS NOT NULL THEN i.row WHEN d.domain IS NULL THEN {_UNKNOWN_DOMAIN}
                    ELSE {_UNKNOWN_ITEM} END::INTEGER AS row, "time"
                FROM log JOIN asked ON {_same(connection, "log", "asked")} LEFT JOIN domains d ON d.domain = log.domain
                LEFT JOIN items i ON i.domain = log.domain AND i.item_id = log.item_id::VARCHAR
                ORDER BY number, "time", log.domain, log.item_id::VARCHAR""").to_arrow_reader(
                _BATCH * 16
            )

    def __iter__(self):
        events, begin = _Events(self._events), 0
        for ids in (
            self.connection.cursor()
            .sql("SELECT user_id FROM asked ORDER BY number")
            .to_arrow_reader(_BATCH)
        ):
            number_N, row_N, time_N = events.until(begin + len(ids))
            known_N = row_N >= 0
            for kind in self.left_out:
                self.left_out[kind] += int(np.count_nonzero(row_N == kind))
            lengths_B = np.bincount(number_N[known_N] - begin, minlength=len(ids))
            yield (
                ids["user_id"],
                lengths_B,
                row_N[known_N],
                self.dataset.ticks(time_N[known_N]),
            )
            begin += len(ids)


class _FromDataset:
    """Yields (raw ids, lengths, rows, ticks) of a dataset's users in the order of their numbers, then of unknown ones."""

    def __init__(self, connection, config, dataset, stages, report):
        self.connection, self.dataset, self.report = connection, dataset, report
        self.left_out = {_UNKNOWN_ITEM: 0, _UNKNOWN_DOMAIN: 0}
        self.unread = 0
        users = f"read_parquet('{escape(dataset.local(USERS))}')"
        if config.users:
            connection.execute(f"CREATE TABLE known AS SELECT * FROM {users}")
            same = _same(connection, "known", "ids")
            self._query = f"""SELECT ids.user_id, coalesce("user", -1)::BIGINT AS number FROM ids LEFT JOIN known ON {same}
                ORDER BY "user" NULLS LAST, ids.user_id"""
            ((self.users,),) = connection.execute("SELECT count(*) FROM ids").fetchall()
        else:
            self._query = (
                f'SELECT user_id, "user"::BIGINT AS number FROM {users} ORDER BY number'
            )
            self.users = dataset.users
        _refuse_nobody(self.users, config)

    def __iter__(self):
        histories = Histories(
            self.dataset, blocks=1, report=self.report
        )  # users come in the order of the blocks
        self.connection.execute("SET preserve_insertion_order = true")
        try:
            for batch in self.connection.sql(self._query).to_arrow_reader(_BATCH):
                number_B = batch["number"].to_numpy()
                known_B = number_B >= 0
                read = histories.read(number_B[known_B])
                there_B = ~known_B | np.isin(number_B, read.number_B)
                self.unread += int(np.count_nonzero(~there_B))
                lengths_B = np.zeros(len(number_B), np.int64)
                lengths_B[known_B & there_B] = read.lengths_B
                yield (
                    batch["user_id"].filter(pa.array(there_B)),
                    lengths_B[there_B],
                    read.items_N,
                    read.ticks_N,
                )
        finally:
            histories.close()


class _Events:
    """Sorted events (number, row, time) out of Arrow batches, taken user by user."""

    def __init__(self, reader):
        self._reader = iter(reader)
        self._rest = np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0)

    def until(self, end):
        """The events of users below `end` that have not been taken yet."""
        taken = [self._rest]
        while not (len(taken[-1][0]) and taken[-1][0][-1] >= end):
            batch = next(self._reader, None)
            if batch is None:
                break
            taken.append(
                tuple(batch[name].to_numpy() for name in ("number", "row", "time"))
            )
        columns = [np.concatenate(parts) for parts in zip(*taken, strict=True)]
        cut = int(np.searchsorted(columns[0], end))
        self._rest = tuple(column[cut:] for column in columns)
        return [column[:cut] for column in columns]


def _columns(config):
    return {
        role: getattr(config, f"{role}_column")
        for role in ("user", "item", "domain", "time")
    }


def _refuse_nobody(users, config):
    if not users:
        raise InputError(
            f"{config.users}: names no user: there is nobody to recommend to"
        )


def _same(connection, one, other):
    """SQL: the user_id of two tables is the same; where one is a number and the other text, by their texts."""
    kinds = {
        connection.sql(f"SELECT user_id FROM {table}").types[0]
        for table in (one, other)
    }
    cast = "" if len(kinds) == 1 else "::VARCHAR"
    return f"{one}.user_id{cast} = {other}.user_id{cast}"


def _read_vocabularies(connection, dataset):
    """Makes the tables `domains` (domain) and `items` (domain, item_id as text, row)."""
    connection.execute("CREATE TABLE domains (domain VARCHAR)")
    connection.executemany(
        "INSERT INTO domains VALUES (?)", [[domain.name] for domain in dataset.domains]
    )
    selects = " UNION ALL ".join(
        f"SELECT '{escape(domain.name)}' AS domain, item_id::VARCHAR AS item_id, row::INTEGER AS row "
        f"FROM read_parquet('{escape(dataset.local(domain.vocabulary))}')"
        for domain in dataset.domains
    )
    connection.execute(f"CREATE TABLE items AS {selects}")


def _write_parts(folder, source, part_users, advance) -> Asked:
    """Cuts what comes into parts of so many users."""
    waiting, part, users, without = [], 0, 0, 0
    for ids, lengths_B, rows_N, ticks_N in source:
        users += len(ids)
        without += int(np.count_nonzero(lengths_B == 0))
        offsets = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32)
        jagged = {"rows": rows_N.astype(np.int32), "ticks": ticks_N}
        offsets = pa.array(offsets)
        columns = {
            name: pa.ListArray.from_arrays(offsets, pa.array(values))
            for name, values in jagged.items()
        }
        waiting.append(pa.table({"user_id": ids, **columns}))
        advance(len(ids))
        while sum(map(len, waiting)) >= part_users:
            table = pa.concat_tables(waiting)
            _write_part(folder, part, table.slice(0, part_users))
            part, waiting = part + 1, [table.slice(part_users)]
    if rest := sum(map(len, waiting)):
        _write_part(folder, part, pa.concat_tables(waiting).slice(0, rest))
    return Asked(
        users,
        without,
        source.left_out[_UNKNOWN_DOMAIN],
        source.left_out[_UNKNOWN_ITEM],
        source.unread,
    )


def _write_part(folder, part, table):
    pq.write_table(
        table.combine_chunks(), folder / f"{part:05d}.parquet", compression="lz4"
    )
