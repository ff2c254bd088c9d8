"""Exact ranking of all items of a domain on the row-wise shards of M: the best k for a user, and the rank of an item.

The table is never gathered. The users' vectors go to all ranks; each rank scores the rows that it holds, block by block, and
keeps the best so far; what it found goes back to the users' ranks, which merge. A block is scored by a float32 product, and
only what that cannot tell from what is sought is scored again, exactly (embeddings/scores.py): results do not depend on the
number of ranks, on the block, or on the device. Memory is that of a block, whatever the number of items and of users.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from embeddings.scores import Vectors, error, exact_scores, product

_GROUP = 32  # columns of a block of which only the greatest is looked at first
_MISSING = (0x7F800000 << 32) | 0xFFFFFFFF  # the key of no item: a score of −inf and a row behind all others


@dataclass(frozen=True)
class Excluded:
    """Rows that users are not to be shown, jagged.

    rows_E: int64, rows of M as in the dataset, user after user, in any order; one may stand there more than once, and rows of
    other domains are ignored. counts_B: int64, of each user.
    """

    rows_E: torch.Tensor
    counts_B: torch.Tensor

    def __post_init__(self):
        if int(self.counts_B.sum()) != len(self.rows_E):
            raise ValueError(f"{len(self.rows_E)} excluded rows, and users' counts of them that add up to {self.counts_B.sum()}")


@dataclass(frozen=True)
class Top:
    """The best items of each user. rows_Bk: int64, rows of M, best first, equal scores by row, −1 where none is left; scores_Bk:
    float32, −inf there and where a score is not a number."""

    rows_Bk: torch.Tensor
    scores_Bk: torch.Tensor


class ExactRanking:
    """Ranks the rows [first, first + items) of M. Every method, the first too, is called on all ranks, each with its own
    users, of which there may be none, and gives each the answers of its own.

    Vectors are taken as they are in the table at a call.
    """

    def __init__(self, table, first, items, block=1024, users=1024):
        """table: ItemTable; block: rows of a shard scored at once; users: of all ranks together, at once.

        Raises ValueError where the rows are not the table's.
        """
        if not (0 <= first and 1 <= items and first + items <= table.rows):
            raise ValueError(f"rows {first} to {first + items - 1} are not rows of a table of {table.rows}")
        if block < 1 or users < 1:
            raise ValueError(f"block is {block} and users {users}: give at least 1")
        self.table, self.first, self.items, self.users = table, first, items, users
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.span = block * self.world_size  # rows of M, of which about a block lies on each shard
        starts = torch.tensor([table.shard()[0]], device=table.device)
        self._starts_W = torch.cat(_gathered(starts, [1] * self.world_size))

    @torch.no_grad()
    def top_k(self, y_BR, k, excluded=None) -> Top:
        """The k best items of each user. y_BR: float32, the score of an item is its dot product with the item's vector."""
        if k < 1:
            raise ValueError(f"k is {k}: give at least 1")
        found = [torch.empty(0, k, dtype=torch.int64, device=self.table.device)]
        for part in self._parts(y_BR, excluded):
            best = self._best(part, k)
            received = torch.empty(self.world_size * part.own, k, dtype=torch.int64, device=best.device)
            dist.all_to_all_single(received, best, [part.own] * self.world_size, part.counts)
            keys = received.unflatten(0, (self.world_size, part.own)).transpose(0, 1).flatten(1)
            found.append(_smallest(keys, k))
        scores_Bk, rows_Bk = _scores_and_rows(torch.cat(found))
        return Top(rows_Bk, scores_Bk)

    @torch.no_grad()
    def ranks(self, y_BR, row_B, excluded=None):
        """The rank of item row_B (int64, rows of this domain) for each user: int64, 1 + the number of other items, not
        excluded, whose score is not less. So ties and scores that are no numbers count against it. It may itself be excluded.

        Raises ValueError where a row is not the domain's.
        """
        row_B = row_B.to(self.table.device)
        if ((row_B < self.first) | (row_B >= self.first + self.items)).any():
            raise ValueError(f"an item to be ranked is not one of rows {self.first} to {self.first + self.items - 1}")
        found = [torch.empty(0, dtype=torch.int64, device=self.table.device)]
        for part in self._parts(y_BR, excluded, row_B):
            before_U = self._count(part)
            dist.all_reduce(before_U)
            found.append(1 + part.of_own(before_U))
        return torch.cat(found)

    def _parts(self, y_BR, excluded, row_B=None):
        """The users of all ranks, some of each at a time."""
        device = self.table.device
        y_BR = y_BR.detach().to(device, torch.float32)
        if excluded is None:
            nothing = torch.zeros(0, dtype=torch.int64, device=device)
            excluded = Excluded(nothing, nothing.new_zeros(len(y_BR)))
        if len(excluded.counts_B) != len(y_BR):
            raise ValueError(f"{len(y_BR)} users, and what is excluded of {len(excluded.counts_B)}")
        ends = [0, *excluded.counts_B.cumsum(0).tolist()]
        rows_E = excluded.rows_E.to(device)
        totals = torch.cat(_gathered(torch.tensor([len(y_BR)], device=device), [1] * self.world_size)).tolist()
        parts = -(-sum(totals) // self.users)
        for number in range(parts):
            bounds = [(total * number // parts, total * (number + 1) // parts) for total in totals]
            counts = [end - begin for begin, end in bounds]
            begin, end = bounds[self.rank]
            y_UR = torch.cat(_gathered(y_BR[begin:end], counts))
            part = _Part(Vectors(y_UR), counts, self.rank)
            rows = rows_E[ends[begin] : ends[end]]
            lengths = excluded.counts_B[begin:end].to(device)
            users = torch.repeat_interleave(torch.arange(part.before, part.before + part.own, device=device), lengths)
            if row_B is not None:
                part.row_U = torch.cat(_gathered(row_B[begin:end], counts))
                own = torch.arange(part.before, part.before + part.own, device=device)
                users, rows = torch.cat([users, own]), torch.cat([rows, row_B[begin:end]])
            self._exclude(part, users, rows)
            yield part

    def _exclude(self, part, users_E, rows_E):
        """Tells the ranks that hold the rows who is not to be shown them; by row, in `part`."""
        here = (rows_E >= self.first) & (rows_E < self.first + self.items)
        users_E, rows_E = users_E[here], rows_E[here]
        owner_E = torch.searchsorted(self._starts_W, self.table.scatter.stored(rows_E), right=True) - 1
        owner_E, order = owner_E.sort()
        sent = torch.bincount(owner_E, minlength=self.world_size)
        coming = torch.empty_like(sent)
        dist.all_to_all_single(coming, sent)
        sent, coming = sent.tolist(), coming.tolist()
        pairs = torch.empty(sum(coming), 2, dtype=torch.int64, device=rows_E.device)
        dist.all_to_all_single(pairs, torch.stack([users_E, rows_E], 1)[order], coming, sent)
        users = len(part.y.vectors_VR)
        by_row = torch.unique(pairs[:, 1] * users + pairs[:, 0])
        part.excluded_row, part.excluded_user = by_row // users, by_row % users

    def _blocks(self, part):
        """(its rows of M, ascending, their vectors, the product with all users) of each block of this rank's shard."""
        first_stored, tensors = self.table.shard()
        weight = tensors["weight"]
        starts = torch.arange(self.first, self.first + self.items, self.span, device=weight.device)
        cuts = [*torch.searchsorted(part.excluded_row, starts).tolist(), len(part.excluded_row)]
        users = len(part.y.vectors_VR)
        memory = torch.empty(0, device=weight.device)
        for number, start in enumerate(range(self.first, self.first + self.items, self.span)):
            row = torch.arange(start, min(start + self.span, self.first + self.items), device=weight.device)
            place = self.table.scatter.stored(row) - first_stored
            here = (place >= 0) & (place < len(weight))
            rows_N = row[here]
            count = len(rows_N)
            if count == 0:
                continue
            padded = -(-count // _GROUP) * _GROUP
            m_NR = torch.zeros(padded, self.table.dim, device=weight.device)
            m_NR[:count] = weight[place[here]]
            if memory.numel() < users * padded:
                memory = torch.empty(users * padded, device=weight.device)
            items = Vectors(m_NR)
            scores_UN = product(part.y, items, memory[: users * padded].view(users, padded))
            scores_UN[:, count:] = -torch.inf
            users_E = part.excluded_user[cuts[number] : cuts[number + 1]]
            columns_E = torch.searchsorted(rows_N, part.excluded_row[cuts[number] : cuts[number + 1]])
            scores_UN[users_E, columns_E] = -torch.inf
            yield _Block(rows_N, items, scores_UN, users_E * padded + columns_E)

    def _best(self, part, k):
        """The keys (U, k) of the best items of this rank's shard."""
        best_Uk = torch.full((len(part.y.vectors_VR), k), _MISSING, device=self.table.device)
        for block in self._blocks(part):
            error_U = error(part.y, block.items)
            groups_UG = block.scores_UN.unflatten(1, (_GROUP, -1)).amax(1)
            least_U = _scores_and_rows(best_Uk[:, -1])[0].double()
            pool = groups_UG if k <= groups_UG.shape[1] else block.scores_UN
            if k <= pool.shape[1]:  # there are k items with scores of at least the k-th less the error
                pool = torch.where(pool.isnan(), -torch.inf, pool)
                least_U = torch.maximum(least_U, pool.topk(k).values[:, -1].double() - error_U)
            cutoff_U = _below(least_U - error_U)
            users_P, groups_P = torch.nonzero(~(groups_UG < cutoff_U[:, None]), as_tuple=True)
            scores_PG = block.scores_UN.unflatten(1, (_GROUP, -1))[users_P, :, groups_P]
            pairs_C, members_C = torch.nonzero(~(scores_PG < cutoff_U[users_P, None]), as_tuple=True)
            users_C, columns_C = block.of_items(users_P[pairs_C], members_C * groups_UG.shape[1] + groups_P[pairs_C])
            keys_C = _keys(block.exact(part.y, users_C, columns_C), block.rows_N[columns_C])
            _merge(best_Uk, users_C, keys_C)
        return best_Uk

    def _count(self, part):
        """How many items of this rank's shard come before the user's given one (U,)."""
        score_U = self._given_scores(part)
        before_U = torch.zeros(len(score_U), dtype=torch.int64, device=score_U.device)
        for block in self._blocks(part):
            error_U = error(part.y, block.items)
            low_U, high_U = _below(score_U.double() - error_U), _above(score_U.double() + error_U)
            high_U = high_U.masked_fill(~(score_U > -torch.inf), torch.nan)
            surely_UN = block.scores_UN >= high_U[:, None]
            perhaps_UN = ~(block.scores_UN < low_U[:, None]) & ~surely_UN
            before_U += surely_UN.sum(1)
            users_C, columns_C = block.of_items(*torch.nonzero(perhaps_UN, as_tuple=True))
            beaten_C = block.exact(part.y, users_C, columns_C) < score_U[users_C]
            before_U.index_add_(0, users_C, (~beaten_C).long())
        return before_U

    def _given_scores(self, part):
        """The scores of the items that are to be ranked (U,), from the ranks that hold them."""
        first_stored, tensors = self.table.shard()
        place_U = self.table.scatter.stored(part.row_U) - first_stored
        (here,) = torch.nonzero((place_U >= 0) & (place_U < len(tensors["weight"])), as_tuple=True)
        score_U = torch.zeros(len(place_U), device=place_U.device)
        score_U[here] = exact_scores(part.y.vectors_VR, here, tensors["weight"], place_U[here])
        dist.all_reduce(score_U)
        return score_U


class _Part:
    """Some users of all ranks. y: their Vectors; counts: of each rank; before: users of the ranks before; own: of this rank."""

    def __init__(self, y, counts, rank):
        self.y, self.counts, self.before, self.own = y, counts, sum(counts[:rank]), counts[rank]

    def of_own(self, values_U):
        return values_U[self.before : self.before + self.own]


@dataclass(frozen=True)
class _Block:
    """rows_N: of M, ascending; items: their Vectors, and zeros up to whole groups; scores_UN: the product, −inf at what is no
    item and what is excluded; excluded: user · columns + column of the latter."""

    rows_N: torch.Tensor
    items: Vectors
    scores_UN: torch.Tensor
    excluded: torch.Tensor

    def of_items(self, users_C, columns_C):
        """Those of the pairs that are of items and not excluded, by user and row."""
        keys_C = (users_C * self.scores_UN.shape[1] + columns_C).sort().values
        keys_C = keys_C[keys_C % self.scores_UN.shape[1] < len(self.rows_N)]
        keys_C = keys_C[~torch.isin(keys_C, self.excluded)]
        return keys_C // self.scores_UN.shape[1], keys_C % self.scores_UN.shape[1]

    def exact(self, y, users_C, columns_C):
        return exact_scores(y.vectors_VR, users_C, self.items.vectors_VR, columns_C)


def _merge(best_Uk, users_C, keys_C):
    """Puts candidates, sorted by user, among the best."""
    users_A, counts_A = torch.unique_consecutive(users_C, return_counts=True)
    if len(users_A) == 0:
        return
    k, most = best_Uk.shape[1], int(counts_A.max())
    keys = torch.full((len(users_A), k + most), _MISSING, device=best_Uk.device)
    keys[:, :k] = best_Uk[users_A]
    nth_A = torch.arange(len(users_A), device=best_Uk.device)
    place_C = torch.arange(len(users_C), device=best_Uk.device) - (counts_A.cumsum(0) - counts_A).repeat_interleave(counts_A)
    keys[nth_A.repeat_interleave(counts_A), k + place_C] = keys_C
    best_Uk[users_A] = _smallest(keys, k)


def _smallest(keys, k):
    return keys.topk(k, dim=1, largest=False, sorted=True).values


def _keys(scores_C, rows_C):
    """int64 that ascend as scores descend, equal ones as rows ascend; the row's 32 bits are the lower ones."""
    scores_C = torch.where(scores_C.isnan(), -torch.inf, scores_C) + 0.0  # −0 is 0
    bits_C = scores_C.view(torch.int32)
    ascending_C = torch.where(bits_C < 0, bits_C ^ 0x7FFFFFFF, bits_C)
    return ((~ascending_C).long() << 32) | rows_C


def _scores_and_rows(keys):
    """What `_keys` was given; −1 where there is no item."""
    ascending = ~(keys >> 32).int()
    rows = keys & 0xFFFFFFFF
    scores = torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(torch.float32)
    return scores, torch.where(rows == 0xFFFFFFFF, -1, rows)


def _below(values):
    """The float32 number before the nearest one to a float64."""
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))


def _above(values):
    return -_below(-values)


def _gathered(own, counts):
    """All ranks' tensors, of which they have so many rows each."""
    most = max(counts)
    padded = torch.zeros(most, *own.shape[1:], dtype=own.dtype, device=own.device)
    padded[: len(own)] = own
    whole = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(whole, padded)
    return [part[:count] for part, count in zip(whole, counts, strict=True)]
