"""The preparation of `prepare.py` on Spark: the same logs and options give the same folder, byte for byte.

    ids      users and items are numbered              Spark
    parts    each part sorted and cut into shards      Spark brings a part's events to one task, `write_part` does the rest
    dataset  vocabularies, users, lengths, dataset.json, on the driver

The output lies where the driver and all executors see it by the same path. Without a session that runs already (spark-submit,
a notebook) one is started on this machine.
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
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.format.dataset import Dataset
from trainer.data.prepare.pipeline import PrepareConfig, engine, facts, join_parts
from trainer.data.prepare.shard_writing import (
    HASH_DIGITS,
    Ids,
    Layout,
    refuse_beyond_int32,
    room_of,
    write_part,
)
from trainer.errors import InputError
from trainer.files.staged import Work, finished_whole

try:
    from pyspark.sql import DataFrame, SparkSession
    from pyspark.sql import functions as F
except ImportError as error:
    raise InputError(
        f"Spark is not installed ({error}): pip install 'syncrec-trainer[spark]'"
    ) from None

from trainer.data.prepare.spark_logs import (
    SPARK_ERRORS,
    escaped,
    find_inputs,
    open_log,
    spark_reason,
)

_PART_INTERACTIONS = 1 << 23  # what Python holds of a part: some 60 bytes for each
_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.caseSensitive": "true",
    "spark.sql.legacy.parquet.nanosAsLong": "false",
    "spark.sql.parquet.binaryAsString": "false",
    "spark.sql.parquet.int96AsTimestamp": "true",
}
_PLACE_BITS = 33  # of monotonically_increasing_id(): the place in the portion; above them the portion


def prepare(config: PrepareConfig, fresh=False) -> Dataset:
    """Does what `prepare.prepare` does. Inputs may also be addresses that Spark reads (s3a://, hdfs://) and table:NAME.

    `config.processes` is for Spark to say, and `config.memory` holds for the driver's last stage alone. Where an input is a
    table, whose state is not known, it always begins anew. Raises InputError for whatever is wrong with the logs, the output
    folder or the cluster.
    """
    config = dataclasses.replace(config, output=os.path.abspath(config.output))
    with _session() as spark:
        inputs = find_inputs(spark, config.inputs)
        fresh = fresh or any(one.is_table for one in inputs)
        known = facts(
            config, [one.facts for one in inputs], ("pyspark", "duckdb", "pyarrow")
        )
        with Work(
            config.output, known | {"part_interactions": _PART_INTERACTIONS}, fresh
        ) as work:
            if work.begun_anew:
                print(
                    f"{work.folder}: was made from other logs or options; begins anew",
                    file=sys.stderr,
                )
            try:
                _Preparation(spark, config, inputs, work).run()
            except InputError:  # of the logs: it would be met again
                work.discard()
                raise
            except OSError as error:
                raise InputError(
                    f"{work.folder} cannot be written: {error}: mend it, and the same command goes on"
                ) from None
            except SPARK_ERRORS as error:
                raise InputError(_gave_up(error)) from None
            work.deliver("dataset")
    return Dataset.load(config.output)


def _gave_up(error):
    missing = re.search(r"No module named '(\w+)", str(error))
    if missing:
        return (
            f"Spark's executors do not find the Python package {missing[1]}: install it there, give it with --py-files, "
            "or name the Python that has it in PYSPARK_PYTHON"
        )
    return f"Spark gave up: {spark_reason(error)}: the same command goes on"


@contextlib.contextmanager
def _session():
    """The session that runs, or a new one, with the settings that the meaning of the logs depends on."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = (
        SparkSession.getActiveSession()
        or SparkSession.builder.appName("prepare").getOrCreate()
    )
    before = {name: spark.conf.get(name, None) for name in _SETTINGS}
    try:
        for name, value in _SETTINGS.items():
            spark.conf.set(name, value)
        yield spark
    finally:
        for name, value in before.items():
            spark.conf.unset(name) if value is None else spark.conf.set(name, value)


class _Preparation:
    """The stages of one call of `prepare`."""

    def __init__(self, spark, config, inputs, work):
        self.spark, self.config, self.inputs, self.work = spark, config, inputs, work

    def run(self):
        config, work = self.config, self.work
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
        with engine(
            work.scratch, config.memory_bytes, len(os.sched_getaffinity(0))
        ) as connection:
            join_parts(work, layout, config.seed, connection)

    @functools.cached_property
    def log(self):
        """The rows of the logs."""
        return open_log(
            self.spark,
            self.inputs,
            self.config.columns,
            self.config.domain,
            self.scratch("text"),
        )

    def number_ids(self, log, folder):
        """Writes the numbered users and items (see `Ids`) into `folder`."""
        config = self.config
        users = log.select("user_id").distinct()
        items = log.groupBy("domain", "item_id").agg(F.count("*").alias("total"))
        if config.min_user > 1 or config.min_item > 1:
            users, items = self.frequent(log)
        items = self.kept(items, "found_items")

        key = F.substring(
            F.md5(F.concat(F.lit(f"{config.seed}:"), "text").cast("binary")),
            1,
            HASH_DIGITS,
        )
        users = users.withColumn("text", F.col("user_id").cast("string"))
        users = users.withColumn("key", F.conv(key, 16, 10).cast("bigint"))
        users, count = self.numbered(users, ("key", "text"), "user")
        refuse_beyond_int32(count, "users")
        refuse_beyond_int32(items.count(), "items")
        users.select("user_id", "user").write.parquet(_uri(folder / "users"))

        first, last = log.agg(F.min("time"), F.max("time")).head()
        domains = sorted(
            items.groupBy("domain").count().collect(),
            key=lambda found: found[0].encode(),
        )
        ids = Ids(
            users=count,
            interactions=items.agg(F.sum("total")).head()[0],
            names=tuple(name for name, _ in domains),
            items=tuple(number for _, number in domains),
            rooms=tuple(room_of(number) for _, number in domains),
            first_time=float(first),
            last_time=float(last),
        )
        ids.check()
        befores = [sum(ids.items[:number]) for number in range(len(ids.items))]
        shifts = [
            start - before
            for start, before in zip(ids.starts[:-1], befores, strict=True)
        ]
        table = self.spark.createDataFrame(
            [
                (number, name, shift)
                for number, (name, shift) in enumerate(
                    zip(ids.names, shifts, strict=True)
                )
            ],
            "domain int, name string, shift bigint",
        )
        items = items.withColumnRenamed("domain", "name").join(
            F.broadcast(table), "name"
        )
        items = items.withColumn("text", F.col("item_id").cast("string"))
        items, _ = self.numbered(items, ("domain", "text"), "item")
        items, _ = self.numbered(items, ("domain", F.desc("total"), "text"), "rank")
        items = items.withColumn("row", F.col("shift") + F.col("rank"))
        items.select("domain", "name", "item_id", "total", "item", "row").write.parquet(
            _uri(folder / "items")
        )
        ids.save(folder)

    def frequent(self, log):
        """Users and items that stay when events are dropped until every user left has `min_user` and every item left
        `min_item` interactions: the k-core."""
        config, item = self.config, ["domain", "item_id"]
        total = F.sum("total").alias("total")
        pairs = self.kept(
            log.groupBy("user_id", *item).agg(F.count("*").alias("total")), "round-0"
        )
        before, count, number = None, pairs.count(), 0
        while count != before:
            # Kept as files at each round: a plan that grew with the rounds would be worked through anew in each of them.
            rest, number = pairs, number + 1
            for column, least in (
                (["user_id"], config.min_user),
                (item, config.min_item),
            ):
                if least > 1:
                    rare = (
                        pairs.groupBy(column).agg(total).filter(F.col("total") < least)
                    )
                    rest = rest.join(rare, column, "left_anti")
            pairs = self.kept(rest, f"round-{number}")
            before, count = count, pairs.count()
            shutil.rmtree(self.work.scratch / f"round-{number - 1}")
        if not count:
            raise InputError(
                f"nothing is left with --min-user {config.min_user} --min-item {config.min_item}: lower them"
            )
        return pairs.select("user_id").distinct(), pairs.groupBy(*item).agg(total)

    def numbered(self, frame: DataFrame, order, name):
        """The rows with their number in that order, from 0, in a new column; and how many there are."""
        place = F.col("place")
        frame = self.kept(
            frame.orderBy(*order).withColumn("place", F.monotonically_increasing_id()),
            f"by-{name}",
        )
        portion = F.shiftright(place, _PLACE_BITS)
        counts = sorted(frame.groupBy(portion.alias("portion")).count().collect())
        starts, count = [], 0
        for number, size in counts:
            starts.append((number, count))
            count += size
        starts = self.spark.createDataFrame(starts, "portion bigint, start bigint")
        frame = frame.withColumn("portion", portion).join(
            F.broadcast(starts), "portion"
        )
        number = F.col("start") + place.bitwiseAND(2**_PLACE_BITS - 1)
        return frame.withColumn(name, number).drop("portion", "start", "place"), count

    def write_parts(self, ids, layout):
        """Writes the shards of all parts that are not there yet."""
        folder = self.work.folder / "parts"
        for partial in folder.glob("*.partial"):
            shutil.rmtree(partial)
        missing = [
            part
            for part in range(layout.parts)
            if not self.work.done(f"parts/{part:05d}")
        ]
        if not missing:
            return
        users = self.spark.read.parquet(escaped(_uri(self.work.path("ids") / "users")))
        items = self.spark.read.parquet(escaped(_uri(self.work.path("ids") / "items")))
        users = users.selectExpr(
            "user_id",
            "int(user) AS user",
            f"int({layout.part_sql('user', 'div')}) AS part",
        )
        if len(missing) < layout.parts:
            users = users.filter(F.col("part").isin(missing))
        items = items.selectExpr(
            "name AS domain", "item_id", "int(item) AS item", "int(row) AS row"
        )
        events = self.log.join(users, "user_id").join(items, ["domain", "item_id"])
        events = events.select("part", "user", "time", "item", "row").repartition(
            len(missing), "part"
        )
        events = events.sortWithinPartitions("part", "user", "time", "item").select(
            "part", "user", "row", "time"
        )
        write = functools.partial(_write_parts, folder, ids, layout)
        written = sorted(
            part for (part,) in events.mapInArrow(write, "part int").collect()
        )
        if written != missing:
            raise AssertionError(f"parts {written} were written in place of {missing}")

    def kept(self, frame, name):
        """The same rows, read from files."""
        path = self.scratch(name)
        frame.write.parquet(path)
        return self.spark.read.schema(frame.schema).parquet(escaped(path))

    def scratch(self, name):
        return _uri(self.work.scratch / name)


def _uri(path):
    return f"file://{path}"


def _write_parts(folder: Path, ids: Ids, layout: Layout, batches):
    """Writes the shards of the parts whose events (part, user, row, time) come in order. Runs in a task.

    Another attempt at the same part may run at the same time, or have run: each writes into a folder of its own, and the
    first to end gives it the part's name.
    """
    for part, number_N, rows_N, time_N in _by_part(batches):
        target = folder / f"{part:05d}"
        try:
            with finished_whole(target, uuid.uuid4().hex) as partial:
                write_part(partial, ids, layout, part, number_N, rows_N, time_N)
        except OSError:
            if not target.is_dir():
                raise
        yield pa.RecordBatch.from_pydict({"part": pa.array([part], pa.int32())})


def _by_part(batches):
    """Each part with all of its user numbers, rows of M and times, (N,)."""
    current, found = None, []
    for batch in batches:
        part_N, *columns = (
            column.to_numpy(zero_copy_only=False) for column in batch.columns
        )
        cuts = [0, *(np.flatnonzero(np.diff(part_N)) + 1), len(part_N)]
        for start, end in itertools.pairwise(cuts):
            if start == end:
                continue
            if part_N[start] != current:
                if found:
                    yield current, *map(np.concatenate, zip(*found, strict=True))
                current, found = int(part_N[start]), []
            found.append([column[start:end] for column in columns])
    if found:
        yield current, *map(np.concatenate, zip(*found, strict=True))
