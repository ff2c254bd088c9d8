"""A run's configuration: every part's dataclass under one roof, from YAML and `key=value`."""

import math
from dataclasses import dataclass, field
from typing import Any

from embeddings.config import TableConfig, keeps_squares
from syncrec.config import ModelConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.evaluation import EvaluationConfig
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.stream import StreamConfig


@dataclass(frozen=True)
class LogConfig:
    """What a run says while it trains."""

    every: int = 50  # steps between two lines
    tensorboard: bool = True

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}: give at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything about one run. At the top: what everyone types."""

    data: str = ""  # the prepared dataset, a folder
    run: str = ""  # the folder that gets everything a run writes
    warm_start: str = ""  # another run, whose best model this one begins with
    # What its item vectors are multiplied by, and what Adagrad has summed for them by its square; 0.3 measures best
    # (docs/retraining.md), 1: all as it was
    warm_kept: float = 1.0
    seed: int = 0
    global_batch_size: int = 256  # users in a step, over all ranks
    tokens_per_batch: int = 0  # end a batch before it holds more interactions, a user's newest model.max_length; 0: no limit
    epochs: int = 20
    max_steps: int = 0  # stop after so many steps; 0: epochs decide
    timeout_minutes: float = (
        30.0  # how long a rank waits for the others before it gives up
    )
    deterministic: bool = (
        False  # on CUDA: sums in one order, slower; a CPU's have one (docs/gpu.md)
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    table: TableConfig = field(default_factory=TableConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    deepspeed: dict[str, Any] = field(
        default_factory=dict
    )  # DeepSpeed's own JSON, merged over ours

    def __post_init__(self):
        for name in ("global_batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if not 0 < self.warm_kept <= 1:
            raise ValueError(
                f"warm_kept is {self.warm_kept}: give more than 0, at most 1 (all as it was)"
            )
        if self.warm_kept < 1 and not keeps_squares(self.table):
            raise ValueError(
                f"warm_kept is {self.warm_kept}: Adam's moments cannot be scaled by it, so leave it at 1, or use "
                "table.optimizer=adagrad or rowwise_adagrad"
            )
        if not 0 < self.timeout_minutes < math.inf:
            raise ValueError(
                f"timeout_minutes is {self.timeout_minutes}: give more than 0"
            )
        for name in ("seed", "max_steps", "tokens_per_batch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more")
        if 0 < self.tokens_per_batch < self.model.max_length:
            raise ValueError(
                f"tokens_per_batch is {self.tokens_per_batch}: give 0 (no limit), or at least model.max_length, "
                f"{self.model.max_length}, which one user may have"
            )
