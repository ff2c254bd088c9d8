"""From interaction logs to a dataset folder, in stages that each leave files: a killed preparation goes on from them.

    log      where it is kept: old and new rows as one log    see extend.py
    ids      users and items are numbered                     one pass over the logs, DuckDB, out of core
    events   user, item and time of every event by part       one more pass, DuckDB
    rows     the row of M of every item                        one array, mapped by all processes
    parts    each part sorted and cut into shards             a process a part, several at once
    dataset  vocabularies, users, lengths, dataset.json

The same logs give the same bytes whatever their format, their order, the memory and the number of processes: users are
numbered by (MD5 of seed and id, text of the id), items by (domain, text of the id), and a user's events go by time, domain and
item id. `memory` bounds all processes together; beside it some 10 bytes a user and 20 a row of the item matrix are held, once.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import re
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np

from trainer.data.format.dataset import FORMAT_VERSION, Dataset
from trainer.data.prepare.extend import (
    EXTENSION,
    LOG,
    add_known_items,
    keep_log,
    open_kept,
    order_of,
    place_items,
    rooms_of,
    take_log,
    to_extend,
    write_extension,
)
from trainer.data.prepare.logs import find_files, open_log, reason
from trainer.data.prepare.shard_writing import (
    HASH_DIGITS,
    Ids,
    Layout,
    assemble,
    connect,
    escape,
    refuse_beyond_int32,
    room_of,
    scan,
    write_part,
)
from trainer.errors import InputError
from trainer.files.atomic import move_folder
from trainer.files.progress import Stages
from trainer.files.staged import Work, finished_whole

_UNITS = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_LEAST_MEMORY = 500 * 10**6
_FIRST_PROCESS, _NEXT_PROCESS = (
    200 * 10**6,
    130 * 10**6,
)  # what Python, its libraries and what they keep take
_WORTH_A_PROCESS = 250 * 10**6
_ENGINE_SHARE = (
    0.6  # of the rest: DuckDB goes beyond its limit for a while, and NumPy needs some
)
_ROWS, _ROW_OF = "rows", "row_of.npy"  # a stage, and the file that it leaves
_EVENT_BYTES = 96  # what sorting and cutting a part take for each of its events


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how. `domain` names the one domain of logs without a domain column; `min_user` and `min_item`
    drop users and items with fewer interactions, again and again until none is left to drop.

    extend: the folder of a dataset onto which these logs come; its items keep their rows of M where they can. keep_log: the
    dataset keeps its log, so that it can be extended. whole_log: these logs are all that count, in place of the one that was
    kept. since, days: the window of time that counts, from a time or so many days before the newest row; time_unit: of times
    that are numbers. retire: items without an event in the window lose their row."""

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
    extend: str | None = None
    keep_log: bool = False
    whole_log: bool = False
    since: str | None = None
    days: float | None = None
    time_unit: str | None = None
    retire: bool = False
    memory: str = "8GB"  # of all processes together
    processes: int = 0  # 0: as many as this process may use cores

    def __post_init__(self):
        # Two users a shard at least: with one, a multiple of `streams` shards could leave some empty.
        least = {
            "min_user": 0,
            "min_item": 0,
            "seed": 0,
            "streams": 1,
            "shard_users": 2,
            "block_users": 1,
            "processes": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(
                    f"{name} is {getattr(self, name)}: it must be at least {bound}"
                )
        if self.domain == "":
            raise InputError(
                "domain is empty: give the one domain of these logs a name"
            )
        for name in ("whole_log", "retire"):
            if getattr(self, name) and self.extend is None:
                raise InputError(
                    f"{name} is for a dataset that is extended: give --extend, or leave it out"
                )
        if self.since is not None and self.days is not None:
            raise InputError(
                "since and days are both given: one of them says where the window begins"
            )
        if self.days is not None and not 0 < self.days < float("inf"):
            raise InputError(f"days is {self.days}: it must be more than 0")
        memory_bytes(self.memory)

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return memory_bytes(self.memory)

    @property
    def columns(self) -> dict[str, str]:
        """The columns' names by role."""
        return {
            role: getattr(self, f"{role}_column")
            for role in ("user", "item", "domain", "time")
        }


def memory_bytes(text) -> int:
    """An amount like 8GB or 500MiB in bytes. Raises InputError where it is none, or too little to read logs with."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] not in _UNITS:
        raise InputError(f"memory {text!r} is no amount like 8GB")
    amount = int(float(found[1]) * _UNITS[found[2]])
    if amount < _LEAST_MEMORY:
        raise InputError(
            f"memory {text} is too little: give {_LEAST_MEMORY // 10**6}MB or more with --memory"
        )
    return amount


def prepare(config: PrepareConfig, fresh=False) -> Dataset:
    """Reads the logs and writes the dataset folder `config.output`, all of it or nothing.

    Where an earlier call with the same logs and options was killed, it goes on from the stages and parts that were finished;
    fresh: begins anew. Raises InputError for whatever is wrong with the logs, the output folder, the memory or the disk.
    """
    files, old = (
        find_files(config.inputs),
        None if config.extend is None else to_extend(config.extend, config.whole_log),
    )
    made_from = facts(config, map(file_facts, files)) | {
        "extended": old and old.fingerprint
    }
    with Work(config.output, made_from, fresh) as work, Stages() as stages:
        if work.begun_anew:
            print(
                f"{work.folder}: was made from other logs or options; begins anew",
                file=sys.stderr,
            )
        try:
            dataset = _Preparation(config, files, old, work, stages).run()
        except InputError:  # of the logs: it would be met again
            work.discard()
            raise
        except duckdb.OutOfMemoryException as error:
            raise InputError(
                f"memory {config.memory} is too little: give more with --memory ({reason(error)})"
            ) from None
        except (duckdb.IOException, OSError) as error:
            raise InputError(
                f"{work.folder} cannot be written: {reason(error)}: make room, and the same command goes on"
            ) from None
        except BrokenProcessPool:
            raise InputError(
                "a process that writes shards was killed, perhaps for want of memory: give less with --memory or --processes; "
                "the same command goes on"
            ) from None
        work.deliver("dataset")
    return dataclasses.replace(dataset, folder=Path(config.output))


def file_facts(file: Path):
    """What tells one state of a file from another."""
    return [str(file), file.stat().st_size, file.stat().st_mtime_ns]


def facts(config: PrepareConfig, files, libraries=("duckdb", "pyarrow")):
    """What the stages depend on: the options, the files, the libraries whose versions shape what a stage leaves."""
    options = dataclasses.asdict(config)
    for name in ("inputs", "output", "memory", "processes"):
        del options[name]
    return {
        "options": options,
        "files": list(files),
        "format_version": FORMAT_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
    }


class _Preparation:
    """The stages of one call of `prepare`."""

    def __init__(self, config, files, old, work, stages):
        self.config, self.files, self.old, self.work, self.stages = (
            config,
            files,
            old,
            work,
            stages,
        )
        self.threads = config.processes or len(os.sched_getaffinity(0))
        self.memory = config.memory_bytes - _FIRST_PROCESS
        # The first process waits where others make the parts, and makes them itself where there is room for one alone.
        self.processes = min(self.threads, self.memory // _WORTH_A_PROCESS)
        self.part_memory = (
            self.memory
            if self.processes < 2
            else self.memory // self.processes - _NEXT_PROCESS
        )

    def run(self):
        config, work = self.config, self.work
        ids = work.path("ids")
        with engine(work.scratch, self.memory, self.threads, self.stages) as connection:
            if not (work.done("ids") and work.done("events")):
                with self.stages("reading the logs"):
                    self._open_log(connection)
            if not work.done("ids"):
                with work.stage("ids") as folder:
                    number_ids(connection, config, folder, self.stages, self.old)
            layout = self._layout(Ids.load(ids))
            if not work.done("events"):
                with work.stage("events") as folder, self.stages("dividing the events"):
                    _divide(connection, ids, layout, folder)
            if not work.done(_ROWS):
                with work.stage(_ROWS) as folder:
                    _write_rows(connection, ids, folder)
        self._write_parts(layout)
        with (
            engine(work.scratch, self.memory, self.threads, self.stages) as connection,
            self.stages("writing vocabularies"),
        ):
            return join_parts(work, layout, config.seed, connection, self._finish)

    def _open_log(self, connection):
        """Makes the view `log`."""
        config, work = self.config, self.work
        if not (config.keep_log or self.old or config.since or config.days):
            open_log(connection, self.files, config.columns, config.domain)
            return
        if not work.done(LOG):
            with work.stage(LOG) as folder:
                keep_log(connection, config, self.files, self.old, folder)
        open_kept(connection, work.path(LOG), self.old)

    def _finish(self, connection, folder, dataset):
        """What an assembled dataset has beside its files. May be called again."""
        log = self.work.path(LOG)
        if self.config.keep_log or (self.old and not self.config.whole_log):
            take_log(log, folder / LOG)
        if self.old:
            open_kept(connection, log, self.old)
            write_extension(
                connection,
                self.old,
                self.work.path("ids"),
                log,
                folder / EXTENSION,
                dataset,
            )

    def _layout(self, ids):
        """The cut that the events on disk have, or the one that suits the memory."""
        config, kept = self.config, self.work.path("events") / "parts"
        size = max(1, int(self.part_memory * _ENGINE_SHARE) // _EVENT_BYTES)
        layout = Layout.of(
            ids, config.streams, config.shard_users, config.block_users, size
        )
        return (
            dataclasses.replace(layout, parts=int(kept.read_text()))
            if kept.is_file()
            else layout
        )

    def _write_parts(self, layout):
        missing = [
            part
            for part in range(layout.parts)
            if not self.work.done(f"parts/{part:05d}")
        ]
        jobs = [(self.work.folder, layout, part, self.part_memory) for part in missing]
        total = sum(len(layout.users_of(part)) for part in missing)
        with self.stages("sorting, writing shards", total=total) as advance:
            if len(jobs) < 2 or self.processes < 2:
                for job in jobs:
                    _make_part(*job)
                    advance(len(layout.users_of(job[2])))
                return
            with _pool(min(self.processes, len(jobs))) as pool:
                waiting = {pool.submit(_make_part, *job): job[2] for job in jobs}
                for finished in concurrent.futures.as_completed(waiting):
                    finished.result()
                    advance(len(layout.users_of(waiting[finished])))


@contextlib.contextmanager
def _pool(processes):
    """Processes that share nothing with this one, and begin nothing more once one of them has failed."""
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn")
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def number_ids(connection, config, folder, stages, old=None):
    """Writes the numbered users and items of the view `log` (see `Ids`) into `folder`. old: the Dataset that is extended."""
    with stages("numbering users and items"):
        connection.execute(
            "CREATE TABLE found_users AS SELECT DISTINCT user_id FROM log"
        )
        connection.execute(
            "CREATE TABLE found_items AS SELECT domain, item_id, count(*) AS total FROM log GROUP BY ALL"
        )
    if config.min_user > 1 or config.min_item > 1:
        with stages("dropping rare users and items"):
            _drop_rare(connection, config.min_user, config.min_item)
    if old is not None:
        with stages("finding known items"):
            add_known_items(connection, old, config.retire)
            place_items(connection, old)
    for table in ("users", "items"):
        refuse_beyond_int32(
            _one(connection, f"SELECT count(*) FROM found_{table}"), table
        )
    with stages("numbering users and items"):
        key = f"('0x' || substr(md5('{config.seed}:' || user_id), 1, {HASH_DIGITS}))::BIGINT"
        connection.execute(f"""CREATE TABLE users AS
            SELECT user_id, row_number() OVER (ORDER BY key, text) - 1 AS "user"
            FROM (SELECT user_id, {key} AS key, user_id::VARCHAR AS text FROM found_users)""")
        count_of = dict(
            connection.execute(
                "SELECT domain, count(*) FROM found_items GROUP BY ALL ORDER BY ALL"
            ).fetchall()
        )
        names = list(count_of) if old is None else order_of(old, count_of)
        items = [count_of.get(name, 0) for name in names]
        ids = Ids(
            users=_one(connection, "SELECT count(*) FROM users"),
            interactions=_one(connection, "SELECT sum(total)::BIGINT FROM found_items"),
            names=tuple(names),
            items=tuple(items),
            rooms=tuple(map(room_of, items) if old is None else rooms_of(old, items)),
            first_time=float(_one(connection, 'SELECT min("time") FROM log')),
            last_time=float(_one(connection, 'SELECT max("time") FROM log')),
        )
        ids.check()
        starts = ", ".join(f"({number}, '{escape(name)}', {start})" for number, (name, start) in enumerate(
            zip(names, ids.starts[:-1], strict=True)))  # fmt: skip
        if old is None:
            connection.execute("""CREATE TABLE places AS SELECT domain, item_id,
                row_number() OVER (PARTITION BY domain ORDER BY total DESC, item_id::VARCHAR) - 1 AS place FROM found_items""")
        connection.execute(f"""CREATE TABLE items AS
            SELECT d.number AS domain, domain AS name, item_id, total,
                row_number() OVER (ORDER BY domain, item_id::VARCHAR) - 1 AS item, first + place AS row
            FROM found_items JOIN places USING (domain, item_id)
            JOIN (VALUES {starts}) d (number, name, first) ON domain = d.name""")
        for table in ("users", "items"):
            (folder / table).mkdir()
            connection.execute(
                f"COPY {table} TO '{escape(folder / table)}/0.parquet' (FORMAT parquet)"
            )
            connection.execute(f"DROP TABLE {table}; DROP TABLE found_{table}")
        ids.save(folder)


def _one(connection, query):
    ((value,),) = connection.execute(query).fetchall()
    return value


def _drop_rare(connection, min_user, min_item):
    """Leaves in `found_users` and `found_items` those that stay when events are dropped until every user left has `min_user`
    and every item left `min_item` interactions: the k-core."""
    connection.execute("""CREATE TABLE pairs AS SELECT u.rowid AS "user", i.rowid AS item
        FROM log JOIN found_users u USING (user_id) JOIN found_items i USING (domain, item_id)""")
    dropped = 1
    while dropped:
        dropped = 0
        for column, least in (("item", min_item), ("user", min_user)):
            rare = f'SELECT "{column}" FROM pairs GROUP BY "{column}" HAVING count(*) < {least}'
            dropped += _one(
                connection, f'DELETE FROM pairs WHERE "{column}" IN ({rare})'
            )
    if not _one(connection, "SELECT count(*) FROM pairs"):
        raise InputError(
            f"nothing is left with --min-user {min_user} --min-item {min_item}: lower them"
        )
    connection.execute("""
        CREATE OR REPLACE TABLE found_users AS
            SELECT user_id FROM found_users WHERE rowid IN (SELECT "user" FROM pairs);
        CREATE OR REPLACE TABLE found_items AS
            SELECT domain, item_id, kept.total FROM found_items JOIN
            (SELECT item, count(*) AS total FROM pairs GROUP BY item) kept ON found_items.rowid = kept.item;
        DROP TABLE pairs""")


def _divide(connection, ids_folder, layout, folder):
    """Writes the events that have a numbered user and item: user, item, time, in a folder a part."""
    connection.execute(f"""
        CREATE TABLE users AS SELECT user_id, "user"::INTEGER AS "user", ({layout.part_sql('"user"', "//")})::INTEGER AS part
            FROM {scan(ids_folder / "users")};
        CREATE TABLE items AS SELECT name AS domain, item_id, item::INTEGER AS item FROM {scan(ids_folder / "items")}""")
    connection.execute(f"""COPY (SELECT "user", item, "time", part
        FROM log JOIN users USING (user_id) JOIN items USING (domain, item_id))
        TO '{escape(folder)}' (FORMAT parquet, PARTITION_BY (part), OVERWRITE_OR_IGNORE, COMPRESSION lz4)""")
    (folder / "parts").write_text(str(layout.parts))


def _write_rows(connection, ids_folder, folder):
    """Writes the row of M of each item, by its number, as one array that all processes map: no copy of it each."""
    items = sum(Ids.load(ids_folder).items)
    row_of = np.lib.format.open_memmap(
        folder / _ROW_OF, mode="w+", dtype=np.int32, shape=(items,)
    )
    for batch in connection.sql(
        f"SELECT item, row FROM {scan(ids_folder / 'items')}"
    ).to_arrow_reader():
        row_of[batch["item"].to_numpy()] = batch["row"].to_numpy()
    row_of.flush()


def _make_part(work_folder: Path, layout: Layout, part, memory):
    """Sorts one part's events and writes its shards, all of them or none. Runs in a process of its own."""
    ids_folder, target = work_folder / "ids", work_folder / "parts" / f"{part:05d}"
    ids = Ids.load(ids_folder)
    scratch = work_folder / "scratch" / f"part-{part:05d}"
    scratch.mkdir()
    with finished_whole(target) as folder:
        with engine(scratch, memory, 1) as connection:
            connection.execute("SET preserve_insertion_order = true")
            row_of = np.load(
                work_folder / _ROWS / _ROW_OF, mmap_mode="r", allow_pickle=False
            )
            events = scan(work_folder / "events" / f"part={part}")
            number_N = np.empty(
                _one(connection, f"SELECT count(*) FROM {events}"), np.int32
            )
            rows_N, time_N = (
                np.empty_like(number_N),
                np.empty(len(number_N), np.float64),
            )
            place = 0
            ordered = f'SELECT "user", item, "time" FROM {events} ORDER BY "user", "time", item'
            for batch in connection.sql(ordered).to_arrow_reader():
                own = slice(place, place := place + len(batch))
                number_N[own], rows_N[own] = (
                    batch["user"].to_numpy(),
                    row_of[batch["item"].to_numpy()],
                )
                time_N[own] = batch["time"].to_numpy()
        write_part(folder, ids, layout, part, number_N, rows_N, time_N)
    shutil.rmtree(scratch)


def join_parts(work: Work, layout: Layout, seed, connection, finish=None) -> Dataset:
    """Makes the dataset of the finished parts: the stage `dataset`. finish(connection, folder, dataset): adds to it."""
    folder = work.path("dataset.partial")
    folder.mkdir(exist_ok=True)
    parts = [work.path(f"parts/{part:05d}") for part in range(layout.parts)]
    dataset = assemble(folder, work.path("ids"), parts, layout, seed, connection)
    if finish is not None:
        finish(connection, folder, dataset)
    move_folder(folder, work.path("dataset"))
    return dataset


@contextlib.contextmanager
def engine(scratch, memory, threads, stages=None):
    """A DuckDB connection that keeps within `memory` bytes together with what is made of its results."""
    with connect() as connection:
        connection.execute(f"""
            SET temp_directory = '{escape(scratch)}'; SET memory_limit = '{int(memory * _ENGINE_SHARE)}B';
            SET threads = {threads}; SET preserve_insertion_order = false;
            SET enable_progress_bar = true; SET enable_progress_bar_print = false""")
        if stages is not None:
            stages.connection = connection
        yield connection
        if stages is not None:
            stages.connection = None
