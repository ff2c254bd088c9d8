"""Numbering of users and items with DuckDB: one pass over the logs, out of core.

Users are numbered by (MD5 of seed and id, text of the id), items by (domain, text of the id).
An item's row of M follows its popularity within the domain. Rare users and items are dropped
first (the k-core).
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from duckdb import DuckDBPyConnection

from trainer.config.prepare import PrepareConfig
from trainer.data.duckdb_engine import (
    escape_sql,
    query_domain_spans,
    query_value,
)
from trainer.data.format.dataset import Dataset
from trainer.data.log_times import LogTimes, describe_mixed_units
from trainer.data.prepare.extend import (
    add_old_items,
    order_domains,
    place_items,
    reserve_extended_rows,
)
from trainer.data.prepare.ids import (
    Ids,
    refuse_beyond_int32,
    reserve_rows,
)
from trainer.data.prepare.left_out import record_left_out
from trainer.data.tie_order import item_key_sql, user_key_sql
from trainer.errors import InputError
from trainer.files.progress import Stages


def number_ids(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    folder: Path,
    stages: Stages,
    dates: bool,
    old: Dataset | None = None,
) -> None:
    """Writes the numbered users and items of the view `log` (see `Ids`) into `folder`.

    dates: the log's times are dates. old: the dataset that is extended.
    """
    with stages("numbering users and items"):
        _find_distinct_ids(connection)
    if drops_rare(config):
        with stages("dropping rare users and items"):
            _drop_rare(connection, config, old, folder)
    if old is not None:
        with stages("finding known items"):
            add_old_items(connection, old, config.retire)
            place_items(connection, old)
    for noun in ("users", "items"):
        count = query_value(connection, f"SELECT count(*) FROM distinct_{noun}")
        refuse_beyond_int32(count, noun)
    with stages("numbering users and items"):
        _number_users(connection, config.seed)
        spans = query_domain_spans(connection, "log")
        times = read_times(spans, dates, config.time_unit)
        ids = _summarize(connection, old, spans, times)
        ids.check()
        if old is None:
            _place_by_popularity(connection)
        _number_items(connection, ids)
        for table in ("users", "items"):
            (folder / table).mkdir()
            target = folder / table / "0.parquet"
            connection.execute(
                f"COPY {table} TO '{escape_sql(target)}' (FORMAT parquet)"
            )
            connection.execute(
                f"DROP TABLE {table}; DROP TABLE distinct_{table}"
            )
        ids.save(folder)


def _find_distinct_ids(connection: DuckDBPyConnection) -> None:
    """Makes the tables `distinct_users` and `distinct_items` (domain, item_id, total)."""
    connection.execute("""
        CREATE TABLE distinct_users AS
            SELECT DISTINCT user_id
            FROM log""")
    connection.execute("""
        CREATE TABLE distinct_items AS
            SELECT domain, item_id, count(*) AS total
            FROM log
            GROUP BY ALL""")


def drops_rare(config: PrepareConfig) -> bool:
    """Returns whether users, items or domains are dropped for having too few interactions."""
    return config.min_user > 1 or config.min_item > 1 or config.min_domain > 0


def _drop_rare(
    connection: DuckDBPyConnection,
    config: PrepareConfig,
    old: Dataset | None,
    folder: Path,
) -> None:
    """Leaves the k-core in `distinct_users` and `distinct_items`.

    Events are dropped until every user left has `min_user` and every item left `min_item`
    interactions, and every domain left `min_domain` and two items. Domains of the dataset that
    is extended stay. Domains that are left out are recorded in the folder.
    """
    connection.execute("""
        CREATE TABLE pairs AS
            SELECT u.rowid AS "user", i.rowid AS item, dense_domain AS domain
            FROM log
            JOIN distinct_users u USING (user_id)
            JOIN (
                SELECT
                    rowid,
                    domain,
                    item_id,
                    dense_rank() OVER (ORDER BY domain) AS dense_domain
                FROM distinct_items
            ) i USING (domain, item_id)""")
    before = query_domain_sizes(connection)
    dropped = 1
    while dropped:
        dropped = _drop_rare_once(connection, "item", config.min_item)
        dropped += _drop_rare_once(connection, "user", config.min_user)
        if config.min_domain:
            dropped += _drop_small_domains(connection, config.min_domain, old)
    if not query_value(connection, "SELECT count(*) FROM pairs"):
        refuse_nothing_left(config)
    connection.execute("""
        CREATE OR REPLACE TABLE distinct_users AS
            SELECT user_id
            FROM distinct_users
            WHERE rowid IN (SELECT "user" FROM pairs);
        CREATE OR REPLACE TABLE distinct_items AS
            SELECT domain, item_id, core.total
            FROM distinct_items
            JOIN (
                SELECT item, count(*) AS total
                FROM pairs
                GROUP BY item
            ) core ON distinct_items.rowid = core.item;
        DROP TABLE pairs""")
    if config.min_domain:
        after = query_domain_sizes(connection)
        record_left_out(folder, before, set(after))


def query_domain_sizes(
    connection: DuckDBPyConnection,
) -> dict[str, tuple[int, int]]:
    """Returns the items and interactions of each domain of `distinct_items`."""
    rows = connection.execute("""
        SELECT domain, count(*), sum(total)::BIGINT
        FROM distinct_items
        GROUP BY ALL
        ORDER BY ALL""").fetchall()
    sizes = {}
    for name, items, interactions in rows:
        sizes[name] = (items, interactions)
    return sizes


def refuse_nothing_left(config: PrepareConfig) -> NoReturn:
    """Raises InputError: every interaction was dropped."""
    flags = f"--min-user {config.min_user} --min-item {config.min_item}"
    if config.min_domain:
        flags += f" --min-domain {config.min_domain}"
    raise InputError(f"nothing is left with {flags}: lower them")


def _drop_small_domains(
    connection: DuckDBPyConnection,
    least: int,
    old: Dataset | None,
) -> int:
    """Drops the events of small domains; returns how many events."""
    names = ["''"]
    for domain in old.domains if old is not None else ():
        names.append(f"'{escape_sql(domain.name)}'")
    delete = f"""
        DELETE FROM pairs
        WHERE domain IN (
            SELECT domain
            FROM pairs
            GROUP BY domain
            HAVING count(*) < {least} OR count(DISTINCT item) < 2
        )
        AND item NOT IN (
            SELECT rowid
            FROM distinct_items
            WHERE domain IN ({", ".join(names)})
        )"""
    return query_value(connection, delete)


def _drop_rare_once(
    connection: DuckDBPyConnection,
    column: str,
    least: int,
) -> int:
    """Drops the events of rare users or items; returns how many events."""
    delete = f"""
        DELETE FROM pairs
        WHERE "{column}" IN (
            SELECT "{column}"
            FROM pairs
            GROUP BY "{column}"
            HAVING count(*) < {least}
        )"""
    return query_value(connection, delete)


def _number_users(connection: DuckDBPyConnection, seed: int) -> None:
    """Makes the table `users` (user_id, "user", key)."""
    key = user_key_sql(seed, "user_id")
    connection.execute(f"""
        CREATE TABLE users AS
            SELECT
                user_id,
                row_number() OVER (ORDER BY key, text) - 1 AS "user",
                key
            FROM (
                SELECT
                    user_id,
                    {key} AS key,
                    user_id::VARCHAR AS text
                FROM distinct_users
            )""")


def read_times(
    spans: list[tuple[str, float, float]],
    dates: bool,
    unit: str | None,
) -> LogTimes:
    """Tells the kind of a log's times; warns where its domains have several units.

    spans: name, first and last time of each domain. unit: of times that are numbers, where it is
    given.
    """
    if not dates:
        warning = describe_mixed_units(spans)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
    newest = max(last for _, _, last in spans)
    times = LogTimes.of(dates, newest, unit)
    if not dates and unit not in (None, times.unit):
        print(
            f"warning: --time-unit {unit}: the newest time, {newest}, looks like {times}",
            file=sys.stderr,
        )
    return times


def _summarize(
    connection: DuckDBPyConnection,
    old: Dataset | None,
    spans: list[tuple[str, float, float]],
    times: LogTimes,
) -> Ids:
    """Counts users, interactions, and the items of each domain."""
    counts = connection.execute("""
        SELECT domain, count(*)
        FROM distinct_items
        GROUP BY ALL
        ORDER BY ALL""").fetchall()
    items_by_domain = dict(counts)
    names = _order_names(items_by_domain, old)
    items = [items_by_domain.get(name, 0) for name in names]
    if old is None:
        rows = [reserve_rows(count) for count in items]
    else:
        rows = reserve_extended_rows(old, items)
    interactions_query = "SELECT sum(total)::BIGINT FROM distinct_items"
    return Ids(
        users=query_value(connection, "SELECT count(*) FROM users"),
        interactions=query_value(connection, interactions_query),
        names=tuple(names),
        items=tuple(items),
        rooms=tuple(rows),
        first_time=float(min(first for _, first, _ in spans)),
        last_time=float(max(last for _, _, last in spans)),
        time_kind=times.kind,
        time_unit=times.unit,
    )


def _order_names(names: Iterable[str], old: Dataset | None) -> list[str]:
    """Returns the domains in their order."""
    if old is None:
        return list(names)
    return order_domains(old, names)


def _place_by_popularity(connection: DuckDBPyConnection) -> None:
    """Makes the table `places` (domain, item_id, place), by popularity in the domain."""
    connection.execute("""
        CREATE TABLE places AS
            SELECT
                domain,
                item_id,
                row_number() OVER (
                    PARTITION BY domain
                    ORDER BY total DESC, item_id::VARCHAR
                ) - 1 AS place
            FROM distinct_items""")


def _number_items(connection: DuckDBPyConnection, ids: Ids) -> None:
    """Makes the table `items` (domain, name, item_id, total, item, row, key)."""
    starts = []
    for number, name in enumerate(ids.names):
        starts.append(f"({number}, '{escape_sql(name)}', {ids.starts[number]})")
    connection.execute(f"""
        CREATE TABLE items AS
            SELECT
                d.number AS domain,
                domain AS name,
                item_id,
                total,
                row_number() OVER (ORDER BY domain, item_id::VARCHAR) - 1 AS item,
                first + place AS row,
                {item_key_sql("domain", "item_id")} AS key
            FROM distinct_items
            JOIN places USING (domain, item_id)
            JOIN (VALUES {", ".join(starts)}) d (number, name, first)
                ON domain = d.name""")
