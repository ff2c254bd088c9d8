"""Micro-batches: where a batch's users are cut for gradient accumulation.

Sizes: B users, U micro-batches.
"""

import numpy as np


def cut_micro_batches(lengths_B: np.ndarray, count: int) -> list[slice]:
    """Cuts users into `count` neighbouring ranges of about equally many interactions.

    Each range has a user at least, so there are fewer where there are fewer users. Their number
    depends on `count` and B alone: ranks with equally many users have equally many.

    Example: a long history first, and six users in three micro-batches:

        lengths_B    array([6, 1, 1, 2, 1, 1])
        result       [slice(0, 1), slice(1, 4), slice(4, 6)]
    """
    users = len(lengths_B)
    count = min(count, max(1, users))
    ends_B = np.cumsum(lengths_B)
    ranges = []
    begin = 0
    for left in range(count, 1, -1):
        before = ends_B[begin - 1] if begin else 0
        wanted = before + (ends_B[-1] - before) / left
        # The user with whom the range comes nearest to its share of what is left.
        end = int(np.searchsorted(ends_B, wanted))
        below = ends_B[end - 1] if end else 0
        if ends_B[end] - wanted <= wanted - below:
            end += 1
        end = min(max(end, begin + 1), users - left + 1)
        ranges.append(slice(begin, end))
        begin = end
    ranges.append(slice(begin, users))
    return ranges
