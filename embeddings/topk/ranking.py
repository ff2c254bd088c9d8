"""Exact ranking of all items of a domain on the row-wise shards of M: full ranking.

It gives the best k items of a user (top-k), and the position of an item in a user's ranked list.

The table is never gathered. The users' vectors go to all ranks. Each rank scores the rows that it
has, strip by strip, and keeps the best so far (embeddings/topk/chunks.py; cpu_scan.py, or
torch_scan.py where that cannot run). Its results go back to the users' ranks, which merge them.
Scores are float32 products, and only what those cannot tell apart is scored again, exactly
(bounds.py): results do not depend on the number of ranks, on the block, or on the device. Memory is
that of a few blocks and of the users scored at once, whatever the number of items and of users.

Shapes: B users of this rank, U users of all ranks that are scored at once, E excluded pairs of user
and row, W ranks, k best items, r width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.topk import cpu_scan, torch_scan
from embeddings.topk.bounds import exact_scores
from embeddings.topk.chunks import (
    Shard,
    Strips,
    UserPart,
    scan_strips,
    split_users,
)
from embeddings.topk.torch_scan import scores_and_rows, smallest

if TYPE_CHECKING:
    from embeddings.table import ItemTable


@dataclass(frozen=True)
class Excluded:
    """Rows that users are not to be shown, jagged.

    Attributes:
        rows_E: int64, rows of M as in the dataset, user after user, in any order. One may stand
            there more than once, and rows of other domains are ignored.
        counts_B: int64, of each user.

    Example: two domains, rows 0 to 9 and 10 to 19, and four users with their histories. In a
    ranking of the first domain the rows 12, 14 and 15 are ignored:

        rows_E      tensor([3, 12, 5, 14,   15,   1, 2])
        counts_B    tensor([4,               1, 0, 2])

    Raises ValueError where the counts do not add up to the rows.
    """

    rows_E: Tensor
    counts_B: Tensor

    def __post_init__(self) -> None:
        total = int(self.counts_B.sum())
        if total != len(self.rows_E):
            raise ValueError(
                f"{len(self.rows_E)} excluded rows, but counts of them that add up to {total}"
            )


@dataclass(frozen=True)
class Top:
    """The best items of each user.

    Attributes:
        rows_Bk: int64, rows of M, best first, equal scores by row, −1 where none is left.
        scores_Bk: float32, −inf there and where a score is not a number.

    Example: two users and k = 3. The second is to be shown two items only:

        rows_Bk      tensor([[4, 2, 7], [9, 4, -1]])
        scores_Bk    tensor([[0.9, 0.5, 0.5], [0.3, 0.1, −inf]])
    """

    rows_Bk: Tensor
    scores_Bk: Tensor


class ExactRanking:
    """Ranks the rows [first, first + items) of M.

    Every method, the first too, is called on all ranks, each with its own users, of which there may
    be none. Each rank gets the answers for its own users. Vectors are taken as they are in the table
    at a call.
    """

    def __init__(
        self,
        table: "ItemTable",
        first: int,
        items: int,
        block: int = 1024,
        users: int = 2048,
        ranked_N: np.ndarray | None = None,
    ):
        """block: rows of a shard scored at once; users: of all ranks together, at once.

        ranked_N: bool (items,), the items that are ranked and shown, the same on all ranks; None:
        all. Raises ValueError where the rows are not the table's.
        """
        if not (first >= 0 and items >= 1 and first + items <= table.rows):
            raise ValueError(
                f"rows {first} to {first + items - 1} are not rows of a table of {table.rows}"
            )
        if block < 1 or users < 1:
            raise ValueError(
                f"block is {block} and users {users}: give at least 1"
            )
        self.table = table
        self.first = first
        self.items = items
        self.block = block
        self.users = users
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._ranked_N = None
        if ranked_N is not None:
            self._ranked_N = torch.from_numpy(ranked_N).to(table.device)
        self.strips = Strips(
            first, items, block, self.world_size, self._ranked_N
        )
        first_stored_row, _ = table.shard()
        starts_W = self._gather_numbers(first_stored_row)
        # Where the table has copies, parts do not lie as the ranks do.
        self._starts_W, self._ranks_W = starts_W.sort()

    @torch.no_grad()
    def top_k(
        self,
        y_BR: Tensor,
        k: int,
        excluded: Excluded | None = None,
    ) -> Top:
        """The k best items of each user.

        y_BR: float32; the score of an item is the dot product with the item's vector. k is the same
        on all ranks. Raises ValueError where k is less than 1, or `excluded` is of other users.
        """
        if k < 1:
            raise ValueError(f"k is {k}: give at least 1")
        best = [
            torch.empty(
                0,
                k,
                dtype=torch.int64,
                device=self.table.device,
            )
        ]
        for group in self._group_users(y_BR, excluded):
            scans = [group.scan.TopK(part, k) for part in group.parts]
            scan_strips(
                self.strips.cut(group.shard, group.scan.pack_items), scans
            )
            keys_Uk = torch.cat([scan.best_keys() for scan in scans])
            best.append(self._merge_keys(group, keys_Uk, k))
        scores_Bk, rows_Bk = scores_and_rows(torch.cat(best))
        return Top(rows_Bk, scores_Bk)

    @torch.no_grad()
    def positions(
        self,
        y_BR: Tensor,
        row_B: Tensor,
        excluded: Excluded | None = None,
    ) -> Tensor:
        """The position of item row_B in each user's ranked list, int64 from 1, (B,).

        It is 1 + the number of other ranked items, not excluded, whose score is not less. So ties and
        scores that are no numbers count against the item. It may itself be excluded.

        row_B: int64, rows of this domain. Raises ValueError where a row is not the domain's, or
        `excluded` is of other users.

        Example: a domain of rows 0 to 2, which score 0.9, 0.5 and 0.5 for each of three users:

            row_B     tensor([0, 1, 2])
            result    tensor([1, 3, 3])
        """
        row_B = row_B.to(self.table.device)
        end = self.first + self.items
        if ((row_B < self.first) | (row_B >= end)).any():
            raise ValueError(
                f"an item to be ranked is not one of rows {self.first} to {end - 1}"
            )
        positions = [
            torch.empty(
                0,
                dtype=torch.int64,
                device=self.table.device,
            )
        ]
        for group in self._group_users(y_BR, excluded, row_B):
            score_U = self._score_targets(group)
            scans = []
            for part, users in zip(group.parts, group.slices, strict=True):
                scans.append(group.scan.ItemsAhead(part, score_U[users]))
            scan_strips(
                self.strips.cut(group.shard, group.scan.pack_items), scans
            )
            ahead_U = torch.cat([scan.count() for scan in scans])
            dist.all_reduce(ahead_U)
            positions.append(1 + ahead_U[group.first : group.end])
        return torch.cat(positions)

    def _merge_keys(self, group: "_Group", keys_Uk: Tensor, k: int) -> Tensor:
        """The k smallest keys of this rank's users over all ranks, (users, k)."""
        users = group.end - group.first
        received = keys_Uk.new_empty(self.world_size * users, k)
        dist.all_to_all_single(
            received,
            keys_Uk,
            [users] * self.world_size,
            group.counts,
        )
        by_rank = received.unflatten(0, (self.world_size, users))
        return smallest(by_rank.transpose(0, 1).flatten(1), k)

    def _score_targets(self, group: "_Group") -> Tensor:
        """The scores of the items whose position is asked for (U,), from the ranks that have them."""
        slot_U = group.shard.slot(cast(Tensor, group.row_U))
        is_local_U = group.shard.contains(slot_U)
        (local,) = torch.nonzero(is_local_U, as_tuple=True)
        score_U = torch.zeros(len(slot_U), device=slot_U.device)
        weight = group.shard.weight
        score_U[local] = exact_scores(group.y_UR, local, weight, slot_U[local])
        dist.all_reduce(score_U)
        return score_U

    def _group_users(
        self,
        y_BR: Tensor,
        excluded: Excluded | None,
        row_B: Tensor | None = None,
    ) -> Iterator["_Group"]:
        """The users of all ranks, some of each at a time. row_B: items whose position is wanted."""
        device = self.table.device
        y_BR = y_BR.detach().to(device, torch.float32)
        if excluded is None:
            nothing = torch.zeros(
                0,
                dtype=torch.int64,
                device=device,
            )
            excluded = Excluded(nothing, nothing.new_zeros(len(y_BR)))
        if len(excluded.counts_B) != len(y_BR):
            raise ValueError(
                f"{len(y_BR)} users, and what is excluded of {len(excluded.counts_B)}"
            )
        ends = [0, *excluded.counts_B.cumsum(0).tolist()]
        rows_E = excluded.rows_E.to(device)
        lengths_B = excluded.counts_B.to(device)
        totals = self._gather_numbers(len(y_BR)).tolist()
        groups = -(-sum(totals) // self.users)
        shard = Shard(self.table)
        for number in range(groups):
            begins = [total * number // groups for total in totals]
            next_begins = [total * (number + 1) // groups for total in totals]
            counts = []
            for begin, end in zip(begins, next_begins, strict=True):
                counts.append(end - begin)
            begin = begins[self.rank]
            end = next_begins[self.rank]
            first = sum(counts[: self.rank])
            local = torch.arange(first, first + end - begin, device=device)
            y_UR = torch.cat(_gather(y_BR[begin:end], counts))
            row_U = None
            users = torch.repeat_interleave(local, lengths_B[begin:end])
            rows = rows_E[ends[begin] : ends[end]]
            if row_B is not None:  # each item is compared with the others
                row_U = torch.cat(_gather(row_B[begin:end], counts))
                users = torch.cat([users, local])
                rows = torch.cat([rows, row_B[begin:end]])
            pairs = self._exchange_excluded(users, rows, len(y_UR))
            yield self._build_group(y_UR, row_U, pairs, shard, counts, first)

    def _build_group(
        self,
        y_UR: Tensor,
        row_U: Tensor | None,
        pairs: tuple[Tensor, Tensor],
        shard: Shard,
        counts: list[int],
        first: int,
    ) -> "_Group":
        """Cuts users into parts. pairs: the excluded rows of this rank, and their users."""
        excluded_row, excluded_user = pairs
        scan = cpu_scan if cpu_scan.supports(y_UR) else torch_scan
        slices = split_users(len(y_UR), self.table.device, scan.PARTS)
        parts = []
        for users in slices:
            from_start = excluded_user >= users.start
            before_stop = excluded_user < users.stop
            in_part = from_start & before_stop
            part = UserPart(
                y_UR[users],
                excluded_row[in_part],
                excluded_user[in_part] - users.start,
                shard,
                self.strips,
            )
            parts.append(part)
        return _Group(
            y_UR=y_UR,
            row_U=row_U,
            slices=slices,
            parts=parts,
            scan=scan,
            shard=shard,
            counts=counts,
            first=first,
            end=first + counts[self.rank],
        )

    def _exchange_excluded(
        self,
        users_E: Tensor,
        rows_E: Tensor,
        users: int,
    ) -> tuple[Tensor, Tensor]:
        """Sends excluded pairs to the ranks that have the rows.

        Returns (rows, users) of what this rank has, by row, once each.

        Example: two ranks, rows 0 to 4 on the first, 5 to 9 on the second. Rank 0 calls with

            users_E    tensor([0, 0, 1])
            rows_E     tensor([7, 2, 2])

        and rank 1, whose only user is number 2, with row 4. Rank 0 gets

            rows       tensor([2, 2, 4])
            users      tensor([0, 1, 2])
        """
        in_domain = (rows_E >= self.first) & (rows_E < self.first + self.items)
        users_E = users_E[in_domain]
        rows_E = rows_E[in_domain]
        if self._ranked_N is not None:
            is_ranked_E = self._ranked_N[rows_E - self.first]
            users_E = users_E[is_ranked_E]
            rows_E = rows_E[is_ranked_E]
        stored_E = self.table.scatter.stored(rows_E)
        part_E = torch.searchsorted(self._starts_W, stored_E, right=True) - 1
        owner_E, order_E = self._ranks_W[part_E].sort()
        sent_W = torch.bincount(owner_E, minlength=self.world_size)
        received_W = torch.empty_like(sent_W)
        dist.all_to_all_single(received_W, sent_W)
        sent_counts = sent_W.tolist()
        received_counts = received_W.tolist()
        pairs = rows_E.new_empty(sum(received_counts))
        sent_pairs = (rows_E * users + users_E)[order_E]
        dist.all_to_all_single(pairs, sent_pairs, received_counts, sent_counts)
        pairs = torch.unique(pairs)
        return pairs // users, pairs % users

    def _gather_numbers(self, number: int) -> Tensor:
        """One number of each rank, int64 (W,)."""
        local = torch.tensor([number], device=self.table.device)
        return torch.cat(_gather(local, [1] * self.world_size))


@dataclass(frozen=True)
class _Group:
    """Users of all ranks, one rank's after the other's.

    Attributes:
        y_UR: their vectors.
        row_U: items whose position is wanted, or None.
        slices: the users of each part.
        parts: the same users, for this rank's shard.
        scan: the module that scans, the kernel's or PyTorch's.
        shard: this rank's.
        counts: how many users are each rank's.
        first, end: this rank's users.
    """

    y_UR: Tensor
    row_U: Tensor | None
    slices: list[slice]
    parts: list[UserPart]
    scan: ModuleType
    shard: Shard
    counts: list[int]
    first: int
    end: int


def _gather(local: Tensor, counts: list[int]) -> list[Tensor]:
    """All ranks' tensors. counts: how many rows each rank's has.

    Example: two ranks with two rows and one:

        local     tensor([4, 7]) on rank 0, tensor([5]) on rank 1
        counts    [2, 1]
        result    [tensor([4, 7]), tensor([5])] on both
    """
    most = max(counts)
    padded = torch.zeros(
        most,
        *local.shape[1:],
        dtype=local.dtype,
        device=local.device,
    )
    padded[: len(local)] = local
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    tensors = []
    for tensor, count in zip(gathered, counts, strict=True):
        tensors.append(tensor[:count])
    return tensors
