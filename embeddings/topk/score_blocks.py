"""Scores of users and a strip by PyTorch's operations, block by block: on any device.

A block of scores is what stays in the caches. embeddings/topk/cpu_scan.py is faster on a CPU.

Shapes: U users of a part, S rows of a strip, N columns of a block, E excluded pairs, C pairs of
user and column, r width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from embeddings.topk.bounds import Vectors, error, product
from embeddings.topk.chunks import Strip, UserPart

GROUP = 32  # a block's columns are a multiple of it


def pack_items(weight: Tensor, slot_S: Tensor) -> Vectors:
    """A strip's vectors, and zeros up to a whole group.

    Example: 33 items of a shard with 100, r = 8:

        weight        (100, 8)
        slot_S        (33,)
        vectors_VR    (64, 8), zeros from row 33 on
    """
    items = len(slot_S)
    columns = -(-items // GROUP) * GROUP
    width = weight.shape[1]
    m_SR = torch.empty(columns, width, device=weight.device)
    torch.index_select(weight, 0, slot_S, out=m_SR[:items])
    m_SR[items:] = 0
    return Vectors(m_SR)


@dataclass(frozen=True)
class Block:
    """Scores of a part's users and some rows of a strip.

    Attributes:
        row_N: rows of M, ascending.
        slot_N: their slots in the shard.
        scores_UN: the product; −inf at what is no item, at what is excluded, and for idle users.
        error_U: of these.
        excluded: users and columns.

    Example: two users and two rows, in slots 0 and 1; the third column is of no item. The second user is not to be shown row 6:

        row_N        tensor([4, 6])
        slot_N       tensor([0, 1])
        scores_UN    tensor([[0.9, 0.1, −inf], [0.2, −inf, −inf]])
        error_U      tensor([1e-6, 1e-6])
        excluded     tensor([1]), tensor([1])
    """

    row_N: Tensor
    slot_N: Tensor
    scores_UN: Tensor
    error_U: Tensor
    excluded: tuple[Tensor, Tensor]

    def select_shown(
        self,
        users_C: Tensor,
        columns_C: Tensor,
        scores_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the pairs that are of items and not excluded. scores_C: by product.

        Example: pairs of the block above:

            users_C      tensor([0, 0, 1])
            columns_C    tensor([0, 2, 1])
            scores_C     tensor([0.9, −inf, −inf])
            result       tensor([0]), tensor([0]), tensor([0.9])
        """
        if not (scores_C == -torch.inf).any():
            return users_C, columns_C, scores_C
        width = self.scores_UN.shape[1]
        users_E, columns_E = self.excluded
        pairs_C = users_C * width + columns_C
        pairs_E = users_E * width + columns_E
        is_excluded_C = torch.isin(pairs_C, pairs_E)
        shown_C = (columns_C < len(self.row_N)) & ~is_excluded_C
        return users_C[shown_C], columns_C[shown_C], scores_C[shown_C]


class BlockScorer:
    """Scores the users of a part, a block of a strip's columns at a time.

    idle_U: bool, users for whom nothing is looked for, None: there is none.
    """

    def __init__(self, part: UserPart, idle_U: Tensor | None):
        self.part = part
        self.idle_U = idle_U
        self._memory: dict[str, Tensor] = {}

    def memory(self, name: str, *shape: int) -> Tensor:
        """A tensor that is written again for every block.

        A fresh one takes longer than a product does. What it holds before is of no account, for
        whoever asks writes all of it.
        """
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            device = self.part.y.vectors_VR.device
            self._memory[name] = torch.empty(size, device=device)
        return self._memory[name][:size].view(shape)

    def score(self, strip: Strip) -> Iterator[Block]:
        """The strip's blocks of scores; each is valid until the next is asked for.

        Example: a strip of 100 rows in 2 blocks, GROUP = 32:

            width     64
            bounds    [0, 64, 128], of which the last 28 columns are of no item
        """
        users = self.part.y
        items = len(strip.row_S)
        users_E, columns_E = self.part.find_excluded(strip)
        error_U = error(users, strip.items)
        groups = -(-items // (strip.blocks * GROUP))
        width = groups * GROUP
        bounds = [*range(0, items, width), len(strip.items.vectors_VR)]
        bounds_of_columns = torch.tensor(bounds, device=columns_E.device)
        cuts = torch.searchsorted(columns_E, bounds_of_columns).tolist()
        ranges = zip(pairwise(bounds), pairwise(cuts), strict=True)
        for (begin, end), (first, last) in ranges:
            columns = end - begin
            memory = self.memory("scores", len(error_U), columns)
            scores_UN = product(users, strip.items, memory, begin)
            if end > items:
                scores_UN[:, items - begin :] = -torch.inf
            if self.idle_U is not None:
                scores_UN[self.idle_U] = -torch.inf
            block_columns_E = columns_E[first:last] - begin
            excluded = (users_E[first:last], block_columns_E)
            if last > first:
                scores_UN[excluded] = -torch.inf
            yield Block(
                row_N=strip.row_S[begin:end],
                slot_N=strip.slot_S[begin:end],
                scores_UN=scores_UN,
                error_U=error_U,
                excluded=excluded,
            )
