"""Exact ranking of all items of a domain on the row-wise shards of M: the best k for a user, and the rank of an item.

The table is never gathered. The users' vectors go to all ranks; each rank scores the rows that it holds, block by block, and
keeps the best so far; what it found goes back to the users' ranks, which merge. A block is scored by a float32 product, and
only what that cannot tell from what is sought is scored again, exactly (embeddings/scores.py): results do not depend on the
number of ranks, on the block, or on the device. Memory is that of a block, whatever the number of items and of users.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from embeddings.scores import Vectors, error, exact_scores, product

_GROUP = 32  # columns of a block of which only the greatest is looked at first
_STRIP = 8  # blocks whose rows are copied at once
_WAITING = 4  # candidates that may be held, as a multiple of those that will be left
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
        if (total := int(self.counts_B.sum())) != len(self.rows_E):
            raise ValueError(f"{len(self.rows_E)} excluded rows, but counts of them that add up to {total}")


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

    def __init__(self, table, first, items, block=2048, users=2048):
        """table: ItemTable; block: rows of a shard scored at once; users: of all ranks together, at once.

        Raises ValueError where the rows are not the table's.
        """
        if not (first >= 0 and items >= 1 and first + items <= table.rows):
            raise ValueError(f"rows {first} to {first + items - 1} are not rows of a table of {table.rows}")
        if block < 1 or users < 1:
            raise ValueError(f"block is {block} and users {users}: give at least 1")
        self.table, self.first, self.items, self.users = table, first, items, users
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.block, self.span = block, _STRIP * block * self.world_size  # of rows of M, each shard has its share
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
        parts, shard = -(-sum(totals) // self.users), _Shard(self.table)
        for number in range(parts):
            bounds = [(total * number // parts, total * (number + 1) // parts) for total in totals]
            counts = [end - begin for begin, end in bounds]
            begin, end = bounds[self.rank]
            y_UR = torch.cat(_gathered(y_BR[begin:end], counts))
            part = _Part(y_UR, counts, self.rank, shard)
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
        """This rank's rows of the domain, some at a time, in the order of rows."""
        device = self.table.device
        starts = range(self.first, self.first + self.items, self.span)
        cuts = torch.searchsorted(part.excluded_row, torch.tensor([*starts, self.first + self.items], device=device)).tolist()
        users, memory = len(part.y.vectors_VR), _Memory(device)
        for start, (first_excluded, last_excluded) in zip(starts, pairwise(cuts), strict=True):
            row = torch.arange(start, min(start + self.span, self.first + self.items), device=device)
            place = part.shard.place(row)
            here = part.shard.holds(place)
            rows_S, place_S = row[here], place[here]
            if len(rows_S) == 0:
                continue
            # As wide as each other: how many of a strip lie here differs by a few.
            blocks = max(1, round(len(rows_S) / self.block))
            width = -(-len(rows_S) // (blocks * _GROUP)) * _GROUP
            columns = -(-len(rows_S) // _GROUP) * _GROUP
            m_SR = memory("rows", columns, self.table.dim)
            torch.index_select(part.shard.weight, 0, place_S, out=m_SR[: len(rows_S)])
            m_SR[len(rows_S) :] = 0
            items = Vectors(m_SR)
            error_U = error(part.y, items)
            users_E = part.excluded_user[first_excluded:last_excluded]
            columns_E = torch.searchsorted(rows_S, part.excluded_row[first_excluded:last_excluded])
            begins = [*range(0, len(rows_S), width), columns]
            places = torch.searchsorted(columns_E, torch.tensor(begins, device=device)).tolist() if len(users_E) else begins
            for (begin, end), (first, last) in zip(pairwise(begins), pairwise(places), strict=True):
                scores_UN = product(part.y, items, memory("scores", users, end - begin), begin)
                if end > len(rows_S):
                    scores_UN[:, len(rows_S) - begin :] = -torch.inf
                if part.idle_U is not None:
                    scores_UN[part.idle_U] = -torch.inf
                hidden = users_E[first:last], columns_E[first:last] - begin
                if len(users_E):
                    scores_UN[hidden] = -torch.inf
                yield _Block(rows_S[begin:end], place_S[begin:end], scores_UN, error_U, hidden, memory)

    def _best(self, part, k):
        """The keys (U, k) of the best items of this rank's shard."""
        best = _Best(part, k)
        part.idle_U = best.hopeless()
        for number, block in enumerate(self._blocks(part), start=1):
            groups_UG = block.scores_UN.unflatten(1, (_GROUP, -1)).amax(1)
            if number == 1:
                best.begin(groups_UG if k <= groups_UG.shape[1] else block.scores_UN, block.error_U)
            cutoff_U = best.cutoff(block.error_U)
            users_P, groups_P = torch.nonzero(~(groups_UG < cutoff_U[:, None]), as_tuple=True)
            scores_PG = block.scores_UN.unflatten(1, (_GROUP, -1))[users_P, :, groups_P]
            pairs_C, members_C = torch.nonzero(~(scores_PG < cutoff_U[users_P, None]), as_tuple=True)
            users_C, columns_C = users_P[pairs_C], members_C * groups_UG.shape[1] + groups_P[pairs_C]
            best.add(block, *block.shown(users_C, columns_C, scores_PG[pairs_C, members_C]))
            if number & (number - 1) == 0:  # each time that twice as many rows have been seen, about as many are better
                best.settle()
        return best.keys()

    def _count(self, part):
        """How many items of this rank's shard come before the user's given one (U,)."""
        score_U = self._given_scores(part)
        lost_U = ~(score_U > -torch.inf)  # behind every item that is left: nothing has to be compared
        part.idle_U = lost_U if lost_U.any() else None
        score_U = score_U.masked_fill(lost_U, torch.inf)
        before_U = torch.zeros(len(score_U), dtype=torch.int64, device=score_U.device)
        items = 0
        for block in self._blocks(part):
            items += len(block.rows_N)
            scores_UN = block.scores_UN
            low_U, high_U = _below(score_U.double() - block.error_U), _above(score_U.double() + block.error_U)
            # As numbers: torch takes four times as long to write bools.
            compared_UN = block.memory("compared", *scores_UN.shape)
            above_U = torch.ge(scores_UN, high_U[:, None], out=compared_UN).sum(1).long()
            below_U = torch.lt(scores_UN, low_U[:, None], out=compared_UN).sum(1).long()
            (close_A,) = torch.nonzero(above_U + below_U < scores_UN.shape[1], as_tuple=True)
            scores_AN = scores_UN[close_A]
            perhaps_AN = ~((scores_AN >= high_U[close_A, None]) | (scores_AN < low_U[close_A, None]))
            users_C, columns_C = torch.nonzero(perhaps_AN, as_tuple=True)
            users_C, columns_C, _ = block.shown(close_A[users_C], columns_C, scores_AN[users_C, columns_C])
            ahead_C = ~(part.exact(users_C, block.place_N[columns_C]) < score_U[users_C])
            before_U += above_U.index_add_(0, users_C, ahead_C.long())
        left_U = items - torch.bincount(part.excluded_user, minlength=len(lost_U))
        return torch.where(lost_U, left_U, before_U)

    def _given_scores(self, part):
        """The scores of the items that are to be ranked (U,), from the ranks that hold them."""
        place_U = part.shard.place(part.row_U)
        (here,) = torch.nonzero(part.shard.holds(place_U), as_tuple=True)
        score_U = torch.zeros(len(place_U), device=place_U.device)
        score_U[here] = part.exact(here, place_U[here])
        dist.all_reduce(score_U)
        return score_U


class _Shard:
    """The rows that this rank holds."""

    def __init__(self, table):
        self.first, tensors = table.shard()
        self.weight, self.scatter = tensors["weight"], table.scatter

    def place(self, row):
        """Where in `weight` rows of M would be."""
        return self.scatter.stored(row) - self.first

    def row(self, place):
        return self.scatter.row(place + self.first)

    def holds(self, place):
        return (place >= 0) & (place < len(self.weight))


class _Part:
    """Some users of all ranks. y: their Vectors; counts: of each rank; before: users of the ranks before; own: of this rank.

    idle_U: users for whom nothing is to be looked for, None where there is none. row_U: items to be ranked.
    excluded_row, excluded_user: what this shard has of excluded pairs, once each, by row.
    """

    def __init__(self, y_UR, counts, rank, shard):
        self.y, self.counts, self.before, self.own = Vectors(y_UR), counts, sum(counts[:rank]), counts[rank]
        self.shard, self.idle_U, self.row_U = shard, None, None

    def of_own(self, values_U):
        return values_U[self.before : self.before + self.own]

    def exact(self, users_C, places_C):
        return exact_scores(self.y.vectors_VR, users_C, self.shard.weight, places_C)


@dataclass(frozen=True)
class _Block:
    """rows_N: of M, ascending; place_N: in the shard; scores_UN: the product, with columns up to whole groups, −inf at what is
    no item and what is excluded, and for the idle; error_U: of these; excluded: users and columns."""

    rows_N: torch.Tensor
    place_N: torch.Tensor
    scores_UN: torch.Tensor
    error_U: torch.Tensor
    excluded: tuple[torch.Tensor, torch.Tensor]
    memory: "_Memory"

    def shown(self, users_C, columns_C, scores_C):
        """Those of the pairs that are of items and not excluded; scores_C: by product."""
        if (scores_C == -torch.inf).any():
            width, (users_E, columns_E) = self.scores_UN.shape[1], self.excluded
            excluded_C = torch.isin(users_C * width + columns_C, users_E * width + columns_E)
            left_C = (columns_C < len(self.rows_N)) & ~excluded_C
            users_C, columns_C, scores_C = users_C[left_C], columns_C[left_C], scores_C[left_C]
        return users_C, columns_C, scores_C


class _Memory:
    """Tensors that are written again for every block: fresh ones would cost more than a product does."""

    def __init__(self, device):
        self.device, self._flat = device, {}

    def __call__(self, name, *shape):
        size = math.prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = torch.empty(size, device=self.device)
        return self._flat[name][:size].view(shape)


class _Best:
    """Candidates for the best k of each user, with their scores by product."""

    def __init__(self, part, k):
        y_UR = part.y.vectors_VR
        self.part, self.k, self.limit = part, k, _WAITING * k * len(y_UR)
        self.least_U = torch.full((len(y_UR),), -torch.inf, device=y_UR.device)  # what the k-th best has at least
        self.full_U = torch.zeros(len(y_UR), dtype=torch.bool, device=y_UR.device)  # k candidates are settled
        self.nowhere_U = (y_UR == 0).all(1)  # all items are equal for these
        self.error_U = torch.zeros(len(y_UR), dtype=torch.float64, device=y_UR.device)  # of any candidate's product
        # Of each candidate: the user's number, and in the lower 32 bits the place in the shard.
        self._keys, self._waiting = [torch.empty(0, dtype=torch.int64, device=y_UR.device)], 0
        self._scores = [torch.empty(0, device=y_UR.device)]

    def hopeless(self):
        """The users whose scores all are no numbers, None where there is none."""
        nan_U = self.part.y.vectors_VR.isnan().any(1) if self.part.y.any_wild else None
        if nan_U is None or not nan_U.any():
            return None
        self.nowhere_U |= nan_U
        return nan_U

    def begin(self, pool_UN, error_U):
        """Of k scores by product the least, less the error, is not more than the k-th best."""
        if self.k <= pool_UN.shape[1]:
            pool_UN = torch.where(pool_UN.isnan(), -torch.inf, pool_UN)
            self.least_U = _below(pool_UN.topk(self.k).values[:, -1].double() - error_U)

    def cutoff(self, error_U):
        """Products from which on an item may be one of the best (U,)."""
        cutoff_U = _below(self.least_U.double() - error_U)
        # Rows come in order: once there are k, no equal one comes before them.
        passed_U = torch.nextafter(self.least_U, torch.full_like(self.least_U, torch.inf))
        return torch.where(self.nowhere_U & self.full_U, passed_U, cutoff_U)

    def add(self, block, users_C, columns_C, scores_C):
        """scores_C: by product."""
        self._keys.append(users_C << 32 | block.place_N[columns_C])
        self._scores.append(scores_C)
        self.error_U = torch.maximum(self.error_U, block.error_U)
        self._waiting += len(users_C)
        if self._waiting > self.limit:
            self.settle()

    def settle(self):
        """Leaves out those that cannot be among the best any more."""
        keys_C, scores_C = self._held()
        users_C = keys_C >> 32
        lows_Un, counts_U = self._padded(users_C, scores_C.where(~scores_C.isnan(), -torch.inf), -torch.inf)
        least_U = _below(lows_Un.topk(self.k).values[:, -1].double() - self.error_U)
        self.least_U, self.full_U = torch.maximum(self.least_U, least_U), counts_U >= self.k
        left_C = ~(scores_C < _below(self.least_U.double() - self.error_U)[users_C])
        keys_C, scores_C = keys_C[left_C], scores_C[left_C]
        if len(keys_C) > self.limit:  # they are too near each other
            users_C, nth_C = torch.nonzero((best_Uk := self._best(keys_C)) != _MISSING, as_tuple=True)
            scores_C, rows_C = _scores_and_rows(best_Uk[users_C, nth_C])
            keys_C = users_C << 32 | self.part.shard.place(rows_C)
        self._keys, self._scores, self._waiting = [keys_C], [scores_C], 0

    def keys(self):
        """Of the best k (U, k)."""
        return self._best(self._held()[0])

    def _best(self, keys_C):
        users_C, places_C = keys_C >> 32, keys_C & 0xFFFFFFFF
        keys_C = _keys(self.part.exact(users_C, places_C), self.part.shard.row(places_C))
        return _smallest(self._padded(users_C, keys_C, _MISSING)[0], self.k)

    def _held(self):
        """All candidates, by user."""
        keys_C, order_C = torch.cat(self._keys).sort()
        return keys_C, torch.cat(self._scores)[order_C]

    def _padded(self, users_C, values_C, nothing):
        """The values of each user beside each other, at least k (U, n), and how many each has."""
        counts_U = torch.bincount(users_C, minlength=len(self.least_U))
        padded_Un = torch.full((len(counts_U), max(self.k, int(counts_U.max()))), nothing, device=users_C.device)
        place_C = torch.arange(len(users_C), device=users_C.device) - (counts_U.cumsum(0) - counts_U)[users_C]
        padded_Un[users_C, place_C] = values_C
        return padded_Un, counts_U


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
