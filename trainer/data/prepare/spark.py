"""The preparation of `pipeline.py` on Spark, which gives the same folder, byte for byte.

    ids      users and items are numbered              Spark
    parts    each part sorted and cut into shards      Spark brings a part's events to one task,
                                                       and `write_part` does the rest
    dataset  vocabularies, users, lengths, dataset.json, on the driver

The driver and all executors see the output by the same path. Without a session that runs
already (spark-submit, a notebook) one is started on this machine.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config.prepare import PrepareConfig
from trainer.data.duckdb_engine import open_engine
from trainer.data.format.dataset import Dataset
from trainer.data.prepare.ids import (
    HASH_DIGITS,
    Ids,
    refuse_beyond_int32,
    reserve_rows,
)
from trainer.data.prepare.layout import Layout
from trainer.data.prepare.left_out import record_left_out
from trainer.data.prepare.numbering import (
    drops_rare,
    read_times,
    refuse_nothing_left,
)
from trainer.data.prepare.pipeline import (
    DATASET,
    join_parts,
    list_dependencies,
    missing_parts,
    save_reading,
    warn_of_new_begin,
    warn_of_ties,
)
from trainer.data.prepare.shard_writing import write_part
from trainer.data.tie_order import FILE, break_ties
from trainer.errors import InputError
from trainer.files.staged import StagedOutput, staged_folder

try:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
except ImportError as error:
    raise InputError(
        f"Spark is not installed ({error}): pip install 'syncrec-trainer[spark]'"
    ) from None

from trainer.data.logs.spark_logs import (
    SPARK_ERRORS,
    Input,
    escape_glob,
    find_inputs,
    open_log,
    spark_reason,
)

# What Python holds of a part: some 80 bytes for each.
_PART_INTERACTIONS = 1 << 23
_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.legacy.parquet.nanosAsLong": "false",
    "spark.sql.parquet.binaryAsString": "false",
    "spark.sql.parquet.int96AsTimestamp": "true",
}
# Of monotonically_increasing_id(): the position in the portion; above them the portion.
_POSITION_BITS = 33


def prepare(config: PrepareConfig, fresh: bool = False) -> Dataset:
    """Does what `pipeline.prepare` does.

    Inputs may also be addresses that Spark reads (s3a://, hdfs://) and table:NAME. Spark
    decides on `config.processes`, and `config.memory` holds for the driver's last stage alone.
    If an input is a table, whose state is not known, it always begins anew.
    Raises InputError for whatever is wrong with the logs, the output folder or the cluster.
    """
    output = os.path.abspath(config.output)
    config = dataclasses.replace(config, output=output)
    with _open_session() as spark:
        inputs = find_inputs(spark, config.inputs)
        fresh = fresh or any(one.is_table for one in inputs)
        states = [one.facts for one in inputs]
        libraries = ("pyspark", "duckdb", "pyarrow")
        dependencies = list_dependencies(config, states, libraries)
        dependencies["part_interactions"] = _PART_INTERACTIONS
        with StagedOutput(config.output, dependencies, fresh) as work:
            warn_of_new_begin(work)
            with _refused_errors(work):
                # Else it was killed before it was delivered.
                if not work.done(DATASET):
                    _Preparation(spark, config, inputs, work).run()
                work.deliver(DATASET)
    dataset = Dataset.load(config.output)
    warn_of_ties(dataset)
    return dataset


@contextlib.contextmanager
def _refused_errors(work: StagedOutput) -> Iterator[None]:
    """Turns errors of the disk and of Spark into InputErrors that say what to do."""
    try:
        yield
    except InputError:  # of the logs: it would be met again
        work.discard()
        raise
    except OSError as error:
        raise InputError(
            f"{work.folder} cannot be written: {error}: "
            "mend it, and the same command goes on"
        ) from None
    except SPARK_ERRORS as error:
        raise InputError(_explain_failure(error)) from None


def _explain_failure(error: Exception) -> str:
    """Says why Spark gave up, and the way out."""
    missing = re.search(r"No module named '(\w+)", str(error))
    if missing:
        return (
            f"Spark's executors do not find the Python package {missing[1]}: "
            "install it there, give it with --py-files, "
            "or name the Python that has it in PYSPARK_PYTHON"
        )
    return f"Spark gave up: {spark_reason(error)}: the same command goes on"


@contextlib.contextmanager
def _open_session() -> Iterator[SparkSession]:
    """Yields the session that runs, or a new one, with the settings that logs depend on."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.getActiveSession()
    if spark is None:
        spark = SparkSession.builder.appName("prepare").getOrCreate()
    before = {name: spark.conf.get(name, None) for name in _SETTINGS}
    try:
        for name, value in _SETTINGS.items():
            spark.conf.set(name, value)
        yield spark
    finally:
        for name, setting in before.items():
            if setting is None:
                spark.conf.unset(name)
            else:
                spark.conf.set(name, setting)


class _Preparation:
    """The stages of one call of `prepare`."""

    def __init__(
        self,
        spark: SparkSession,
        config: PrepareConfig,
        inputs: list[Input],
        work: StagedOutput,
    ):
        self.spark = spark
        self.config = config
        self.inputs = inputs
        self.work = work

    def run(self) -> None:
        """Runs the stages that are not done."""
        config = self.config
        work = self.work
        if not work.done("ids"):
            with work.stage("ids") as folder:
                self.number_ids(self.log, folder)
        ids = Ids.load(work.path("ids"))
        layout = Layout.of(
            ids,
            config.streams,
            config.shard_users,
            config.block_users,
            _PART_INTERACTIONS,
        )
        self.write_parts(ids, layout)
        threads = len(os.sched_getaffinity(0))
        with open_engine(
            work.scratch, config.memory_bytes, threads
        ) as connection:
            join_parts(work, layout, config, connection)

    @property
    def log(self) -> DataFrame:
        """The rows of the logs."""
        log, _ = self.opened_log
        return log

    @functools.cached_property
    def opened_log(self) -> tuple[DataFrame, bool]:
        """The rows of the logs, and whether their times are dates."""
        config = self.config
        log, reading = open_log(
            self.spark,
            self.inputs,
            config,
            config.domain,
            self.scratch_uri("text"),
            config.tie_order == FILE,
        )
        save_reading(self.work, reading)
        return log, reading.dates

    def number_ids(self, log: DataFrame, folder: Path) -> None:
        """Writes the numbered users and items (see `Ids`) into `folder`."""
        config = self.config
        if drops_rare(config):
            users, items = self.drop_rare(log, folder)
        else:
            users = log.select("user_id").distinct()
            total = F.count("*").alias("total")
            items = log.groupBy("domain", "item_id").agg(total)
        items = self.materialize(items, "distinct_items")
        users, count = self.number_users(users)
        refuse_beyond_int32(count, "users")
        refuse_beyond_int32(items.count(), "items")
        users = users.select("user_id", "user", "key")
        users.write.parquet(_uri(folder / "users"))
        ids = self.summarize(log, items, count)
        ids.check()
        items = self.number_items(items, ids)
        items.write.parquet(_uri(folder / "items"))
        ids.save(folder)

    def number_users(self, users: DataFrame) -> tuple[DataFrame, int]:
        """Numbers users by (MD5 of seed and id, text of the id); returns them, and how many."""
        seed = F.lit(f"{self.config.seed}:")
        key = _key(F.concat(seed, "text"))
        text = F.col("user_id").cast("string")
        users = users.withColumn("text", text)
        users = users.withColumn("key", key)
        return self.number_rows(users, ("key", "text"), "user")

    def summarize(
        self,
        log: DataFrame,
        items: DataFrame,
        users: int,
    ) -> Ids:
        """Counts interactions, and the items of each domain."""
        _, dates = self.opened_log
        log_by_domain = log.groupBy("domain")
        times = log_by_domain.agg(F.min("time"), F.max("time"))
        spans = [tuple(row) for row in times.collect()]
        spans.sort(key=lambda span: span[0].encode())
        log_times = read_times(spans, dates, self.config.time_unit)
        (interactions,) = items.agg(F.sum("total")).collect()[0]
        items_by_domain = items.groupBy("domain")
        domains = items_by_domain.count().collect()
        domains.sort(key=lambda row: row[0].encode())
        names = []
        counts = []
        rooms = []
        for name, count in domains:
            names.append(name)
            counts.append(count)
            rooms.append(reserve_rows(count))
        return Ids(
            users=users,
            interactions=interactions,
            names=tuple(names),
            items=tuple(counts),
            rooms=tuple(rooms),
            first_time=float(min(first for _, first, _ in spans)),
            last_time=float(max(last for _, _, last in spans)),
            time_kind=log_times.kind,
            time_unit=log_times.unit,
        )

    def number_items(self, items: DataFrame, ids: Ids) -> DataFrame:
        """Numbers items by (domain, text of the id), and gives them rows of M by popularity."""
        # What a domain's first row is beyond the number of items before it.
        shifts = []
        items_before = 0
        for number, name in enumerate(ids.names):
            shift = ids.starts[number] - items_before
            shifts.append((number, name, shift))
            items_before += ids.items[number]
        schema = "domain int, name string, shift bigint"
        domains = self.spark.createDataFrame(shifts, schema)
        items = items.withColumnRenamed("domain", "name")
        items = items.join(F.broadcast(domains), "name")
        text = F.col("item_id").cast("string")
        items = items.withColumn("text", text)
        by_id = ("domain", "text")
        items, _ = self.number_rows(items, by_id, "item")
        by_popularity = ("domain", F.desc("total"), "text")
        items, _ = self.number_rows(items, by_popularity, "position")
        row = F.col("shift") + F.col("position")
        items = items.withColumn("row", row)
        name_hash = F.md5(F.col("name").cast("binary"))
        items = items.withColumn("key", _key(F.concat(name_hash, "text")))
        return items.select(
            "domain", "name", "item_id", "total", "item", "row", "key"
        )

    def drop_rare(
        self, log: DataFrame, folder: Path
    ) -> tuple[DataFrame, DataFrame]:
        """Returns the users and items of the k-core.

        Events are dropped until every user left has `min_user` and every item left `min_item`
        interactions, and every domain left `min_domain` and two items. Domains that are left
        out are recorded in the folder.
        """
        config = self.config
        user = ["user_id"]
        item = ["domain", "item_id"]
        total = F.sum("total").alias("total")
        events = F.count("*").alias("total")
        pairs = log.groupBy(*user, *item).agg(events)
        pairs = self.materialize(pairs, "round-0")
        sizes_before = _domain_sizes(pairs)
        before = None
        count = pairs.count()
        number = 0
        while count != before:
            rest = pairs
            for columns, least in (
                (user, config.min_user),
                (item, config.min_item),
            ):
                if least > 1:
                    totals = pairs.groupBy(columns).agg(total)
                    rare = totals.filter(F.col("total") < least)
                    rest = rest.join(rare, columns, "left_anti")
            if config.min_domain:
                small = F.sum("total") < config.min_domain
                single = F.countDistinct("item_id") < 2
                domains = pairs.groupBy("domain").agg(
                    (small | single).alias("is_small")
                )
                domains = domains.filter("is_small")
                rest = rest.join(domains, "domain", "left_anti")
            # Kept as files at each round: a plan that grew with the rounds would be worked
            # through anew in each of them.
            pairs = self.materialize(rest, f"round-{number + 1}")
            before = count
            count = pairs.count()
            old_round = self.work.scratch / f"round-{number}"
            shutil.rmtree(old_round)
            number += 1
        if not count:
            refuse_nothing_left(config)
        if config.min_domain:
            record_left_out(folder, sizes_before, set(_domain_sizes(pairs)))
        users = pairs.select("user_id").distinct()
        return users, pairs.groupBy(*item).agg(total)

    def number_rows(
        self,
        frame: DataFrame,
        order: tuple[Column | str, ...],
        name: str,
    ) -> tuple[DataFrame, int]:
        """Adds the rows' number in an order, from 0, as the column `name`; also counts them.

        Spark numbers rows within the portions of its sort. The rows before a portion are added:

            serial    portion 0: 0 1 2    portion 1: 2³³ + 0, 2³³ + 1
            start     0                   3
            number    0 1 2               3 4
        """
        serial = F.col("serial")
        ordered = frame.orderBy(*order)
        ordered = ordered.withColumn("serial", F.monotonically_increasing_id())
        frame = self.materialize(ordered, f"by-{name}")
        portion = F.shiftright(serial, _POSITION_BITS)
        position = serial.bitwiseAND(2**_POSITION_BITS - 1)
        portions = frame.groupBy(portion.alias("portion"))
        sizes = portions.count().collect()
        starts = []
        count = 0
        for number, size in sorted(sizes):
            starts.append((number, count))
            count += size
        schema = "portion bigint, start bigint"
        starts_frame = self.spark.createDataFrame(starts, schema)
        frame = frame.withColumn("portion", portion)
        frame = frame.join(F.broadcast(starts_frame), "portion")
        frame = frame.withColumn(name, F.col("start") + position)
        frame = frame.drop("portion", "start", "serial")
        return frame, count

    def write_parts(self, ids: Ids, layout: Layout) -> None:
        """Writes the shards of all parts that are not done."""
        folder = self.work.folder / "parts"
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial)
        missing = missing_parts(self.work, layout)
        if not missing:
            return
        events = self.sort_events(layout, missing)
        write = functools.partial(_write_parts, folder, ids, layout)
        written_parts = events.mapInArrow(write, "part int")
        written = []
        for (part,) in written_parts.collect():
            written.append(part)
        written.sort()
        if written != missing:
            raise AssertionError(
                f"parts {written} were written in place of {missing}"
            )

    def sort_events(self, layout: Layout, missing: list[int]) -> DataFrame:
        """Brings the events of each part into one portion: part, user, row, time, in order.

        Where a hash orders equal times, they have the keys of user and item, too.
        """
        ids_folder = self.work.path("ids")
        users = self.read_parquet(_uri(ids_folder / "users"))
        items = self.read_parquet(_uri(ids_folder / "items"))
        part = layout.part_sql("user", "div")
        users = users.selectExpr(
            "user_id",
            "int(user) AS user",
            "key AS user_key",
            f"int({part}) AS part",
        )
        if len(missing) < layout.parts:
            is_missing = F.col("part").isin(missing)
            users = users.filter(is_missing)
        items = items.selectExpr(
            "name AS domain",
            "item_id",
            "int(item) AS item",
            "int(row) AS row",
            "key AS item_key",
        )
        log = self.log
        events = log.join(users, "user_id")
        events = events.join(items, ["domain", "item_id"])
        last_key = "item"
        keys = ["user_key", "item_key"]
        if self.config.tie_order == FILE:
            last_key = "position"
            keys = []
        columns = ["part", "user", "row", "time", *keys]
        events = events.select(*columns, last_key)
        events = events.repartition(len(missing), "part")
        events = events.sortWithinPartitions("part", "user", "time", last_key)
        return events.select(*columns)

    def materialize(self, frame: DataFrame, name: str) -> DataFrame:
        """Writes the rows to files; returns the same rows, read from them."""
        uri = self.scratch_uri(name)
        frame.write.parquet(uri)
        reader = self.spark.read.schema(frame.schema)
        return reader.parquet(escape_glob(uri))

    def read_parquet(self, uri: str) -> DataFrame:
        """Reads all files of a folder."""
        return self.spark.read.parquet(escape_glob(uri))

    def scratch_uri(self, name: str) -> str:
        """Returns the name of a scratch folder in Spark's terms."""
        return _uri(self.work.scratch / name)


def _domain_sizes(pairs: DataFrame) -> dict[str, tuple[int, int]]:
    """Returns the items and interactions by domain of (user, domain, item, total)."""
    by_domain = pairs.groupBy("domain")
    sizes = by_domain.agg(F.countDistinct("item_id"), F.sum("total"))
    return {
        name: (items, interactions)
        for name, items, interactions in sizes.collect()
    }


def _key(text: Column) -> Column:
    """Returns the key of a text, see `tie_order.py`."""
    digits = F.substring(F.md5(text.cast("binary")), 1, HASH_DIGITS)
    return F.conv(digits, 16, 10).cast("bigint")


def _uri(path: Path) -> str:
    return f"file://{path}"


def _write_parts(
    folder: Path,
    ids: Ids,
    layout: Layout,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    """Writes the shards of the parts whose events (part, user, row, time) come in order.

    Where they have keys of user and item, these order equal times.

    Runs in a task. Another attempt at the same part may run at the same time, or have run: each
    writes into a folder of its own, and the first to end gives it the part's name.
    """
    for part, number_N, rows_N, time_N, *keys in _join_batches(batches):
        if keys:
            _break_ties(number_N, rows_N, time_N, keys)
        target = folder / f"{part:05d}"
        try:
            with staged_folder(target, uuid.uuid4().hex) as partial:
                write_part(partial, ids, layout, part, number_N, rows_N, time_N)
        except OSError:
            if not target.is_dir():
                raise
        written = pa.array([part], pa.int32())
        yield pa.RecordBatch.from_pydict({"part": written})


def _break_ties(
    number_N: np.ndarray,
    rows_N: np.ndarray,
    time_N: np.ndarray,
    keys: list[np.ndarray],
) -> None:
    """Orders a user's events at the same time: changes `rows_N`. keys: of users and of items."""
    user_key_N, item_key_N = keys
    break_ties(
        number_N,
        time_N,
        rows_N,
        lambda tied: (user_key_N[tied], item_key_N[tied]),
    )


def _join_batches(
    batches: Iterable[pa.RecordBatch],
) -> Iterator[tuple[Any, ...]]:
    """Yields each part with all of its columns, (N,): user numbers, rows of M, times, …

    batches: Arrow batches of (part, user, row, time, …), all events of a part one after the other:

        part  4 4 4 | 4 7 7      gives  4: user [0 0 1 1], row [5 2 2 8], time [1 3 2 6]
        user  0 0 1 | 1 6 6             7: user [6 6],     row [2 5],     time [4 5]
        row   5 2 2 | 8 2 5
        time  1 3 2 | 6 4 5
    """
    current = None
    pieces: list[list[np.ndarray]] = []
    for batch in batches:
        columns = []
        for column in batch.columns:
            columns.append(column.to_numpy(zero_copy_only=False))
        part_N = columns.pop(0)
        changes = np.diff(part_N)
        cuts = np.flatnonzero(changes) + 1
        bounds = [0, *cuts, len(part_N)]
        for start, end in itertools.pairwise(bounds):
            if start == end:
                continue
            if part_N[start] != current:
                if pieces:
                    yield current, *_concatenate_columns(pieces)
                current = int(part_N[start])
                pieces = []
            pieces.append([column[start:end] for column in columns])
    if pieces:
        yield current, *_concatenate_columns(pieces)


def _concatenate_columns(pieces: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Joins pieces of (user numbers, rows of M, times, …).

    pieces     [[0 0 1], [5 2 2], [1 3 2]]    and    [[1], [8], [6]]
    returns    [0 0 1 1], [5 2 2 8], [1 3 2 6]
    """
    columns = zip(*pieces, strict=True)
    return [np.concatenate(column) for column in columns]
