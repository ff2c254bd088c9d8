"""Settings of the item table: its optimizer, its placement, and how its rows travel.

Each field's metadata has its help line, and whether the setting may change on resume and on a warm
start (trainer/config/setting.py).
"""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TableConfig:
    """The item matrix M and its fused optimizer."""

    optimizer: Literal[
        "auto",
        "sgd",
        "adagrad",
        "rowwise_adagrad",
        "adam",
        "partial_rowwise_adam",
    ] = field(
        default="auto",
        metadata={
            "help": "the fused optimizer of the rows; auto: rowwise_adagrad"
        },
    )
    learning_rate: float = field(
        default=0.05,
        metadata={"help": "of the item table", "on_warm_start": True},
    )
    eps: float = field(
        default=1e-8,
        metadata={"help": "what the optimizer adds to the divisor"},
    )
    beta1: float = field(
        default=0.9, metadata={"help": "Adam's decay of the gradient's mean"}
    )
    beta2: float = field(
        default=0.999,
        metadata={"help": "Adam's decay of the squared gradient's mean"},
    )
    init_std: float = field(
        default=0.05,
        metadata={
            "help": "standard deviation of the rows at the start",
            "on_warm_start": True,
        },
    )
    placement: Literal["auto", "device", "cached"] = field(
        default="auto",
        metadata={
            "help": "CUDA: rows on the device, or cached from the host; auto: as they fit",
            "on_resume": True,
        },
    )
    cache_share: float = field(
        default=0.2,
        metadata={
            "help": "CUDA: the share of cached rows that the device has room for",
            "on_resume": True,
        },
    )
    device_share: float = field(
        default=0.7,
        metadata={
            "help": "CUDA: the share of free memory for rows and their optimizer's state",
            "on_resume": True,
        },
    )
    communication: Literal["fp32", "fp16", "bf16", "int8"] = field(
        default="fp32",
        metadata={
            "help": "of rows between ranks; their gradients: fp32, or else bf16",
            "on_warm_start": True,
        },
    )
    group_size: int = field(
        default=0,
        metadata={
            "help": "ranks that share a copy of the table, best those of a host; 0: one copy, on all",
            "on_resume": True,
        },
    )

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "init_std"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"table.{name} is {value}: give more than 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"table.{name} is {value}: give 0 or more, and less than 1"
                )
        if self.group_size < 0:
            raise ValueError(
                f"table.group_size is {self.group_size}: give how many ranks share a copy of the "
                "table, or 0 for one copy on all"
            )
        for name in ("cache_share", "device_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(
                    f"table.{name} is {value}: give more than 0, and at most 1"
                )


def optimizer_name(config: TableConfig) -> str:
    """The optimizer in force: `auto` is row-wise Adagrad, which both devices have."""
    if config.optimizer == "auto":
        return "rowwise_adagrad"
    return config.optimizer


def keeps_squares(config: TableConfig) -> bool:
    """Whether the optimizer's state of a row is sums of squared gradients, if anything."""
    return "adam" not in optimizer_name(config)
