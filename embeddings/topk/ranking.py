"""Exact ranking of all items of a domain on the row-wise shards of M: the best k for a user, and the rank of an item.

The table is never gathered. The users' vectors go to all ranks; each rank scores the rows that it holds, strip by strip, and
keeps the best so far (embeddings/topk/chunks.py; cpu_scan.py, or torch_scan.py where that cannot run); what it found goes back to the users'
ranks, which merge. Scores are float32 products, and only what those cannot tell from what is sought is scored again, exactly
(bounds.py): results do not depend on the number of ranks, on the block, or on the device. Memory is that of a few blocks and of
the users scored at once, whatever the number of items and of users.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist

from embeddings.topk import cpu_scan, torch_scan
from embeddings.topk.bounds import exact_scores
from embeddings.topk.chunks import Shard, Strips, UserPart, parts_of, show
from embeddings.topk.torch_scan import scores_and_rows, smallest


@dataclass(frozen=True)
class Excluded:
    """Rows that users are not to be shown, jagged.

    rows_E: int64, rows of M as in the dataset, user after user, in any order; one may stand there more than once, and rows of
    other domains are ignored. counts_B: int64, of each user.
    """

    rows_E: torch.Tensor
    counts_B: torch.Tensor

    def __post_init__(self):
        if (total := int(self.counts_B.sum())) != len(self.rows_E):
            raise ValueError(
                f"{len(self.rows_E)} excluded rows, but counts of them that add up to {total}"
            )


@dataclass(frozen=True)
class Top:
    """The best items of each user. rows_Bk: int64, rows of M, best first, equal scores by row, −1 where none is left;
    scores_Bk: float32, −inf there and where a score is not a number."""

    rows_Bk: torch.Tensor
    scores_Bk: torch.Tensor


class ExactRanking:
    """Ranks the rows [first, first + items) of M. Every method, the first too, is called on all ranks, each with its own
    users, of which there may be none, and gives each the answers of its own.

    Vectors are taken as they are in the table at a call.
    """

    def __init__(self, table, first, items, block=1024, users=2048):
        """table: ItemTable; block: rows of a shard scored at once; users: of all ranks together, at once.

        Raises ValueError where the rows are not the table's.
        """
        if not (first >= 0 and items >= 1 and first + items <= table.rows):
            raise ValueError(
                f"rows {first} to {first + items - 1} are not rows of a table of {table.rows}"
            )
        if block < 1 or users < 1:
            raise ValueError(f"block is {block} and users {users}: give at least 1")
        self.table, self.first, self.items, self.block, self.users = (
            table,
            first,
            items,
            block,
            users,
        )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.strips = Strips(first, items, block, self.world_size)
        starts = torch.tensor([table.shard()[0]], device=table.device)
        self._starts_W = torch.cat(_gathered(starts, [1] * self.world_size))

    @torch.no_grad()
    def top_k(self, y_BR, k, excluded=None) -> Top:
        """The k best items of each user. y_BR: float32; the score of an item is the dot product with the item's vector.

        k is the same on all ranks. Raises ValueError where it is less than 1, or `excluded` is of other users.
        """
        if k < 1:
            raise ValueError(f"k is {k}: give at least 1")
        found = [torch.empty(0, k, dtype=torch.int64, device=self.table.device)]
        for group in self._groups(y_BR, excluded):
            viewers = [group.way.Best(part, k) for part in group.parts]
            show(self.strips.of(group.shard, group.way.items_of), viewers)
            best_Uk = torch.cat([viewer.keys() for viewer in viewers])
            received = best_Uk.new_empty(self.world_size * group.own, k)
            dist.all_to_all_single(
                received, best_Uk, [group.own] * self.world_size, group.counts
            )
            found.append(
                smallest(
                    received.unflatten(0, (self.world_size, group.own))
                    .transpose(0, 1)
                    .flatten(1),
                    k,
                )
            )
        scores_Bk, rows_Bk = scores_and_rows(torch.cat(found))
        return Top(rows_Bk, scores_Bk)

    @torch.no_grad()
    def ranks(self, y_BR, row_B, excluded=None):
        """The rank of item row_B (int64, rows of this domain) for each user: int64, 1 + the number of other items, not
        excluded, whose score is not less. So ties and scores that are no numbers count against it. It may itself be excluded.

        Raises ValueError where a row is not the domain's, or `excluded` is of other users.
        """
        row_B = row_B.to(self.table.device)
        if ((row_B < self.first) | (row_B >= self.first + self.items)).any():
            raise ValueError(
                f"an item to be ranked is not one of rows {self.first} to {self.first + self.items - 1}"
            )
        found = [torch.empty(0, dtype=torch.int64, device=self.table.device)]
        for group in self._groups(y_BR, excluded, row_B):
            score_U = self._scores(group)
            viewers = [
                group.way.Ahead(part, score_U[users])
                for part, users in zip(group.parts, group.slices, strict=True)
            ]
            show(self.strips.of(group.shard, group.way.items_of), viewers)
            ahead_U = torch.cat([viewer.count() for viewer in viewers])
            dist.all_reduce(ahead_U)
            found.append(1 + ahead_U[group.before : group.before + group.own])
        return torch.cat(found)

    def _scores(self, group):
        """The scores of the items that are to be ranked (U,), from the ranks that hold them."""
        place_U = group.shard.place(group.row_U)
        (here,) = torch.nonzero(group.shard.holds(place_U), as_tuple=True)
        score_U = torch.zeros(len(place_U), device=place_U.device)
        score_U[here] = exact_scores(
            group.y_UR, here, group.shard.weight, place_U[here]
        )
        dist.all_reduce(score_U)
        return score_U

    def _groups(self, y_BR, excluded, row_B=None):
        """The users of all ranks, some of each at a time."""
        device = self.table.device
        y_BR = y_BR.detach().to(device, torch.float32)
        if excluded is None:
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            excluded = Excluded(nothing, nothing.new_zeros(len(y_BR)))
        if len(excluded.counts_B) != len(y_BR):
            raise ValueError(
                f"{len(y_BR)} users, and what is excluded of {len(excluded.counts_B)}"
            )
        ends = [0, *excluded.counts_B.cumsum(0).tolist()]
        rows_E, lengths_B = excluded.rows_E.to(device), excluded.counts_B.to(device)
        totals = torch.cat(
            _gathered(torch.tensor([len(y_BR)], device=device), [1] * self.world_size)
        ).tolist()
        groups, shard = -(-sum(totals) // self.users), Shard(self.table)
        for number in range(groups):
            bounds = [
                (total * number // groups, total * (number + 1) // groups)
                for total in totals
            ]
            counts = [end - begin for begin, end in bounds]
            begin, end = bounds[self.rank]
            y_UR, row_U = torch.cat(_gathered(y_BR[begin:end], counts)), None
            before = sum(counts[: self.rank])
            own = torch.arange(before, before + end - begin, device=device)
            users, rows = (
                torch.repeat_interleave(own, lengths_B[begin:end]),
                rows_E[ends[begin] : ends[end]],
            )
            if row_B is not None:  # each item is compared with the others
                row_U = torch.cat(_gathered(row_B[begin:end], counts))
                users, rows = (
                    torch.cat([users, own]),
                    torch.cat([rows, row_B[begin:end]]),
                )
            excluded_row, excluded_user = self._told(users, rows, len(y_UR))
            way = cpu_scan if cpu_scan.can(y_UR) else torch_scan
            slices, parts = parts_of(len(y_UR), device, way.PARTS), []
            for users in slices:
                here = (excluded_user >= users.start) & (excluded_user < users.stop)
                pairs = excluded_row[here], excluded_user[here] - users.start
                parts.append(UserPart(y_UR[users], *pairs, shard, self.strips))
            yield _Group(
                y_UR, row_U, slices, parts, way, shard, counts, before, end - begin
            )

    def _told(self, users_E, rows_E, users):
        """Tells the ranks that hold the rows who is not to be shown them: (rows, users) of what this one holds, by row, once
        each."""
        here = (rows_E >= self.first) & (rows_E < self.first + self.items)
        users_E, rows_E = users_E[here], rows_E[here]
        owner_E = (
            torch.searchsorted(
                self._starts_W, self.table.scatter.stored(rows_E), right=True
            )
            - 1
        )
        owner_E, order_E = owner_E.sort()
        sent = torch.bincount(owner_E, minlength=self.world_size)
        coming = torch.empty_like(sent)
        dist.all_to_all_single(coming, sent)
        sent, coming = sent.tolist(), coming.tolist()
        pairs = rows_E.new_empty(sum(coming))
        dist.all_to_all_single(pairs, (rows_E * users + users_E)[order_E], coming, sent)
        pairs = torch.unique(pairs)
        return pairs // users, pairs % users


@dataclass(frozen=True)
class _Group:
    """Users of all ranks, one rank's after the other's, counts of each; this rank's are `own`, from `before` on.

    row_U: items to be ranked; parts: the users' slices, for this rank's shard; way: of looking, the kernel's or PyTorch's.
    """

    y_UR: torch.Tensor
    row_U: torch.Tensor | None
    slices: list[slice]
    parts: list[UserPart]
    way: ModuleType
    shard: Shard
    counts: list[int]
    before: int
    own: int


def _gathered(own, counts):
    """All ranks' tensors, of which they have so many rows each."""
    most = max(counts)
    padded = torch.zeros(most, *own.shape[1:], dtype=own.dtype, device=own.device)
    padded[: len(own)] = own
    whole = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(whole, padded)
    return [part[:count] for part, count in zip(whole, counts, strict=True)]
