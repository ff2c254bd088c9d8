"""Candidates that other systems rank too, and results per user: raw ids in and out, as Parquet."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from trainer.config.run import RunConfig
from trainer.data.duckdb_engine import (
    escape_sql,
    open_connection,
    open_limited_engine,
    parquet_sql,
)
from trainer.data.format.dataset import USERS, Dataset
from trainer.data.id_columns import IdColumn
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.distributed.agreement import run_on_first_rank
from trainer.errors import InputError
from trainer.files.atomic import LateStorage, Patience, replace_file

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks
    from trainer.evaluation.sampled import Candidates

_BATCH = 1 << 20  # candidates that are read and sent at once
_END = -1  # in place of a batch's size
_FAILED = -2

# Users, domains, rows.
CandidateBatch = tuple[np.ndarray, np.ndarray, np.ndarray]


class CandidateLists(Mapping[int, tuple[int, np.ndarray]]):
    """{user number: (domain, rows of M)}, the positive first, held as arrays.

    user_K: int64, rising; domain_K; ends_K: where each user's rows end in rows_C, int32. longest:
    how many the user with most of them has, of all ranks' users.

    Four users of two domains, domain 1 from row 50:

        user_K      7          12       31         40
        domain_K    1          0        0          1
        ends_K      3          5        8          10
        rows_C      58 52 61   4 9      9 17 3     51 60
    """

    def __init__(
        self,
        user_K: np.ndarray,
        domain_K: np.ndarray,
        ends_K: np.ndarray,
        rows_C: np.ndarray,
        longest: int,
    ):
        self.user_K = user_K
        self.domain_K = domain_K
        self.ends_K = ends_K
        self.rows_C = rows_C
        self.longest = longest

    def __len__(self) -> int:
        return len(self.user_K)

    def __iter__(self) -> Iterator[int]:
        return iter(self.user_K.tolist())

    def __getitem__(self, user: int) -> tuple[int, np.ndarray]:
        index = int(np.searchsorted(self.user_K, user))
        if index == len(self.user_K) or self.user_K[index] != user:
            raise KeyError(user)
        begin = 0
        if index:
            begin = self.ends_K[index - 1]
        end = self.ends_K[index]
        domain = int(self.domain_K[index])
        rows = self.rows_C[begin:end]
        return domain, rows.astype(np.int64)


def read_candidates(dataset: Dataset, file: str | Path) -> CandidateLists:
    """Reads everybody's candidates.

    file: Parquet with `user_id`, `positive` and `negatives` (a list), raw ids, one row a user:

        user_id    positive    negatives             domain (optional)
        u5         a1          ["a4", "a2"]          Books
        u0         b2          ["b3", "b1", "b3"]    Toys

    The domain is the only one that has the positive's id, or that of a column `domain`. A negative
    may occur twice (drawn with replacement), the positive may not occur among them. Raises
    InputError naming the file and the first row (from 0) that does not fit.
    """
    collector = _CandidateCollector()
    with open_limited_engine() as engine:
        _join(engine, dataset, file)
        for user_C, domain_C, row_C in _read_joined(engine):
            collector.add(user_C, domain_C, row_C)
    return collector.candidates()


def read_candidates_of_rank(
    dataset: Dataset, file: str | Path, ranks: "Ranks", config: RunConfig
) -> CandidateLists:
    """Reads the candidates of the users that this rank ranks.

    Called on all ranks; the first one reads, and sends to the others.
    """
    homes = Homes(dataset, ranks.world_size, config)
    collector = _CandidateCollector(homes, ranks.rank)
    with contextlib.ExitStack() as stack:
        engine = None
        batches: Iterator[CandidateBatch] = iter(())
        if ranks.first:
            engine = stack.enter_context(open_limited_engine())
            batches = _read_joined(engine)
        run_on_first_rank(
            lambda: _join(
                cast(duckdb.DuckDBPyConnection, engine), dataset, file
            ),
            ranks.first,
        )
        while (
            batch := _broadcast_next(batches, file, ranks.first)
        ) is not None:
            collector.add(*batch)
    return collector.candidates()


class Homes:
    """The home rank of each user: the one that ranks the user in `RankingBatches`."""

    def __init__(self, dataset: Dataset, world_size: int, config: RunConfig):
        batch_size = max(config.evaluation.batch_size, world_size)
        plan = BatchSchedule(
            dataset,
            batch_size,
            world_size,
            config.seed,
            shuffle=False,
            balance=False,
        )
        self._first_user = np.array(
            [shard.first_user for shard in dataset.shards]
        )
        self._rank_of_shard = np.zeros(len(dataset.shards), np.int64)
        for stream, shards in enumerate(plan.shards(0)):
            self._rank_of_shard[shards] = stream % world_size

    def ranks(self, user_K: np.ndarray) -> np.ndarray:
        """The ranks of some users, int64 (K,)."""
        shard_K = np.searchsorted(self._first_user, user_K, side="right") - 1
        return self._rank_of_shard[shard_K]


class _CandidateCollector:
    """Collects candidates that come user after user, and keeps those of one rank."""

    def __init__(self, homes: Homes | None = None, rank: int = 0):
        """homes: None to keep everybody's."""
        self._homes = homes
        self._rank = rank
        # Of each batch; a user may be in two of them.
        self._users = [np.zeros(0, np.int64)]
        self._domains = [np.zeros(0, np.int32)]
        self._counts = [np.zeros(0, np.int64)]
        self._rows = [np.zeros(0, np.int32)]
        self._longest = 0
        self._last_user = -1
        self._last_count = 0

    def add(
        self, user_C: np.ndarray, domain_C: np.ndarray, row_C: np.ndarray
    ) -> None:
        """Adds the next candidates, users rising.

        user_C, domain_C, row_C: of each candidate, a user's positive first. Two users with three
        and two candidates, domain 1 from row 50:

            user_C      7  7  7     12 12
            domain_C    1  1  1     0  0
            row_C       58 52 61    4  9
        """
        starts_K = np.flatnonzero(np.diff(user_C, prepend=-1))
        count_K = np.diff(starts_K, append=len(user_C))
        if len(count_K):
            self._measure(user_C, count_K)
        if self._homes is not None:
            mine_K = self._homes.ranks(user_C[starts_K]) == self._rank
            row_C = row_C[np.repeat(mine_K, count_K)]
            starts_K = starts_K[mine_K]
            count_K = count_K[mine_K]
        self._users.append(user_C[starts_K].astype(np.int64))
        self._domains.append(domain_C[starts_K].astype(np.int32))
        self._counts.append(count_K)
        self._rows.append(row_C.astype(np.int32))

    def _measure(self, user_C: np.ndarray, count_K: np.ndarray) -> None:
        """Keeps the length of the longest list.

        The last user of the batch before may go on in this one.
        """
        before = 0
        if user_C[0] == self._last_user:
            before = self._last_count
        first_count = before + int(count_K[0])
        self._longest = max(self._longest, int(count_K.max()), first_count)
        self._last_user = int(user_C[-1])
        self._last_count = int(count_K[-1])
        if len(count_K) == 1:
            self._last_count = first_count

    def candidates(self) -> CandidateLists:
        """Joins all batches."""
        user_K = np.concatenate(self._users)
        domain_K = np.concatenate(self._domains)
        count_K = np.concatenate(self._counts)
        rows_C = np.concatenate(self._rows)
        first_K = np.flatnonzero(np.diff(user_K, prepend=-1))
        ends_K = np.zeros(0, np.int64)
        if len(first_K):
            total_K = np.cumsum(count_K)
            ends_K = np.append(total_K[first_K[1:] - 1], total_K[-1])
        return CandidateLists(
            user_K[first_K],
            domain_K[first_K],
            ends_K,
            rows_C,
            max(1, self._longest),
        )


def _broadcast_next(
    batches: Iterator[CandidateBatch], file: str | Path, first: bool
) -> CandidateBatch | None:
    """The next of the first rank's batches, on all ranks; None after the last.

    The first rank sends the batch's size, or _END or _FAILED, and then int32 (3, size). Raises
    InputError on all ranks where the first one cannot read on.
    """
    size = torch.tensor([_END])
    batch = None
    error = None
    if first:
        try:
            batch = next(batches, None)
        except duckdb.Error as raised:
            error = raised
            size[0] = _FAILED
        if batch is not None:
            size[0] = len(batch[0])
    dist.broadcast(size, 0)
    if size == _FAILED:
        reason = "the first rank's own line says why"
        if error is not None:
            reason = _first_line(error)
        raise InputError(
            f"{file}: cannot be read ({reason})", one_rank=error is not None
        )
    if size == _END:
        return None
    if batch is not None:
        rows_3C = torch.from_numpy(np.stack(batch).astype(np.int32))
    else:
        rows_3C = torch.empty(3, int(size), dtype=torch.int32)
    dist.broadcast(rows_3C, 0)
    user_C, domain_C, row_C = rows_3C.numpy()
    return user_C, domain_C, row_C


def _read_joined(engine: duckdb.DuckDBPyConnection) -> Iterator[CandidateBatch]:
    """Batches of the table `joined`, which `_join` leaves: user after user, the positive first."""
    query = 'SELECT "user", domain, row FROM joined ORDER BY "user", place'
    for batch in engine.sql(query).to_arrow_reader(_BATCH):
        user_C, domain_C, row_C = batch.columns
        yield user_C.to_numpy(), domain_C.to_numpy(), row_C.to_numpy()


def _join(
    engine: duckdb.DuckDBPyConnection, dataset: Dataset, file: str | Path
) -> None:
    """Makes the table `joined`, or raises InputError.

    "user"    domain    place    row
    5         0         1        1         the positive of the user with number 5
    5         0         2        4         the first negative
    """
    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    try:
        _load_file(engine, file)
        _load_items(engine, dataset)
        _refuse_unusable_rows(engine, dataset, file)
        _place_positives(engine, file)
        _join_items(engine, dataset, file)
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"{file}: is too large for the memory and the temporary files of this host "
            f"({_first_line(error)}): set TMPDIR to a larger disk, or rank fewer users"
        ) from None


def _load_file(engine: duckdb.DuckDBPyConnection, file: str | Path) -> None:
    """Makes the table `given` of the file's rows.

        line    user_id    domain    without    candidates
        0       u5         Books     false      [a1, a4, a2]
        1       u0         NULL      true       …

    domain: NULL where the file does not say it. without: there is no list of negatives.
    candidates: the positive first.
    """
    # DuckDB finds a relation in this function's variables by the name that the SQL says.
    parquet = _open_parquet(engine, file)
    types = dict(zip(parquet.columns, map(str, parquet.types), strict=True))
    user = IdColumn("user_id", types["user_id"]).text_sql()
    positive = IdColumn("positive", types["positive"]).text_sql()
    list_type = types["negatives"]
    item_type = list_type[: list_type.rindex("[")]
    negative = IdColumn("item", item_type).text_sql()
    domain = "NULL::VARCHAR"
    if "domain" in parquet.columns:
        domain = "domain::VARCHAR"
    try:
        engine.execute(
            f"""
            CREATE TABLE given AS
            SELECT file_row_number AS line,
                   {user} AS user_id,
                   {domain} AS domain,
                   negatives IS NULL AS without,
                   list_prepend(
                       {positive},
                       list_transform(
                           negatives::{item_type}[], lambda item: {negative}
                       )
                   ) AS candidates
            FROM parquet
            """
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise InputError(
            f"{file}: cannot be read ({_first_line(error)})"
        ) from None


def _open_parquet(
    engine: duckdb.DuckDBPyConnection, file: str | Path
) -> duckdb.DuckDBPyRelation:
    """The file's rows, with their numbers. Raises InputError where it has not the columns."""
    try:
        parquet = engine.read_parquet(
            str(file), file_row_number=True, hive_partitioning=False
        )
    except duckdb.Error as error:
        raise InputError(
            f"{file}: is no readable Parquet ({_first_line(error)})"
        ) from None
    columns = parquet.columns
    missing = {"user_id", "positive", "negatives"} - set(columns)
    if missing:
        raise InputError(
            f"{file}: has no column {', '.join(sorted(missing))}; "
            f"its columns are {', '.join(columns[:-1])}"
        )
    kind = str(parquet.types[columns.index("negatives")])
    if not kind.endswith("]"):
        raise InputError(
            f"{file}: the column negatives is {kind}; it has to be a list of item ids"
        )
    return parquet


def _load_items(engine: duckdb.DuckDBPyConnection, dataset: Dataset) -> None:
    """Makes the tables `items` (domain, item_id, row) and `domains` (domain, name)."""
    selects = []
    names = []
    for number, domain in enumerate(dataset.domains):
        vocabulary = parquet_sql(dataset.local(domain.vocabulary))
        selects.append(
            f"SELECT {number} AS domain, item_id::VARCHAR AS item_id, row "
            f"FROM {vocabulary}"
        )
        names.append([number, domain.name])
    engine.execute(f"CREATE TABLE items AS {' UNION ALL '.join(selects)}")
    engine.execute("CREATE TABLE domains (domain INTEGER, name VARCHAR)")
    engine.executemany("INSERT INTO domains VALUES (?, ?)", names)


def _refuse_unusable_rows(
    engine: duckdb.DuckDBPyConnection, dataset: Dataset, file: str | Path
) -> None:
    """Raises InputError for a row that cannot be used, whatever its items are."""
    users = _users_sql(dataset)
    _refuse(
        engine,
        file,
        f"""
        SELECT line, user_id
        FROM given ANTI JOIN {users} u ON given.user_id = u.user_id::VARCHAR
        """,
        "user_id {} is not in the dataset",
    )
    _refuse(
        engine,
        file,
        """
        SELECT line, user_id
        FROM given
        WHERE line NOT IN (SELECT min(line) FROM given GROUP BY user_id)
        """,
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
        """
        SELECT line, candidates[1]
        FROM given
        WHERE list_contains(candidates[2:], candidates[1])
        """,
        "item {} is the positive and one of the negatives",
    )
    _refuse(
        engine,
        file,
        """
        SELECT line, domain
        FROM given
        WHERE domain IS NOT NULL AND domain NOT IN (SELECT name FROM domains)
        """,
        "domain {} is not in the dataset",
    )


def _place_positives(
    engine: duckdb.DuckDBPyConnection, file: str | Path
) -> None:
    """Makes the table `placed` (line, matches, domain): the domain that has the row's positive."""
    engine.execute(
        """
        CREATE TABLE placed AS
        SELECT line, count(*) AS matches, min(i.domain) AS domain
        FROM (SELECT line, domain, candidates[1] AS positive FROM given) g
             JOIN items i ON i.item_id = g.positive
             JOIN domains d ON d.domain = i.domain AND d.name = coalesce(g.domain, d.name)
        GROUP BY line
        """
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
        """
        SELECT line, candidates[1]
        FROM given JOIN placed USING (line)
        WHERE matches > 1
        """,
        "item {} is in several domains; add a column `domain`",
    )


def _join_items(
    engine: duckdb.DuckDBPyConnection, dataset: Dataset, file: str | Path
) -> None:
    """Makes the table `joined` of `given` and `placed`: a row for each candidate."""
    engine.execute(
        f"""
        CREATE TABLE joined AS
        SELECT line, "user", p.domain, place, i.row,
               CASE WHEN i.row IS NULL THEN l.item_id END AS unknown
        FROM (SELECT line, user_id,
                     unnest(candidates) AS item_id,
                     generate_subscripts(candidates, 1) AS place
              FROM given) l
             JOIN placed p USING (line)
             JOIN {_users_sql(dataset)} u ON l.user_id = u.user_id::VARCHAR
             LEFT JOIN items i ON i.domain = p.domain AND i.item_id = l.item_id
        """
    )
    engine.execute("DROP TABLE given")
    _refuse(
        engine,
        file,
        "SELECT line, unknown FROM joined WHERE row IS NULL",
        "item {} is not in the positive's domain",
    )


class ResultWriter:
    """Writes the results per target: `user_id`, `domain`, `rank`, `scores`.

    scores: the held-out item's first. Each rank writes a part; `finish` joins the parts, sorted by
    user number and a user's oldest first, and leaves one file:

        user_id    domain    rank    scores
        u0         Toys      2       [0.5, 1.5]
        u5         Books     1       [3.0, 2.0, 1.0]
    """

    def __init__(self, dataset: Dataset, file: str | Path, ranks: "Ranks"):
        """Raises InputError where the file exists or cannot be written."""
        self.dataset = dataset
        self.file = Path(file)
        self.ranks = ranks
        if self.file.exists():
            raise InputError(
                f"{self.file}: already exists; give another --output"
            )
        if not self.file.parent.is_dir():
            raise InputError(f"{self.file.parent}: there is no such folder")
        self._schema = pa.schema(
            [
                ("user", pa.int64()),
                ("target", pa.int64()),
                ("domain", pa.string()),
                ("rank", pa.int64()),
                ("scores", pa.list_(pa.float32())),
            ]
        )
        try:
            self._writer = pq.ParquetWriter(
                self._part(ranks.rank), self._schema
            )
        except OSError as error:
            raise InputError(
                f"{self.file.parent}: cannot be written ({error.strerror})"
            ) from None

    def add(
        self,
        candidates: "Candidates",
        ranks_B: np.ndarray,
        scores_C: np.ndarray,
    ) -> None:
        """Adds the users of one step of `rank_candidates`. ranks_B: positions."""
        real = candidates.user_B >= 0
        if not real.any():
            return
        ends_B = np.cumsum(candidates.counts_B)
        offsets = np.concatenate([[0], ends_B]).astype(np.int32)
        names = [
            self.dataset.domains[domain].name for domain in candidates.domain_B
        ]
        scores = pa.ListArray.from_arrays(offsets, scores_C.astype(np.float32))
        columns = {
            "user": candidates.user_B,
            "target": candidates.number_B,
            "domain": names,
            "rank": ranks_B,
            "scores": scores,
        }
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def finish(self) -> None:
        """Joins the parts. Called on all ranks after the last user."""
        self._writer.close()
        my_size = torch.tensor([self._part(self.ranks.rank).stat().st_size])
        sizes = [
            torch.empty_like(my_size) for _ in range(self.ranks.world_size)
        ]
        dist.all_gather(sizes, my_size)
        run_on_first_rank(
            lambda: self._join([int(size) for size in sizes]), self.ranks.first
        )

    def _join(self, sizes: list[int]) -> None:
        """Makes one file of all parts. sizes: of the parts, in bytes."""
        parts = [self._part(rank) for rank in range(self.ranks.world_size)]
        users = _users_sql(self.dataset)
        try:
            self._wait_for(parts, sizes)
            quoted_parts = ", ".join(map(_quote, parts))
            with (
                replace_file(self.file) as partial,
                open_connection() as engine,
            ):
                engine.execute(
                    f"""
                    COPY (SELECT u.user_id, r.domain, r.rank, r.scores
                          FROM read_parquet([{quoted_parts}], hive_partitioning=false) r
                               JOIN {users} u ON u.user = r.user
                          ORDER BY r.target)
                    TO {_quote(partial)} (FORMAT parquet)
                    """
                )
        finally:
            partial = self.file.with_name(self.file.name + ".partial")
            for file in (partial, *parts):
                file.unlink(missing_ok=True)

    def _wait_for(self, parts: list[Path], sizes: list[int]) -> None:
        """Waits for the parts, which other hosts may have written only now."""
        patience = Patience(self.file.parent)
        for part, size in zip(parts, sizes, strict=True):
            while not _has_size(part, size):
                if patience.over:
                    raise LateStorage(
                        f"{part}: is not seen on this host: --output has to be on storage "
                        "that all hosts see"
                    )
                patience.wait()

    def discard(self) -> None:
        """Removes this rank's part, where ranking failed."""
        self._writer.close()
        self._part(self.ranks.rank).unlink(missing_ok=True)

    def _part(self, rank: int) -> Path:
        return self.file.with_name(f"{self.file.name}.{rank:05d}.part")


def _refuse(
    engine: duckdb.DuckDBPyConnection,
    file: str | Path,
    offenders: str,
    message: str,
) -> None:
    """Raises InputError for the first row that the query `offenders` (line, value) gives."""
    query = f"SELECT * FROM ({offenders}) ORDER BY 1 LIMIT 1"
    offender = engine.execute(query).fetchone()
    if offender:
        line, value = offender
        raise InputError(f"{file}: row {line}: {message.format(value)}")


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _users_sql(dataset: Dataset) -> str:
    """SQL: the rows of the dataset's users."""
    return parquet_sql(dataset.local(USERS))


def _quote(path: str | Path) -> str:
    """A path as an SQL literal."""
    return f"'{escape_sql(path)}'"
