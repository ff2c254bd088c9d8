"""Candidates that others rank too, and results per user: raw ids in and out, as Parquet."""

import os
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from trainer.data.dataset import USERS
from trainer.data.parts import connect
from trainer.errors import InputError


def read_candidates(dataset, file):
    """Given candidates as {user number: (domain, rows of M)}, the positive first.

    file: Parquet with `user_id`, `positive` and `negatives` (a list), raw ids, one row a user. The domain is the only one
    that has the positive's id, or that of a column `domain`. A negative may stand twice (drawn with replacement), the
    positive among them may not. Raises InputError naming the file and the first row (from 0) that does not fit.
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    with connect() as engine:
        try:
            given = engine.read_parquet(str(file), file_row_number=True)
        except duckdb.Error as error:
            raise InputError(f"{file}: is no readable Parquet ({str(error).splitlines()[0]})") from None
        missing = {"user_id", "positive", "negatives"} - set(given.columns)
        if missing:
            raise InputError(
                f"{file}: has no column {', '.join(sorted(missing))}; its columns are {', '.join(given.columns[:-1])}"
            )
        types = dict(zip(given.columns, map(str, given.types), strict=True))
        if not types["negatives"].endswith("]"):
            raise InputError(f"{file}: the column negatives is {types['negatives']}; it has to be a list of item ids")
        domain = "domain::VARCHAR" if "domain" in given.columns else "NULL::VARCHAR"
        try:
            engine.execute(
                f"CREATE TABLE given AS SELECT file_row_number AS line, user_id::VARCHAR AS user_id, {domain} AS domain, "
                "negatives IS NULL AS without, list_prepend(positive::VARCHAR, negatives::VARCHAR[]) AS candidates FROM given"
            )
        except duckdb.Error as error:
            raise InputError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from None
        items = " UNION ALL ".join(
            f"SELECT {number} AS domain, item_id::VARCHAR AS item_id, row "
            f"FROM read_parquet({_quoted(dataset.local(d.vocabulary))})"
            for number, d in enumerate(dataset.domains)
        )
        engine.execute(f"CREATE TABLE items AS {items}")
        engine.execute("CREATE TABLE domains (domain INTEGER, name VARCHAR)")
        engine.executemany("INSERT INTO domains VALUES (?, ?)", [[i, d.name] for i, d in enumerate(dataset.domains)])
        users = f"read_parquet({_quoted(dataset.local(USERS))})"
        _refuse(
            engine,
            file,
            f"SELECT line, user_id FROM given ANTI JOIN {users} u ON given.user_id = u.user_id::VARCHAR",
            "user_id {} is not in the dataset",
        )
        _refuse(
            engine,
            file,
            "SELECT line, user_id FROM given WHERE line NOT IN (SELECT min(line) FROM given GROUP BY user_id)",
            "user_id {} stands in an earlier row too",
        )
        _refuse(engine, file, "SELECT line, user_id FROM given WHERE without", "user_id {} has no list of negatives")
        _refuse(
            engine,
            file,
            "SELECT line, candidates[1] FROM given WHERE list_contains(candidates[2:], candidates[1])",
            "item {} is the positive and one of the negatives",
        )
        _refuse(
            engine,
            file,
            "SELECT line, domain FROM given WHERE domain IS NOT NULL AND domain NOT IN (SELECT name FROM domains)",
            "domain {} is not in the dataset",
        )
        engine.execute(
            "CREATE TABLE placed AS SELECT line, g.user_id, candidates, count(*) AS found, min(i.domain) AS domain "
            "FROM given g JOIN items i ON i.item_id = g.candidates[1] "
            "JOIN domains d ON d.domain = i.domain AND d.name = coalesce(g.domain, d.name) GROUP BY ALL"
        )
        _refuse(
            engine, file, "SELECT line, candidates[1] FROM given ANTI JOIN placed USING (line)", "item {} is not in the dataset"
        )
        _refuse(
            engine,
            file,
            "SELECT line, candidates[1] FROM placed WHERE found > 1",
            "item {} is in several domains; add a column `domain`",
        )
        engine.execute(
            "CREATE TABLE long AS SELECT line, domain, unnest(candidates) AS item_id, "
            "generate_subscripts(candidates, 1) AS place FROM placed"
        )
        _refuse(
            engine,
            file,
            "SELECT line, l.item_id FROM long l LEFT JOIN items i ON i.domain = l.domain AND i.item_id = l.item_id "
            "WHERE i.item_id IS NULL",
            "item {} is not in the positive's domain",
        )
        rows = engine.execute(
            "SELECT u.user, any_value(p.domain), list(i.row ORDER BY l.place) FROM placed p "
            f"JOIN {users} u ON p.user_id = u.user_id::VARCHAR JOIN long l USING (line) "
            "JOIN items i ON i.domain = l.domain AND i.item_id = l.item_id GROUP BY u.user"
        ).fetchall()
    return {user: (domain, np.array(candidates, np.int64)) for user, domain, candidates in rows}


class ResultWriter:
    """Per user: `user_id`, `domain`, `rank`, `scores` (the held-out item's first). Each rank writes a part; `finish` joins
    them, sorted by user number, and leaves one file."""

    def __init__(self, dataset, file, ranks):
        self.dataset, self.file, self.ranks = dataset, Path(file), ranks
        if self.file.exists():
            raise InputError(f"{self.file}: already exists; give another --output")
        if not self.file.parent.is_dir():
            raise InputError(f"{self.file.parent}: there is no such folder")
        self._schema = pa.schema(
            [("user", pa.int64()), ("domain", pa.string()), ("rank", pa.int64()), ("scores", pa.list_(pa.float32()))]
        )
        try:
            self._writer = pq.ParquetWriter(self._part(ranks.rank), self._schema)
        except OSError as error:
            raise InputError(f"{self.file.parent}: cannot be written ({error.strerror})") from None

    def add(self, candidates, ranks_B, scores_C):
        """One step's users, as `rank_candidates` hands them to `visit`."""
        real = candidates.user_B >= 0
        if not real.any():
            return
        offsets = np.concatenate([[0], np.cumsum(candidates.counts_B)]).astype(np.int32)
        names = [self.dataset.domains[domain].name for domain in candidates.domain_B]
        columns = [candidates.user_B, names, ranks_B, pa.ListArray.from_arrays(offsets, scores_C.astype(np.float32))]
        self._writer.write_table(pa.table(dict(zip(self._schema.names, columns, strict=True)), schema=self._schema))

    def finish(self):
        """Called on all ranks after the last user."""
        self._writer.close()
        dist.barrier()
        if self.ranks.first:
            partial = self.file.with_name(self.file.name + ".partial")
            parts = [self._part(rank) for rank in range(self.ranks.world_size)]
            users = _quoted(self.dataset.local(USERS))
            try:
                with connect() as engine:
                    engine.execute(
                        "COPY (SELECT u.user_id, r.domain, r.rank, r.scores "
                        f"FROM read_parquet([{', '.join(map(_quoted, parts))}]) r "
                        f"JOIN read_parquet({users}) u ON u.user = r.user ORDER BY r.user) "
                        f"TO {_quoted(partial)} (FORMAT parquet)"
                    )
                os.replace(partial, self.file)
            finally:
                for file in (partial, *parts):
                    file.unlink(missing_ok=True)
        dist.barrier()

    def discard(self):
        """Takes this rank's part away, where ranking failed."""
        self._writer.close()
        self._part(self.ranks.rank).unlink(missing_ok=True)

    def _part(self, rank):
        return self.file.with_name(f"{self.file.name}.{rank:05d}.part")


def _refuse(engine, file, offenders, message):
    """Raises InputError for the first row that `offenders` (line, value) finds."""
    found = engine.execute(f"SELECT * FROM ({offenders}) ORDER BY 1 LIMIT 1").fetchone()
    if found:
        raise InputError(f"{file}: row {found[0]}: {message.format(found[1])}")


def _quoted(path):
    return "'" + str(path).replace("'", "''") + "'"
