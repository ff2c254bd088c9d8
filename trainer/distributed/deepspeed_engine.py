"""The DeepSpeed engine around the dense model: optimizer, ZeRO stage, learning-rate schedule.

DeepSpeed is imported by `import_deepspeed` alone, which prepares it.
"""

import functools
import math
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trainer.config.optimizer import OptimizerConfig, section_enabled
from trainer.errors import InputError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn

_Json = dict[str, Any]

_LONGEST_REASON = 400  # letters
# Sections of the user's JSON that do not reach DeepSpeed: they are refused, or settled elsewhere.
_NOT_PASSED = (
    "bf16",
    "torch_autocast",
    "fp16",
    "amp",
    "train_batch_size",
    "gradient_accumulation_steps",
)


@functools.cache
def import_deepspeed() -> ModuleType:
    """The module `deepspeed`, set up for this program."""
    import torch

    # DeepSpeed probes for an accelerator when it is imported, and warns where there is none.
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", accelerator)
    import deepspeed

    # It calls what torch has renamed, which is nobody's business in a run's output.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
    )
    # On CPU hosts it would compile a shared-memory all-reduce at start-up: a minute, a compiler,
    # and other sums than between hosts.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def learning_rate_share(
    config: OptimizerConfig,
    step: int,
    total_steps: int,
) -> float:
    """The share of the full learning rate in a step (counted from 0): warm-up, then the schedule.

    The dense model and the table share it.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    steps_done = step - config.warmup_steps
    all_steps = max(1, total_steps - config.warmup_steps)
    done = min(1.0, steps_done / all_steps)
    if config.schedule == "linear":
        remaining = 1 - done
    elif config.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * done)) / 2
    else:
        remaining = 1.0
    return config.final_share + (1 - config.final_share) * remaining


def build_engine_config(
    config: OptimizerConfig,
    user_json: _Json,
    global_batch_size: int,
    world_size: int,
) -> _Json:
    """DeepSpeed's configuration: this program's, and over it the user's own JSON.

    Raises InputError for what cannot hold beside a table whose optimizer is fused into backward.
    """
    micro_batch_size = max(1, global_batch_size // world_size)
    _refuse_values_for_sections(user_json)
    _refuse_loss_scaling(user_json)
    _refuse_batch_sizes(user_json, global_batch_size, micro_batch_size)
    _refuse_settings_of_both(user_json)
    passed = {
        key: user_json[key] for key in user_json if key not in _NOT_PASSED
    }
    merged = _merge(_default_config(config), passed)
    zero = merged["zero_optimization"]
    if zero["stage"] in (1, 2) and "offload_optimizer" not in zero:
        # We have the norm; DeepSpeed would have the host look at it in every step.
        zero.setdefault("compute_grad_norm", False)
    # DeepSpeed wants a batch size; ours need not be divisible by the ranks, and DeepSpeed only
    # reports it.
    merged["train_micro_batch_size_per_gpu"] = micro_batch_size
    return merged


def _refuse_values_for_sections(user_json: _Json) -> None:
    """Refuses a plain value where this program lays its own settings under a section."""
    for section in ("optimizer", "zero_optimization"):
        value = user_json.get(section, {})
        if not isinstance(value, dict):
            raise InputError(
                f"deepspeed.{section} is {value}: it is a section with keys of its own"
            )
    params = user_json.get("optimizer", {}).get("params", {})
    if not isinstance(params, dict):
        raise InputError(
            f"deepspeed.optimizer.params is {params}: it is a section with keys of its own"
        )


def _refuse_loss_scaling(user_json: _Json) -> None:
    """Refuses float16 in DeepSpeed's ways."""
    for section in ("fp16", "amp"):
        if section_enabled(user_json, section):
            raise InputError(
                f"deepspeed.{section}.enabled: loss scaling does not reach the item table, whose "
                "optimizer runs inside backward; use model.precision=bf16"
            )


def _refuse_batch_sizes(
    user_json: _Json,
    global_batch_size: int,
    micro_batch_size: int,
) -> None:
    """Refuses another batch size than the run's, and gradient accumulation."""
    if user_json.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise InputError(
            "deepspeed.gradient_accumulation_steps: it would accumulate the dense model's gradient "
            "alone; use accumulation, which cuts global_batch_size into micro-batches"
        )
    batch_size = user_json.get("train_batch_size", "auto")
    if batch_size not in ("auto", global_batch_size):
        raise InputError(
            f"deepspeed.train_batch_size is {batch_size}, but global_batch_size is "
            f"{global_batch_size}: leave it out, global_batch_size alone decides"
        )
    batch_size = user_json.get("train_micro_batch_size_per_gpu", "auto")
    if batch_size not in ("auto", micro_batch_size):
        raise InputError(
            f"deepspeed.train_micro_batch_size_per_gpu is {batch_size}: leave it out, "
            "global_batch_size alone decides"
        )


def _refuse_settings_of_both(user_json: _Json) -> None:
    """Refuses what would change the dense model and not the table."""
    optimizer = user_json.get("optimizer")
    params = None
    if isinstance(optimizer, dict):
        params = optimizer.get("params")
    if isinstance(params, dict) and "lr" in params:
        raise InputError(
            "deepspeed.optimizer.params.lr: every step sets the rate anew; use "
            "optimizer.learning_rate"
        )
    if "scheduler" in user_json:
        raise InputError(
            "deepspeed.scheduler: it would move the dense model alone; use optimizer.schedule, "
            "which moves both"
        )
    if "gradient_clipping" in user_json:
        raise InputError(
            "deepspeed.gradient_clipping: it would clip the dense model alone; use optimizer.clip"
        )


def _default_config(config: OptimizerConfig) -> _Json:
    """What the user's JSON is laid over."""
    params = {
        "lr": config.learning_rate,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        # PyTorch's own kernels: nothing to compile at start-up.
        "torch_adam": True,
        # One kernel, which takes it from the device where it is not to step
        # (trainer.training.gradients).
        "fused": True,
    }
    return {
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"stage": config.zero_stage},
        # trainer.training.gradients clips; where nothing is said, ZeRO does too.
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        # It waits for the device twice a step.
        "timers": {"throughput": {"enabled": False}},
    }


def start_engine(model: "nn.Module", config: _Json) -> "DeepSpeedEngine":
    """The engine that computes, reduces and steps.

    The model must be called through it, never around it.
    """
    deepspeed = import_deepspeed()
    parameters = parameter_groups(model, config)
    try:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, config=config
        )
    except _refusals() as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        kind = type(error).__name__
        raise InputError(
            f"deepspeed: DeepSpeed refuses this configuration ({kind}: {reason}); see the "
            "settings below deepspeed. and optimizer.zero_stage"
        ) from error
    return engine


def _refusals() -> tuple[type[Exception], ...]:
    """What DeepSpeed raises for a configuration that it does not take; pydantic's is a ValueError."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    return (
        DeepSpeedConfigError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        AssertionError,
        ImportError,
    )


def parameter_groups(model: "nn.Module", config: _Json) -> list[Any]:
    """The trained parameters, as an optimizer takes them.

    With weight decay in two groups, since it is not for all of them.
    """
    from syncrec.model import select_decayed_parameters

    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[name] = parameter
    if not config["optimizer"]["params"].get("weight_decay", 0):
        return list(trained.values())
    decayed = []
    others = []
    names = select_decayed_parameters(model)
    for name, parameter in trained.items():
        if name in names:
            decayed.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = []
    if decayed:
        groups.append({"params": decayed})
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    return groups


def set_learning_rate(engine: "DeepSpeedEngine", learning_rate: float) -> None:
    """Takes effect in the next engine.step()."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def _merge(base: _Json, over: _Json) -> _Json:
    """`base` with the values of `over`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        section = base.get(key)
        if isinstance(value, dict) and isinstance(section, dict):
            merged[key] = _merge(section, value)
        else:
            merged[key] = value
    return merged
