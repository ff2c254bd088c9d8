"""What users' parts look for among strips: the best k items, and how many come before a given one; by PyTorch's operations.

Scores by product are told apart by more than their error (embeddings/topk/bounds.py); what is nearer is scored exactly.
"""

import torch

from embeddings.topk.bounds import above, below
from embeddings.topk.score_blocks import GROUP, Blocks, items_of

__all__ = ["Ahead", "Best", "items_of", "scores_and_rows", "smallest"]
PARTS = 1  # of users for a thread: operations are short as it is
MISSING = (
    0x7F800000 << 32
) | 0xFFFFFFFF  # the key of no item: a score of −inf and a row behind all others
_WAITING = 4  # candidates that may be held, as a multiple of those that will be left


class Best:
    """Candidates for the best k of each user, with their scores by product."""

    def __init__(self, part, k):
        y_UR = part.y.vectors_VR
        self.part, self.k, self.limit = part, k, _WAITING * k * len(y_UR)
        self.least_U = torch.full(
            (len(y_UR),), -torch.inf, device=y_UR.device
        )  # what the k-th best has at least
        self.full_U = torch.zeros(
            len(y_UR), dtype=torch.bool, device=y_UR.device
        )  # k candidates are settled
        self.nowhere_U = (y_UR == 0).all(1)  # all items are equal for these
        self.error_U = torch.zeros(
            len(y_UR), dtype=torch.float64, device=y_UR.device
        )  # of any candidate's product
        self._scored = Blocks(part, self._hopeless())
        # Of each candidate: the user's number, and in the lower 32 bits the place in the shard.
        self._blocks, self._waiting = 0, 0
        self._keys = [torch.empty(0, dtype=torch.int64, device=y_UR.device)]
        self._scores = [torch.empty(0, device=y_UR.device)]

    def see(self, strip):
        """Takes the candidates of a strip."""
        for block in self._scored.of(strip):
            self._blocks += 1
            groups_UG = block.scores_UN.unflatten(1, (GROUP, -1)).amax(1)
            if self._blocks == 1:
                self._begin(
                    groups_UG if self.k <= groups_UG.shape[1] else block.scores_UN,
                    block.error_U,
                )
            cutoff_U = self._cutoff(block.error_U)
            users_P, groups_P = torch.nonzero(
                ~(groups_UG < cutoff_U[:, None]), as_tuple=True
            )
            scores_PG = block.scores_UN.unflatten(1, (GROUP, -1))[users_P, :, groups_P]
            pairs_C, members_C = torch.nonzero(
                ~(scores_PG < cutoff_U[users_P, None]), as_tuple=True
            )
            users_C, columns_C = (
                users_P[pairs_C],
                members_C * groups_UG.shape[1] + groups_P[pairs_C],
            )
            self._add(
                block, *block.shown(users_C, columns_C, scores_PG[pairs_C, members_C])
            )
            if (
                self._blocks & (self._blocks - 1) == 0
            ):  # each time that twice as many rows are seen, about as many are better
                self._settle()

    def _hopeless(self):
        """The users whose scores all are no numbers, None where there is none."""
        nan_U = self.part.y.vectors_VR.isnan().any(1) if self.part.y.any_wild else None
        if nan_U is None or not nan_U.any():
            return None
        self.nowhere_U |= nan_U
        return nan_U

    def _begin(self, pool_UN, error_U):
        """Of k scores by product the least, less the error, is not more than the k-th best."""
        if self.k <= pool_UN.shape[1]:
            pool_UN = torch.where(pool_UN.isnan(), -torch.inf, pool_UN)
            self.least_U = below(pool_UN.topk(self.k).values[:, -1].double() - error_U)

    def _cutoff(self, error_U):
        """Products from which on an item may be one of the best (U,)."""
        cutoff_U = below(self.least_U.double() - error_U)
        # Rows come in order: once there are k, no equal one comes before them.
        passed_U = torch.nextafter(
            self.least_U, torch.full_like(self.least_U, torch.inf)
        )
        return torch.where(self.nowhere_U & self.full_U, passed_U, cutoff_U)

    def _add(self, block, users_C, columns_C, scores_C):
        """scores_C: by product."""
        self._keys.append(users_C << 32 | block.place_N[columns_C])
        self._scores.append(scores_C)
        self.error_U = torch.maximum(self.error_U, block.error_U)
        self._waiting += len(users_C)
        if self._waiting > self.limit:
            self._settle()

    def _settle(self):
        """Leaves out those that cannot be among the best any more."""
        keys_C, scores_C = self._held()
        users_C = keys_C >> 32
        lows_Un, counts_U = self._padded(
            users_C, scores_C.where(~scores_C.isnan(), -torch.inf), -torch.inf
        )
        least_U = below(lows_Un.topk(self.k).values[:, -1].double() - self.error_U)
        self.least_U, self.full_U = (
            torch.maximum(self.least_U, least_U),
            counts_U >= self.k,
        )
        left_C = ~(scores_C < below(self.least_U.double() - self.error_U)[users_C])
        keys_C, scores_C = keys_C[left_C], scores_C[left_C]
        if len(keys_C) > self.limit:  # they are too near each other
            users_C, nth_C = torch.nonzero(
                (best_Uk := self._best(keys_C)) != MISSING, as_tuple=True
            )
            scores_C, rows_C = scores_and_rows(best_Uk[users_C, nth_C])
            keys_C = users_C << 32 | self.part.shard.place(rows_C)
        self._keys, self._scores, self._waiting = [keys_C], [scores_C], 0

    def keys(self):
        """Of the best k (U, k)."""
        return self._best(self._held()[0])

    def _best(self, keys_C):
        users_C, places_C = keys_C >> 32, keys_C & 0xFFFFFFFF
        keys_C = keys_of(
            self.part.exact(users_C, places_C), self.part.shard.row(places_C)
        )
        return smallest(self._padded(users_C, keys_C, MISSING)[0], self.k)

    def _held(self):
        """All candidates, by user."""
        keys_C, order_C = torch.cat(self._keys).sort()
        return keys_C, torch.cat(self._scores)[order_C]

    def _padded(self, users_C, values_C, nothing):
        """The values of each user beside each other, at least k (U, n), and how many each has."""
        counts_U = torch.bincount(users_C, minlength=len(self.least_U))
        padded_Un = torch.full(
            (len(counts_U), max(self.k, int(counts_U.max()))),
            nothing,
            device=users_C.device,
        )
        place_C = (
            torch.arange(len(users_C), device=users_C.device)
            - (counts_U.cumsum(0) - counts_U)[users_C]
        )
        padded_Un[users_C, place_C] = values_C
        return padded_Un, counts_U


class Ahead:
    """How many items of the shard come before one whose score is given: not less, or no number."""

    def __init__(self, part, score_U):
        lost_U = ~(
            score_U > -torch.inf
        )  # behind every item that is left: nothing has to be compared
        self._scored = Blocks(part, lost_U if lost_U.any() else None)
        self.part, self._lost_U, self._items = part, lost_U, 0
        self._score_U = score_U.masked_fill(lost_U, torch.inf)
        self._ahead_U = torch.zeros(
            len(score_U), dtype=torch.int64, device=score_U.device
        )

    def see(self, strip):
        self._items += len(strip.row_S)
        for block in self._scored.of(strip):
            scores_UN, score_U = block.scores_UN, self._score_U
            low_U, high_U = (
                below(score_U.double() - block.error_U),
                above(score_U.double() + block.error_U),
            )
            # As numbers: torch takes four times as long to write bools.
            compared_UN = self._scored.memory("compared", *scores_UN.shape)
            self._ahead_U += (
                ahead_U := torch.ge(scores_UN, high_U[:, None], out=compared_UN).sum(1)
            ).long()
            behind_U = torch.lt(scores_UN, low_U[:, None], out=compared_UN).sum(1)
            (close_A,) = torch.nonzero(
                ahead_U + behind_U < scores_UN.shape[1], as_tuple=True
            )
            scores_AN = scores_UN[close_A]
            near_AN = ~(
                (scores_AN >= high_U[close_A, None])
                | (scores_AN < low_U[close_A, None])
            )
            users_C, columns_C = torch.nonzero(near_AN, as_tuple=True)
            users_C, columns_C, _ = block.shown(
                close_A[users_C], columns_C, scores_AN[users_C, columns_C]
            )
            ahead_C = ~(
                self.part.exact(users_C, block.place_N[columns_C]) < score_U[users_C]
            )
            self._ahead_U.index_add_(0, users_C, ahead_C.long())

    def count(self):
        """Of each user: int64 (U,)."""
        return torch.where(self._lost_U, self.part.left(self._items), self._ahead_U)


def smallest(keys, k):
    return keys.topk(k, dim=1, largest=False, sorted=True).values


def keys_of(scores_C, rows_C):
    """int64 that ascend as scores descend, equal ones as rows ascend; the row's 32 bits are the lower ones."""
    scores_C = torch.where(scores_C.isnan(), -torch.inf, scores_C) + 0.0  # −0 is 0
    bits_C = scores_C.view(torch.int32)
    ascending_C = torch.where(bits_C < 0, bits_C ^ 0x7FFFFFFF, bits_C)
    return ((~ascending_C).long() << 32) | rows_C


def scores_and_rows(keys):
    """What `keys_of` was given; −1 where there is no item."""
    ascending = ~(keys >> 32).int()
    rows = keys & 0xFFFFFFFF
    scores = torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).view(
        torch.float32
    )
    return scores, torch.where(rows == 0xFFFFFFFF, -1, rows)
