"""Index arithmetic of jagged arrays: rows of different lengths, stored one after the other.

lengths        [2,    0, 3]
values         [a, b,    c, d, e]
begins         [0,    2, 2]             row_begins(lengths)
row            [0, 0,    2, 2, 2]       np.repeat(np.arange(3), lengths)
within its row [0, 1,    0, 1, 2]       count_within_rows(lengths)
"""

import numpy as np


def row_begins(lengths_B: np.ndarray) -> np.ndarray:
    """Where each row begins: how many values the rows before it have, (B,)."""
    return np.cumsum(lengths_B) - lengths_B


def count_within_rows(lengths_B: np.ndarray) -> np.ndarray:
    """0, 1, … for the values of each row: int64 (N,)."""
    begins_B = row_begins(lengths_B)
    values = int(lengths_B.sum())
    return np.arange(values) - np.repeat(begins_B, lengths_B)


def join_ranges(first_B: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
    """first, first + 1, … for the values of each row: int64 (N,).

    join_ranges([7, 0, 4], [2, 0, 3])    [7, 8, 4, 5, 6]
    """
    begins_B = row_begins(lengths_B)
    values = int(lengths_B.sum())
    return np.arange(values) + np.repeat(first_B - begins_B, lengths_B)
