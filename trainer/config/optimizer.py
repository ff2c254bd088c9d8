"""Settings: the dense optimizer, its learning-rate schedule, gradient clipping, and the ZeRO stage."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """The dense model's Adam, and the schedule and clipping that dense model and table share."""

    learning_rate: float = (
        1e-3  # of the dense model; the table's is table.learning_rate
    )
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = (
        0.0  # of projections and embeddings; biases, LayerNorms, α and β have none
    )
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = (
        "constant"  # after warm-up, down to final_share at the last step
    )
    final_share: float = 0.0
    clip: float = 0.0  # largest norm of the dense gradient, and of the gradient of the looked-up vectors; 0: none
    # What ZeRO takes apart: 0 nothing, 1 the optimizer's state, 2 the gradients too, 3 the weights too. The dense model is
    # small beside the table (1.2 million weights at r = 128), and from 1 on they go over the wire once more in every step.
    zero_stage: int = 0

    def __post_init__(self):
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}: give more than 0"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}: give 0 or more, and less than 1"
                )
        for name in ("weight_decay", "warmup_steps", "clip", "final_share"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}: give 0 or more"
                )
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"optimizer.zero_stage is {self.zero_stage}: give 0, 1, 2 or 3"
            )
