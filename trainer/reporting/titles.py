"""Titles of items, from a table of one's own, for the items that a run's report names.

    item_id   domain   title
    7         drama    Casablanca
    7         horror   Alien

The domain may be missing: an id then has the same title in all domains. Titles of the items that
`look.json` names are kept in it, so that later pages have them without the table.
"""

import glob
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from trainer.data.duckdb_engine import escape_sql, open_connection
from trainer.errors import InputError
from trainer.files.atomic import write_json
from trainer.run_files import LOOK

Titles = dict[str, dict[str, str]]  # by domain: of an item's id

# How DuckDB reads each kind of file. All columns of text files are text, so that ids stay as they are.
_READERS = {
    ".parquet": "read_parquet({path}, hive_partitioning=false)",
    ".csv": "read_csv({path}, header=true, all_varchar=true)",
    ".csv.gz": "read_csv({path}, header=true, all_varchar=true)",
    ".tsv": "read_csv({path}, header=true, all_varchar=true, delim='\t', quote='')",
    ".tsv.gz": "read_csv({path}, header=true, all_varchar=true, delim='\t', quote='')",
    ".jsonl": "read_json({path}, format='newline_delimited')",
    ".jsonl.gz": "read_json({path}, format='newline_delimited')",
}
_LONGEST_REASON = 200
_NEEDED = ("item_id", "title")


def check_titles(file: Path, run: Path | None = None) -> None:
    """Raises InputError, one line that names the file, where it is no table of titles.

    run: a run that has finished, whose items are to get them; likewise where it has none.
    """
    _columns(file)
    if run is not None:
        _read_look(run)


def add_titles(run: Path, file: Path) -> None:
    """Keeps the titles of the items that the run's inspection names beside them, in `look.json`.

    Raises InputError: no such table, a run without an inspection.
    """
    look = _read_look(run)
    titles = read_titles(file, _named_items(look.get("items") or []))
    write_json(run / LOOK, look | {"titles": titles})


def _read_look(run: Path) -> dict[str, Any]:
    """The inspection of a run's best model."""
    file = run / LOOK
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{file}: cannot be read: titles are for the items of a run that has finished"
        ) from None


def read_titles(file: Path, wanted: Mapping[str, set[str]]) -> Titles:
    """The titles of some items. wanted: ids by domain.

    An id is compared as text; a whole number that was written as 7.0 is 7. A first title counts,
    where an item has several.
    """
    columns = _columns(file)
    domain = "domain::VARCHAR" if "domain" in columns else "NULL"
    query = f"""
        SELECT
            regexp_replace(item_id::VARCHAR, '^(-?[0-9]+)\\.0$', '\\1') AS id,
            {domain},
            title::VARCHAR
        FROM {_source(file)}
        WHERE id IN (SELECT unnest(?)) AND title IS NOT NULL"""
    ids: set[str] = set()
    for items in wanted.values():
        ids |= items
    rows = _fetch(file, query, [sorted(ids)])
    titles: Titles = {}
    for item, domain_of_title, title in rows:
        for name, items in wanted.items():
            is_of_domain = domain_of_title in (None, name)
            if is_of_domain and item in items:
                of_domain = titles.setdefault(name, {})
                of_domain.setdefault(item, title)
    return titles


def _named_items(items: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The ids that an inspection names, by domain."""
    named: dict[str, set[str]] = defaultdict(set)
    for item in items:
        domain = item["domain"]
        named[domain].add(item["item"])
        for other, neighbours in item["nearest"].items():
            for neighbour, _cosine in neighbours:
                named[other].add(neighbour)
    return named


def _columns(file: Path) -> list[str]:
    """The table's columns. Raises InputError where it lacks one, or cannot be read."""
    query = f"DESCRIBE SELECT * FROM {_source(file)}"
    columns = []
    for name, *_rest in _fetch(file, query):
        columns.append(name)
    present = ", ".join(columns)
    for column in _NEEDED:
        if column not in columns:
            raise InputError(
                f"{file} has no column {column!r}; it has {present}: "
                "titles need 'item_id' and 'title', and may have 'domain'"
            )
    return columns


def _fetch(
    file: Path, query: str, values: list[Any] | None = None
) -> list[tuple[Any, ...]]:
    """The rows of a query. Raises InputError where the file cannot be read."""
    try:
        with open_connection() as connection:
            result = connection.execute(query, values)
            return result.fetchall()
    except duckdb.Error as error:
        words = str(error).split()
        reason = " ".join(words)
        raise InputError(
            f"{file} cannot be read: {reason[:_LONGEST_REASON]}"
        ) from None


def _source(file: Path) -> str:
    """The table function that reads the file."""
    if not file.is_file():
        raise InputError(f"{file}: there is no such file of titles")
    name = file.name.lower()
    for suffix, reader in _READERS.items():
        if name.endswith(suffix):
            pattern = glob.escape(str(file))
            path = escape_sql(pattern)
            return reader.format(path=f"'{path}'")
    known = ", ".join(_READERS)
    raise InputError(
        f"{file} is no table of titles: the name must end in {known}"
    )
