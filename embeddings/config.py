"""What a person sets about the item table."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TableConfig:
    """The item matrix M and its fused optimizer."""

    optimizer: Literal[
        "auto", "sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam"
    ] = "auto"
    learning_rate: float = 0.05
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    init_std: float = 0.05
    # CUDA. cached: rows in the host's memory, those in use on the device; auto: where they do not fit into device_share
    placement: Literal["auto", "device", "cached"] = "auto"
    cache_share: float = (
        0.2  # of the rows that are cached, those that have a place on the device
    )
    device_share: float = 0.7  # of the device's free memory, what rows and their optimizer's state may take
    communication: Literal["fp32", "fp16", "bf16"] = (
        "fp32"  # of rows between ranks; their gradients: fp32, or else bf16
    )

    def __post_init__(self):
        for name in ("learning_rate", "eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"table.{name} is {getattr(self, name)}: give more than 0"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"table.{name} is {getattr(self, name)}: give 0 or more, and less than 1"
                )
        for name in ("cache_share", "device_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(
                    f"table.{name} is {getattr(self, name)}: give more than 0, and at most 1"
                )


def optimizer_name(config):
    """The optimizer in force: `auto` is row-wise Adagrad, which both devices have."""
    return "rowwise_adagrad" if config.optimizer == "auto" else config.optimizer


def keeps_squares(config):
    """True where all that it keeps of a row is sums of squared gradients, if anything."""
    return "adam" not in optimizer_name(config)
