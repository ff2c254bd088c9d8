"""Scans of strips by PyTorch's operations: the best k items, and how many come before an item.

Scores by product are told apart by more than their error (embeddings/topk/bounds.py); what is nearer
is scored exactly.

Shapes: U users of a part, N columns of a block, G groups of a block's columns, P pairs of user and
group, C candidates (pairs of user and item), A users with close scores, k best items, r width.
"""

import torch
from torch import Tensor

from embeddings.topk.bounds import above, below
from embeddings.topk.chunks import Strip, UserPart
from embeddings.topk.score_blocks import GROUP, Block, BlockScorer, pack_items

__all__ = ["ItemsAhead", "TopK", "pack_items", "scores_and_rows", "smallest"]
PARTS = 1  # of users for a thread: operations are short anyway
# The key of no item: a score of −inf and a row behind all others.
MISSING = (0x7F800000 << 32) | 0xFFFFFFFF
_NO_ROW = 0xFFFFFFFF
_SLOT_BITS = 0xFFFFFFFF  # the lower 32 bits of a candidate
_MOST_CANDIDATES = 4  # as a multiple of those that will be left


class TopK:
    """Candidates for the best k of each user, with their scores by product.

    A candidate is an int64: the user's number, and in the lower 32 bits the slot in the shard.

    Attributes:
        part: the users.
        k: how many items are wanted.
        limit: how many new candidates wait before all are settled.
        least_U: what the k-th best has at least.
        full_U: whether k candidates are settled.
        equal_U: users for whom all items are equal.
        error_U: of any candidate's product, float64.

    Example: k = 2, and two users' products with the three items in slots 0, 1 and 2:

        scores_UN     tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])

        candidates    (user, slot): (0, 0), (0, 2), (1, 1), (1, 2)
        least_U       tensor([0.5, 0.3]), less the error of a product
    """

    def __init__(self, part: UserPart, k: int):
        y_UR = part.y.vectors_VR
        users = len(y_UR)
        device = y_UR.device
        self.part = part
        self.k = k
        self.limit = _MOST_CANDIDATES * k * users
        self.least_U = torch.full((users,), -torch.inf, device=device)
        self.full_U = torch.zeros(
            users,
            dtype=torch.bool,
            device=device,
        )
        self.equal_U = (y_UR == 0).all(1)
        self.error_U = torch.zeros(
            users,
            dtype=torch.float64,
            device=device,
        )
        self._scorer = BlockScorer(part, self._find_hopeless())
        self._blocks = 0
        self._waiting = 0
        self._candidates = [
            torch.empty(
                0,
                dtype=torch.int64,
                device=device,
            )
        ]
        self._scores = [torch.empty(0, device=device)]

    def scan(self, strip: Strip) -> None:
        """Takes in the candidates of a strip, block by block."""
        for block in self._scorer.score(strip):
            self._blocks += 1
            groups_UG = block.scores_UN.unflatten(1, (GROUP, -1)).amax(1)
            if self._blocks == 1:
                pool_UN = block.scores_UN
                if self.k <= groups_UG.shape[1]:
                    pool_UN = groups_UG
                self._begin(pool_UN, block.error_U)
            self._add_candidates(block, groups_UG)
            # Each time that twice as many rows are scanned, about as many are better.
            if self._blocks & (self._blocks - 1) == 0:
                self._settle()

    def best_keys(self) -> Tensor:
        """The keys of the best k (U, k), see `keys_of`.

        Example: k = 2, the two users of the class's example:

            scores_and_rows(result)    tensor([[0.9, 0.5], [0.8, 0.3]]), and the rows of slots
                                       tensor([[0, 2], [1, 2]])
        """
        candidates_C, _ = self._sorted_candidates()
        return self._select_best(candidates_C)

    def _find_hopeless(self) -> Tensor | None:
        """The users whose scores all are no numbers, None where there is none.

        All items are equal for them.

        Example: r = 2:

            vectors_VR    tensor([[0.1, 0.2], [nan, 0.3]])
            result        tensor([False, True])
        """
        if not self.part.y.any_wild:
            return None
        nan_U = self.part.y.vectors_VR.isnan().any(1)
        if not nan_U.any():
            return None
        self.equal_U |= nan_U
        return nan_U

    def _begin(self, pool_UN: Tensor, error_U: Tensor) -> None:
        """Of k scores by product the least, less the error, is not more than the k-th best.

        Example: k = 2, one user:

            pool_UN     tensor([[0.9, nan, 0.5, 0.1]])
            error_U     tensor([0.01])
            least_U     tensor([0.49]), rounded down
        """
        if self.k <= pool_UN.shape[1]:
            pool_UN = torch.where(pool_UN.isnan(), -torch.inf, pool_UN)
            kth_U = pool_UN.topk(self.k).values[:, -1]
            self.least_U = below(kth_U.double() - error_U)

    def _cutoff(self, error_U: Tensor) -> Tensor:
        """Products from which on an item may be one of the best (U,).

        Example: two users. All items are equal for the second, who has k of them:

            least_U     tensor([0.49, 0.0])
            error_U     tensor([0.01, 0.01])
            result      tensor([0.48, 1e-45]), rounded down, and the number after 0
        """
        cutoff_U = below(self.least_U.double() - error_U)
        # Rows come in order: once there are k, no equal one comes before them.
        infinity_U = torch.full_like(self.least_U, torch.inf)
        passed_U = torch.nextafter(self.least_U, infinity_U)
        return torch.where(self.equal_U & self.full_U, passed_U, cutoff_U)

    def _add_candidates(self, block: Block, groups_UG: Tensor) -> None:
        """Adds a block's items that may be among the best.

        First whole groups of columns are passed over, of which few have such an item. Then the
        columns of the others are compared one by one.

        Args:
            block: scores of some rows.
            groups_UG: the greatest score of each group of columns.

        Example: one user, two groups of two columns instead of GROUP. Column n is of group n mod 2:

            scores_UN    tensor([[0.9, 0.1, 0.5, 0.2]])
            groups_UG    tensor([[0.9, 0.2]])
            cutoff_U     tensor([0.4])
            columns_C    tensor([0, 2])
        """
        cutoff_U = self._cutoff(block.error_U)
        passes_UG = ~(groups_UG < cutoff_U[:, None])
        users_P, groups_P = torch.nonzero(passes_UG, as_tuple=True)
        scores_UGG = block.scores_UN.unflatten(1, (GROUP, -1))
        scores_PG = scores_UGG[users_P, :, groups_P]
        passes_PG = ~(scores_PG < cutoff_U[users_P, None])
        pairs_C, members_C = torch.nonzero(passes_PG, as_tuple=True)
        columns_C = members_C * groups_UG.shape[1] + groups_P[pairs_C]
        users_C = users_P[pairs_C]
        scores_C = scores_PG[pairs_C, members_C]
        users_C, columns_C, scores_C = block.select_shown(
            users_C,
            columns_C,
            scores_C,
        )
        slots_C = block.slot_N[columns_C]
        self._candidates.append(users_C << 32 | slots_C)
        self._scores.append(scores_C)
        self.error_U = torch.maximum(self.error_U, block.error_U)
        self._waiting += len(users_C)
        if self._waiting > self.limit:
            self._settle()

    def _settle(self) -> None:
        """Leaves out those that cannot be among the best any more.

        Example: k = 2, three candidates of one user, errors of 0.01:

            scores_C     tensor([0.9, 0.1, 0.5])
            least_U      tensor([0.49]), rounded down
            remains_C    tensor([True, False, True])
        """
        candidates_C, scores_C = self._sorted_candidates()
        users_C = candidates_C >> 32
        is_number_C = ~scores_C.isnan()
        numbers_C = scores_C.where(is_number_C, -torch.inf)
        lows_Un, counts_U = self._pad_by_user(users_C, numbers_C, -torch.inf)
        kth_U = lows_Un.topk(self.k).values[:, -1]
        least_U = below(kth_U.double() - self.error_U)
        self.least_U = torch.maximum(self.least_U, least_U)
        self.full_U = counts_U >= self.k
        cutoff_U = below(self.least_U.double() - self.error_U)
        remains_C = ~(scores_C < cutoff_U[users_C])
        candidates_C = candidates_C[remains_C]
        scores_C = scores_C[remains_C]
        if len(candidates_C) > self.limit:  # they are too near each other
            best_Uk = self._select_best(candidates_C)
            users_C, nth_C = torch.nonzero(best_Uk != MISSING, as_tuple=True)
            keys_C = best_Uk[users_C, nth_C]
            scores_C, rows_C = scores_and_rows(keys_C)
            slots_C = self.part.shard.slot(rows_C)
            candidates_C = users_C << 32 | slots_C
        self._candidates = [candidates_C]
        self._scores = [scores_C]
        self._waiting = 0

    def _select_best(self, candidates_C: Tensor) -> Tensor:
        """The keys of the best k of some candidates, by exact scores, (U, k).

        Example: k = 2, two users, of whom the second has one candidate:

            users_C    tensor([0, 0, 0, 1])
            slots_C    tensor([0, 1, 2, 1])
            result     keys of slots [[0, 2], [1, none]], none: MISSING
        """
        users_C = candidates_C >> 32
        slots_C = candidates_C & _SLOT_BITS
        scores_C = self.part.exact(users_C, slots_C)
        rows_C = self.part.shard.row(slots_C)
        keys_C = keys_of(scores_C, rows_C)
        keys_Un, _ = self._pad_by_user(users_C, keys_C, MISSING)
        return smallest(keys_Un, self.k)

    def _sorted_candidates(self) -> tuple[Tensor, Tensor]:
        """All candidates, by user, and their scores by product.

        Example: (user, slot) of two blocks:

            _candidates    (0, 0), (1, 1)    (0, 2), (1, 2)
            _scores        0.9, 0.8          0.5, 0.3
            result         (0, 0), (0, 2), (1, 1), (1, 2) and 0.9, 0.5, 0.8, 0.3
        """
        candidates_C, order_C = torch.cat(self._candidates).sort()
        scores_C = torch.cat(self._scores)[order_C]
        return candidates_C, scores_C

    def _pad_by_user(
        self,
        users_C: Tensor,
        values_C: Tensor,
        padding: float,
    ) -> tuple[Tensor, Tensor]:
        """The values of each user beside each other, at least k (U, n), and how many each has.

        Args:
            users_C: the user of each value, rising.
            values_C: the values.
            padding: what fills a user's row up.

        Example: three users, k = 2:

            users_C     tensor([0, 0, 0, 2])
            values_C    tensor([0.5, 0.1, 0.9, 0.3])
            padded_Un   tensor([[0.5, 0.1, 0.9], [−inf, −inf, −inf], [0.3, −inf, −inf]])
            counts_U    tensor([3, 0, 1])
        """
        counts_U = torch.bincount(users_C, minlength=len(self.least_U))
        width = max(self.k, int(counts_U.max()))
        shape = (len(counts_U), width)
        padded_Un = torch.full(shape, padding, device=users_C.device)
        end_U = counts_U.cumsum(0)
        first_U = end_U - counts_U
        index_C = torch.arange(len(users_C), device=users_C.device)
        nth_C = index_C - first_U[users_C]
        padded_Un[users_C, nth_C] = values_C
        return padded_Un, counts_U


class ItemsAhead:
    """How many items of the shard come before one whose score is given: ties count against it.

    An item comes before it whose score is not less, or no number. An item whose own score is −inf
    or no number is lost: every item that is shown comes before it, and nothing is compared.

    Example: three users, each of whose scores of the shard's three items are 0.9, 0.5 and 0.1:

        score_U    tensor([0.5, 0.2, −inf])
        count()    tensor([2, 2, 3])
    """

    def __init__(self, part: UserPart, score_U: Tensor):
        """Starts at no items.

        Args:
            part: the users.
            score_U: the score of each user's item.
        """
        lost_U = ~(score_U > -torch.inf)
        self.part = part
        idle_U = None
        if lost_U.any():
            idle_U = lost_U
        self._scorer = BlockScorer(part, idle_U)
        self._lost_U = lost_U
        self._items = 0
        self._score_U = score_U.masked_fill(lost_U, torch.inf)
        users = len(score_U)
        self._ahead_U = torch.zeros(
            users,
            dtype=torch.int64,
            device=score_U.device,
        )

    def scan(self, strip: Strip) -> None:
        """Counts those of a strip."""
        self._items += len(strip.row_S)
        for block in self._scorer.score(strip):
            self._count_block(block)

    def count(self) -> Tensor:
        """Of each user: int64 (U,)."""
        all_U = self.part.count_shown(self._items)
        return torch.where(self._lost_U, all_U, self._ahead_U)

    def _count_block(self, block: Block) -> None:
        """Counts the items of a block that come before each user's.

        Products that are more than their error away from the score are counted as they are. Users
        with a product that is nearer have those pairs scored exactly.

        Example: two users whose items score 0.5, errors of 0.01:

            scores_UN       tensor([[0.9, 0.1], [0.502, 0.9]])
            ahead_U         tensor([1, 1])
            behind_U        tensor([1, 0])
            close_A         tensor([1])
            near_AN         tensor([[True, False]])
        """
        scores_UN = block.scores_UN
        score_U = self._score_U
        low_U = below(score_U.double() - block.error_U)
        high_U = above(score_U.double() + block.error_U)
        # As numbers: torch takes four times as long to write bools.
        compared_UN = self._scorer.memory("compared", *scores_UN.shape)
        ahead_U = torch.ge(scores_UN, high_U[:, None], out=compared_UN).sum(1)
        self._ahead_U += ahead_U.long()
        behind_U = torch.lt(scores_UN, low_U[:, None], out=compared_UN).sum(1)
        is_close_U = ahead_U + behind_U < scores_UN.shape[1]
        (close_A,) = torch.nonzero(is_close_U, as_tuple=True)
        scores_AN = scores_UN[close_A]
        is_ahead_AN = scores_AN >= high_U[close_A, None]
        is_behind_AN = scores_AN < low_U[close_A, None]
        near_AN = ~(is_ahead_AN | is_behind_AN)
        near_C, columns_C = torch.nonzero(near_AN, as_tuple=True)
        users_C = close_A[near_C]
        scores_C = scores_AN[near_C, columns_C]
        users_C, columns_C, _ = block.select_shown(
            users_C,
            columns_C,
            scores_C,
        )
        slots_C = block.slot_N[columns_C]
        exact_C = self.part.exact(users_C, slots_C)
        ahead_C = ~(exact_C < score_U[users_C])
        self._ahead_U.index_add_(0, users_C, ahead_C.long())


def smallest(keys: Tensor, k: int) -> Tensor:
    """The k smallest keys of each row, ascending.

    Example: k = 2:

        keys      tensor([[7, 3, 5], [1, 9, 4]])
        result    tensor([[3, 5], [1, 4]])
    """
    return keys.topk(
        k,
        dim=1,
        largest=False,
        sorted=True,
    ).values


def keys_of(scores_C: Tensor, rows_C: Tensor) -> Tensor:
    """int64 keys that ascend as scores descend, those of equal scores as rows ascend.

    The row is the lower 32 bits. The upper ones are the score's bits, made to ascend as integers
    and then inverted; a score that is no number is −inf.

    Args:
        scores_C: float32.
        rows_C: int64, rows of M.

    Example: the keys ascend in the order of rows 2, 4, 7, 9:

        scores_C    tensor([0.5, 0.5, nan, 0.1])
        rows_C      tensor([4, 2, 9, 7])
    """
    scores_C = torch.where(scores_C.isnan(), -torch.inf, scores_C)
    scores_C = scores_C + 0.0  # −0 is 0
    bits_C = scores_C.view(torch.int32)
    ascending_C = torch.where(bits_C < 0, bits_C ^ 0x7FFFFFFF, bits_C)
    descending_C = (~ascending_C).long()
    return (descending_C << 32) | rows_C


def scores_and_rows(keys: Tensor) -> tuple[Tensor, Tensor]:
    """What `keys_of` was given; −1 as row where there is no item.

    Example: the key of row 4 with a score of 0.5, and MISSING:

        scores    tensor([0.5, −inf])
        rows      tensor([4, -1])
    """
    ascending = ~(keys >> 32).int()
    bits = torch.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending)
    rows = keys & 0xFFFFFFFF
    scores = bits.view(torch.float32)
    return scores, torch.where(rows == _NO_ROW, -1, rows)
