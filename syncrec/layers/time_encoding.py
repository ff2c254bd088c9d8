"""When: vectors for the time for which a token predicts, and for how long after the token's interaction that is.

Time comes as ticks, whole numbers from 0, the first time of the dataset's logs, to 65,535, the last. Shapes: K knots, r width.
"""

import numpy as np
import torch
from torch import nn

TICKS = 2**16 - 1
NO_GAP = 17  # of SOS, before which nothing was; the others are 0 to 16
_INPUT, _OUTPUT = range(2)


class Clock(nn.Module):
    """What time adds to a token: a vector of its gap, and one of the time for which it predicts; and what the latter adds to
    the output that items are scored with, by which an item has a popularity of its own at every time.

    A token of a history predicts for the time of the interaction that followed, the newest for the time of the request. The
    time's vectors are linear between `time_knots` knots at equal distances. Not in the paper, which knows the order of
    interactions and nothing of their times. All start at zero.
    """

    def __init__(self, config):
        super().__init__()
        self.knots_2KR = nn.Parameter(torch.zeros(2, config.time_knots, config.dim))
        self.gaps_GR = nn.Parameter(torch.zeros(NO_GAP + 1, config.dim))

    def added_to_tokens(self, asked_M, gap_M):
        """asked_M: ticks, gap_M: see `gaps`, both int64. Returns (M, r)."""
        return self._at(_INPUT, asked_M) + self.gaps_GR.index_select(0, gap_M)

    def added_to_outputs(self, asked_L):
        """asked_L: ticks, int64. Returns (L, r)."""
        return self._at(_OUTPUT, asked_L)

    def _at(self, function, tick_N):
        knots_KR = self.knots_2KR[function]
        place_N = tick_N.to(knots_KR.dtype) * ((len(knots_KR) - 1) / TICKS)
        low_N = place_N.long().clamp(max=len(knots_KR) - 2)
        share_N1 = (place_N - low_N).unsqueeze(1)
        return torch.lerp(
            knots_KR.index_select(0, low_N),
            knots_KR.index_select(0, low_N + 1),
            share_N1,
        )


def gaps(ticks):
    """The number of a span of time: ⌊log₂(1 + ticks)⌋, int32 of the same shape; of negative ones 0."""
    return np.frexp(np.maximum(ticks, 0) + 1.0)[1].astype(np.int32) - 1
