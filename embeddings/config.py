"""What a person sets about the item table."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TableConfig:
    """The item matrix M and its fused optimizer."""

    optimizer: Literal["auto", "sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam"] = "auto"
    learning_rate: float = 0.05
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    init_std: float = 0.05

    def __post_init__(self):
        for name in ("learning_rate", "eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"table.{name} is {getattr(self, name)}: give more than 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"table.{name} is {getattr(self, name)}: give 0 or more, and less than 1")
