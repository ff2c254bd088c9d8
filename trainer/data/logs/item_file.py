"""The file of items: it has the domain of every item of the logs.

item_id   title        domain
7         Casablanca   drama
8         Alien        horror
"""

from duckdb import DuckDBPyConnection

from trainer.config.prepare import LogFormat
from trainer.data.duckdb_engine import query_value
from trainer.data.logs.duckdb_groups import group_files
from trainer.data.logs.files import find_logs
from trainer.data.logs.reading import NAMED
from trainer.errors import InputError


def items_format(log_format: LogFormat) -> LogFormat:
    """Returns how the file of items is written."""
    return LogFormat(
        item_column=log_format.item_column,
        domain_column=log_format.domain_column,
        columns=log_format.items_columns,
        delimiter=log_format.items_delimiter,
        domain_separator=log_format.domain_separator,
    )


def open_items(connection: DuckDBPyConnection, log_format: LogFormat) -> None:
    """Makes the table `domain_of_item` (item, domain), both text.

    Items without a domain are left out. Raises InputError where the file cannot be read, or
    gives an item two domains.
    """
    files = find_logs([str(log_format.items)])
    wanted = {
        "item": log_format.item_column,
        "domain": log_format.domain_column,
    }
    groups = group_files(
        connection, files, items_format(log_format), wanted, {}
    )
    selects = []
    for group in groups:
        rows = f"""
            FROM ({group.rows_sql(group.files)})
            WHERE keep
                AND NOT {group.missing_sql("item")}
                AND NOT {group.missing_sql("domain")}"""
        for role in ("item", "domain"):
            is_whole = f"coalesce(bool_and({group.whole_sql(role)}), true)"
            group.is_whole[role] = query_value(
                connection, f"SELECT {is_whole} {rows}"
            )
        item = group.id_sql("item", "VARCHAR")
        domain = group.id_sql("domain", "VARCHAR")
        selects.append(f"SELECT {item} AS item, {domain} AS domain {rows}")
    connection.execute(f"""
        CREATE OR REPLACE TABLE domain_of_item AS
            SELECT DISTINCT item, domain
            FROM ({" UNION ALL ".join(selects)})""")
    twice = connection.execute(f"""
        SELECT item, list(domain ORDER BY domain)
        FROM domain_of_item
        GROUP BY item
        HAVING count(*) > 1
        ORDER BY item
        LIMIT {NAMED}""").fetchall()
    if twice:
        item, domains = twice[0]
        raise InputError(
            f"{log_format.items}: item {item!r} has several domains, "
            f"{domains[0]!r} and {domains[1]!r}: give each item one"
        )


def count_unknown_items(
    connection: DuckDBPyConnection, rows: str
) -> dict[str, int]:
    """Returns the events of items that have no domain, most events first. rows: a query."""
    counts = connection.execute(f"""
        SELECT item_id::VARCHAR AS item, count(*)
        FROM ({rows})
        WHERE item_id::VARCHAR NOT IN (SELECT item FROM domain_of_item)
        GROUP BY ALL
        ORDER BY 2 DESC, 1""").fetchall()
    return dict(counts)
