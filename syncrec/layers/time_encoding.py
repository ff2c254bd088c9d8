"""When: vectors for the time for which a token predicts, and for how long after its input that is.

Time comes as ticks, whole numbers from 0, the first time of the dataset's logs, to 65,535, the last.
Shapes: K knots, M packed tokens, L targets, r width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from syncrec.config import ModelConfig

TICKS = 2**16 - 1
NO_GAP = 17  # of SOS, before which nothing was; the others are 0 to 16
_INPUT = 0
_OUTPUT = 1


class Clock(nn.Module):
    """A time encoding: what time adds to a token, and to the output that items are scored with.

    To a token it adds a vector of its gap and a vector of the time for which it predicts. A token
    of a history predicts for the time of the interaction that followed, the newest token for the
    time of the request. By what it adds to the output an item has a popularity of its own at every
    time. The time's vectors are linear between `time_knots` knots at equal distances; one knot
    stands for all times, so that gaps alone count. All start at zero.

    The vectors of the newest time that training knows stand for all later ones, as in
    `end_training`: the knots behind it learn nothing.

    Beyond section 4 of the paper, which knows the order of interactions and nothing of their times.
    """

    newest_tick: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.register_buffer("newest_tick", torch.tensor(TICKS))
        self.knots_2KR = nn.Parameter(
            torch.zeros(2, config.time_knots, config.dim)
        )
        self.gaps_GR = nn.Parameter(torch.zeros(NO_GAP + 1, config.dim))

    def encode_tokens(self, time_M: Tensor, gap_M: Tensor) -> Tensor:
        """time_M: ticks, gap_M: of `compute_gaps`, both int64. Returns (M, r)."""
        time_MR = self._interpolate(_INPUT, time_M)
        return time_MR + self.gaps_GR.index_select(0, gap_M)

    def encode_outputs(self, time_L: Tensor) -> Tensor:
        """time_L: ticks, int64. Returns (L, r)."""
        return self._interpolate(_OUTPUT, time_L)

    def end_training(self, newest_tick: int | None) -> None:
        """Says that training knows no later time. newest_tick: None: it knows all."""
        self.newest_tick.fill_(TICKS if newest_tick is None else newest_tick)

    def _interpolate(self, function: int, time_N: Tensor) -> Tensor:
        """Vectors of some times, linear between the two knots beside each: (N, r).

        Example: three knots, at the ticks 0, 32,767.5 and 65,535:

            time_N      tensor([0, 65535])
            low_N       tensor([0, 1])
            share_N1    tensor([[0.0], [1.0]])
        """
        knots_KR = self.knots_2KR[function]
        last = len(knots_KR) - 1
        known_N = torch.minimum(time_N, self.newest_tick)
        along_N = known_N.to(knots_KR.dtype) * (last / TICKS)
        low_N = along_N.long().clamp(max=max(0, last - 1))
        high_N = (low_N + 1).clamp(max=last)
        share_N1 = (along_N - low_N).unsqueeze(1)
        low_NR = knots_KR.index_select(0, low_N)
        high_NR = knots_KR.index_select(0, high_N)
        return torch.lerp(low_NR, high_NR, share_N1)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Takes a state of before, which knows all times."""
        newest_tick = torch.tensor(TICKS)
        state_dict.setdefault(f"{prefix}newest_tick", newest_tick)
        super()._load_from_state_dict(state_dict, prefix, *args)


def compute_gaps(ticks: np.ndarray) -> np.ndarray:
    """The number of each span of time: ⌊log₂(1 + ticks)⌋, int32 of the same shape; 0 below 0.

    Example:

        ticks     array([-3, 0, 1, 2, 3, 65535])
        result    array([0, 0, 1, 1, 2, 16])
    """
    _, exponent = np.frexp(np.maximum(ticks, 0) + 1.0)
    return exponent.astype(np.int32) - 1
