"""Copies of the item table on groups of ranks (two-level sharding): each group has all rows.

    4 ranks, table.group_size=2, 8 stored rows

                 first of a group    second of a group
    group 0      rank 0: rows 0 – 3  rank 1: rows 4 – 7
    group 1      rank 2: rows 0 – 3  rank 3: rows 4 – 7
                 replicas            replicas

Rows are looked up within a group: with a group a host, the all-to-all stays inside it. Gradients are
summed over the groups before the one update, so that all copies stay equal to the bit and the result
is that of one copy, but for the order of a sum. Of the rows that replicas hold each answers for a
part (here rank 0 for rows 0 and 1, rank 2 for rows 2 and 3): it sums the gradients of its part
(reduce-scatter), and sends the sums to its replicas (all-gather). Only rows that a step looked up
are on their way, each once.

Shapes: N looked-up rows of a shard, K distinct ones of them, P rows that replicas send, Q distinct
ones of them, U rows of the shard that any group looked up, G groups, r width.
"""

import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.config import TableConfig

Encoder = Callable[[Tensor], Tensor]


def count_ranks_of_group(config: TableConfig, ranks: int) -> int:
    """How many ranks share a copy of the table.

    Raises ValueError where so many ranks cannot be cut into groups of that size.
    """
    size = config.group_size or ranks
    if ranks % size:
        raise ValueError(
            f"table.group_size={size}: {ranks} ranks cannot be cut into groups of {size}: give a "
            f"divisor of {ranks}, or 0 for one copy of the table on all ranks"
        )
    return size


@dataclass(frozen=True)
class RankGroups:
    """This rank's place among groups and replicas.

    Attributes:
        size: ranks of a group.
        copies: groups, G.
        group: which of the groups this rank is in.
        within: the process group of its group.
        replicas: that of the ranks that hold the same rows; None where there is one copy.
    """

    size: int
    copies: int
    group: int
    within: dist.ProcessGroup
    replicas: dist.ProcessGroup | None = None

    @property
    def first_rank(self) -> int:
        """The first rank of this rank's group."""
        return self.group * self.size

    def part_bounds(self, rows: int) -> list[int]:
        """Where the parts begin that replicas answer for, and where the last ends (G + 1).

        Eight rows and three groups: [0, 2, 5, 8].
        """
        return [rows * group // self.copies for group in range(self.copies + 1)]


def build_groups(size: int) -> RankGroups:
    """Groups of so many consecutive ranks each. Called on all ranks."""
    ranks = dist.get_world_size()
    copies = ranks // size
    world = dist.group.WORLD
    assert world is not None  # a table is made within a process group
    if copies == 1:
        return RankGroups(size, 1, 0, world)
    timeout = _timeout(world)
    groups = [
        list(range(first, first + size)) for first in range(0, ranks, size)
    ]
    within, _ = dist.new_subgroups_by_enumeration(groups, timeout=timeout)
    same_rows = [list(range(number, ranks, size)) for number in range(size)]
    replicas, _ = dist.new_subgroups_by_enumeration(same_rows, timeout=timeout)
    return RankGroups(size, copies, dist.get_rank() // size, within, replicas)


def _timeout(world: dist.ProcessGroup) -> datetime.timedelta:
    """How long a collective of all ranks may take: timeout_minutes, of a run."""
    backend = world._get_backend(torch.device("cpu"))
    return backend.options._timeout


@dataclass(frozen=True)
class SharedRows:
    """Rows of this rank's shard that a step updates, on all replicas alike.

    Attributes:
        place_N: for each looked-up row its place among the distinct ones.
        distinct: how many these are, K.
        sent: of them, how many each replica answers for.
        received: how many rows each replica sends of this rank's part.
        place_P: for each of those its place among the distinct ones.
        counts: of each replica's part, how many rows any group looked up; Q is this rank's.
        rows_U: all of those, as rows of the shard, rising.

    Example: the rank 0 above looks rows 3, 1 and 3 up, its replica rows 0 and 3:

        place_N     tensor([1, 0, 1])        of the distinct rows 1, 3
        sent        [1, 1]
        received    [1, 1]                   row 1 of its own, row 0 of rank 2
        place_P     tensor([1, 0])
        counts      [2, 1]
        rows_U      tensor([0, 1, 3])
    """

    place_N: Tensor
    distinct: int
    sent: list[int]
    received: list[int]
    place_P: Tensor
    counts: list[int]
    rows_U: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """What lies on the device."""
        yield self.place_N
        yield self.place_P
        yield self.rows_U


def exchange_rows(
    groups: RankGroups, looked_up_N: Tensor, rows: int
) -> SharedRows:
    """Tells replicas which rows a step has looked up. Called on all ranks.

    looked_up_N: int64, rows of this rank's shard, which has `rows`. The host waits for the counts.
    """
    rows_K, place_N = torch.unique(looked_up_N, return_inverse=True)
    bounds = torch.tensor(groups.part_bounds(rows), device=rows_K.device)
    sent_G = torch.searchsorted(rows_K, bounds).diff()
    received_G = torch.empty_like(sent_G)
    dist.all_to_all_single(received_G, sent_G, group=groups.replicas)
    sent = sent_G.tolist()
    received = received_G.tolist()
    rows_P = rows_K.new_empty(sum(received), dtype=torch.int32)
    dist.all_to_all_single(
        rows_P, rows_K.int(), received, sent, group=groups.replicas
    )
    rows_Q, place_P = torch.unique(rows_P, return_inverse=True)
    counts_G = sent_G.new_empty(groups.copies)
    count = torch.tensor([len(rows_Q)], device=rows_Q.device)
    dist.all_gather_into_tensor(counts_G, count, group=groups.replicas)
    counts = counts_G.tolist()
    return SharedRows(
        place_N=place_N,
        distinct=len(rows_K),
        sent=sent,
        received=received,
        place_P=place_P,
        counts=counts,
        rows_U=_gather_parts(groups, rows_Q, counts).long(),
    )


def sum_gradients(
    groups: RankGroups, shared: SharedRows, gradient_NR: Tensor, encode: Encoder
) -> Tensor:
    """The gradients of `shared.rows_U`, summed over all ranks, (U, r). Called on all ranks.

    gradient_NR: of the looked-up rows, fp32, summed over this rank's group, as TorchRec has it
    divided by its ranks. encode: makes what travels of fp32. The host waits for nothing.
    """
    width = gradient_NR.shape[1]
    gradient_KR = gradient_NR.new_zeros(shared.distinct, width)
    gradient_KR.index_add_(0, shared.place_N, gradient_NR)
    sent_KR = encode(gradient_KR / groups.copies)
    received_PR = sent_KR.new_empty(sum(shared.received), width)
    dist.all_to_all_single(
        received_PR,
        sent_KR,
        shared.received,
        shared.sent,
        group=groups.replicas,
    )
    number = dist.get_rank(groups.replicas)
    sum_QR = gradient_NR.new_zeros(shared.counts[number], width)
    sum_QR.index_add_(0, shared.place_P, received_PR.to(sum_QR.dtype))
    return _gather_parts(groups, encode(sum_QR), shared.counts).to(sum_QR.dtype)


def _gather_parts(
    groups: RankGroups, part: Tensor, counts: list[int]
) -> Tensor:
    """All replicas' parts, one after the other. counts: how many rows each has."""
    most = max(counts)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part
    gathered = part.new_empty(groups.copies * most, *part.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=groups.replicas)
    parts = []
    for group, count in enumerate(counts):
        parts.append(gathered[group * most : group * most + count])
    return torch.cat(parts)
