"""The DeepSpeed engine around the dense model: its optimizer, its ZeRO stage, and what cannot hold beside fused tables."""

import math
import os
import warnings

import torch

from syncrec.model import decayed_names
from trainer.errors import InputError

# DeepSpeed probes for an accelerator when it is imported, and warns where there is none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed

from trainer.config.deepspeed_json import _enabled
from trainer.config.optimizer import OptimizerConfig

# DeepSpeed calls what torch has renamed, which is nobody's business in a run's output.
warnings.filterwarnings(
    "ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning
)

# On CPU hosts DeepSpeed would compile a shared-memory all-reduce at start-up: a minute, a compiler, and other sums than
# between hosts.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def rate_share(config: OptimizerConfig, step, total_steps):
    """The share of the full learning rate in a step (counted from 0), for the dense model and the table alike."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = min(
        1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    )
    falling = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
    }[config.schedule]
    return config.final_share + (1 - config.final_share) * falling


def engine_config(
    config: OptimizerConfig, given: dict, global_batch_size: int, world_size: int
) -> dict:
    """What DeepSpeed is told: ours, and over it the user's own JSON (`given`). Raises InputError for what cannot hold."""
    for section in ("fp16", "amp"):
        if _enabled(given, section):
            raise InputError(
                f"deepspeed.{section}.enabled: loss scaling does not reach the item table, whose optimizer runs inside "
                "backward; use model.precision=bf16"
            )
    if given.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise InputError(
            "deepspeed.gradient_accumulation_steps: the item table is updated in every backward, so it has to be 1; use a "
            "larger global_batch_size"
        )
    if given.get("train_batch_size", "auto") not in ("auto", global_batch_size):
        raise InputError(
            f"deepspeed.train_batch_size is {given['train_batch_size']}, but global_batch_size is {global_batch_size}: "
            "leave it out, global_batch_size alone decides"
        )
    micro_batch_size = max(1, global_batch_size // world_size)
    if given.get("train_micro_batch_size_per_gpu", "auto") not in (
        "auto",
        micro_batch_size,
    ):
        raise InputError(
            f"deepspeed.train_micro_batch_size_per_gpu is {given['train_micro_batch_size_per_gpu']}: leave it out, "
            "global_batch_size alone decides"
        )
    optimizer = given.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    if isinstance(params, dict) and "lr" in params:
        raise InputError(
            "deepspeed.optimizer.params.lr: every step sets the rate anew; use optimizer.learning_rate"
        )
    if "scheduler" in given:
        raise InputError(
            "deepspeed.scheduler: it would move the dense model alone; use optimizer.schedule, which moves both"
        )
    if "gradient_clipping" in given:
        raise InputError(
            "deepspeed.gradient_clipping: it would clip the dense model alone; use optimizer.clip"
        )
    params = {
        "lr": config.learning_rate,
        "betas": [config.beta1, config.beta2],
        "eps": config.eps,
        "weight_decay": config.weight_decay,
        "torch_adam": True,  # PyTorch's own kernels: nothing to compile at start-up
        "fused": True,  # one kernel, which takes it from the device where it is not to step (trainer.training.gradients)
    }
    ours = {
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"stage": config.zero_stage},
        "gradient_clipping": 0.0,  # trainer.training.gradients clips; where nothing is said, ZeRO does too
        "steps_per_print": 2**31 - 1,
        "timers": {
            "throughput": {"enabled": False}
        },  # it waits for the device twice a step
    }
    settled = (
        "bf16",
        "torch_autocast",
        "fp16",
        "amp",
        "train_batch_size",
        "gradient_accumulation_steps",
    )
    passed = {key: value for key, value in given.items() if key not in settled}
    merged = _merge(ours, passed)
    zero = merged["zero_optimization"]
    if zero["stage"] in (1, 2) and "offload_optimizer" not in zero:
        zero.setdefault(
            "compute_grad_norm", False
        )  # we have it; DeepSpeed would have the host look at it in every step
    # DeepSpeed wants a batch size; ours need not be divisible by the ranks, and DeepSpeed only reports it.
    merged["train_micro_batch_size_per_gpu"] = micro_batch_size
    return merged


def start_engine(model, config: dict):
    """The engine that computes, reduces and steps. Its module must be called through it, never around it."""
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameter_groups(model, config), config=config
    )
    return engine


def parameter_groups(model, config: dict) -> list:
    """The trained parameters, as an optimizer takes them: in two groups where there is weight decay, which is not for all."""
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not config["optimizer"]["params"].get("weight_decay", 0):
        return list(trained.values())
    decayed = decayed_names(model)
    others = [parameter for name, parameter in trained.items() if name not in decayed]
    groups = [
        {
            "params": [
                parameter for name, parameter in trained.items() if name in decayed
            ]
        },
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(engine, learning_rate):
    """Takes effect in the next engine.step()."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def _merge(base, over):
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(base[key], value)
            if isinstance(value, dict) and isinstance(base.get(key), dict)
            else value
        )
    return merged
