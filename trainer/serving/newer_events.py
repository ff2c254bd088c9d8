"""Counts what is newer than an export: events of logs, or of a prepared dataset that has them.

Logs are counted from the export's newest counted event on, and its counts are carried on. A dataset
is counted whole, and so its counts are those of an export made of it.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from safetensors.numpy import load_file

from trainer.config.prepare import memory_bytes
from trainer.config.serving import RefreshConfig
from trainer.data.duckdb_engine import open_engine, query_time_span
from trainer.data.format.dataset import FILE_NAME, Dataset
from trainer.data.format.shards import read_blocks
from trainer.data.format.vocabulary import read_item_ids
from trainer.data.log_times import LogTimes, refuse_other_times
from trainer.data.logs.duckdb_logs import open_log
from trainer.data.logs.files import find_logs
from trainer.data.recent_counts import Days
from trainer.errors import InputError
from trainer.files.progress import Stages
from trainer.serving.item_offsets import CountMoment, OffsetFormula

_BATCH = 1 << 20


@dataclass(frozen=True)
class ExportedDomain:
    """A domain of an exported folder, and its items' ids as texts in the order of their vectors."""

    folder: Path
    name: str
    ids: pa.LargeStringArray

    @classmethod
    def read(cls, folder: Path, name: str, items: int) -> "ExportedDomain":
        """Reads the ids. Raises OSError, ValueError, KeyError."""
        stored = load_file(folder / "ids.safetensors")
        ids = pa.LargeStringArray.from_buffers(
            len(stored["offsets"]) - 1,
            pa.py_buffer(stored["offsets"]),
            pa.py_buffer(stored["bytes"]),
        )
        if len(ids) != items:
            raise ValueError(f"{folder.name} has {len(ids)} ids")
        return cls(folder, name, ids)


@dataclass(frozen=True)
class NewerCounts:
    """Counts of each domain's items as of a moment, float64 (N, J), and what was counted newly.

    events: of known items. older: events that were counted already. unknown_items,
    unknown_domains: newer events that the export cannot count.
    """

    moment: CountMoment
    counts: list[np.ndarray]
    events: int = 0
    older: int = 0
    unknown_items: int = 0
    unknown_domains: int = 0

    def to_record(self) -> dict[str, Any]:
        """{"events": 812, "older": 0, …, "until": 1764146000.0, "as_of": 20419}"""
        return {
            "events": self.events,
            "older": self.older,
            "unknown_items": self.unknown_items,
            "unknown_domains": self.unknown_domains,
            "until": self.moment.until,
            "as_of": self.moment.as_of,
        }


def find_dataset(inputs: Sequence[str]) -> Path | None:
    """The folder of the prepared dataset that is given in place of logs; None of logs."""
    if len(inputs) == 1 and (Path(inputs[0]) / FILE_NAME).is_file():
        return Path(inputs[0])
    return None


def count_dataset(
    folder: Path,
    before: NewerCounts,
    formula: OffsetFormula,
    domains: list[ExportedDomain],
    times: LogTimes,
    stages: Stages,
) -> NewerCounts:
    """The counts of a dataset's events as of the day after its last, by the export's items."""
    dataset = Dataset.load(folder)
    moment = CountMoment.of(dataset)
    refuse_other_times("the export", times, folder, dataset.log_times)
    if moment.unit != before.moment.unit:
        raise InputError(
            f"{folder}: its counts are of {moment.unit}, the export's of "
            f"{before.moment.unit}: export the run again"
        )
    if not moment.until > before.moment.until:
        raise InputError(_nothing_newer(folder, moment.until, before.moment))
    days = Days.of(dataset)
    weight_TJ = formula.fade(days.count - np.arange(days.count))
    counts_JM = np.zeros((len(formula.half_lives), dataset.num_embeddings))
    events_M = np.zeros(dataset.num_embeddings, np.int64)
    total = dataset.interactions
    with stages("counting the dataset", total=total) as advance:
        for shard in dataset.shards:
            for _, block in read_blocks(dataset, shard):
                weight_KJ = weight_TJ[days.of_ticks(block.ticks_N)]
                for j, counts_M in enumerate(counts_JM):
                    np.add.at(counts_M, block.items_N, weight_KJ[:, j])
                np.add.at(events_M, block.items_N, 1)
                advance(len(block.items_N))
    counts = []
    events = 0
    for domain in domains:
        row_N = _rows_in_dataset(dataset, domain)
        is_there_N = row_N >= 0
        counts_NJ = counts_JM[:, row_N].T
        counts_NJ[~is_there_N] = 0
        counts.append(counts_NJ)
        events += int(events_M[row_N[is_there_N]].sum())
    return NewerCounts(moment, counts, events, unknown_items=total - events)


def _rows_in_dataset(dataset: Dataset, domain: ExportedDomain) -> np.ndarray:
    """The row of M of each exported item, int64 (N,); −1 where the dataset does not have it."""
    names = [other.name for other in dataset.domains]
    if domain.name not in names:
        return np.full(len(domain.ids), -1)
    other = dataset.domains[names.index(domain.name)]
    ids = read_item_ids(dataset, other).cast(pa.large_string())
    place_N = pc.index_in(domain.ids, value_set=ids)
    item_N = place_N.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(item_N >= 0, other.start + item_N.astype(np.int64), -1)


def count_logs(
    config: RefreshConfig,
    before: NewerCounts,
    formula: OffsetFormula,
    domains: list[ExportedDomain],
    times: LogTimes,
    scratch: Path,
    stages: Stages,
) -> NewerCounts:
    """The export's counts carried to the day after the logs' last, with the newer events of these."""
    memory = memory_bytes(config.memory)
    threads = len(os.sched_getaffinity(0))
    with open_engine(scratch, memory, threads, stages) as connection:
        with stages("reading the logs"):
            logs = find_logs(config.inputs, verbose=True)
            reading = open_log(connection, logs, config, config.log_domain)
            _, newest = query_time_span(connection, "log")
        found = LogTimes.of(reading.dates, newest)
        refuse_other_times("the export", times, logs[0].path, found)
        until = before.moment.until
        if not newest > until:
            raise InputError(
                _nothing_newer(logs[0].path, newest, before.moment)
            )
        as_of = before.moment.day_of(newest) + 1
        moment = replace(before.moment, as_of=as_of, until=float(newest))
        fade_1J = formula.fade(np.array([as_of - before.moment.as_of]))
        counts = [counts_NJ * fade_1J for counts_NJ in before.counts]
        with stages("counting the logs"):
            _create_items(connection, domains)
            result = _count_newer(connection, moment, until)
            older = _count_older(connection, until)
        sums = {"events": 0, "unknown_items": 0, "unknown_domains": 0}
        for batch in result.to_arrow_reader(_BATCH):
            _add_batch(batch, counts, formula, as_of, sums)
    return NewerCounts(moment, counts, older=older, **sums)


def _add_batch(
    batch: pa.RecordBatch,
    counts: list[np.ndarray],
    formula: OffsetFormula,
    as_of: int,
    sums: dict[str, int],
) -> None:
    """Adds events by domain, item and day to the counts, or to what cannot be counted.

    Of two domains, of which the second one's item is not known:

        number    0    1     null
        item      7    null  null
        day       3    3     3
        events    2    1     5       sums: 2 events, 1 of unknown items, 5 of unknown domains
    """
    columns = {}
    for name in ("number", "item", "day", "events"):
        column = batch[name].fill_null(-1)
        columns[name] = column.to_numpy(zero_copy_only=False)
    number_K = columns["number"]
    item_K = columns["item"]
    events_K = columns["events"]
    sums["unknown_domains"] += int(events_K[number_K < 0].sum())
    is_unknown_K = (number_K >= 0) & (item_K < 0)
    sums["unknown_items"] += int(events_K[is_unknown_K].sum())
    sums["events"] += int(events_K[item_K >= 0].sum())
    for number, counts_NJ in enumerate(counts):
        own_K = (number_K == number) & (item_K >= 0)
        weight_KJ = formula.fade(as_of - columns["day"][own_K])
        weight_KJ *= events_K[own_K][:, None]
        np.add.at(counts_NJ, item_K[own_K], weight_KJ)


def _create_items(connection: Any, domains: list[ExportedDomain]) -> None:
    """Makes the tables `domains` (number, domain) and `items` (number, item, item_id)."""
    names = [domain.name for domain in domains]
    numbers = np.arange(len(names), dtype=np.int32)
    connection.register(
        "given_domains", pa.table({"number": numbers, "domain": names})
    )
    connection.execute("CREATE TABLE domains AS FROM given_domains")
    tables = []
    for number, domain in enumerate(domains):
        items = np.arange(len(domain.ids), dtype=np.int64)
        columns = {
            "number": np.full(len(items), number, np.int32),
            "item": items,
            "item_id": domain.ids,
        }
        tables.append(pa.table(columns))
    connection.register("given_items", pa.concat_tables(tables))
    connection.execute("CREATE TABLE items AS FROM given_items")


def _count_newer(connection: Any, moment: CountMoment, until: float) -> Any:
    """Events after `until` by domain, item and day, where these are known."""
    return connection.sql(f"""
        SELECT d.number, i.item, day, sum(events)::BIGINT AS events
        FROM (
            SELECT domain, item_id::VARCHAR AS item_id,
                floor(("time"::DOUBLE - {moment.origin!r}) / {moment.length!r})::BIGINT AS day,
                count(*) AS events
            FROM log
            WHERE "time"::DOUBLE > {until!r}
            GROUP BY ALL) l
        LEFT JOIN domains d ON d.domain = l.domain
        LEFT JOIN items i ON i.number = d.number AND i.item_id = l.item_id
        GROUP BY ALL""")


def _count_older(connection: Any, until: float) -> int:
    """Events that are counted already."""
    query = f'SELECT count(*) FROM log WHERE "time"::DOUBLE <= {until!r}'
    ((older,),) = connection.execute(query).fetchall()
    return older


def _nothing_newer(log: object, newest: float, moment: CountMoment) -> str:
    return (
        f"{log}: nothing is newer than what the export counts (its newest event is of "
        f"{newest:.15g}, the export counts until {moment.until:.15g}): give newer logs"
    )
