"""What embeddings/topk/torch_scan.py looks for, by a CPU kernel that compares while it multiplies (syncrec_kernels/scan.cpp): the same, sooner.

Scores never go through memory. The kernel itself scores exactly what its products cannot tell apart.
"""

from dataclasses import dataclass

import torch

from embeddings.topk.bounds import Vectors, above, below, error
from embeddings.topk.torch_scan import MISSING, keys_of, smallest
from syncrec_kernels.build import missing

PARTS = 2  # of users for a thread: whichever is free takes the next


def can(y_UR):
    """True where the kernel can look for what these users want: on a CPU with AVX-512 and a C++ compiler, where their vectors
    are tame (embeddings/topk/bounds.py)."""
    if y_UR.device.type != "cpu" or Vectors(y_UR).any_wild:
        return False
    return not missing("scan", "ranking all items takes up to twice as long")


@dataclass(frozen=True)
class Panels:
    """A strip's vectors as the kernel reads them, and the length of the longest of them that is tame, at least."""

    packed: torch.Tensor
    longest: float


def items_of(weight, place_S):
    """A strip's Panels."""
    return Panels(*torch.ops.scan.pack(weight, place_S))


class Best:
    """The best k of each user so far, and what could be: of each `room` places in the shard at most, in the order of rows."""

    def __init__(self, part, k):
        y_UR, items = part.y.vectors_VR, len(part.shard.weight)
        users, self.part, self.k, self._least_k = (
            len(y_UR),
            part,
            k,
            max(1, min(k, items)),
        )
        room = 2 * self._least_k + 32
        self._places_UC = torch.empty(users, room, dtype=torch.int32)
        self._products_UC = torch.empty(users, room)
        self._counts_U = torch.zeros(users, dtype=torch.int32)
        self._least_U = torch.full(
            (users,), -torch.inf
        )  # what the k-th best has at least
        self._nowhere_U = (y_UR == 0).all(1)  # all items are equal for these
        self._error_U = torch.zeros(
            users, dtype=torch.float64
        )  # of any product that is held

    def see(self, strip):
        """Takes the candidates of a strip."""
        error_U = error(self.part.y, strip.items)
        self._error_U = torch.maximum(self._error_U, error_U)
        torch.ops.scan.best(*_seen(self.part, strip), error_U, *self._held())

    def keys(self):
        """Of the best k (U, k)."""
        torch.ops.scan.settle(
            self.part.shard.weight, self.part.y.vectors_VR, *self._held()
        )
        left = int(self._counts_U.max())  # of any user
        rows_Un = self.part.shard.row(self._places_UC[:, :left].long() & 0xFFFFFFFF)
        there_Un = torch.arange(left) < self._counts_U[:, None]
        keys_Un = torch.where(
            there_Un, keys_of(self._products_UC[:, :left], rows_Un), MISSING
        )
        none_Um = keys_Un.new_full((len(keys_Un), self.k - left), MISSING)
        return smallest(torch.cat([keys_Un, none_Um], 1), self.k)

    def _held(self):
        state = self._places_UC, self._products_UC, self._counts_U, self._least_U
        return self._error_U, self._nowhere_U, self._least_k, *state


class Ahead:
    """How many items of the shard come before one whose score is given: not less, or no number."""

    def __init__(self, part, score_U):
        self.part, self._items = part, 0
        self._lost_U = ~(score_U > -torch.inf)  # behind every item that is left
        self._score_U = score_U.masked_fill(self._lost_U, torch.inf)
        self._ahead_U = torch.zeros(len(score_U), dtype=torch.int64)

    def see(self, strip):
        """Counts those of a strip."""
        self._items += len(strip.row_S)
        score_U, error_U = self._score_U.double(), error(self.part.y, strip.items)
        low_U, high_U = below(score_U - error_U), above(score_U + error_U)
        torch.ops.scan.ahead(
            *_seen(self.part, strip), low_U, high_U, self._score_U, self._ahead_U
        )

    def count(self):
        """Of each user: int64 (U,)."""
        return torch.where(self._lost_U, self.part.left(self._items), self._ahead_U)


def _seen(part, strip):
    """What the kernel reads."""
    return (
        strip.items.packed,
        strip.place_S,
        part.shard.weight,
        part.y.vectors_VR,
        *part.hidden(strip),
    )
