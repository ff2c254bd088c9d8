"""Counts what is newer than an export: events of logs, or of a prepared dataset that has them.

Logs are counted from the export's newest counted event on, and its counts are carried on. A dataset
is counted whole, and so its counts are those of an export made of it.

Legend of shapes: N items of a domain, J half-lives, K items and days of the logs, M rows of the
dataset's item matrix, T its days.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb import DuckDBPyConnection, DuckDBPyRelation

from trainer.config.prepare import memory_bytes
from trainer.config.serving import RefreshConfig
from trainer.data.duckdb_engine import (
    open_engine,
    query_time_span,
    query_value,
)
from trainer.data.format.dataset import FILE_NAME, Dataset
from trainer.data.format.shards import read_blocks
from trainer.data.format.vocabulary import read_item_ids
from trainer.data.log_times import LogTimes, refuse_other_times
from trainer.data.logs.duckdb_logs import open_log
from trainer.data.logs.files import find_logs
from trainer.data.recent_counts import Days
from trainer.errors import InputError
from trainer.files.progress import Stages
from trainer.serving.exported_counts import ExportedCounts, ExportedDomain
from trainer.serving.item_offsets import CountMoment, OffsetFormula

_BATCH = 1 << 20  # items and days that are added at once


@dataclass
class EventCounts:
    """How many events were counted, and how many were not.

    events: of items that the export has. older: counted already. unknown_items, unknown_domains:
    newer ones that the export cannot count.
    """

    events: int = 0
    older: int = 0
    unknown_items: int = 0
    unknown_domains: int = 0


@dataclass(frozen=True)
class NewerCounts:
    """Counts of each domain's items as of a moment, float64 (N, J), and what was counted newly."""

    moment: CountMoment
    counts: list[np.ndarray]
    counted: EventCounts

    def to_record(self) -> dict[str, Any]:
        """{"events": 812, "older": 0, …, "until": 1764146000.0, "as_of": 20419}"""
        record = asdict(self.counted)
        record["until"] = self.moment.until
        record["as_of"] = self.moment.as_of
        return record


def count_newer(
    export: ExportedCounts,
    config: RefreshConfig,
    scratch: Path,
    stages: Stages,
) -> NewerCounts:
    """The export's counts with what is newer in the logs, or in the dataset that has them.

    scratch: gets what does not fit into memory. Raises InputError where nothing is newer, and for
    whatever is wrong with the logs.
    """
    dataset = _find_dataset(config.inputs)
    if dataset is not None:
        return _count_dataset(export, dataset, stages)
    memory = memory_bytes(config.memory)
    threads = len(os.sched_getaffinity(0))
    with open_engine(
        scratch,
        memory,
        threads,
        stages,
    ) as connection:
        return _count_logs(
            export,
            config,
            connection,
            stages,
        )


def _find_dataset(inputs: Sequence[str]) -> Path | None:
    """The folder of the prepared dataset that is given in place of logs; None of logs."""
    if len(inputs) == 1:
        folder = Path(inputs[0])
        if (folder / FILE_NAME).is_file():
            return folder
    return None


def _count_dataset(
    export: ExportedCounts, folder: Path, stages: Stages
) -> NewerCounts:
    """The counts of a dataset's events as of the day after its last."""
    dataset = Dataset.load(folder)
    moment = CountMoment.of(dataset)
    refuse_other_times(
        export.folder,
        export.log_times,
        folder,
        dataset.log_times,
    )
    if moment.unit != export.moment.unit:
        raise InputError(
            f"{folder}: its counts are of {moment.unit}, the export's of "
            f"{export.moment.unit}: export the run again"
        )
    _require_newer(export, folder, moment.until)
    sums = _DatasetSums(dataset, export.formula)
    with stages(
        "counting the dataset",
        total=dataset.interactions,
    ) as advance:
        for shard in dataset.shards:
            for _, block in read_blocks(dataset, shard):
                sums.add(block.items_N, block.ticks_N)
                advance(len(block.items_N))
    counts = []
    counted = EventCounts()
    for domain in export.domains:
        row_N = _rows_in_dataset(dataset, domain)
        counts.append(sums.of_rows(row_N))
        counted.events += sums.events(row_N)
    counted.unknown_items = dataset.interactions - counted.events
    return NewerCounts(moment, counts, counted)


class _DatasetSums:
    """Faded counts of all rows of a dataset's item matrix, as of the day after its last."""

    def __init__(self, dataset: Dataset, formula: OffsetFormula) -> None:
        self._days = Days.of(dataset)
        days = self._days.count
        self._weight_TJ = formula.fade(days - np.arange(days))
        rows = dataset.num_embeddings
        half_lives = len(formula.half_lives)
        self._counts_JM = np.zeros((half_lives, rows))
        self._events_M = np.zeros(rows, np.int64)

    def add(self, rows_K: np.ndarray, ticks_K: np.ndarray) -> None:
        """Counts some events."""
        day_K = self._days.of_ticks(ticks_K)
        weight_KJ = self._weight_TJ[day_K]
        for j, counts_M in enumerate(self._counts_JM):
            np.add.at(counts_M, rows_K, weight_KJ[:, j])
        np.add.at(self._events_M, rows_K, 1)

    def of_rows(self, row_N: np.ndarray) -> np.ndarray:
        """The counts of some rows, float64 (N, J); 0 where the row is −1."""
        counts_NJ = self._counts_JM[:, row_N].T
        counts_NJ[row_N < 0] = 0
        return counts_NJ

    def events(self, row_N: np.ndarray) -> int:
        """How many events these rows have together."""
        known_K = row_N[row_N >= 0]
        return int(self._events_M[known_K].sum())


def _rows_in_dataset(dataset: Dataset, domain: ExportedDomain) -> np.ndarray:
    """The row of M of each exported item, int64 (N,); −1 where the dataset does not have it."""
    row_N = np.full(len(domain.ids), -1)
    for other in dataset.domains:
        if other.name != domain.name:
            continue
        ids = read_item_ids(dataset, other)
        texts = ids.cast(pa.large_string())
        place_N = pc.index_in(domain.ids, value_set=texts)
        item_N = _to_numpy(place_N)
        is_there_N = item_N >= 0
        row_N[is_there_N] = other.start + item_N[is_there_N]
    return row_N


def _count_logs(
    export: ExportedCounts,
    config: RefreshConfig,
    connection: DuckDBPyConnection,
    stages: Stages,
) -> NewerCounts:
    """The export's counts carried to the day after the logs' last, with the newer events of these."""
    with stages("reading the logs"):
        logs = find_logs(config.inputs, verbose=True)
        reading = open_log(
            connection,
            logs,
            config,
            config.log_domain,
        )
        _, newest = query_time_span(connection, "log")
    path = logs[0].path
    refuse_other_times(
        export.folder,
        export.log_times,
        path,
        LogTimes.of(reading.dates, newest),
    )
    _require_newer(export, path, newest)
    before = export.moment
    as_of = before.day_of(newest) + 1
    moment = replace(
        before,
        as_of=as_of,
        until=float(newest),
    )
    faded_1J = export.formula.fade(np.array([as_of - before.as_of]))
    counts = [domain.counts_NJ * faded_1J for domain in export.domains]
    counted = EventCounts()
    with stages("counting the logs"):
        _create_items(connection, export.domains)
        newer = _query_newer(connection, before)
        for batch in newer.to_arrow_reader(_BATCH):
            groups = _EventGroups.of(batch)
            groups.add_to(counts, export.formula, as_of)
            groups.tell(counted)
        counted.older = query_value(
            connection,
            f'SELECT count(*) FROM log WHERE "time"::DOUBLE <= {before.until!r}',
        )
    return NewerCounts(moment, counts, counted)


@dataclass(frozen=True)
class _EventGroups:
    """Newer events by domain, item and day: int64 (K,) each; −1 where one is not known.

    Of two domains, two events of an item of the first one, one of an unknown item of the second
    one, and five of an unknown domain:

        number_K    0    1    -1
        item_K      7    -1   -1
        day_K       3    3    3
        events_K    2    1    5
    """

    number_K: np.ndarray
    item_K: np.ndarray
    day_K: np.ndarray
    events_K: np.ndarray

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "_EventGroups":
        """The groups of a batch of `_query_newer`."""
        return cls(
            number_K=_to_numpy(batch["number"]),
            item_K=_to_numpy(batch["item"]),
            day_K=_to_numpy(batch["day"]),
            events_K=_to_numpy(batch["events"]),
        )

    def add_to(
        self,
        counts: list[np.ndarray],
        formula: OffsetFormula,
        as_of: int,
    ) -> None:
        """Adds the events of known items to the domains' counts."""
        is_known_K = self.item_K >= 0
        for number, counts_NJ in enumerate(counts):
            own_K = is_known_K & (self.number_K == number)
            weight_KJ = formula.fade(as_of - self.day_K[own_K])
            weight_KJ *= self.events_K[own_K, None]
            np.add.at(counts_NJ, self.item_K[own_K], weight_KJ)

    def tell(self, counted: EventCounts) -> None:
        """Adds up which events are counted, and which cannot be."""
        is_known_K = self.item_K >= 0
        is_nowhere_K = self.number_K < 0
        unknown = self.events_K.sum() - self.events_K[is_known_K].sum()
        nowhere = self.events_K[is_nowhere_K].sum()
        counted.events += int(self.events_K[is_known_K].sum())
        counted.unknown_domains += int(nowhere)
        counted.unknown_items += int(unknown - nowhere)


def _create_items(
    connection: DuckDBPyConnection, domains: list[ExportedDomain]
) -> None:
    """Makes the tables `domains` (number, domain) and `items` (number, item, item_id)."""
    names = [domain.name for domain in domains]
    numbers = np.arange(len(names))
    columns = {"number": numbers, "domain": names}
    connection.register("given_domains", pa.table(columns))
    connection.execute("CREATE TABLE domains AS FROM given_domains")
    tables = []
    for number, domain in enumerate(domains):
        count = len(domain.ids)
        columns = {
            "number": np.full(count, number),
            "item": np.arange(count),
            "item_id": domain.ids,
        }
        tables.append(pa.table(columns))
    connection.register("given_items", pa.concat_tables(tables))
    connection.execute("CREATE TABLE items AS FROM given_items")


def _query_newer(
    connection: DuckDBPyConnection, moment: CountMoment
) -> DuckDBPyRelation:
    """Events that a moment does not count, by domain, item and day, where these are known."""
    return connection.sql(f"""
        SELECT d.number, i.item, l.day, sum(l.events)::BIGINT AS events
        FROM (
            SELECT
                domain,
                item_id::VARCHAR AS item_id,
                floor(("time"::DOUBLE - {moment.origin!r}) / {moment.length!r})::BIGINT AS day,
                count(*) AS events
            FROM log
            WHERE "time"::DOUBLE > {moment.until!r}
            GROUP BY ALL) l
        LEFT JOIN domains d ON d.domain = l.domain
        LEFT JOIN items i ON i.number = d.number AND i.item_id = l.item_id
        GROUP BY ALL""")


def _to_numpy(column: pa.Array) -> np.ndarray:
    """A column of whole numbers, int64, −1 where it has none."""
    filled = column.cast(pa.int64()).fill_null(-1)
    return filled.to_numpy(zero_copy_only=False)


def _require_newer(export: ExportedCounts, log: object, newest: float) -> None:
    """Raises InputError where nothing is newer than what the export counts."""
    until = export.moment.until
    if not newest > until:
        raise InputError(
            f"{log}: nothing is newer than what {export.folder} counts (its newest event is of "
            f"{newest:.15g}, the export's of {until:.15g}): give newer logs"
        )
