"""The cut of a dataset into shards and parts, one part's shards from its sorted events, and the dataset from all parts.

Users are numbered by a hash of their ids, so a range of numbers is a random part of them: a part is the users of some
consecutive shards, and can be made, or made again, without the others. What is in a shard does not depend on the parts.
Whatever sorts the events (DuckDB here, a Spark cluster in `spark.py`) hands them to the same functions.
"""

import dataclasses
import glob
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.format.dataset import (
    LENGTHS,
    LENGTHS_DTYPE,
    SPLIT_LENGTH,
    USERS,
    Dataset,
    Domain,
    File,
    Shard,
    ticks_of,
)
from trainer.data.format.shards import Block, write_shard
from trainer.errors import InputError

PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
INT32_MAX = 2**31 - 1
HASH_DIGITS = (
    15  # hexadecimal digits of an MD5: 60 bits, which every engine's BIGINT holds
)
_PARQUET_ROWS = 1 << 17
_BLOCK_INTERACTIONS = (
    1 << 17
)  # a block of mean histories is not larger: a reader holds one a stream


@dataclass(frozen=True)
class Ids:
    """What numbering the users and items found: U users 0 … U − 1, N interactions, and by domain how many items and rows of M;
    the first and the last time of the logs.

    Beside these facts lie, as Parquet files in the folders `users` and `items`: user_id, "user" (the number); and domain
    (its number), name, item_id, item (0, 1, … by domain and text of the id), total (interactions), row (of M).
    """

    users: int
    interactions: int
    names: tuple[str, ...]
    items: tuple[int, ...]
    rooms: tuple[int, ...]
    first_time: float
    last_time: float

    @property
    def starts(self):
        """First row of each domain, and behind them the number of rows."""
        return [0, *itertools.accumulate(self.rooms)]

    def check(self):
        """Raises InputError where they cannot be a dataset."""
        for name, items in zip(self.names, self.items, strict=True):
            if items < 2:
                raise InputError(
                    f"domain {name!r} has one item: there is no other to tell it from (negatives are impossible); leave it out"
                )
        refuse_beyond_int32(self.starts[-1], "rows of the item matrix")

    def save(self, folder: Path):
        """Writes `facts.json` into the folder."""
        _write_json(folder / "facts.json", dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Ids":
        """Reads what `save` wrote."""
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        return cls(
            **facts | {name: tuple(facts[name]) for name in ("names", "items", "rooms")}
        )


def room_of(items) -> int:
    """Rows of M kept for a domain of so many items: a tenth more, 64 at least."""
    return items + max(64, items // 10)


def refuse_beyond_int32(count, what):
    """Raises InputError where so many cannot be numbered."""
    if count > INT32_MAX:
        raise InputError(
            f"{count:,} {what} are more than int32 can number ({INT32_MAX:,}): drop rare ones with --min-item"
        )


@dataclass(frozen=True)
class Layout:
    """Which users are in which shard and part: shard k has the users [k · users // shards, (k + 1) · users // shards)."""

    users: int
    streams: int
    shards: int
    block_users: int
    parts: int

    @classmethod
    def of(
        cls, ids: Ids, streams, shard_users, block_users, part_interactions
    ) -> "Layout":
        """Shards of `shard_users` at most, a multiple of `streams` (fewer where there are fewer users) of them; blocks of
        `block_users` at most, fewer where histories are long; parts of about `part_interactions`, one shard at least."""
        streams = min(streams, ids.users)
        shards = streams * -(-ids.users // (streams * shard_users))
        fitting = _BLOCK_INTERACTIONS * ids.users // ids.interactions
        parts = min(shards, -(-ids.interactions // part_interactions))
        return cls(ids.users, streams, shards, max(1, min(block_users, fitting)), parts)

    def first_user(self, shard):
        """First user of a shard, or for `shards` the number of users."""
        return shard * self.users // self.shards

    def shards_of(self, part):
        """The shards of a part, a range."""
        return range(
            *(-(-number * self.shards // self.parts) for number in (part, part + 1))
        )

    def users_of(self, part):
        """The users of a part, a range."""
        shards = self.shards_of(part)
        return range(self.first_user(shards.start), self.first_user(shards.stop))

    def part_sql(self, number, divide):
        """SQL: the part of the user `number`. divide: the engine's whole division, `//` or `div`."""
        return f"((({number} + 1) * {self.shards} - 1) {divide} {self.users}) * {self.parts} {divide} {self.shards}"


def write_part(
    folder: Path, ids: Ids, layout: Layout, part, number_N, rows_N, time_N, advance=None
):
    """Writes a part's shards into `folder`/shards, and beside them what the dataset has to know of them.

    number_N: user numbers, rising; rows_N: rows of M, int32, each user's oldest first: all events of the part's users; time_N:
    their times, in the logs' unit.
    advance(n): called as n interactions have been written.
    """
    users = layout.users_of(part)
    starts, ticks_N = (
        np.array(ids.starts),
        ticks_of(time_N, ids.first_time, ids.last_time),
    )
    lengths = np.bincount(number_N - users.start, minlength=len(users))
    if len(lengths) != len(users) or not lengths.all():
        raise AssertionError(f"part {part} has not the events of its users {users}")
    ends = np.cumsum(lengths)
    offsets = np.concatenate([[0], ends])
    splits = lengths >= SPLIT_LENGTH
    held = np.concatenate([rows_N[ends[splits] - back] for back in (1, 2)])

    domains = len(ids.names)
    own_N = (number_N - users.start) * domains + (
        np.searchsorted(starts, rows_N, side="right") - 1
    )
    counts_UD = np.bincount(own_N, minlength=len(users) * domains).reshape(
        len(users), domains
    )
    domain = [
        np.searchsorted(starts, rows_N[ends[splits] - back], side="right") - 1
        for back in (1, 2)
    ]
    training_UD = counts_UD.copy()
    for column in domain:
        training_UD[np.flatnonzero(splits), column] -= 1
    np.save(
        folder / LENGTHS,
        np.minimum(training_UD, np.iinfo(LENGTHS_DTYPE).max).astype(LENGTHS_DTYPE),
    )
    np.save(folder / "held.npy", np.stack(np.unique(held, return_counts=True)))
    histograms = [
        np.unique(column[column > 0], return_counts=True) for column in counts_UD.T
    ]
    np.save(folder / "histograms.npy", np.array([
        (number, length, count)
        for number, histogram in enumerate(histograms)
        for length, count in zip(*map(np.ndarray.tolist, histogram), strict=True)
    ], np.int64).reshape(-1, 3))  # fmt: skip

    def blocks(first, last):
        for begin in range(first, last, layout.block_users):
            own = slice(
                begin - users.start, min(begin + layout.block_users, last) - users.start
            )
            events = slice(offsets[own.start], offsets[own.stop])
            if advance is not None:
                advance(events.stop - events.start)
            yield Block(lengths[own].astype(np.int32), rows_N[events], ticks_N[events])

    (folder / "shards").mkdir()
    shards = []
    for number in layout.shards_of(part):
        first, last = layout.first_user(number), layout.first_user(number + 1)
        name = f"shards/{number:06d}.tar"
        size, sha256 = write_shard(
            folder / name, first, int(starts[-1]), blocks(first, last)
        )
        interactions = int(offsets[last - users.start] - offsets[first - users.start])
        shards.append(
            dataclasses.asdict(
                Shard(name, last - first, first, interactions, size, sha256)
            )
        )
    _write_json(folder / "facts.json", {
        "shards": shards,
        "too_short": int((~splits).sum()),
        "max_length": int(lengths.max()),
    })  # fmt: skip


def assemble(
    folder: Path,
    ids_folder: Path,
    part_folders,
    layout: Layout,
    seed,
    connection: duckdb.DuckDBPyConnection,
):
    """Makes the dataset in `folder` out of the numbered ids and the finished parts, whose shards it takes. May be called
    again after it was interrupted."""
    ids = Ids.load(ids_folder)
    facts = [
        json.loads((part / "facts.json").read_text(encoding="utf-8"))
        for part in part_folders
    ]
    histograms = np.concatenate(
        [np.load(part / "histograms.npy") for part in part_folders]
    )
    held = np.zeros(ids.starts[-1], np.int64)
    for part in part_folders:
        rows, counts = np.load(part / "held.npy")
        held[rows] += counts
    (folder / "vocabulary").mkdir(exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    domains = []
    items = scan(ids_folder / "items")
    for number, (name, count) in enumerate(zip(ids.names, ids.items, strict=True)):
        found = connection.sql(
            f"SELECT item_id, row::BIGINT AS row, total FROM {items} WHERE domain = {number} ORDER BY row"
        )
        vocabulary = f"vocabulary/{number}.parquet"
        _write_parquet(folder / vocabulary, found.to_arrow_reader(), held)
        lengths, users = _sum_by(*histograms[histograms[:, 0] == number, 1:].T)
        domains.append(
            Domain(
                name=name,
                start=ids.starts[number],
                items=count,
                room=ids.rooms[number],
                users=int(users.sum()),
                interactions=int(users @ lengths),
                length_percentiles=percentiles(lengths, users),
                vocabulary=vocabulary,
            )
        )
    users = connection.sql(
        f"""SELECT user_id, "user"::BIGINT AS "user" FROM {scan(ids_folder / "users")} ORDER BY "user" """
    )
    _write_parquet(folder / USERS, users.to_arrow_reader())
    _join_lengths(folder / LENGTHS, part_folders, (ids.users, len(domains)))
    for part, fact in zip(part_folders, facts, strict=True):
        for shard in fact["shards"]:
            if (
                part / shard["name"]
            ).exists():  # else it was taken before the interruption
                (part / shard["name"]).rename(folder / shard["name"])
    dataset = Dataset(
        folder=folder,
        seed=seed,
        users=ids.users,
        interactions=ids.interactions,
        too_short=sum(fact["too_short"] for fact in facts),
        max_length=max(fact["max_length"] for fact in facts),
        first_time=ids.first_time,
        last_time=ids.last_time,
        block_users=layout.block_users,
        streams=layout.streams,
        domains=tuple(domains),
        shards=tuple(Shard(**shard) for fact in facts for shard in fact["shards"]),
        files=tuple(
            File.of(folder, name)
            for name in (USERS, LENGTHS, *(domain.vocabulary for domain in domains))
        ),
    )
    dataset.save()
    return dataset


def percentiles(lengths, users) -> dict[str, int]:
    """p5, p50, p95 and max of lengths (rising) that so many users have: the least length that enough users do not exceed; 0
    where nobody has any."""
    if not len(users):
        return dict.fromkeys(PERCENTILES, 0)
    share = np.cumsum(users) / users.sum()
    return {
        name: int(lengths[np.searchsorted(share, q)]) for name, q in PERCENTILES.items()
    }


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB that fetches and loads no extension, whatever a file holds or is called."""
    off = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    return duckdb.connect(":memory:", config=off)


def escape(path):
    """A path inside an SQL literal."""
    return str(path).replace("'", "''")


def scan(folder):
    """SQL: the rows of all Parquet files in a folder, whatever its name."""
    return f"read_parquet('{escape(glob.escape(str(folder)))}/*.parquet', hive_partitioning=false)"


def _sum_by(keys, counts):
    """Rising keys, each once, and the sums of their counts."""
    found, index = np.unique(keys, return_inverse=True)
    return found, np.bincount(index, weights=counts, minlength=len(found)).astype(
        np.int64
    )


def _join_lengths(path, part_folders, shape):
    with open(path, "wb") as stream:
        header = {
            "descr": np.lib.format.dtype_to_descr(LENGTHS_DTYPE),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(stream, header)
        for part in part_folders:
            np.load(part / LENGTHS).tofile(stream)


def _write_parquet(path, reader, held_out=None):
    """Writes a stream in row groups of one size, so that the bytes do not depend on how it was batched."""
    with pq.ParquetWriter(path, _schema(reader.schema)) as writer:
        waiting = []
        for batch in itertools.chain(reader, [None]):
            if batch is not None:
                waiting.append(batch)
            table = pa.Table.from_batches(waiting, schema=reader.schema)
            whole = (
                len(table)
                if batch is None
                else len(table) // _PARQUET_ROWS * _PARQUET_ROWS
            )
            for start in range(0, whole, _PARQUET_ROWS):
                part = table.slice(start, min(_PARQUET_ROWS, whole - start))
                if held_out is not None:
                    count = part["total"].to_numpy() - held_out[part["row"].to_numpy()]
                    part = part.set_column(2, "count", pa.array(count, pa.int64()))
                writer.write_table(part.combine_chunks().cast(writer.schema))
            waiting = table.slice(whole).to_batches()


def _schema(schema):
    return pa.schema(
        [
            ("count" if field.name == "total" else field.name, field.type)
            for field in schema
        ]
    )


def _write_json(path, facts):
    path.write_text(
        json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
