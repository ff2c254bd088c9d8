"""A run's configuration: all sections under one roof, from YAML and `key=value`."""

import math
from dataclasses import dataclass
from typing import Any

from embeddings.config import TableConfig, keeps_squares
from syncrec.config import ModelConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.evaluation import EvaluationConfig
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.setting import CONSTANT_SCHEDULE, setting
from trainer.config.stream import StreamConfig


@dataclass(frozen=True)
class LogConfig:
    """What a run logs while it trains."""

    every: int = setting(
        50,
        "steps between two log lines; metrics.jsonl has more of the first steps",
    )
    tensorboard: bool = setting(True, "write TensorBoard's event files too")

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}: give at least 1")


@dataclass(frozen=True)
class RunConfig:
    """Everything about one run. The top level has what everyone types."""

    data: str = setting(
        "",
        "the prepared dataset: a folder, or an address to fetch it from",
        on_resume=True,
        on_each_host=True,
    )
    run: str = setting(
        "",
        "the folder that gets everything a run writes",
        on_resume=True,
        on_each_host=True,
    )
    warm_start: str = setting(
        "",
        "another run, with whose best model this one begins",
        on_warm_start=True,
        on_each_host=True,
    )
    # Adagrad's sums are scaled by its square; 0.3 measured best (docs/retrain.md).
    warm_kept: float = setting(
        1.0,
        "what a warm start scales the item vectors by; 1: as they were",
        on_warm_start=True,
    )
    seed: int = setting(0, "of everything that is drawn", on_warm_start=True)
    global_batch_size: int = setting(
        256, "users in a step, over all ranks", on_warm_start=True
    )
    tokens_per_batch: int = setting(
        0,
        "end a batch before it holds more interactions; 0: no limit",
        on_warm_start=True,
    )
    epochs: int = setting(
        20, "passes over the training users", on_resume=CONSTANT_SCHEDULE
    )
    max_steps: int = setting(
        0,
        "stop after so many steps; 0: epochs decide",
        on_resume=CONSTANT_SCHEDULE,
    )
    timeout_minutes: float = setting(
        30.0,
        "how long a rank waits for the others before it gives up",
        on_resume=True,
    )
    deterministic: bool = setting(
        False,
        "on CUDA: sums in one order, slower; a CPU's have one (docs/cuda.md)",
        on_resume=True,
    )
    model: ModelConfig = setting(
        ModelConfig, "the model's architecture and losses"
    )
    table: TableConfig = setting(
        TableConfig, "the item table and its optimizer"
    )
    optimizer: OptimizerConfig = setting(
        OptimizerConfig, "the dense model's optimizer", on_warm_start=True
    )
    negatives: NegativesConfig = setting(
        NegativesConfig, "negative sampling", on_warm_start=True
    )
    stream: StreamConfig = setting(
        StreamConfig, "how shards become batches", on_warm_start=True
    )
    evaluation: EvaluationConfig = setting(
        EvaluationConfig, "validation and early stopping", on_warm_start=True
    )
    checkpoint: CheckpointConfig = setting(
        CheckpointConfig, "when a checkpoint is written", on_resume=True
    )
    log: LogConfig = setting(LogConfig, "what a run logs", on_resume=True)
    deepspeed: dict[str, Any] = setting(
        dict,
        "DeepSpeed's own JSON, merged over ours",
        on_resume=("zero_optimization",),
        on_warm_start=True,
    )

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "epochs"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        for name in ("seed", "max_steps", "tokens_per_batch"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value}: give 0 or more")
        if not 0 < self.timeout_minutes < math.inf:
            raise ValueError(
                f"timeout_minutes is {self.timeout_minutes}: give more than 0"
            )
        self._check_warm_kept()
        if 0 < self.tokens_per_batch < self.model.max_length:
            raise ValueError(
                f"tokens_per_batch is {self.tokens_per_batch}: give 0 (no limit), or at "
                f"least model.max_length, {self.model.max_length}, which one user may have"
            )

    def _check_warm_kept(self) -> None:
        if not 0 < self.warm_kept <= 1:
            raise ValueError(
                f"warm_kept is {self.warm_kept}: give more than 0, at most 1 (all as it was)"
            )
        if self.warm_kept < 1 and not keeps_squares(self.table):
            raise ValueError(
                f"warm_kept is {self.warm_kept}: Adam's moments cannot be scaled by it, so "
                "leave it at 1, or use table.optimizer=adagrad or rowwise_adagrad"
            )
