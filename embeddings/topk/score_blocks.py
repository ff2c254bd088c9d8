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
    """A strip's vectors, and zeros up to a whole group."""
    items = len(slot_S)
    columns = -(-items // GROUP) * GROUP
    m_SR = torch.empty(columns, weight.shape[1], device=weight.device)
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
    """

    row_N: Tensor
    slot_N: Tensor
    scores_UN: Tensor
    error_U: Tensor
    excluded: tuple[Tensor, Tensor]

    def select_shown(
        self, users_C: Tensor, columns_C: Tensor, scores_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the pairs that are of items and not excluded. scores_C: by product."""
        if not (scores_C == -torch.inf).any():
            return users_C, columns_C, scores_C
        width = self.scores_UN.shape[1]
        users_E, columns_E = self.excluded
        pairs_C = users_C * width + columns_C
        is_excluded_C = torch.isin(pairs_C, users_E * width + columns_E)
        shown_C = (columns_C < len(self.row_N)) & ~is_excluded_C
        return users_C[shown_C], columns_C[shown_C], scores_C[shown_C]


class BlockScorer:
    """Scores the users of a part. idle_U: users for whom nothing is looked for, None: there is none."""

    def __init__(self, part: UserPart, idle_U: Tensor | None):
        self.part = part
        self.idle_U = idle_U
        self._memory: dict[str, Tensor] = {}

    def memory(self, name: str, *shape: int) -> Tensor:
        """A tensor that is written again for every block.

        A fresh one takes longer than a product does.
        """
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            device = self.part.y.vectors_VR.device
            self._memory[name] = torch.empty(size, device=device)
        return self._memory[name][:size].view(shape)

    def score(self, strip: Strip) -> Iterator[Block]:
        """The strip's blocks of scores; each is valid until the next is asked for."""
        users = self.part.y
        items = len(strip.row_S)
        users_E, columns_E = self.part.find_excluded(strip)
        error_U = error(users, strip.items)
        width = -(-items // (strip.blocks * GROUP)) * GROUP
        bounds = [*range(0, items, width), len(strip.items.vectors_VR)]
        bounds_of_columns = torch.tensor(bounds, device=columns_E.device)
        cuts = torch.searchsorted(columns_E, bounds_of_columns).tolist()
        ranges = zip(pairwise(bounds), pairwise(cuts), strict=True)
        for (begin, end), (first, last) in ranges:
            memory = self.memory("scores", len(error_U), end - begin)
            scores_UN = product(users, strip.items, memory, begin)
            if end > items:
                scores_UN[:, items - begin :] = -torch.inf
            if self.idle_U is not None:
                scores_UN[self.idle_U] = -torch.inf
            excluded = (users_E[first:last], columns_E[first:last] - begin)
            if last > first:
                scores_UN[excluded] = -torch.inf
            yield Block(
                row_N=strip.row_S[begin:end],
                slot_N=strip.slot_S[begin:end],
                scores_UN=scores_UN,
                error_U=error_U,
                excluded=excluded,
            )
