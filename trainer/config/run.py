"""A run's configuration: all sections under one roof, from YAML and `key=value`."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from embeddings.config import TableConfig, keeps_squares
from syncrec.config import ModelConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.evaluation import EvaluationConfig, SplitConfig
from trainer.config.negatives import NegativesConfig
from trainer.config.optimizer import OptimizerConfig
from trainer.config.setting import CONSTANT_SCHEDULE, setting
from trainer.config.stream import StreamConfig

# FBGEMM's kernels read rows by vectors of four numbers.
_ROW_VECTOR = 4
_LEAST_MINUTES = 0.001
MEASURED_PEAK = -1  # of profile.peak_tflops
TRACKERS = ("mlflow", "wandb")  # of log.trackers
_WINDOW = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)  # of profile.steps
# The largest value of a setting: far above what a run uses, and below what no memory, no clock
# and no integer of the libraries holds.
_MOST: dict[str, float] = {
    "seed": 2**63 - 1,
    "epochs": 100_000,
    "timeout_minutes": 525_600,
    "model.dim": 16_384,
    "model.max_length": 65_536,
    "model.time_knots": 1_000_000,
    "model.experts": 1024,
    "model.blocks": 1024,
    "model.ffn_dim": 65_536,
    "negatives.per_target": 65_536,
    "negatives.shared": 1_000_000,
    "stream.cache_bytes": 2**63 - 1,
    "stream.attempts": 1000,
    "stream.read_ahead": 65_536,
    "stream.workers": 1024,
    "stream.prefetch": 1024,
    "evaluation.negatives": 100_000,
    "evaluation.batch_size": 1_000_000,
}
_MOST_OF_INTEGERS = 2**31 - 1
# What float32, in which a step computes, tells from nothing, and its square from infinity.
_LEAST_NUMBER = 1e-30
_MOST_OF_NUMBERS = 1e9


@dataclass(frozen=True)
class LogConfig:
    """What a run logs while it trains."""

    every: int = setting(
        50,
        "steps between two log lines; metrics.jsonl has more of the first steps",
    )
    tensorboard: bool = setting(True, "write TensorBoard's event files too")
    trackers: list[str] = setting(
        list, "where the run shows up as well: mlflow, wandb (docs/observe.md)"
    )
    project: str = setting(
        "",
        "the trackers' experiment or project; empty: their own variable, or syncrec",
    )
    prometheus: str = setting(
        "",
        "a file for Prometheus' node exporter, such as /…/textfile/syncrec.prom",
    )
    console: Literal["quiet", "normal", "verbose"] = setting(
        "normal",
        "quiet: the test's line alone; verbose: all figures in every line",
    )

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every is {self.every}: give at least 1")
        if self.prometheus and not self.prometheus.endswith(".prom"):
            raise ValueError(
                f"log.prometheus is {self.prometheus}: give a name that ends in .prom, which the "
                "node exporter reads"
            )
        for name in self.trackers:
            if name not in TRACKERS:
                raise ValueError(
                    f"log.trackers has {name}: there are {', '.join(TRACKERS)}; "
                    "TensorBoard has log.tensorboard"
                )
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(
                f"log.trackers is {self.trackers}: give each one once"
            )


def read_window(text: str) -> tuple[int, int] | None:
    """The first and the last step of "100-110", or of "100"; None where the text is neither."""
    match = _WINDOW.fullmatch(text)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2] or first)
    if not 1 <= first <= last:
        return None
    return first, last


@dataclass(frozen=True)
class ProfileConfig:
    """What a run records of its own speed."""

    steps: str = setting(
        "",
        "steps to trace with PyTorch's profiler, counted from 1: 100-110; empty: none",
    )
    phases: bool = setting(
        False, "a JSON line a step and rank, for `syncrec trace`"
    )
    memory: bool = setting(
        False,
        "on CUDA: note who allocates what, for the snapshot at out-of-memory",
    )
    peak_tflops: float = setting(
        0.0,
        "a device's peak in TFLOP/s, for MFU in each record; -1: measured; 0: no MFU",
    )

    def __post_init__(self) -> None:
        peak = self.peak_tflops
        if peak != MEASURED_PEAK and not 0 <= peak < math.inf:
            raise ValueError(
                f"profile.peak_tflops is {peak}: give more than 0, {MEASURED_PEAK} to have it "
                "measured, or 0 for no MFU"
            )
        if self.steps and self.window is None:
            raise ValueError(
                f"profile.steps is {self.steps}: give a step, or the first and the last one: "
                "100-110"
            )

    @property
    def window(self) -> tuple[int, int] | None:
        """The first and the last step to trace; None where there are none."""
        return read_window(self.steps)


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
    accumulation: int = setting(
        1,
        "micro-batches that a rank cuts its part of a batch into (gradient accumulation): "
        "activations of one at a time are in memory, and a step takes about a third longer",
        on_resume=True,
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
    split: SplitConfig = setting(
        SplitConfig, "what is held out from training", on_warm_start=True
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
    profile: ProfileConfig = setting(
        ProfileConfig, "what a run records of its own speed", on_resume=True
    )
    deepspeed: dict[str, Any] = setting(
        dict,
        "DeepSpeed's own JSON, merged over ours",
        on_resume=("zero_optimization",),
        on_warm_start=True,
    )

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "accumulation", "epochs"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        for name in ("seed", "max_steps", "tokens_per_batch"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} is {value}: give 0 or more")
        if not _LEAST_MINUTES <= self.timeout_minutes < math.inf:
            raise ValueError(
                f"timeout_minutes is {self.timeout_minutes}: give at least {_LEAST_MINUTES}"
            )
        _check_ranges(self)
        if self.model.dim % _ROW_VECTOR:
            raise ValueError(
                f"model.dim is {self.model.dim}: give a multiple of {_ROW_VECTOR}, which the "
                "item table needs (FBGEMM)"
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


def _check_ranges(config: RunConfig) -> None:
    """Raises ValueError for a number that no memory, clock or float32 holds, by its key."""
    for key, value in _iterate_numbers(config):
        if isinstance(value, int):
            most = _MOST.get(key, _MOST_OF_INTEGERS)
        else:
            most = _MOST.get(key, _MOST_OF_NUMBERS)
        if value > most:
            raise ValueError(f"{key} is {value}: give at most {most}")
        if 0 < value < _LEAST_NUMBER:
            raise ValueError(
                f"{key} is {value}: give 0, or at least {_LEAST_NUMBER}"
            )


def _iterate_numbers(
    section: Any, start: str = ""
) -> Iterator[tuple[str, int | float]]:
    """Yields (dotted key, value) of every setting that is a number."""
    for field in fields(section):
        value = getattr(section, field.name)
        key = f"{start}{field.name}"
        if is_dataclass(value):
            yield from _iterate_numbers(value, f"{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value
