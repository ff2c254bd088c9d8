"""One part's shards from its sorted events, and the statistics by which parts become a dataset.

What is in a shard does not depend on the parts. Whatever sorts the events (DuckDB, or a Spark
cluster in `spark.py`) hands them to `write_part`.

A part of four users, where domain 0 owns the rows 0 … 68 of M and domain 1 the rows 69 … 135:

    number_N   0 0  0 0 | 1  | 2 2 2 | 3  3
    rows_N     2 69 0 1 | 70 | 1 1 3 | 69 71
    time_N     1 2  2 9 | 4  | 3 5 8 | 7  8

The users 0 and 2 are split by leave-one-out; of each the last item is the test item, the last
but one the validation item. What the dataset has to know of the part lies beside its shards:

    lengths.npy      training interactions, uint16 (U, D): [[1, 1], [0, 1], [1, 0], [0, 2]]
    held.npy         rows that are held out, and how often: [[0, 1, 3], [1, 2, 1]]
    histograms.npy   domain, length, how many users have it (all parts of the split together):
                     [[0, 3, 2], [1, 1, 2], [1, 2, 1]]
    overlap.npy      users of two domains (all parts of the split together), see `overlap.py`:
                     [[2, 1], [1, 3], [3, 1]]
    facts.json       its shards, how many users are too short to be split, how many have the same
                     time in their newest two events, the longest history
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.format.dataset import (
    LENGTHS,
    LENGTHS_DTYPE,
    Shard,
    quantize_times,
)
from trainer.data.format.shards import Block, write_shard
from trainer.data.prepare.ids import Ids
from trainer.data.prepare.layout import Layout
from trainer.data.prepare.overlap import OVERLAP_COUNTS, count_overlap
from trainer.data.split import TEST, VALIDATION, can_be_split
from trainer.files.staged import write_record


@dataclass(frozen=True)
class _Histories:
    """The histories of a part's users, one after the other.

    lengths_U, int64 (U,). offsets: int64 (U + 1,), where each history begins, and N.
    """

    users: range
    lengths_U: np.ndarray
    offsets: np.ndarray
    rows_N: np.ndarray
    ticks_N: np.ndarray

    def blocks(
        self,
        first: int,
        last: int,
        block_users: int,
        advance: Callable[[int], None] | None,
    ) -> Iterator[Block]:
        """Yields the users [first, last) in blocks, of which the last has the rest."""
        for block_first in range(first, last, block_users):
            block_last = min(block_first + block_users, last)
            begin = block_first - self.users.start
            end = block_last - self.users.start
            first_event = self.offsets[begin]
            last_event = self.offsets[end]
            if advance is not None:
                advance(last_event - first_event)
            lengths_U = self.lengths_U[begin:end]
            yield Block(
                lengths_B=lengths_U.astype(np.int32),
                items_N=self.rows_N[first_event:last_event],
                ticks_N=self.ticks_N[first_event:last_event],
            )


def write_part(
    folder: Path,
    ids: Ids,
    layout: Layout,
    part: int,
    number_N: np.ndarray,
    rows_N: np.ndarray,
    time_N: np.ndarray,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Writes a part's shards into `folder`/shards, and beside them the part's statistics.

    All events of the part's users are given, drawn above: number_N, numbers of users, rising;
    rows_N, rows of M, int32, each user's oldest first; time_N, times in the logs' unit,
    as exact as the logs have them.
    advance(n): called as n interactions have been written.
    """
    users = layout.users_of(part)
    ticks_N = quantize_times(time_N, ids.first_time, ids.last_time)
    index_N = number_N - users.start
    lengths_U = np.bincount(index_N, minlength=len(users))
    if len(lengths_U) != len(users) or not lengths_U.all():
        raise AssertionError(
            f"part {part} has not the events of its users {users}"
        )
    ends_U = np.cumsum(lengths_U)
    offsets = np.concatenate([[0], ends_U])
    histories = _Histories(
        users=users,
        lengths_U=lengths_U,
        offsets=offsets,
        rows_N=rows_N,
        ticks_N=ticks_N,
    )
    _write_statistics(folder, ids, histories, number_N)
    shards = _write_shards(folder, ids, layout, part, histories, advance)
    shard_records = []
    for shard in shards:
        shard_records.append(dataclasses.asdict(shard))
    too_short_U = ~can_be_split(lengths_U)
    ends_S = ends_U[~too_short_U]
    is_tied_S = (
        time_N[ends_S - TEST.offset] == time_N[ends_S - VALIDATION.offset]
    )
    record = {
        "shards": shard_records,
        "too_short": int(too_short_U.sum()),
        "tied_users": int(is_tied_S.sum()),
        "max_length": int(lengths_U.max()),
    }
    write_record(folder / "facts.json", record)


def _write_statistics(
    folder: Path,
    ids: Ids,
    histories: _Histories,
    number_N: np.ndarray,
) -> None:
    """Writes lengths.npy, held.npy, histograms.npy and overlap.npy."""
    starts = np.array(ids.starts)
    rows_N = histories.rows_N

    # Leave-one-out: the last item of the users S that are long enough is the test item, the
    # last but one the validation item.
    is_long_U = can_be_split(histories.lengths_U)
    users_S = np.flatnonzero(is_long_U)
    ends_U = histories.offsets[1:]
    ends_S = ends_U[users_S]
    test_rows_S = rows_N[ends_S - TEST.offset]
    validation_rows_S = rows_N[ends_S - VALIDATION.offset]
    held_out = np.concatenate([test_rows_S, validation_rows_S])
    held_out_rows, held_out_counts = np.unique(held_out, return_counts=True)
    rows_and_counts = np.stack([held_out_rows, held_out_counts])
    np.save(folder / "held.npy", rows_and_counts)

    counts_UD = _count_by_domain(starts, histories, number_N)
    training_UD = counts_UD.copy()
    for rows_S in (test_rows_S, validation_rows_S):
        domains_S = np.searchsorted(starts, rows_S, side="right") - 1
        training_UD[users_S, domains_S] -= 1
    longest = np.iinfo(LENGTHS_DTYPE).max
    clipped_UD = np.minimum(training_UD, longest)
    clipped_UD = clipped_UD.astype(LENGTHS_DTYPE)
    np.save(folder / LENGTHS, clipped_UD)
    histograms = _length_histograms(counts_UD)
    np.save(folder / "histograms.npy", histograms)
    np.save(folder / OVERLAP_COUNTS, count_overlap(counts_UD))


def _count_by_domain(
    starts: np.ndarray,
    histories: _Histories,
    number_N: np.ndarray,
) -> np.ndarray:
    """Counts each user's interactions by domain, int64 (U, D).

    starts: as `Ids.starts`. Of the example in the module's head: [[3, 1], [0, 1], [3, 0], [0,
    2]].
    """
    users = len(histories.users)
    domains = len(starts) - 1
    domain_N = np.searchsorted(starts, histories.rows_N, side="right") - 1
    index_N = number_N - histories.users.start
    cell_N = index_N * domains + domain_N
    counts = np.bincount(cell_N, minlength=users * domains)
    return counts.reshape(users, domains)


def _length_histograms(counts_UD: np.ndarray) -> np.ndarray:
    """Counts the users of each length by domain: (domain, length, users), int64 (K, 3).

    A user without an interaction of a domain is not counted in it.

        counts_UD    [[3, 1], [0, 1], [3, 0], [0, 2]]
        returns      [[0, 3, 2], [1, 1, 2], [1, 2, 1]]
    """
    pieces = []
    for domain, counts_U in enumerate(counts_UD.T):
        active_U = counts_U[counts_U > 0]
        lengths, users = np.unique(active_U, return_counts=True)
        domain_column = np.full(len(lengths), domain, np.int64)
        piece = np.column_stack([domain_column, lengths, users])
        pieces.append(piece)
    return np.concatenate(pieces).astype(np.int64)


def _write_shards(
    folder: Path,
    ids: Ids,
    layout: Layout,
    part: int,
    histories: _Histories,
    advance: Callable[[int], None] | None,
) -> list[Shard]:
    """Writes a part's shards into `folder`/shards."""
    num_embeddings = ids.starts[-1]
    offsets = histories.offsets
    (folder / "shards").mkdir()
    shards = []
    for number in layout.shards_of(part):
        first = layout.first_user(number)
        last = layout.first_user(number + 1)
        name = f"shards/{number:06d}.tar"
        blocks = histories.blocks(first, last, layout.block_users, advance)
        size, sha256 = write_shard(
            folder / name,
            first,
            num_embeddings,
            blocks,
        )
        begin = first - histories.users.start
        end = last - histories.users.start
        first_event = offsets[begin]
        last_event = offsets[end]
        shard = Shard(
            name=name,
            users=last - first,
            first_user=first,
            interactions=int(last_event - first_event),
            bytes=size,
            sha256=sha256,
        )
        shards.append(shard)
    return shards
