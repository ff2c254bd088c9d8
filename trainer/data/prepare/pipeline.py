"""From interaction logs to a dataset folder, in stages that each leave files.

A preparation that is killed goes on from them:

    log      the log that the dataset keeps, old and new rows see stored_log.py
    ids      users and items are numbered                     one pass over the logs, DuckDB,
                                                              see numbering.py
    events   user, item and time of every event by part       one more pass, DuckDB
    rows     rows of M, and keys of users and items           arrays, mapped by all processes
    parts    each part sorted and cut into shards             a process a part, several at once
    dataset  vocabularies, users, lengths, dataset.json       see assembly.py

The same logs give the same bytes whatever their format, their order, the memory and the number
of
processes: users are numbered by (MD5 of seed and id, text of the id), items by (domain, text of
the id), and a user's events go by time, equal times as `--tie-order` says, see tie_order.py.

`memory` bounds all processes together. Besides, some 20 bytes a user and 30 a row of the item
matrix are held, once.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from duckdb import DuckDBPyConnection

from trainer.child_processes import set_up_worker
from trainer.config.prepare import PrepareConfig
from trainer.data import duckdb_engine
from trainer.data.duckdb_engine import (
    escape_sql,
    open_engine,
    parquet_folder_sql,
    query_value,
)
from trainer.data.format.dataset import FORMAT_VERSION, Dataset
from trainer.data.logs.duckdb_groups import summarize_error
from trainer.data.logs.duckdb_logs import open_log
from trainer.data.logs.files import LogFile, find_logs
from trainer.data.logs.reading import Reading
from trainer.data.prepare.assembly import assemble
from trainer.data.prepare.extend import (
    load_extendable,
    write_extension,
)
from trainer.data.prepare.ids import Ids
from trainer.data.prepare.layout import Layout
from trainer.data.prepare.left_out import keep_records
from trainer.data.prepare.numbering import number_ids
from trainer.data.prepare.shard_writing import write_part
from trainer.data.prepare.stored_log import (
    LOG,
    link_log,
    open_stored_log,
    store_log,
)
from trainer.data.tie_order import FILE, HASH, break_ties
from trainer.errors import InputError
from trainer.files.atomic import move_folder
from trainer.files.progress import Stages
from trainer.files.staged import StagedOutput, staged_folder
from trainer.run_files import EXTENSION

# Bytes that Python, its libraries and what they keep take: of this process, and of each further
# one.
_FIRST_PROCESS = 200 * 10**6
_NEXT_PROCESS = 130 * 10**6
_WORTH_A_PROCESS = 250 * 10**6
_EVENT_BYTES = 96  # what sorting and cutting a part take for each of its events
DATASET = "dataset"  # the last stage
READING = "reading"  # a stage: what became of the logs' rows
_ROWS = "rows"  # a stage, and the file that it leaves
_ROW_OF_ITEM = "row_of.npy"
_USER_KEYS = "user_keys.npy"
_ROW_KEYS = "row_keys.npy"

_MANY_TIES = 0.1  # of the users that are split

Finish = Callable[[DuckDBPyConnection, Path, Dataset], None]


def prepare(config: PrepareConfig, fresh: bool = False) -> Dataset:
    """Reads the logs and writes the dataset folder `config.output`, all of it or nothing.

    Where an earlier call with the same logs and options was killed, it goes on from the stages
    and parts that were finished. fresh: begins anew.
    Raises InputError for whatever is wrong with the logs, the output folder, the memory or the
    disk.
    """
    files = find_logs(config.inputs, verbose=True)
    old = None
    if config.extend is not None:
        old = load_extendable(config.extend, config.whole_log, config.tie_order)
    states = [file.state for file in files]
    dependencies = list_dependencies(config, states)
    dependencies["extended"] = old and old.fingerprint
    with (
        StagedOutput(config.output, dependencies, fresh) as work,
        Stages() as stages,
    ):
        warn_of_new_begin(work)
        preparation = _Preparation(config, files, old, work, stages)
        with _refused_errors(config, work):
            if not work.done(DATASET):  # else killed before it was delivered
                preparation.run()
            dataset = Dataset.load(work.path(DATASET))
            work.deliver(DATASET)
    warn_of_ties(dataset)
    return dataclasses.replace(dataset, folder=Path(config.output))


def warn_of_new_begin(work: StagedOutput) -> None:
    """Prints that an earlier preparation is not gone on with."""
    if work.begun_anew:
        print(
            f"{work.folder}: was made from other logs or options; begins anew",
            file=sys.stderr,
        )


def warn_of_ties(dataset: Dataset) -> None:
    """Prints that many users have their newest two events at the same time."""
    split_users = dataset.users - dataset.too_short
    tied_users = dataset.tied_users or 0
    if tied_users < _MANY_TIES * max(split_users, 1):
        return
    share = tied_users / split_users
    order = "a hash decides which of them is tested"
    way_out = "give finer times, or --tie-order file if the order of the rows means something"
    if dataset.tie_order == FILE:
        order = "the order of the rows decides which of them is tested"
        way_out = (
            "give finer times, or --tie-order hash if that order means nothing"
        )
    print(
        f"warning: {share:.0%} of the users have the same time in their newest two "
        f"events: {order}; {way_out}",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _refused_errors(
    config: PrepareConfig, work: StagedOutput
) -> Iterator[None]:
    """Turns errors of memory, disk and processes into InputErrors that say what to do."""
    try:
        yield
    except InputError:  # of the logs: it would be met again
        work.discard()
        raise
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"memory {config.memory} is too little: "
            f"give more with --memory ({summarize_error(error)})"
        ) from None
    except (duckdb.IOException, OSError) as error:
        raise InputError(
            f"{work.folder} cannot be written: {summarize_error(error)}: "
            "make room, and the same command goes on"
        ) from None
    except BrokenProcessPool:
        raise InputError(
            "a process that writes shards was killed, perhaps for want of memory: "
            "give less with --memory or --processes; the same command goes on"
        ) from None


def list_dependencies(
    config: PrepareConfig,
    files: Iterable[Any],
    libraries: tuple[str, ...] = ("duckdb", "pyarrow"),
) -> dict[str, Any]:
    """Returns what the stages depend on: the options, the files, and versions of libraries.

    An earlier preparation with other dependencies is not gone on with.
    files: the states of the logs, see `file_state`.
    libraries: those that shape the files of a stage.
    """
    options = dataclasses.asdict(config)
    for name in ("inputs", "output", "memory", "processes"):
        del options[name]
    versions = {}
    for name in libraries:
        versions[name] = importlib.metadata.version(name)
    items = []
    if config.items is not None:
        items = [file.state for file in find_logs([config.items])]
    return {
        "options": options,
        "files": list(files),
        "items": items,
        "format_version": FORMAT_VERSION,
        "versions": versions,
    }


class _Preparation:
    """The stages of one call of `prepare`."""

    def __init__(
        self,
        config: PrepareConfig,
        files: list[LogFile],
        old: Dataset | None,
        work: StagedOutput,
        stages: Stages,
    ):
        self.config = config
        self.files = files
        self.old = old
        self.work = work
        self.stages = stages
        self.threads = config.processes or len(os.sched_getaffinity(0))
        self.memory = config.memory_bytes - _FIRST_PROCESS
        # The first process waits where others make the parts, and makes them itself where there
        # is room for one alone.
        self.processes = min(self.threads, self.memory // _WORTH_A_PROCESS)
        self.part_memory = self.memory
        if self.processes >= 2:
            self.part_memory = self.memory // self.processes - _NEXT_PROCESS

    def run(self) -> None:
        """Runs the stages that are not done."""
        work = self.work
        with self._engine() as connection:
            dates = False
            if not (work.done("ids") and work.done("events")):
                with self.stages("reading the logs"):
                    dates = self._open_log(connection)
            layout = self._run_passes(connection, dates)
        self._write_parts(layout)
        with self._engine() as connection, self.stages("writing vocabularies"):
            join_parts(work, layout, self.config, connection, self._finish)

    def _engine(self) -> contextlib.AbstractContextManager[DuckDBPyConnection]:
        return open_engine(
            self.work.scratch, self.memory, self.threads, self.stages
        )

    def _open_log(self, connection: DuckDBPyConnection) -> bool:
        """Makes the view `log`. Returns whether its times are dates."""
        config = self.config
        in_file_order = config.tie_order == FILE
        windowed = config.since is not None or config.days is not None
        if not (config.keep_log or self.old or windowed):
            reading = open_log(
                connection,
                self.files,
                config,
                config.domain,
                in_file_order=in_file_order,
            )
            save_reading(self.work, reading)
            return reading.dates
        if not self.work.done(LOG):
            with self.work.stage(LOG) as folder:
                reading = store_log(
                    connection, config, self.files, self.old, folder
                )
                save_reading(self.work, reading)
        return open_stored_log(
            connection, self.work.path(LOG), self.old, in_file_order
        )

    def _run_passes(
        self, connection: DuckDBPyConnection, dates: bool
    ) -> Layout:
        """Numbers the ids, and divides the events: the stages that read the view `log`."""
        work = self.work
        ids_folder = work.path("ids")
        if not work.done("ids"):
            with work.stage("ids") as folder:
                number_ids(
                    connection,
                    self.config,
                    folder,
                    self.stages,
                    dates,
                    self.old,
                )
        layout = self._choose_layout(Ids.load(ids_folder))
        if not work.done("events"):
            with (
                work.stage("events") as folder,
                self.stages("dividing the events"),
            ):
                _divide_events(
                    connection,
                    ids_folder,
                    layout,
                    folder,
                    self.config.tie_order,
                )
        if not work.done(_ROWS):
            with work.stage(_ROWS) as folder:
                _write_arrays(connection, ids_folder, folder)
        return layout

    def _choose_layout(self, ids: Ids) -> Layout:
        """Returns the cut that the events on disk have, or the one that suits the memory."""
        config = self.config
        engine_memory = int(self.part_memory * duckdb_engine.ENGINE_SHARE)
        layout = Layout.of(
            ids,
            config.streams,
            config.shard_users,
            config.block_users,
            max(1, engine_memory // _EVENT_BYTES),
        )
        parts_file = self.work.path("events") / "parts"
        if parts_file.is_file():
            parts = int(parts_file.read_text(encoding="utf-8"))
            layout = dataclasses.replace(layout, parts=parts)
        return layout

    def _write_parts(self, layout: Layout) -> None:
        """Makes the parts that are not done, several at once where there is memory for it."""
        missing = missing_parts(self.work, layout)
        users = sum(len(layout.users_of(part)) for part in missing)
        with self.stages("sorting, writing shards", total=users) as advance:
            tie_order = self.config.tie_order
            if len(missing) < 2 or self.processes < 2:
                for part in missing:
                    _make_part(
                        self.work.folder,
                        layout,
                        part,
                        self.part_memory,
                        tie_order,
                    )
                    advance(len(layout.users_of(part)))
                return
            with _process_pool(min(self.processes, len(missing))) as pool:
                part_of_future = {}
                for part in missing:
                    future = pool.submit(
                        _make_part,
                        self.work.folder,
                        layout,
                        part,
                        self.part_memory,
                        tie_order,
                    )
                    part_of_future[future] = part
                for future in concurrent.futures.as_completed(part_of_future):
                    future.result()
                    advance(len(layout.users_of(part_of_future[future])))

    def _finish(
        self,
        connection: DuckDBPyConnection,
        folder: Path,
        dataset: Dataset,
    ) -> None:
        """Adds the stored log and the extension to a dataset. May be called again."""
        log = self.work.path(LOG)
        if self.config.keep_log or (self.old and not self.config.whole_log):
            link_log(log, folder / LOG)
        if self.old:
            open_stored_log(connection, log, self.old, False)
            write_extension(
                connection,
                self.old,
                self.work.path("ids"),
                log,
                folder / EXTENSION,
                dataset,
            )


def save_reading(work: StagedOutput, reading: Reading) -> None:
    """Keeps what became of the logs' rows."""
    if not work.done(READING):
        with work.stage(READING) as folder:
            reading.save(folder)


def missing_parts(work: StagedOutput, layout: Layout) -> list[int]:
    """Returns the parts that are not done."""
    parts = []
    for part in range(layout.parts):
        if not work.done(part_stage(part)):
            parts.append(part)
    return parts


def part_stage(part: int) -> str:
    """Returns the name of a part's stage."""
    return f"parts/{part:05d}"


@contextlib.contextmanager
def _process_pool(
    processes: int,
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Opens a pool of processes that share nothing with this one.

    They begin nothing more once one of them has failed.
    """
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        processes,
        context,
        initializer=set_up_worker,
        initargs=(os.getpid(),),
    )
    try:
        yield pool
    except KeyboardInterrupt:
        # What they are making is made anew by the same command.
        for process in list(pool._processes.values()):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _divide_events(
    connection: DuckDBPyConnection,
    ids_folder: Path,
    layout: Layout,
    folder: Path,
    tie_order: str,
) -> None:
    """Writes the events of numbered users and items: user, item, time, in a folder a part.

    In the order of the files they have their position, too.
    """
    position = ""
    if tie_order == FILE:
        position = "position,"
    part = layout.part_sql('"user"', "//")
    connection.execute(f"""
        CREATE TABLE users AS
            SELECT user_id, "user"::INTEGER AS "user", ({part})::INTEGER AS part
            FROM {parquet_folder_sql(ids_folder / "users")};
        CREATE TABLE items AS
            SELECT name AS domain, item_id, item::INTEGER AS item
            FROM {parquet_folder_sql(ids_folder / "items")}""")
    connection.execute(f"""
        COPY (
            SELECT "user", item, "time", {position} part
            FROM log
            JOIN users USING (user_id)
            JOIN items USING (domain, item_id)
        ) TO '{escape_sql(folder)}' (
            FORMAT parquet,
            PARTITION_BY (part),
            OVERWRITE_OR_IGNORE,
            COMPRESSION lz4
        )""")
    (folder / "parts").write_text(str(layout.parts), encoding="utf-8")


def _write_arrays(
    connection: DuckDBPyConnection,
    ids_folder: Path,
    folder: Path,
) -> None:
    """Writes arrays that all processes map in place of a copy each.

    row_of.npy: the row of M of each item, by its number, int32 (items,). user_keys.npy,
    row_keys.npy: the keys of the users and of the items, by number and by row, int64; see
    tie_order.py.
    """
    ids = Ids.load(ids_folder)
    items = parquet_folder_sql(ids_folder / "items")
    users = parquet_folder_sql(ids_folder / "users")
    # file, its type, its length, and a query of (index, value)
    arrays = (
        (
            _ROW_OF_ITEM,
            np.int32,
            sum(ids.items),
            f"SELECT item, row FROM {items}",
        ),
        (_ROW_KEYS, np.int64, ids.starts[-1], f"SELECT row, key FROM {items}"),
        (_USER_KEYS, np.int64, ids.users, f'SELECT "user", key FROM {users}'),
    )
    for name, dtype, length, query in arrays:
        values = np.lib.format.open_memmap(
            folder / name, mode="w+", dtype=dtype, shape=(length,)
        )
        for batch in connection.sql(query).to_arrow_reader():
            values[batch.column(0).to_numpy()] = batch.column(1).to_numpy()
        values.flush()


def _make_part(
    work_folder: Path,
    layout: Layout,
    part: int,
    memory: int,
    tie_order: str,
) -> None:
    """Sorts one part's events and writes its shards, all of them or none.

    Runs in a process of its own.
    """
    ids = Ids.load(work_folder / "ids")
    scratch = work_folder / "scratch" / f"part-{part:05d}"
    scratch.mkdir()
    with staged_folder(work_folder / part_stage(part)) as folder:
        with open_engine(scratch, memory, 1) as connection:
            events = work_folder / "events" / f"part={part}"
            row_of_item = _map_array(work_folder, _ROW_OF_ITEM)
            number_N, rows_N, time_N = _sort_events(
                connection, events, row_of_item, tie_order
            )
        if tie_order == HASH:
            user_keys = _map_array(work_folder, _USER_KEYS)
            row_keys = _map_array(work_folder, _ROW_KEYS)
            break_ties(
                number_N,
                time_N,
                rows_N,
                lambda tied: (
                    user_keys[number_N[tied]],
                    row_keys[rows_N[tied]],
                ),
            )
        write_part(folder, ids, layout, part, number_N, rows_N, time_N)
    shutil.rmtree(scratch)


def _map_array(work_folder: Path, name: str) -> np.ndarray:
    """Maps an array that `_write_arrays` wrote."""
    path = work_folder / _ROWS / name
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _sort_events(
    connection: DuckDBPyConnection,
    folder: Path,
    row_of_item: np.ndarray,
    tie_order: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a part's events in order, (N,): see `write_part`.

    Returns numbers of users, int32; rows of M, int32; times, int64 or float64 as the log has them.
    Equal times go by item, or by their position in the files.
    """
    connection.execute("SET preserve_insertion_order = true")
    events = parquet_folder_sql(folder)
    count = query_value(connection, f"SELECT count(*) FROM {events}")
    last_key = "item"
    if tie_order == FILE:
        last_key = "position"
    ordered = connection.sql(f"""
        SELECT "user", item, "time"
        FROM {events}
        ORDER BY "user", "time", {last_key}""")
    reader = ordered.to_arrow_reader()
    number_N = np.empty(count, np.int32)
    rows_N = np.empty(count, np.int32)
    time_N = np.empty(count, reader.schema.field("time").type.to_pandas_dtype())
    end = 0
    for batch in reader:
        begin = end
        end = begin + len(batch)
        number_N[begin:end] = batch["user"].to_numpy()
        item_numbers = batch["item"].to_numpy()
        rows_N[begin:end] = row_of_item[item_numbers]
        time_N[begin:end] = batch["time"].to_numpy()
    return number_N, rows_N, time_N


def join_parts(
    work: StagedOutput,
    layout: Layout,
    config: PrepareConfig,
    connection: DuckDBPyConnection,
    finish: Finish | None = None,
) -> Dataset:
    """Makes the dataset of the finished parts: the stage `dataset`.

    finish(connection, folder, dataset): adds to it.
    """
    folder = work.path(f"{DATASET}.partial")
    folder.mkdir(exist_ok=True)
    ids_folder = work.path("ids")
    parts = [work.path(part_stage(part)) for part in range(layout.parts)]
    dataset = assemble(folder, ids_folder, parts, layout, config, connection)
    if finish is not None:
        finish(connection, folder, dataset)
    keep_records(work.path(READING), ids_folder, folder)
    move_folder(folder, work.path(DATASET))
    return dataset
