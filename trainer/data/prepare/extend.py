"""New logs onto a prepared dataset, whose items keep their rows of the item matrix M.

An extended dataset says what became of the one before it:

    extension/rows.parquet     domain, item_id, old_row, new_row: every item of either; without
                               a new row it was retired
    extension/users.npy        the numbers of the users with rows that came with the new logs
    extension/extension.json   how much came, twice or late, and what it made of every domain

Everything is DuckDB's, out of core, but for one number a user.

Items keep their place in their domain, and new ones fill the free places. Two domains:

    domain  item  old row  place  events         domain  item  place  row
    shop    a     0        0      3              shop    a     0      0
    shop    b     1        1      –  (retired)   shop    z     1      1
    shop    c     2        2      1              shop    c     2      2
    shop    z     –               5      →       shop    y     3      3
    shop    y     –               2              ads     p     0      67
    ads     p     67       0      4              ads     q     1      68
    ads     q     68       1      4
"""

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from duckdb import DuckDBPyConnection

from trainer.data.duckdb_engine import (
    escape_sql,
    open_limited_engine,
    parquet_folder_sql,
    parquet_sql,
    query_value,
)
from trainer.data.format.dataset import USERS, Dataset, Domain
from trainer.data.prepare.ids import reserve_rows
from trainer.data.prepare.stored_log import (
    StoredLog,
    column_type,
    has_positions,
    read_counts,
)
from trainer.data.tie_order import FILE, HASH
from trainer.errors import InputError
from trainer.files.staged import write_record
from trainer.run_files import EXTENSION

_FLOAT_TEXT = re.compile("-?[0-9]+[.]0")  # what a float's text was
_BATCH = 1 << 20  # rows of a result that are in memory at once


def load_extendable(
    folder: str | Path, whole_log: bool = False, tie_order: str = HASH
) -> Dataset:
    """Loads the dataset that is to be extended.

    tie_order: of the new dataset. Says where it is another than that of the old one.
    Raises InputError where it cannot be, with what can be done.
    """
    old = Dataset.load(folder)
    if old.cache is not None:
        raise InputError(
            f"{folder}: an address cannot be extended: copy the dataset to a folder"
        )
    if not whole_log and StoredLog.load(old.folder) is None:
        raise InputError(
            f"{folder}: keeps no log: prepare it with --keep-log, "
            "or give the whole log as --input and say so with --whole-log"
        )
    if whole_log:
        return old
    if tie_order == FILE and not has_positions(old.folder):
        raise InputError(
            f"{folder}: its log was kept without the order of the rows: leave out "
            "--tie-order file, or give the whole log as --input with --whole-log"
        )
    refuse_float_texts(old)
    if old.tie_order is None:
        print(
            f"{folder}: was prepared with equal times in the order of domain and item; "
            "from now on a hash orders them, in the old log's rows too",
            file=sys.stderr,
        )
    return old


def refuse_float_texts(old: Dataset) -> None:
    """Raises InputError where a dataset of format version 4 has made ids like '56.0' of floats.

    The same ids are 56 now: nobody who asks would be known, and each user and item would be there
    twice in an extension.
    """
    if old.tie_order is not None:
        return
    columns = [(USERS, "user_id")]
    for domain in old.domains:
        if _FLOAT_TEXT.fullmatch(domain.name):
            _refuse_float_text(old, "domain", domain.name)
        columns.append((domain.vocabulary, "item_id"))
    with open_limited_engine() as connection:
        for name, column in columns:
            query = f"""
                SELECT any_value({column})
                FROM {parquet_sql(old.local(name))}
                WHERE regexp_full_match({column}::VARCHAR, '{_FLOAT_TEXT.pattern}')"""
            text = query_value(connection, query)
            if text is not None:
                _refuse_float_text(old, column, text)


def _refuse_float_text(old: Dataset, column: str, text: str) -> NoReturn:
    number = text.partition(".")[0]
    raise InputError(
        f"{old.folder}: has the {column} {text!r}, which is read as {number} now: "
        "prepare the whole log again, from its source"
    )


def read_options(folder: str | Path) -> dict[str, Any]:
    """Returns how a dataset was prepared, for one that extends it: options of PrepareConfig."""
    old = Dataset.load(folder)
    log = StoredLog.load(Path(folder))
    options: dict[str, Any] = {"seed": old.seed, "streams": old.streams}
    if log is not None:
        options["min_user"] = log.min_user
        options["min_item"] = log.min_item
        options["min_domain"] = log.min_domain
    if old.tie_order is not None:
        options["tie_order"] = old.tie_order
    return options


def add_old_items(
    connection: DuckDBPyConnection,
    old: Dataset,
    retire: bool,
) -> None:
    """Makes the table `old_items` (domain, item_id, old_row) of the old dataset's items.

    Those without an event come into `distinct_items` (domain, item_id, total) too, unless they
    are retired.
    """
    item_type = query_value(
        connection, "SELECT typeof(item_id) FROM distinct_items LIMIT 1"
    )
    items_sql = _vocabularies_sql(old, item_type)
    connection.execute(f"CREATE TABLE old_items AS {items_sql}")
    if not retire:
        connection.execute("""
            INSERT INTO distinct_items
                SELECT domain, item_id, 0
                FROM old_items
                ANTI JOIN distinct_items USING (domain, item_id)""")


def order_domains(old: Dataset, names: Iterable[str]) -> list[str]:
    """Returns the old domains in their order, and then the new ones."""
    old_names = [domain.name for domain in old.domains]
    new_names = set(names) - set(old_names)
    return old_names + sorted(new_names, key=str.encode)


def reserve_extended_rows(old: Dataset, items: list[int]) -> list[int]:
    """Returns the rows for each domain of `order_domains`, which have so many items.

    Old domains keep theirs, and new ones get theirs. Where a domain has outgrown its rows, all
    are reserved anew.
    """
    old_rows = [domain.room for domain in old.domains]
    for count, rows in zip(items, old_rows, strict=False):
        if count > rows:
            return [reserve_rows(count) for count in items]
    return old_rows + [reserve_rows(count) for count in items[len(old_rows) :]]


def place_items(connection: DuckDBPyConnection, old: Dataset) -> None:
    """Makes the table `places` (domain, item_id, place) of `distinct_items`.

    An item keeps its place in its domain. New ones, by how many events they have, fill those
    that are free. If some are free still (their items were retired), the last ones move there:
    places are those from 0 to the number of items.
    """
    starts = []
    for domain in old.domains:
        starts.append(f"('{escape_sql(domain.name)}', {domain.start})")
    connection.execute(f"""
        CREATE TABLE placed AS
            SELECT
                i.domain,
                i.item_id,
                i.total,
                old_row - first AS old_place,
                count(*) OVER (PARTITION BY i.domain) AS size
            FROM distinct_items i
            LEFT JOIN old_items o ON i.domain = o.domain AND i.item_id = o.item_id
            LEFT JOIN (VALUES {", ".join(starts)}) d (domain, first)
                ON i.domain = d.domain;
        CREATE TABLE free AS
            SELECT
                domain,
                place,
                row_number() OVER (PARTITION BY domain ORDER BY place) AS number
            FROM (
                SELECT domain, unnest(range(max(size))) AS place
                FROM placed
                GROUP BY domain
            )
            ANTI JOIN (
                SELECT domain, old_place AS place
                FROM placed
                WHERE old_place < size
            ) USING (domain, place);
        CREATE TABLE places AS
            SELECT domain, item_id, old_place AS place
            FROM placed
            WHERE old_place < size
            UNION ALL
            SELECT w.domain, w.item_id, free.place
            FROM (
                SELECT
                    *,
                    row_number() OVER (
                        PARTITION BY domain
                        ORDER BY old_place NULLS LAST, total DESC, item_id::VARCHAR
                    ) AS number
                FROM placed
                WHERE old_place IS NULL OR old_place >= size
            ) w
            JOIN free USING (domain, number);
        DROP TABLE placed;
        DROP TABLE free""")


def write_extension(
    connection: DuckDBPyConnection,
    old: Dataset,
    ids_folder: Path,
    log_folder: Path,
    folder: Path,
    new: Dataset,
) -> None:
    """Writes the folder `extension` of the new dataset.

    The connection has the views that `open_stored_log` made.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = folder / "rows.parquet"
    _write_item_rows(connection, old, ids_folder, rows)
    users = parquet_folder_sql(ids_folder / "users")
    touched = connection.execute(f"""
        SELECT DISTINCT u."user"
        FROM newest
        JOIN {users} u USING (user_id)
        ORDER BY 1""")
    numbers = touched.fetchnumpy()["user"].astype(np.int64)
    np.save(folder / "users.npy", numbers)
    log_counts = read_counts(log_folder)
    record = {
        "of": old.fingerprint,
        "span_before": [old.first_time, old.last_time],
        "domains_before": [domain.name for domain in old.domains],
        "arrived": log_counts["arrived"],
        "delivered_before": log_counts["delivered_before"],
        "late": log_counts["late"],
        "before_window": log_counts["before_window"],
        "users": {"before": old.users, "now": new.users},
        "laid_out_anew": _is_laid_out_anew(old, new),
        "domains": _compare_domains(connection, old, new, rows),
    }
    write_record(folder / "extension.json", record)


def _write_item_rows(
    connection: DuckDBPyConnection,
    old: Dataset,
    ids_folder: Path,
    target: Path,
) -> None:
    """Writes rows.parquet: the old and the new row of every item."""
    item_type = column_type(
        connection, ids_folder / "items" / "0.parquet", "item_id"
    )
    connection.execute(f"""
        COPY (
            SELECT
                coalesce(o.domain, n.name) AS domain,
                coalesce(o.item_id, n.item_id) AS item_id,
                o.old_row,
                n.row::BIGINT AS new_row
            FROM ({_vocabularies_sql(old, item_type)}) o
            FULL OUTER JOIN {parquet_folder_sql(ids_folder / "items")} n
                ON o.domain = n.name AND o.item_id = n.item_id
            ORDER BY old_row NULLS LAST, new_row
        ) TO '{escape_sql(target)}' (FORMAT parquet)""")


def _is_laid_out_anew(old: Dataset, new: Dataset) -> bool:
    """Returns whether a domain that was there before begins at another row."""
    old_starts = {domain.name: domain.start for domain in old.domains}
    for domain in new.domains:
        if old_starts.get(domain.name, domain.start) != domain.start:
            return True
    return False


def _compare_domains(
    connection: DuckDBPyConnection,
    old: Dataset,
    new: Dataset,
    rows: Path,
) -> dict[str, dict[str, int]]:
    """Counts items and interactions before and now, by the new dataset's domains."""
    counts = connection.execute(f"""
        SELECT
            domain,
            count(*) FILTER (WHERE old_row IS NULL),
            count(*) FILTER (WHERE new_row IS NULL)
        FROM {parquet_sql(rows)}
        GROUP BY domain""").fetchall()
    new_items = {}
    retired_items = {}
    for name, new_count, retired_count in counts:
        new_items[name] = new_count
        retired_items[name] = retired_count
    old_domains: dict[str, Domain] = {
        domain.name: domain for domain in old.domains
    }
    domains = {}
    for domain in new.domains:
        items_before = 0
        interactions_before = 0
        old_domain = old_domains.get(domain.name)
        if old_domain is not None:
            items_before = old_domain.items
            interactions_before = old_domain.interactions
        domains[domain.name] = {
            "items_before": items_before,
            "items": domain.items,
            "new": new_items[domain.name],
            "retired": retired_items[domain.name],
            "interactions_before": interactions_before,
            "interactions": domain.interactions,
        }
    return domains


def read_old_rows(dataset: Dataset) -> np.ndarray:
    """Reads which row of the dataset before it each row of M was, −1 for a new one: int32.

    `write_extension` left it.
    """
    file = pq.ParquetFile(dataset.folder / EXTENSION / "rows.parquet")
    batches = file.iter_batches(_BATCH, columns=["old_row", "new_row"])
    return _collect_old_rows(dataset, batches)


def join_old_rows(
    old: Dataset,
    dataset: Dataset,
    connection: DuckDBPyConnection,
) -> np.ndarray:
    """Joins the same of any two datasets, by domains' names and items' ids as text."""
    joined = connection.sql(f"""
        SELECT o.old_row, n.old_row AS new_row
        FROM ({_vocabularies_sql(old, "VARCHAR")}) o
        JOIN ({_vocabularies_sql(dataset, "VARCHAR")}) n
            ON o.domain = n.domain AND o.item_id = n.item_id""")
    return _collect_old_rows(dataset, joined.to_arrow_reader(_BATCH))


def _collect_old_rows(
    dataset: Dataset, batches: Iterable[pa.RecordBatch]
) -> np.ndarray:
    """Returns the old row of each row of M, −1 for none: int32. batches: (old row, new row)."""
    old_rows = np.full(dataset.num_embeddings, -1, np.int32)
    for batch in batches:
        old_N = batch.column(0).fill_null(-1).to_numpy(zero_copy_only=False)
        new_N = batch.column(1).fill_null(-1).to_numpy(zero_copy_only=False)
        in_both = (old_N >= 0) & (new_N >= 0)
        old_rows[new_N[in_both]] = old_N[in_both]
    return old_rows


def _vocabularies_sql(dataset: Dataset, item_type: str) -> str:
    """Returns SQL for domain, item_id of a type, and old_row of all items."""
    selects = []
    for domain in dataset.domains:
        vocabulary = parquet_sql(dataset.local(domain.vocabulary))
        selects.append(f"""
            SELECT
                '{escape_sql(domain.name)}' AS domain,
                item_id::{item_type} AS item_id,
                row AS old_row
            FROM {vocabulary}""")
    return " UNION ALL ".join(selects)
