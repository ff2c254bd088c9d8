"""New logs onto a prepared dataset: its kept log and the new one as one, and items that keep their rows of M.

A dataset that is to be extended keeps its log, every row of it, also of users and items too rare to be prepared:

    log/00000.parquet …        user_id, item_id, domain, time, of the logs that came first, second, …
    log/log.json               what they are (LogFacts)

An extended one says what became of the one before it:

    extension/rows.parquet     domain, item_id, old_row, new_row: every item of either; without a new row it was retired
    extension/users.npy        the numbers of the users with rows that came with the new logs
    extension/extension.json   how much came, twice or late, and what it made of every domain

Sizes are whatever the logs are; everything is DuckDB's, out of core, but for one number a user.
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from trainer.data.format.dataset import Dataset
from trainer.data.prepare.logs import open_log
from trainer.data.prepare.shard_writing import escape, room_of, scan
from trainer.errors import InputError

LOG, EXTENSION = "log", "extension"
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DAY = 86400
_BATCH = 1 << 20  # rows of a result that are held at once


@dataclass(frozen=True)
class LogFacts:
    """A kept log: whether its times are dates (microseconds since 1970) or numbers, and what the dataset was made with."""

    dates: bool
    min_user: int
    min_item: int

    def __post_init__(self):
        for each in dataclasses.fields(self):
            if type(getattr(self, each.name)) is not each.type:
                raise TypeError(f"{each.name} is {getattr(self, each.name)!r}")

    @classmethod
    def load(cls, dataset: Path) -> "LogFacts | None":
        """Of a dataset's folder; None where it keeps no log. Raises InputError where it cannot be read."""
        file = dataset / LOG / "log.json"
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): copy the dataset again"
            ) from None

    def save(self, folder: Path):
        """Writes `log.json` into the log's folder."""
        (folder / "log.json").write_text(
            json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8"
        )


def to_extend(folder, whole_log=False) -> Dataset:
    """The dataset in a folder that is to be extended. Raises InputError where it cannot be, with what can be done."""
    old = Dataset.load(folder)
    if old.cache is not None:
        raise InputError(
            f"{folder}: an address cannot be extended: copy the dataset to a folder"
        )
    if not whole_log and LogFacts.load(old.folder) is None:
        raise InputError(
            f"{folder}: keeps no log: prepare it with --keep-log, or give the whole log as --input and say so with --whole-log"
        )
    return old


def options_of(folder) -> dict:
    """How a dataset was prepared, for one that extends it: options of PrepareConfig by name."""
    old, facts = Dataset.load(folder), LogFacts.load(Path(folder))
    kept = (
        {}
        if facts is None
        else {"min_user": facts.min_user, "min_item": facts.min_item}
    )
    return kept | {"seed": old.seed, "streams": old.streams}


def keep_log(connection, config, files, old: Dataset | None, folder: Path):
    """Writes the log that the dataset is made of into `folder`: the rows of `files`, and before them those that `old` has kept.

    Of the new rows those that are in the old log to the letter (user, item, domain, time) are left out: they were delivered
    twice. Rows from before the window are left out of both. `found.json` says how many there were of either.
    Raises InputError: the new logs cannot be read, or have another kind of time; the window is none.
    """
    dates = open_log(connection, files, config.columns, config.domain, view="arrived")
    kept = (
        []
        if old is None or config.whole_log
        else sorted((old.folder / LOG).glob("*.parquet"))
    )
    if kept and LogFacts.load(old.folder).dates != dates:
        kinds = ("numbers", "dates") if dates else ("dates", "numbers")
        raise InputError(
            f"{old.folder}: its times are {kinds[0]}, those of {files[0]} are {kinds[1]}: write one kind"
        )
    found = {
        "arrived": _one(connection, "SELECT count(*) FROM arrived"),
        "delivered_before": 0,
        "late": 0,
        "before_window": 0,
    }
    fresh = "arrived"
    if kept:
        connection.execute(
            f"CREATE OR REPLACE VIEW kept AS {_rows(kept, _kinds(connection, kept))}"
        )
        same = " AND ".join(
            f'k."{name}"{_text(name)} = a."{name}"{_text(name)}' for name in _COLUMNS
        )
        connection.execute(
            f"CREATE TABLE again AS SELECT DISTINCT a.* FROM arrived a JOIN kept k ON {same}"
        )
        connection.execute(
            f"CREATE TABLE fresh AS SELECT * FROM arrived ANTI JOIN again USING ({', '.join(_COLUMNS)})"
        )
        fresh, count = "fresh", _one(connection, "SELECT count(*) FROM fresh")
        found["delivered_before"] = found["arrived"] - count
        found["late"] = _one(
            connection, f"SELECT count(*) FROM fresh WHERE time < {old.last_time!r}"
        )
    begin = _begin_of_window(
        connection, config, dates, ["kept", fresh] if kept else [fresh]
    )
    if begin is not None:
        found["before_window"] = _one(
            connection, f"SELECT count(*) FROM {fresh} WHERE time < {begin!r}"
        )
    for number, file in enumerate(kept):
        newest = _one(
            connection, f"SELECT max(time) FROM read_parquet('{escape(file)}')"
        )
        if begin is None or newest >= begin:
            _take(file, folder / f"{number:05d}.parquet")
    condition = "" if begin is None else f"WHERE time >= {begin!r}"
    target = folder / f"{len(kept):05d}.parquet"
    connection.execute(
        f"COPY (SELECT * FROM {fresh} {condition}) TO '{escape(target)}' (FORMAT parquet, COMPRESSION zstd)"
    )
    LogFacts(dates, config.min_user, config.min_item).save(folder)
    (folder / "found.json").write_text(
        json.dumps({"begin": begin, "newest": target.name, **found}), encoding="utf-8"
    )


_COLUMNS = ("user_id", "item_id", "domain", "time")


def _text(name):
    """An id may be a number in one log and text in another."""
    return "::VARCHAR" if name.endswith("_id") else ""


def open_kept(connection, folder: Path, old: Dataset | None):
    """Makes the view `log` over the log that `keep_log` left in `folder`, and `newest` over the rows that came last. Ids that
    `old` has as text are text."""
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    condition = "" if found["begin"] is None else f"WHERE time >= {found['begin']!r}"
    files = sorted(folder.glob("*.parquet"))
    vocabularies = (
        [] if old is None else [old.local(domain.vocabulary) for domain in old.domains]
    )
    kinds = _kinds(connection, files, vocabularies)
    connection.execute(
        f"CREATE OR REPLACE VIEW log AS {_rows(files, kinds, condition)}"
    )
    connection.execute(
        f"CREATE OR REPLACE VIEW newest AS {_rows([folder / found['newest']], kinds)}"
    )
    if not _one(connection, "SELECT count(*) FROM log"):
        raise InputError(
            "no rows are left in the window: give an earlier --since or more --days"
        )


def _kinds(connection, files, vocabularies=()):
    """The types of a log's columns over files that may have them otherwise, item ids like those of vocabularies: by name."""
    kinds = {}
    for name in _COLUMNS:
        types = {_type(connection, file, name) for file in files}
        if name == "item_id":
            types |= {_type(connection, file, name) for file in vocabularies}
        kinds[name] = (
            types.pop()
            if len(types) == 1
            else "DOUBLE"
            if name == "time"
            else "VARCHAR"
        )
    return kinds


def _rows(files, kinds, condition=""):
    """SQL: the rows of a log's files."""
    columns = ", ".join(f'"{name}"::{kind} AS "{name}"' for name, kind in kinds.items())
    return " UNION ALL ".join(
        f"SELECT {columns} FROM read_parquet('{escape(file)}') {condition}"
        for file in files
    )


def add_known_items(connection, old: Dataset, retire: bool):
    """Makes the table `known` (domain, item_id, old_row) of the old dataset's items, and takes those without an event into
    `found_items` (domain, item_id, total), unless they are retired."""
    kind = _one(connection, "SELECT typeof(item_id) FROM found_items LIMIT 1")
    connection.execute(f"CREATE TABLE known AS {_vocabularies(old, kind)}")
    if not retire:
        connection.execute("""INSERT INTO found_items
            SELECT domain, item_id, 0 FROM known ANTI JOIN found_items USING (domain, item_id)""")


def order_of(old: Dataset, names) -> list[str]:
    """The old domains in their order, and then the new ones."""
    known = [domain.name for domain in old.domains]
    return known + sorted(set(names) - set(known), key=str.encode)


def rooms_of(old: Dataset, items) -> list[int]:
    """Rows for each domain of `order_of`, which have so many items: as they were, and room for a new one; all anew where a
    domain has outgrown its own."""
    before = [domain.room for domain in old.domains]
    if all(count <= room for count, room in zip(items, before, strict=False)):
        return before + [room_of(count) for count in items[len(before) :]]
    return [room_of(count) for count in items]


def place_items(connection, old: Dataset):
    """Makes the table `places` (domain, item_id, place) of `found_items`: the place in its domain that an item had; new ones,
    by how many events they have, fill those that are free. Where still some are left free (their items were retired), the
    last ones move there: places are those from 0 to the number of items."""
    starts = ", ".join(
        f"('{escape(domain.name)}', {domain.start})" for domain in old.domains
    )
    connection.execute(f"""
        CREATE TABLE placed AS
            SELECT f.domain, f.item_id, f.total, old_row - first AS old_place, count(*) OVER (PARTITION BY f.domain) AS size
            FROM found_items f LEFT JOIN known k ON f.domain = k.domain AND f.item_id = k.item_id
            LEFT JOIN (VALUES {starts}) d (domain, first) ON f.domain = d.domain;
        CREATE TABLE free AS
            SELECT domain, place, row_number() OVER (PARTITION BY domain ORDER BY place) AS number
            FROM (SELECT domain, unnest(range(max(size))) AS place FROM placed GROUP BY domain)
            ANTI JOIN (SELECT domain, old_place AS place FROM placed WHERE old_place < size) USING (domain, place);
        CREATE TABLE places AS
            SELECT domain, item_id, old_place AS place FROM placed WHERE old_place < size
            UNION ALL
            SELECT w.domain, w.item_id, free.place FROM (
                SELECT *, row_number() OVER (PARTITION BY domain ORDER BY old_place NULLS LAST, total DESC, item_id::VARCHAR)
                    AS number FROM placed WHERE old_place IS NULL OR old_place >= size
            ) w JOIN free USING (domain, number);
        DROP TABLE placed; DROP TABLE free""")


def write_extension(
    connection,
    old: Dataset,
    ids_folder: Path,
    log_folder: Path,
    folder: Path,
    new: Dataset,
):
    """Writes the folder `extension` of the new dataset. The connection has what `open_kept` made."""
    items, users = scan(ids_folder / "items"), scan(ids_folder / "users")
    known = _vocabularies(
        old, _type(connection, ids_folder / "items" / "0.parquet", "item_id")
    )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = folder / "rows.parquet"
    connection.execute(f"""COPY (
        SELECT coalesce(o.domain, n.name) AS domain, coalesce(o.item_id, n.item_id) AS item_id, o.old_row,
            n.row::BIGINT AS new_row
        FROM ({known}) o FULL OUTER JOIN {items} n ON o.domain = n.name AND o.item_id = n.item_id
        ORDER BY old_row NULLS LAST, new_row) TO '{escape(rows)}' (FORMAT parquet)""")
    touched = connection.execute(
        f"""SELECT DISTINCT u."user" FROM newest JOIN {users} u USING (user_id) ORDER BY 1"""
    )
    np.save(folder / "users.npy", touched.fetchnumpy()["user"].astype(np.int64))
    found = json.loads((log_folder / "found.json").read_text(encoding="utf-8"))
    counts = connection.execute(f"""SELECT domain, count(*) FILTER (WHERE old_row IS NULL),
        count(*) FILTER (WHERE new_row IS NULL) FROM read_parquet('{escape(rows)}') GROUP BY domain""").fetchall()
    counts = {name: numbers for name, *numbers in counts}
    before = {domain.name: domain for domain in old.domains}
    facts = {
        "of": old.fingerprint,
        "span_before": [old.first_time, old.last_time],
        "domains_before": [domain.name for domain in old.domains],
        **{
            name: found[name]
            for name in ("arrived", "delivered_before", "late", "before_window")
        },
        "users": {"before": old.users, "now": new.users},
        "laid_out_anew": any(
            domain.start != before[domain.name].start
            for domain in new.domains
            if domain.name in before
        ),
        "domains": {
            domain.name: {
                "items_before": before[domain.name].items
                if domain.name in before
                else 0,
                "items": domain.items,
                "new": counts[domain.name][0],
                "retired": counts[domain.name][1],
                "interactions_before": before[domain.name].interactions
                if domain.name in before
                else 0,
                "interactions": domain.interactions,
            }
            for domain in new.domains
        },
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    (folder / "extension.json").write_text(text, encoding="utf-8")


def take_log(log: Path, folder: Path):
    """The log that `keep_log` left, as a dataset keeps it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in (*log.glob("*.parquet"), log / "log.json"):
        _take(file, folder / file.name)


def _vocabularies(old, kind):
    """SQL: domain, item_id of a type, old_row of all items."""
    return " UNION ALL ".join(
        f"SELECT '{escape(domain.name)}' AS domain, item_id::{kind} AS item_id, row AS old_row "
        f"FROM read_parquet('{escape(old.local(domain.vocabulary))}')"
        for domain in old.domains
    )


def rows_of_extension(dataset: Dataset) -> np.ndarray:
    """Which row of the dataset before it each row of M was, −1: none, int32; as `write_extension` left it."""
    file = pq.ParquetFile(dataset.folder / EXTENSION / "rows.parquet")
    return _sources(dataset, file.iter_batches(_BATCH, columns=["old_row", "new_row"]))


def rows_of_items(old: Dataset, dataset: Dataset, connection) -> np.ndarray:
    """The same for any two datasets, by domains' names and items' ids as text. connection: of a DuckDB that joins them."""
    before, now = _vocabularies(old, "VARCHAR"), _vocabularies(dataset, "VARCHAR")
    joined = connection.sql(f"""SELECT o.old_row, n.old_row AS new_row
        FROM ({before}) o JOIN ({now}) n ON o.domain = n.domain AND o.item_id = n.item_id""")
    return _sources(dataset, joined.to_arrow_reader(_BATCH))


def _sources(dataset, batches):
    """batches: Arrow batches of (old row, new row)."""
    source_N = np.full(dataset.num_embeddings, -1, np.int32)
    for batch in batches:
        old, new = (
            column.fill_null(-1).to_numpy(zero_copy_only=False)
            for column in batch.columns
        )
        there = (old >= 0) & (new >= 0)
        source_N[new[there]] = old[there]
    return source_N


def _begin_of_window(connection, config, dates, views):
    """The first time that counts, or None: all do."""
    if config.since is None and config.days is None:
        return None
    times = [_one(connection, f"SELECT max(time) FROM {view}") for view in views]
    newest = max(time for time in times if time is not None)
    if config.days is not None:
        if not dates and config.time_unit is None:
            raise InputError(
                f"--days with times that are numbers: say what they are in with --time-unit ({', '.join(UNITS)})"
            )
        return newest - config.days * _DAY * UNITS["us" if dates else config.time_unit]
    if not dates:
        try:
            return float(config.since)
        except ValueError:
            raise InputError(
                f"--since {config.since!r}: these logs' times are numbers: give one"
            ) from None
    begin = connection.execute(
        "SELECT epoch_us(TRY_CAST(? AS TIMESTAMPTZ))", [config.since]
    ).fetchone()[0]
    if begin is None:
        raise InputError(f"--since {config.since!r} is no date like 2026-01-31")
    return begin


def _take(file, target):
    """The same file in another place: a link where the file system knows them."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def _type(connection, file, column):
    return str(
        connection.sql(
            f"SELECT \"{column}\" FROM read_parquet('{escape(file)}')"
        ).types[0]
    )


def _one(connection, query):
    ((value,),) = connection.execute(query).fetchall()
    return value
