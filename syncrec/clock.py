"""When: vectors for the time for which a token predicts, and for how long after the token's interaction that is.

Time comes as ticks, whole numbers from 0, the first time of the dataset's logs, to 65,535, the last. Shapes: K knots, A tasks
(the cross-domain one, then the domains'), G gaps, r width.
"""

import numpy as np
import torch
from torch import nn

TICKS = 2**16 - 1
NO_GAP = 17  # of SOS, before which nothing was; the others are 0 to 16
_INPUT, _OUTPUT = range(2)


class Clock(nn.Module):
    """What time adds to a token: a vector of its gap, and one of the time for which it predicts; and what the latter adds to
    the output that items are scored with, by which an item has a popularity of its own at every time. What all tasks share and
    what a task has of its own are added.

    A token of a history predicts for the time of the interaction that followed, the newest for the time of the request. The
    time's vectors are linear between `time_knots` knots at equal distances. Not in the paper, which knows the order of
    interactions and nothing of their times. All start at zero.
    """

    def __init__(self, config, tasks):
        super().__init__()
        knots, gaps, width = config.time_knots, NO_GAP + 1, config.dim
        self.shared_2KR = nn.Parameter(torch.zeros(2, knots, width))
        self.own_2AKR = nn.Parameter(torch.zeros(2, tasks, knots, width))
        self.shared_gaps_GR = nn.Parameter(torch.zeros(gaps, width))
        self.own_gaps_AGR = nn.Parameter(torch.zeros(tasks, gaps, width))

    def added_to_tokens(self, asked_M, gap_M, task_M):
        """asked_M: ticks, gap_M: see `gaps`, task_M: all int64. Returns (M, r)."""
        gaps_NR = (self.shared_gaps_GR + self.own_gaps_AGR).flatten(0, 1)
        return self._at(_INPUT, asked_M, task_M) + gaps_NR.index_select(0, task_M * (NO_GAP + 1) + gap_M)

    def added_to_outputs(self, asked_L, task_L):
        """asked_L: ticks, task_L: both int64. Returns (L, r)."""
        return self._at(_OUTPUT, asked_L, task_L)

    def _at(self, function, tick_N, task_N):
        knots, knots_NR = self.shared_2KR.shape[1], (self.shared_2KR[function] + self.own_2AKR[function]).flatten(0, 1)
        place_N = tick_N.to(knots_NR.dtype) * ((knots - 1) / TICKS)
        low_N = place_N.long().clamp(max=knots - 2)
        share_N1, row_N = (place_N - low_N).unsqueeze(1), task_N * knots + low_N
        return torch.lerp(knots_NR.index_select(0, row_N), knots_NR.index_select(0, row_N + 1), share_N1)


def gaps(ticks):
    """The number of a span of time: ⌊log₂(1 + ticks)⌋, int32 of the same shape; of negative ones 0."""
    return np.frexp(np.maximum(ticks, 0) + 1.0)[1].astype(np.int32) - 1
