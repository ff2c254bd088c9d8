"""Candidates that others rank too, and results per user: raw ids in and out, as Parquet."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from trainer.data.duckdb_engine import limited_engine
from trainer.data.format.dataset import USERS
from trainer.data.loading.batch_schedule import Plan
from trainer.data.prepare.shard_writing import connect
from trainer.distributed.agreement import by_the_first
from trainer.errors import InputError
from trainer.files.atomic import Patience, StorageLate, replaced

_BATCH = 1 << 20  # candidates that are read and sent at once
_END, _FAILED = -1, -2  # in place of a batch's size


class GivenCandidates(Mapping):
    """{user number: (domain, rows of M)}, the positive first, held as arrays.

    user_K: int64, rising; domain_K; ends_K: where each user's rows end in rows_C, int32. longest: how many the user with most
    of them has, of all ranks' users.
    """

    def __init__(self, user_K, domain_K, ends_K, rows_C, longest):
        self.user_K, self.domain_K, self.ends_K, self.rows_C = (
            user_K,
            domain_K,
            ends_K,
            rows_C,
        )
        self.longest = longest

    def __len__(self):
        return len(self.user_K)

    def __iter__(self):
        return iter(self.user_K.tolist())

    def __getitem__(self, user):
        place = int(np.searchsorted(self.user_K, user))
        if place == len(self.user_K) or self.user_K[place] != user:
            raise KeyError(user)
        begin = self.ends_K[place - 1] if place else 0
        return int(self.domain_K[place]), self.rows_C[
            begin : self.ends_K[place]
        ].astype(np.int64)


def read_candidates(dataset, file) -> GivenCandidates:
    """Everybody's given candidates.

    file: Parquet with `user_id`, `positive` and `negatives` (a list), raw ids, one row a user. The domain is the only one
    that has the positive's id, or that of a column `domain`. A negative may stand twice (drawn with replacement), the
    positive among them may not. Raises InputError naming the file and the first row (from 0) that does not fit.
    """
    collected = _Collected()
    with limited_engine() as engine:
        _join(engine, dataset, file)
        for user_N, domain_N, row_N in _joined(engine):
            collected.add(user_N, domain_N, row_N)
    return collected.candidates()


def read_candidates_of_rank(dataset, file, ranks, config) -> GivenCandidates:
    """The same of the users that this rank ranks. Called on all ranks; the first one reads, and tells the others. config: the
    RunConfig."""
    collected = _Collected(Homes(dataset, ranks.world_size, config), ranks.rank)
    with contextlib.ExitStack() as stack:
        batches = iter(())
        if ranks.first:
            engine = stack.enter_context(limited_engine())
            batches = _joined(engine)
        by_the_first(lambda: _join(engine, dataset, file), ranks.first)
        while (piece := _told(batches, file, ranks.first)) is not None:
            collected.add(*piece)
    return collected.candidates()


class Homes:
    """Which rank ranks a user in `RankingBatches`."""

    def __init__(self, dataset, world_size, config):
        batch_size = max(config.evaluation.batch_size, world_size)
        plan = Plan(
            dataset, batch_size, world_size, config.seed, shuffle=False, balance=False
        )
        self._first_user = np.array([shard.first_user for shard in dataset.shards])
        self._rank_of_shard = np.zeros(len(dataset.shards), np.int64)
        for stream, shards in enumerate(plan.shards(0)):
            self._rank_of_shard[shards] = stream % world_size

    def ranks(self, user_N):
        """Of some users."""
        return self._rank_of_shard[
            np.searchsorted(self._first_user, user_N, side="right") - 1
        ]


class _Collected:
    """Candidates that come user after user, of which those of one rank are kept."""

    def __init__(self, homes: Homes | None = None, rank=0):
        self._homes, self._rank = homes, rank
        self._users, self._domains, self._counts = (
            [],
            [],
            [],
        )  # of each piece; a user may be in two of them
        self._rows = []
        self._longest = self._last_count = 0
        self._last_user = -1

    def add(self, user_N, domain_N, row_N):
        """The next candidates, users rising."""
        starts_K = np.flatnonzero(np.diff(user_N, prepend=-1))
        count_K = np.diff(starts_K, append=len(user_N))
        if len(count_K):
            goes_on = self._last_count if user_N[0] == self._last_user else 0
            self._longest = max(
                self._longest, int(count_K.max()), goes_on + int(count_K[0])
            )
            self._last_user = int(user_N[-1])
            self._last_count = int(count_K[-1]) + (goes_on if len(count_K) == 1 else 0)
        if self._homes is not None:
            own_K = self._homes.ranks(user_N[starts_K]) == self._rank
            row_N = row_N[np.repeat(own_K, count_K)]
            starts_K, count_K = starts_K[own_K], count_K[own_K]
        self._users.append(user_N[starts_K].astype(np.int64))
        self._domains.append(domain_N[starts_K].astype(np.int32))
        self._counts.append(count_K)
        self._rows.append(row_N.astype(np.int32))

    def candidates(self) -> GivenCandidates:
        """All of them."""
        none = np.zeros(0, np.int64)
        user_K, domain_K, count_K = (
            np.concatenate([none, *each])
            for each in (self._users, self._domains, self._counts)
        )
        first_K = np.flatnonzero(np.diff(user_K, prepend=-1))
        ends_K = (
            np.append(np.cumsum(count_K)[first_K[1:] - 1], count_K.sum())
            if len(first_K)
            else none
        )
        rows_C = np.concatenate([none.astype(np.int32), *self._rows])
        return GivenCandidates(
            user_K[first_K], domain_K[first_K], ends_K, rows_C, max(1, self._longest)
        )


def _told(batches, file, first):
    """The next of the first rank's batches, on all ranks; None behind the last."""
    size, error = torch.tensor([_END]), None
    if first:
        try:
            batch = next(batches, None)
        except duckdb.Error as raised:
            error = raised
            size[0] = _FAILED
        else:
            size[0] = _END if batch is None else len(batch[0])
    dist.broadcast(size, 0)
    if size == _FAILED:
        why = (
            "the first rank's own line says why"
            if error is None
            else str(error).splitlines()[0]
        )
        raise InputError(f"{file}: cannot be read ({why})", one_rank=error is not None)
    if size == _END:
        return None
    piece = (
        torch.from_numpy(np.stack(batch).astype(np.int32))
        if first
        else torch.empty(3, int(size), dtype=torch.int32)
    )
    dist.broadcast(piece, 0)
    return piece.numpy()


def _joined(engine):
    """Batches of what `_join` left: (user, domain, row) of each candidate, user after user, the positive first."""
    query = 'SELECT "user", domain, row FROM joined ORDER BY "user", place'
    for batch in engine.sql(query).to_arrow_reader(_BATCH):
        yield tuple(column.to_numpy() for column in batch.columns)


def _join(engine, dataset, file):
    """Makes the table `joined` ("user", domain, place, row), or raises InputError."""
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    try:
        _join_whole(engine, dataset, file)
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"{file}: is too large for the memory and the temporary files of this host ({str(error).splitlines()[0]}): set "
            "TMPDIR to a larger disk, or rank fewer users"
        ) from None


def _join_whole(engine, dataset, file):
    try:
        given = engine.read_parquet(str(file), file_row_number=True)
    except duckdb.Error as error:
        raise InputError(
            f"{file}: is no readable Parquet ({str(error).splitlines()[0]})"
        ) from None
    missing = {"user_id", "positive", "negatives"} - set(given.columns)
    if missing:
        raise InputError(
            f"{file}: has no column {', '.join(sorted(missing))}; its columns are {', '.join(given.columns[:-1])}"
        )
    types = dict(zip(given.columns, map(str, given.types), strict=True))
    if not types["negatives"].endswith("]"):
        raise InputError(
            f"{file}: the column negatives is {types['negatives']}; it has to be a list of item ids"
        )
    domain = "domain::VARCHAR" if "domain" in given.columns else "NULL::VARCHAR"
    try:
        engine.execute(
            f"CREATE TABLE given AS SELECT file_row_number AS line, user_id::VARCHAR AS user_id, {domain} AS domain, "
            "negatives IS NULL AS without, list_prepend(positive::VARCHAR, negatives::VARCHAR[]) AS candidates FROM given"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise InputError(
            f"{file}: cannot be read ({str(error).splitlines()[0]})"
        ) from None
    items = " UNION ALL ".join(
        f"SELECT {number} AS domain, item_id::VARCHAR AS item_id, row "
        f"FROM read_parquet({_quoted(dataset.local(d.vocabulary))})"
        for number, d in enumerate(dataset.domains)
    )
    engine.execute(f"CREATE TABLE items AS {items}")
    engine.execute("CREATE TABLE domains (domain INTEGER, name VARCHAR)")
    engine.executemany(
        "INSERT INTO domains VALUES (?, ?)",
        [[i, d.name] for i, d in enumerate(dataset.domains)],
    )
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
    _refuse(
        engine,
        file,
        "SELECT line, user_id FROM given WHERE without",
        "user_id {} has no list of negatives",
    )
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
        "CREATE TABLE placed AS SELECT line, count(*) AS found, min(i.domain) AS domain "
        "FROM (SELECT line, domain, candidates[1] AS positive FROM given) g JOIN items i ON i.item_id = g.positive "
        "JOIN domains d ON d.domain = i.domain AND d.name = coalesce(g.domain, d.name) GROUP BY line"
    )
    _refuse(
        engine,
        file,
        "SELECT line, candidates[1] FROM given ANTI JOIN placed USING (line)",
        "item {} is not in the dataset",
    )
    _refuse(
        engine,
        file,
        "SELECT line, candidates[1] FROM given JOIN placed USING (line) WHERE found > 1",
        "item {} is in several domains; add a column `domain`",
    )
    engine.execute(
        'CREATE TABLE joined AS SELECT line, "user", p.domain, place, i.row, '
        "CASE WHEN i.row IS NULL THEN l.item_id END AS unknown "
        "FROM (SELECT line, user_id, unnest(candidates) AS item_id, generate_subscripts(candidates, 1) AS place FROM given) l "
        f"JOIN placed p USING (line) JOIN {users} u ON l.user_id = u.user_id::VARCHAR "
        "LEFT JOIN items i ON i.domain = p.domain AND i.item_id = l.item_id"
    )
    engine.execute("DROP TABLE given")
    _refuse(
        engine,
        file,
        "SELECT line, unknown FROM joined WHERE row IS NULL",
        "item {} is not in the positive's domain",
    )


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
            [
                ("user", pa.int64()),
                ("domain", pa.string()),
                ("rank", pa.int64()),
                ("scores", pa.list_(pa.float32())),
            ]
        )
        try:
            self._writer = pq.ParquetWriter(self._part(ranks.rank), self._schema)
        except OSError as error:
            raise InputError(
                f"{self.file.parent}: cannot be written ({error.strerror})"
            ) from None

    def add(self, candidates, ranks_B, scores_C):
        """One step's users, as `rank_candidates` hands them to `visit`."""
        real = candidates.user_B >= 0
        if not real.any():
            return
        offsets = np.concatenate([[0], np.cumsum(candidates.counts_B)]).astype(np.int32)
        names = [self.dataset.domains[domain].name for domain in candidates.domain_B]
        columns = [
            candidates.user_B,
            names,
            ranks_B,
            pa.ListArray.from_arrays(offsets, scores_C.astype(np.float32)),
        ]
        self._writer.write_table(
            pa.table(
                dict(zip(self._schema.names, columns, strict=True)), schema=self._schema
            )
        )

    def finish(self):
        """Called on all ranks after the last user."""
        self._writer.close()
        mine = torch.tensor([self._part(self.ranks.rank).stat().st_size])
        sizes = [torch.empty_like(mine) for _ in range(self.ranks.world_size)]
        dist.all_gather(sizes, mine)
        by_the_first(
            lambda: self._join([int(size) for size in sizes]), self.ranks.first
        )

    def _join(self, sizes):
        """One file of all parts, which other hosts may have written only now."""
        parts = [self._part(rank) for rank in range(self.ranks.world_size)]
        users = _quoted(self.dataset.local(USERS))
        patience = Patience(self.file.parent)
        try:
            for part, size in zip(parts, sizes, strict=True):
                while not _has(part, size):
                    if patience.over:
                        raise StorageLate(
                            f"{part}: is not seen on this host: --output has to be on storage that all hosts see"
                        )
                    patience.wait()
            with replaced(self.file) as partial, connect() as engine:
                engine.execute(
                    "COPY (SELECT u.user_id, r.domain, r.rank, r.scores "
                    f"FROM read_parquet([{', '.join(map(_quoted, parts))}]) r "
                    f"JOIN read_parquet({users}) u ON u.user = r.user ORDER BY r.user) "
                    f"TO {_quoted(partial)} (FORMAT parquet)"
                )
        finally:
            for file in (self.file.with_name(self.file.name + ".partial"), *parts):
                file.unlink(missing_ok=True)

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


def _has(file, size):
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def _quoted(path):
    return "'" + str(path).replace("'", "''") + "'"
