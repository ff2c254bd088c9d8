"""Settings: the dense optimizer, its learning-rate schedule, gradient clipping, the ZeRO
stage; and DeepSpeed's own JSON."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.setting import setting
from trainer.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """The dense model's Adam, and the schedule and clipping that dense model and table share."""

    learning_rate: float = setting(
        1e-3, "of the dense model; the table's is table.learning_rate"
    )
    beta1: float = setting(0.9, "Adam's decay of the gradient's mean")
    beta2: float = setting(0.999, "Adam's decay of the squared gradient's mean")
    eps: float = setting(1e-8, "what Adam adds to the divisor")
    weight_decay: float = setting(
        0.0,
        "of projections and embeddings; biases, LayerNorms, α and β have none",
    )
    warmup_steps: int = setting(
        0, "steps in which the learning rate rises from 0"
    )
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "after warm-up, down to final_share at the last step"
    )
    final_share: float = setting(
        0.0, "the share of the learning rate that is left at the last step"
    )
    clip: float = setting(
        0.0,
        "largest norm of the dense gradient, and of the looked-up vectors'; 0: none",
    )
    ema: float = setting(
        0.0,
        "decay of the moving average of the dense weights, such as 0.999, which is what is "
        "validated, kept and exported; the table is not averaged; 0: none",
        unrecorded=0.0,
    )
    # The dense model is small beside the table (1.2 million weights at r = 128), and from stage 1
    # on the weights go over the wire once more in every step.
    zero_stage: int = setting(
        0,
        "ZeRO shards 0: nothing, 1: the optimizer's state, 2: gradients too, 3: weights too",
        on_resume=True,
    )

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(
                    f"optimizer.{name} is {value}: give more than 0"
                )
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"optimizer.{name} is {value}: give 0 or more, and less than 1"
                )
        for name in ("weight_decay", "warmup_steps", "clip", "final_share"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"optimizer.{name} is {value}: give 0 or more")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"optimizer.zero_stage is {self.zero_stage}: give 0, 1, 2 or 3"
            )


def read_deepspeed_json(file: str | Path) -> dict[str, Any]:
    """Reads a DeepSpeed configuration file. Raises InputError that names the file."""
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{file}: is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(
            f"{file}: is no JSON object; DeepSpeed's configuration is one"
        )
    return config


def asks_for_bf16(deepspeed_config: dict[str, Any]) -> bool:
    """Whether DeepSpeed's bf16 or torch_autocast is enabled: the model then runs in bf16 (autocast)."""
    return section_enabled(deepspeed_config, "bf16") or section_enabled(
        deepspeed_config, "torch_autocast"
    )


def section_enabled(config: dict[str, Any], section: str) -> bool:
    """Whether a section of DeepSpeed's configuration says `enabled`, or is true itself."""
    value = config.get(section)
    if isinstance(value, dict):
        return bool(value.get("enabled", False))
    return bool(value)
