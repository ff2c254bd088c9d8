"""A bijection that scatters the rows of M over the shards.

Row-wise shards are contiguous ranges of stored rows, and a domain is a contiguous range of rows: unscattered, a popular
domain would sit on one rank.
"""

import math

import numpy as np
import torch


class RowScatter:
    """stored = (row · step + 1) mod rows, with step near rows / golden ratio and coprime to it.

    Multiples of the golden ratio are spread evenly (Knuth, TAOCP 3, 6.4), so any contiguous range of rows falls evenly on
    all shards, and neighbours (which are of similar popularity) far apart. It depends on the number of rows alone.
    """

    def __init__(self, rows):
        if not 0 < rows < 2**31:
            raise ValueError(f"a table has 1 to {2**31 - 1} rows, not {rows}")
        self.rows = rows
        step = max(1, round(rows * (math.sqrt(5) - 1) / 2))
        while math.gcd(step, rows) != 1:
            step += 1
        self.step = step
        self.inverse_step = pow(step, -1, rows) if rows > 1 else 0

    def stored(self, row: torch.Tensor) -> torch.Tensor:
        """Where rows of M (int64) are kept."""
        return (row * self.step + 1) % self.rows

    def row(self, stored: np.ndarray | torch.Tensor):
        """Which rows of M the stored rows (int64) are: the inverse of `stored`."""
        return (stored - 1) * self.inverse_step % self.rows
