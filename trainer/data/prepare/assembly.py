"""The dataset from its parts: vocabularies, users, lengths, `dataset.json`, and shards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from trainer.config.prepare import PrepareConfig
from trainer.data.duckdb_engine import parquet_folder_sql
from trainer.data.format.dataset import (
    LENGTHS,
    LENGTHS_DTYPE,
    USERS,
    Dataset,
    Domain,
    File,
    Shard,
)
from trainer.data.prepare.ids import Ids
from trainer.data.prepare.layout import Layout
from trainer.data.prepare.overlap import write_overlap

PERCENTILES = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
_PARQUET_ROWS = 1 << 17


def assemble(
    folder: Path,
    ids_folder: Path,
    part_folders: list[Path],
    layout: Layout,
    config: PrepareConfig,
    connection: DuckDBPyConnection,
) -> Dataset:
    """Makes the dataset in `folder` of the numbered ids and the finished parts.

    ids_folder: what `number_ids` wrote, see `Ids`.
    part_folders: what `write_part` wrote, in the order of the parts. Their shards are moved
    into `folder`.
    config: has the seed by which users were numbered, and the order of equal times.
    May be called again after an interruption.
    """
    ids = Ids.load(ids_folder)
    summaries = []
    for part in part_folders:
        path = part / "facts.json"
        text = path.read_text(encoding="utf-8")
        summaries.append(json.loads(text))
    (folder / "vocabulary").mkdir(exist_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    domains = _write_vocabularies(
        folder, ids, ids_folder, part_folders, connection
    )
    _write_users(folder, ids_folder, connection)
    lengths_shape = (ids.users, len(domains))
    _join_lengths(folder / LENGTHS, part_folders, lengths_shape)
    shards = _take_shards(folder, part_folders, summaries)
    file_names = [USERS, LENGTHS]
    for domain in domains:
        file_names.append(domain.vocabulary)
    files = []
    for name in file_names:
        files.append(File.of(folder, name))
    dataset = Dataset(
        folder=folder,
        seed=config.seed,
        users=ids.users,
        interactions=ids.interactions,
        too_short=sum(summary["too_short"] for summary in summaries),
        max_length=max(summary["max_length"] for summary in summaries),
        first_time=ids.first_time,
        last_time=ids.last_time,
        block_users=layout.block_users,
        streams=layout.streams,
        domains=tuple(domains),
        shards=tuple(shards),
        files=tuple(files),
        tie_order=config.tie_order,
        tied_users=sum(summary["tied_users"] for summary in summaries),
        time_kind=ids.time_kind,
        time_unit=ids.time_unit,
    )
    dataset.save()
    write_overlap(folder, ids.names, part_folders)
    return dataset


def percentiles(lengths: np.ndarray, users: np.ndarray) -> dict[str, int]:
    """Returns p5, p50, p95 and max of lengths (rising), which so many users have.

    Each is the least length that enough users do not exceed; 0 where there are no users. Of the
    lengths [1, 2, 9], which [6, 3, 1] users have, p50 is 1 and p95 is 9.
    """
    if not len(users):
        return dict.fromkeys(PERCENTILES, 0)
    share = np.cumsum(users) / users.sum()
    values = {}
    for name, quantile in PERCENTILES.items():
        index = np.searchsorted(share, quantile)
        values[name] = int(lengths[index])
    return values


def _write_vocabularies(
    folder: Path,
    ids: Ids,
    ids_folder: Path,
    part_folders: list[Path],
    connection: DuckDBPyConnection,
) -> list[Domain]:
    """Writes the vocabulary of each domain, and counts its users and their lengths."""
    items = parquet_folder_sql(ids_folder / "items")
    num_embeddings = ids.starts[-1]
    held_out_counts = _sum_held_out(part_folders, num_embeddings)
    histograms = []
    for part in part_folders:
        histograms.append(np.load(part / "histograms.npy"))
    histogram = np.concatenate(histograms)
    domains = []
    for number, name in enumerate(ids.names):
        rows = connection.sql(f"""
            SELECT item_id, row::BIGINT AS row, total
            FROM {items}
            WHERE domain = {number}
            ORDER BY row""")
        vocabulary = f"vocabulary/{number}.parquet"
        reader = rows.to_arrow_reader()
        _write_parquet(folder / vocabulary, reader, held_out_counts)
        in_domain = histogram[:, 0] == number
        part_lengths = histogram[in_domain, 1]
        part_users = histogram[in_domain, 2]
        lengths, users = _sum_by_key(part_lengths, part_users)
        domain = Domain(
            name=name,
            start=ids.starts[number],
            items=ids.items[number],
            room=ids.rooms[number],
            users=int(users.sum()),
            interactions=int(users @ lengths),
            length_percentiles=percentiles(lengths, users),
            vocabulary=vocabulary,
        )
        domains.append(domain)
    return domains


def _sum_held_out(part_folders: list[Path], rows: int) -> np.ndarray:
    """Counts how often each row of M is a validation or test item, int64 (rows,).

    Of two parts and 6 rows of M:

        held.npy of part 0    [[0, 1, 3], [1, 2, 1]]
        held.npy of part 1    [[1, 5], [3, 1]]
        returns               [1, 5, 0, 1, 0, 1]
    """
    counts = np.zeros(rows, np.int64)
    for part in part_folders:
        part_rows, part_counts = np.load(part / "held.npy")
        counts[part_rows] += part_counts
    return counts


def _sum_by_key(
    keys: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rising keys, each once, and the sums of their counts, int64.

    Of the keys [3, 1, 3] and the counts [4, 5, 6] these are [1, 3] and [5, 10].
    """
    distinct, index = np.unique(keys, return_inverse=True)
    sums = np.bincount(index, weights=counts, minlength=len(distinct))
    return distinct, sums.astype(np.int64)


def _write_users(
    folder: Path,
    ids_folder: Path,
    connection: DuckDBPyConnection,
) -> None:
    """Writes the users' ids in the order of their numbers."""
    users = parquet_folder_sql(ids_folder / "users")
    rows = connection.sql(f"""
        SELECT user_id, "user"::BIGINT AS "user"
        FROM {users}
        ORDER BY "user" """)
    _write_parquet(folder / USERS, rows.to_arrow_reader())


def _join_lengths(
    path: Path,
    part_folders: list[Path],
    shape: tuple[int, int],
) -> None:
    """Joins the parts' lengths, one part in memory at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(LENGTHS_DTYPE),
        "fortran_order": False,
        "shape": shape,
    }
    with open(path, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for part in part_folders:
            lengths = np.load(part / LENGTHS)
            lengths.tofile(stream)


def _take_shards(
    folder: Path,
    part_folders: list[Path],
    summaries: list[dict[str, Any]],
) -> list[Shard]:
    """Moves the parts' shards into the dataset's folder."""
    shards = []
    for part, summary in zip(part_folders, summaries, strict=True):
        for record in summary["shards"]:
            shard = Shard(**record)
            source = part / shard.name
            if source.exists():  # else it was taken before an interruption
                source.rename(folder / shard.name)
            shards.append(shard)
    return shards


def _write_parquet(
    path: Path,
    reader: pa.RecordBatchReader,
    held_out_counts: np.ndarray | None = None,
) -> None:
    """Writes a stream in row groups of one size, whatever batches it comes in.

    held_out_counts: by row of M, to subtract from the column `total`, which becomes `count`.
    """
    schema = _rename_total(reader.schema)
    with pq.ParquetWriter(path, schema) as writer:
        for table in _regroup_rows(reader):
            if held_out_counts is not None:
                rows = table["row"].to_numpy()
                totals = table["total"].to_numpy()
                training_counts = totals - held_out_counts[rows]
                count = pa.array(training_counts, pa.int64())
                table = table.set_column(2, "count", count)
            table = table.combine_chunks()
            writer.write_table(table.cast(writer.schema))


def _regroup_rows(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yields the rows in tables of `_PARQUET_ROWS`, and the rest in a last one."""
    waiting = []
    for batch in reader:
        waiting.append(batch)
        table = pa.Table.from_batches(waiting, schema=reader.schema)
        groups = len(table) // _PARQUET_ROWS
        whole = groups * _PARQUET_ROWS
        for start in range(0, whole, _PARQUET_ROWS):
            yield table.slice(start, _PARQUET_ROWS)
        waiting = table.slice(whole).to_batches()
    rest = pa.Table.from_batches(waiting, schema=reader.schema)
    if len(rest):
        yield rest


def _rename_total(schema: pa.Schema) -> pa.Schema:
    """Returns the schema with `total` called `count`."""
    fields = []
    for field in schema:
        if field.name == "total":
            field = pa.field("count", field.type)
        fields.append((field.name, field.type))
    return pa.schema(fields)
