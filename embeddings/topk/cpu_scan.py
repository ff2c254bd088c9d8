"""Scans of strips by a CPU kernel that compares while it multiplies (syncrec_kernels/scan.cpp).

They give what those of embeddings/topk/torch_scan.py give, sooner: scores never go through memory.
The kernel itself scores exactly what its products cannot tell apart.

Shapes: U users of a part, S rows of a strip, C candidates of a user, k best items, r width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from embeddings.topk.bounds import Vectors, above, below, error
from embeddings.topk.chunks import Strip, UserPart
from embeddings.topk.torch_scan import MISSING, keys_of, smallest
from syncrec_kernels.build import why_unavailable

PARTS = 2  # of users for a thread: whichever is free takes the next
_SLOT_BITS = 0xFFFFFFFF


def supports(y_UR: Tensor) -> bool:
    """Whether the kernel can scan for these users.

    It runs on a CPU with AVX-512 and a C++ compiler, for vectors that are tame
    (embeddings/topk/bounds.py).

    y_UR: float32, on the device where the shards are.
    """
    if y_UR.device.type != "cpu" or Vectors(y_UR).any_wild:
        return False
    return not why_unavailable(
        "scan", "ranking all items takes up to twice as long"
    )


@dataclass(frozen=True)
class Panels:
    """A strip's vectors as the kernel reads them.

    longest: the length of the longest of them that is tame, at least.
    """

    packed: Tensor
    longest: float


def pack_items(weight: Tensor, slot_S: Tensor) -> Panels:
    """A strip's Panels.

    weight: of the shard. slot_S: the strip's rows in it.
    """
    packed, longest = torch.ops.scan.pack(weight, slot_S)
    return Panels(packed, longest)


class TopK:
    """The best k of each user so far, and what could be among them.

    The kernel reads and writes

        _slots_UC       the slots of each user's candidates, in the order of rows
        _products_UC    their scores by product, exact ones where they are settled
        _counts_U       how many candidates there are
        _least_U        what the k-th best has at least
        _equal_U        users for whom all items are equal
        _error_U        of any product of a candidate, float64

    Example: k = 2, and two users, for each of whom two of three items are candidates:

        _slots_UC       tensor([[0, 2, …], [1, 2, …]])
        _products_UC    tensor([[0.9, 0.5, …], [0.8, 0.3, …]])
        _counts_U       tensor([2, 2])
    """

    def __init__(self, part: UserPart, k: int):
        y_UR = part.y.vectors_VR
        users = len(y_UR)
        self.part = part
        self.k = k
        self._least_k = max(1, min(k, len(part.shard.weight)))
        most = 2 * self._least_k + 32
        self._slots_UC = torch.empty(users, most, dtype=torch.int32)
        self._products_UC = torch.empty(users, most)
        self._counts_U = torch.zeros(users, dtype=torch.int32)
        self._least_U = torch.full((users,), -torch.inf)
        self._equal_U = (y_UR == 0).all(1)
        self._error_U = torch.zeros(users, dtype=torch.float64)

    def scan(self, strip: Strip) -> None:
        """Takes in the candidates of a strip."""
        error_U = error(self.part.y, strip.items)
        self._error_U = torch.maximum(self._error_U, error_U)
        inputs = _kernel_inputs(self.part, strip)
        torch.ops.scan.best(*inputs, error_U, *self._state())

    def best_keys(self) -> Tensor:
        """The keys of the best k (U, k), see `keys_of` of torch_scan.py.

        Example: k = 3, two users with two and one candidates:

            slots_Un        tensor([[0, 2], [1, –]])
            is_filled_Un    tensor([[True, True], [True, False]])
            padding_Um      tensor([[MISSING], [MISSING]])
        """
        weight = self.part.shard.weight
        torch.ops.scan.settle(weight, self.part.y.vectors_VR, *self._state())
        most = int(self._counts_U.max())  # of any user
        slots_Un = self._slots_UC[:, :most].long() & _SLOT_BITS
        rows_Un = self.part.shard.row(slots_Un)
        is_filled_Un = torch.arange(most) < self._counts_U[:, None]
        keys_Un = keys_of(self._products_UC[:, :most], rows_Un)
        keys_Un = torch.where(is_filled_Un, keys_Un, MISSING)
        padding = (len(keys_Un), self.k - most)
        padding_Um = keys_Un.new_full(padding, MISSING)
        keys_Un = torch.cat([keys_Un, padding_Um], 1)
        return smallest(keys_Un, self.k)

    def _state(self) -> tuple[Tensor | int, ...]:
        """What the kernel reads and writes."""
        return (
            self._error_U,
            self._equal_U,
            self._least_k,
            self._slots_UC,
            self._products_UC,
            self._counts_U,
            self._least_U,
        )


class ItemsAhead:
    """How many items of the shard come before one whose score is given: ties count against it.

    An item comes before it whose score is not less, or no number. An item whose own score is −inf
    or no number is lost: every item that is shown comes before it.

    Example: three users, each of whose scores of the shard's three items are 0.9, 0.5 and 0.1:

        score_U    tensor([0.5, 0.2, −inf])
        count()    tensor([2, 2, 3])
    """

    def __init__(self, part: UserPart, score_U: Tensor):
        self.part = part
        self._items = 0
        self._lost_U = ~(score_U > -torch.inf)
        self._score_U = score_U.masked_fill(self._lost_U, torch.inf)
        self._ahead_U = torch.zeros(len(score_U), dtype=torch.int64)

    def scan(self, strip: Strip) -> None:
        """Counts those of a strip."""
        self._items += len(strip.row_S)
        score_U = self._score_U.double()
        error_U = error(self.part.y, strip.items)
        low_U = below(score_U - error_U)
        high_U = above(score_U + error_U)
        inputs = _kernel_inputs(self.part, strip)
        torch.ops.scan.ahead(
            *inputs,
            low_U,
            high_U,
            self._score_U,
            self._ahead_U,
        )

    def count(self) -> Tensor:
        """Of each user: int64 (U,)."""
        all_U = self.part.count_shown(self._items)
        return torch.where(self._lost_U, all_U, self._ahead_U)


def _kernel_inputs(part: UserPart, strip: Strip) -> tuple[Tensor, ...]:
    """What the kernel reads."""
    users_E, columns_E = part.find_excluded(strip)
    return (
        strip.items.packed,
        strip.slot_S,
        part.shard.weight,
        part.y.vectors_VR,
        users_E,
        columns_E,
    )
