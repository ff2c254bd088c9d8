"""Scores of users and a strip by PyTorch's operations, block by block: on any device. embeddings/topk/cpu_scan.py is faster on a CPU.

A block of scores is what stays in the caches.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from embeddings.topk.bounds import Vectors, error, product

GROUP = 32  # a block's columns are a multiple of it


def items_of(weight, place_S):
    """A strip's Vectors, and zeros up to a whole group."""
    m_SR = torch.empty(
        -(-len(place_S) // GROUP) * GROUP, weight.shape[1], device=weight.device
    )
    torch.index_select(weight, 0, place_S, out=m_SR[: len(place_S)])
    m_SR[len(place_S) :] = 0
    return Vectors(m_SR)


class Blocks:
    """The scores of a UserPart. idle_U: users for whom nothing is to be looked for, None where there is none."""

    def __init__(self, part, idle_U):
        self.part, self.idle_U, self._memory = part, idle_U, {}

    def memory(self, name, *shape):
        """A tensor that is written again for every block: fresh ones take longer than a product does."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, device=self.part.y.vectors_VR.device)
        return self._memory[name][:size].view(shape)

    def of(self, strip):
        """The strip's scores."""
        y, items = self.part.y, len(strip.row_S)
        (users_E, columns_E), error_U = self.part.hidden(strip), error(y, strip.items)
        width = -(-items // (strip.blocks * GROUP)) * GROUP
        bounds = [*range(0, items, width), len(strip.items.vectors_VR)]
        cuts = torch.searchsorted(
            columns_E, torch.tensor(bounds, device=columns_E.device)
        ).tolist()
        for (begin, end), (first, last) in zip(
            pairwise(bounds), pairwise(cuts), strict=True
        ):
            scores_UN = product(
                y, strip.items, self.memory("scores", len(error_U), end - begin), begin
            )
            if end > items:
                scores_UN[:, items - begin :] = -torch.inf
            if self.idle_U is not None:
                scores_UN[self.idle_U] = -torch.inf
            hidden = users_E[first:last], columns_E[first:last] - begin
            if last > first:
                scores_UN[hidden] = -torch.inf
            yield Block(
                strip.row_S[begin:end],
                strip.place_S[begin:end],
                scores_UN,
                error_U,
                hidden,
            )


@dataclass(frozen=True)
class Block:
    """row_N: of M, ascending; place_N: in the shard; scores_UN: the product, −inf at what is no item and what is excluded, and
    for the idle; error_U: of these; excluded: users and columns."""

    row_N: torch.Tensor
    place_N: torch.Tensor
    scores_UN: torch.Tensor
    error_U: torch.Tensor
    excluded: tuple[torch.Tensor, torch.Tensor]

    def shown(self, users_C, columns_C, scores_C):
        """Those of the pairs that are of items and not excluded; scores_C: by product."""
        if (scores_C == -torch.inf).any():
            width, (users_E, columns_E) = self.scores_UN.shape[1], self.excluded
            excluded_C = torch.isin(
                users_C * width + columns_C, users_E * width + columns_E
            )
            left_C = (columns_C < len(self.row_N)) & ~excluded_C
            users_C, columns_C, scores_C = (
                users_C[left_C],
                columns_C[left_C],
                scores_C[left_C],
            )
        return users_C, columns_C, scores_C
