"""Item vectors with one more column: a bias of each item, for exact ranking by score plus bias."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from embeddings.table import ItemTable, Shard


class BiasedTable:
    """An item table as `ExactRanking` reads it, with a column of biases behind the vectors.

    A user's vector has a 1 in that place (`with_one`), so that its product with an item's is the
    score and the bias. Three items of width 2:

        vectors         bias     rows
        [0.5, 0.1]      2.0      [0.5, 0.1, 2.0]
        [0.3, 0.9]      0.0      [0.3, 0.9, 0.0]
        [0.2, 0.2]      −1       [0.2, 0.2, −1 ]

    It holds a copy of this rank's shard.
    """

    def __init__(self, table: "ItemTable") -> None:
        first, tensors = table.shard()
        weight = tensors["weight"].detach()
        self.rows = table.rows
        self.device = table.device
        self.scatter = table.scatter
        self._first = first
        self._weight = torch.nn.functional.pad(weight, (0, 1))
        stored = torch.arange(first, first + len(weight), device=table.device)
        self._row_S = table.scatter.row(stored)

    def set_biases(self, first: int, bias_N: Tensor) -> None:
        """Sets the biases of the rows of M from `first` on: float32 (N,)."""
        place_S = self._row_S - first
        is_set_S = (place_S >= 0) & (place_S < len(bias_N))
        bias_N = bias_N.to(self._weight)
        self._weight[is_set_S, -1] = bias_N[place_S[is_set_S]]

    def shard(self) -> "Shard":
        """This rank's part, as `ItemTable.shard` gives it."""
        return self._first, {"weight": self._weight}


def with_one(y_BR: Tensor) -> Tensor:
    """Users' vectors with a 1 behind them, (B, r + 1)."""
    return torch.nn.functional.pad(y_BR, (0, 1), value=1.0)
