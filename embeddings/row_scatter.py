"""A bijection that scatters the rows of M over the shards (hashing by the golden ratio).

Row-wise shards are contiguous ranges of stored rows, and a domain is a contiguous range of rows:
unscattered, a popular domain would sit on one rank.
"""

import math
from typing import TypeVar

import numpy as np
import torch

_Rows = TypeVar("_Rows", np.ndarray, torch.Tensor)


class RowScatter:
    """stored = (row · step + 1) mod rows, with step near rows / golden ratio and coprime to it.

    Multiples of the golden ratio are spread evenly (Knuth, TAOCP 3, 6.4). So any contiguous range
    of rows falls evenly on all shards, and neighbours (which are of similar popularity) fall far
    apart. It depends on the number of rows alone.

    Raises ValueError where a table cannot have so many rows.
    """

    def __init__(self, rows: int):
        if not 0 < rows < 2**31:
            raise ValueError(f"a table has 1 to {2**31 - 1} rows, not {rows}")
        self.rows = rows
        step = max(1, round(rows * (math.sqrt(5) - 1) / 2))
        while math.gcd(step, rows) != 1:
            step += 1
        self.step = step
        self.inverse_step = pow(step, -1, rows) if rows > 1 else 0

    def stored(self, row: _Rows) -> _Rows:
        """The stored rows of rows of M (int64)."""
        return (row * self.step + 1) % self.rows

    def row(self, stored: _Rows) -> _Rows:
        """The rows of M of stored rows (int64): the inverse of `stored`."""
        return (stored - 1) * self.inverse_step % self.rows
