"""From interaction logs to a dataset folder. DuckDB joins, counts and sorts, out of core; Python cuts its ordered stream.

The same logs give the same bytes whatever their format, their order and the number of threads: ids are numbered by the
order of their text, users are shuffled by (seed, number), and a user's events go by time, domain and item id.
Memory: `memory` for DuckDB, and beside it some 60 bytes a user and 4 a row of the item matrix.
"""

import dataclasses
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.data.dataset import SPLIT_LENGTH, Dataset, Domain, Shard
from trainer.data.folder import new_folder
from trainer.data.logs import find_files, open_log, reason
from trainer.data.random import permutation
from trainer.data.shards import Block, write_shard
from trainer.errors import InputError

PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
INT32_MAX = 2**31 - 1
_PARQUET_ROWS = 1 << 17


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how. `domain` names the one domain of logs without a domain column; `min_user` and `min_item`
    drop users and items with fewer interactions, again and again until none is left to drop."""

    inputs: tuple[str, ...]
    output: str
    user_column: str = "user_id"
    item_column: str = "item_id"
    domain_column: str = "domain"
    time_column: str = "timestamp"
    domain: str | None = None
    min_user: int = 0
    min_item: int = 0
    seed: int = 0
    streams: int = 64
    shard_users: int = 32768
    block_users: int = 1024
    memory: str = "8GB"

    def __post_init__(self):
        # Two users a shard at least: with one, a multiple of `streams` shards could leave some empty.
        least = {"min_user": 0, "min_item": 0, "seed": 0, "streams": 1, "shard_users": 2, "block_users": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} is {getattr(self, name)}: it must be at least {bound}")
        if self.domain == "":
            raise InputError("domain is empty: give the one domain of these logs a name")


def prepare(config: PrepareConfig) -> Dataset:
    """Reads the logs and writes the dataset folder `config.output`, all of it or nothing.

    Raises InputError for whatever is wrong with the logs, the output folder or the memory.
    """
    with new_folder(config.output) as (folder, scratch):
        files = find_files(config.inputs)
        try:
            with duckdb.connect(":memory:") as connection:
                connection.execute(f"SET temp_directory = '{_escape(scratch)}'")
                connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
                _set_memory(connection, config.memory)
                with _Stages(connection) as stages:
                    dataset = _prepare(connection, config, files, folder, stages)
        except duckdb.OutOfMemoryException as error:
            raise InputError(f"memory {config.memory} is too little: give more with --memory ({reason(error)})") from None
        except duckdb.IOException as error:
            raise InputError(f"{scratch} cannot be written: {reason(error)}") from None
    return dataclasses.replace(dataset, folder=Path(config.output))


def _prepare(connection, config, files, folder, stages):
    columns = {role: getattr(config, f"{role}_column") for role in ("user", "item", "domain", "time")}
    with stages("reading the logs"):
        open_log(connection, files, columns, config.domain)
    connection.execute("SET preserve_insertion_order = false")
    with stages("numbering users and items"):
        _number_ids(connection)
    with stages("joining"):
        _join(connection)
    if config.min_user > 1 or config.min_item > 1:
        with stages("dropping rare users and items"):
            _drop_rare(connection, config.min_user, config.min_item)
    with stages("shuffling users, ranking items"):
        lengths = _shuffle_users(connection, config.seed)
        domains = _rank_items(connection)
    (folder / "shards").mkdir()
    (folder / "vocabulary").mkdir()
    with stages("sorting"):
        stream = connection.sql("""
            SELECT row::INTEGER AS row FROM events JOIN shuffled USING ("user") JOIN vocabulary USING (item)
            ORDER BY number, "time", item""").to_arrow_reader()
    with stages("writing shards", total=int(lengths.sum())) as advance:
        held_out = np.zeros(domains[-1].start + domains[-1].room, dtype=np.int32)
        shards = _write_shards(folder, config, lengths, stream, held_out, advance)
    with stages("writing vocabularies"):
        _write_vocabularies(connection, folder, domains, held_out)
        users = connection.sql("""SELECT user_id, number::BIGINT AS "user" FROM users JOIN shuffled USING ("user")
            ORDER BY number""")
        _write_parquet(folder / "users.parquet", users.to_arrow_reader())
    dataset = Dataset(
        folder=folder,
        seed=config.seed,
        users=len(lengths),
        interactions=int(lengths.sum()),
        too_short=int((lengths < SPLIT_LENGTH).sum()),
        max_length=int(lengths.max()),
        block_users=config.block_users,
        streams=min(config.streams, len(lengths)),
        domains=tuple(domains),
        shards=tuple(shards),
    )
    dataset.save()
    return dataset


def _one(connection, query):
    ((value,),) = connection.execute(query).fetchall()
    return value


def _number_ids(connection):
    """Tables `users` and `items`: raw ids and their numbers, by the order of the text of (domain and) id."""
    connection.execute("""CREATE TABLE users AS
        SELECT user_id, (row_number() OVER (ORDER BY user_id::VARCHAR) - 1) AS "user"
        FROM (SELECT DISTINCT user_id FROM log)""")
    connection.execute("""CREATE TABLE items AS
        SELECT domain, item_id, (row_number() OVER (ORDER BY domain, item_id::VARCHAR) - 1) AS item
        FROM (SELECT DISTINCT domain, item_id FROM log)""")
    for table in ("users", "items"):
        _refuse_beyond_int32(_one(connection, f"SELECT count(*) FROM {table}"), table)


def _refuse_beyond_int32(count, what):
    if count > INT32_MAX:
        raise InputError(f"{count:,} {what} are more than int32 can number ({INT32_MAX:,}): drop rare ones with --min-item")


def _join(connection):
    """Table `events`: the numbers of user and item, and the time."""
    connection.execute("""CREATE TABLE events AS SELECT "user"::INTEGER AS "user", item::INTEGER AS item, "time"
        FROM log JOIN users USING (user_id) JOIN items USING (domain, item_id)""")


def _drop_rare(connection, min_user, min_item):
    """Drops events until every user left has `min_user` and every item left `min_item` interactions: the k-core."""
    dropped = 1
    while dropped:
        dropped = 0
        for column, least in (("item", min_item), ("user", min_user)):
            rare = f'SELECT "{column}" FROM events GROUP BY "{column}" HAVING count(*) < {least}'
            dropped += _one(connection, f'DELETE FROM events WHERE "{column}" IN ({rare})')
    if not _one(connection, "SELECT count(*) FROM events"):
        raise InputError(f"nothing is left with --min-user {min_user} --min-item {min_item}: lower them")


def _shuffle_users(connection, seed):
    """Table `shuffled`: user, its place 0..U-1 in the shuffle, its length. Returns the lengths by number, int64 (U,)."""
    connection.execute("""CREATE TABLE lengths AS SELECT "user", count(*) AS length,
        row_number() OVER (ORDER BY "user") - 1 AS position FROM events GROUP BY "user" """)
    users = _one(connection, "SELECT count(*) FROM lengths")
    number = np.empty(users, dtype=np.int32)
    number[permutation(users, seed)] = np.arange(users, dtype=np.int32)
    connection.register("numbers", pa.table({"position": np.arange(users), "number": number}))
    connection.execute("""CREATE TABLE shuffled AS SELECT "user", number, length FROM lengths JOIN numbers USING (position)""")
    connection.unregister("numbers")
    lengths = np.empty(users, dtype=np.int64)
    for batch in connection.sql("SELECT number, length FROM shuffled").to_arrow_reader():
        lengths[batch.column(0).to_numpy()] = batch.column(1).to_numpy()
    return lengths


def _rank_items(connection):
    """Table `vocabulary`: item, domain number, raw id, total count, row of M. Returns the domains."""
    counts = connection.execute("""CREATE TABLE totals AS SELECT item, count(*) AS total FROM events GROUP BY item;
        SELECT domain, count(*) FROM totals JOIN items USING (item) GROUP BY domain ORDER BY domain""").fetchall()
    for name, items in counts:
        if items < 2:
            raise InputError(
                f"domain {name!r} has one item: there is no other to tell it from (negatives are impossible); leave it out"
            )
    rooms = [items + max(64, items // 10) for _, items in counts]
    starts = [0, *itertools.accumulate(rooms)]
    _refuse_beyond_int32(starts[-1], "rows of the item matrix")
    starts_by_name = pa.table({
        "domain": [name for name, _ in counts],
        "number": list(range(len(counts))),
        "start": starts[:-1],
    })  # fmt: skip
    connection.register("starts", starts_by_name)
    connection.execute("""CREATE TABLE vocabulary AS
        SELECT item, number AS domain, item_id, total,
            "start" + row_number() OVER (PARTITION BY number ORDER BY total DESC, item) - 1 AS row
        FROM totals JOIN items USING (item) JOIN starts USING (domain)""")
    connection.unregister("starts")
    histogram = connection.execute("""SELECT domain, length, count(*) FROM
        (SELECT domain, count(*) AS length FROM events JOIN vocabulary USING (item) GROUP BY "user", domain)
        GROUP BY ALL ORDER BY domain, length""").fetchall()
    domains = []
    for number, (name, items) in enumerate(counts):
        lengths, users = np.array([row[1:] for row in histogram if row[0] == number], dtype=np.int64).T
        domains.append(
            Domain(
                name=name,
                start=starts[number],
                items=items,
                room=rooms[number],
                users=int(users.sum()),
                interactions=int(users @ lengths),
                length_percentiles=percentiles(lengths, users),
                vocabulary=f"vocabulary/{number}.parquet",
            )
        )
    return domains


def percentiles(lengths, users) -> dict[str, int]:
    """p5, p50, p95 and max of lengths (rising) that so many users have: the least length that enough users do not exceed."""
    share = np.cumsum(users) / users.sum()
    return {name: int(lengths[np.searchsorted(share, q)]) for name, q in PERCENTILES.items()}


def _write_shards(folder, config, lengths, stream, held_out, advance):
    """Cuts the stream of rows into shards, and counts in `held_out` (by row) what validation and test keep from training."""
    users = len(lengths)
    streams = min(config.streams, users)
    count = streams * -(-users // (streams * config.shard_users))
    take = _cut(stream)
    shards = []

    def blocks(first, last):
        for start in range(first, last, config.block_users):
            numbers = np.arange(start, min(start + config.block_users, last))
            rows = take(int(lengths[numbers].sum()))
            ends = np.cumsum(lengths[numbers])[lengths[numbers] >= SPLIT_LENGTH]
            for back in (1, 2):
                np.add.at(held_out, rows[ends - back], 1)
            advance(len(rows))
            yield Block(numbers, lengths[numbers].astype(np.int32), rows)

    for number in range(count):
        first, last = number * users // count, (number + 1) * users // count
        name = f"shards/{number:06d}.tar"
        size, sha256 = write_shard(folder / name, blocks(first, last))
        shards.append(Shard(name, last - first, first, int(lengths[first:last].sum()), size, sha256))
    if any(len(batch) for batch in stream):  # reading to the end also frees the connection for the next query
        raise AssertionError("the sorted stream holds more rows than the users' lengths add up to")
    return shards


def _cut(stream):
    """A function that takes the next n values of a stream of one-column batches."""
    rest = np.empty(0, dtype=np.int32)

    def take(count):
        nonlocal rest
        parts, have = [rest], len(rest)
        while have < count:
            parts.append(stream.read_next_batch().column(0).to_numpy())
            have += len(parts[-1])
        values = np.concatenate(parts)
        rest = values[count:]
        return values[:count]

    return take


def _write_vocabularies(connection, folder, domains, held_out):
    for number, domain in enumerate(domains):
        items = connection.sql(f"SELECT item_id, row, total FROM vocabulary WHERE domain = {number} ORDER BY row")
        _write_parquet(folder / domain.vocabulary, items.to_arrow_reader(), held_out)


def _write_parquet(path, reader, held_out=None):
    """Writes a stream in row groups of one size, so that the bytes do not depend on how it was batched."""
    with pq.ParquetWriter(path, _schema(reader.schema)) as writer:
        waiting = []
        for batch in itertools.chain(reader, [None]):
            if batch is not None:
                waiting.append(batch)
            table = pa.Table.from_batches(waiting, schema=reader.schema)
            whole = len(table) if batch is None else len(table) // _PARQUET_ROWS * _PARQUET_ROWS
            for start in range(0, whole, _PARQUET_ROWS):
                part = table.slice(start, min(_PARQUET_ROWS, whole - start))
                if held_out is not None:
                    count = part["total"].to_numpy() - held_out[part["row"].to_numpy()]
                    part = part.set_column(2, "count", pa.array(count, pa.int64()))
                writer.write_table(part.combine_chunks().cast(writer.schema))
            waiting = table.slice(whole).to_batches()


def _schema(schema):
    return pa.schema([("count" if field.name == "total" else field.name, field.type) for field in schema])


def _escape(path):
    return str(path).replace("'", "''")


def _set_memory(connection, memory):
    try:
        connection.execute(f"SET memory_limit = '{_escape(memory)}'")
    except duckdb.Error as error:
        raise InputError(f"memory {memory!r} is no amount like 8GB: {reason(error)}") from None


class _Stages(Progress):
    """A line for each stage on stderr while it runs, with the time left where DuckDB or the stage knows it.

    Nothing is shown where stderr is no terminal, nor left behind where it is one.
    """

    def __init__(self, connection):
        self._connection = connection
        self._query = None
        console = Console(stderr=True)
        super().__init__(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4,
        )  # fmt: skip

    def get_renderables(self):
        if self._query is not None:
            percent = self._connection.query_progress()
            if percent > 0:
                self.update(self._query, total=100, completed=percent)
        return super().get_renderables()

    @contextmanager
    def __call__(self, description, total=None):
        task = self.add_task(description, total=total)
        self._query = task if total is None else None
        try:
            yield lambda done: self.advance(task, done)
        finally:
            self._query = None
            self.update(task, total=1, completed=1)
