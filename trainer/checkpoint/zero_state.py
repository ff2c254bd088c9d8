"""The dense model's weights and optimizer state, whole, float32, on the CPU, at any ZeRO stage.

ZeRO's own checkpoints are pickles that only the same number of ranks and the same stage read.
Weights are restored before the engine is built, which is the same at every stage; the optimizer's
state after it.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainer.distributed.deepspeed_engine import import_deepspeed

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

deepspeed = import_deepspeed()

# By the names of parameters, buffers or states.
Tensors = dict[str, torch.Tensor]

# The state that is the moving average of the weights (trainer.training.weight_average).
AVERAGE = "ema"

_SEPARATOR = "//"  # between a parameter's name and its state's
_TRAINED = "trained"  # in a file, the weights themselves where the model is their average


def collect_gradients(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """Collects this rank's part of the dense gradient after backward, as it goes into the step.

    It is the mean over ranks: all of it at stage 0, a partition at the others.
    """
    candidates = []
    stage = engine.zero_optimization_stage()
    if stage == 0 or engine.zero_offload_optimizer():
        for parameter in flat_parameters(engine):
            candidates.append(parameter.grad)
    else:
        optimizer = engine.optimizer
        for group in optimizer.averaged_gradients.values():
            candidates.extend(group)
    gradients = []
    for gradient in candidates:
        if gradient is not None:
            gradients.append(gradient)
    return gradients


def gather_state(engine: "DeepSpeedEngine", keep: bool) -> Tensors:
    """Gathers the dense model's parameters and buffers by name. Called on all ranks.

    keep: whether this rank wants them; it is empty otherwise.
    """
    state = {}
    model = engine.module
    for name, parameter in model.named_parameters():
        is_partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters(
            parameter, enabled=is_partitioned
        ):
            if keep:
                state[name] = _copy(parameter)
    if keep:
        for name, buffer in model.named_buffers():
            state[name] = _copy(buffer)
    return state


def gather_optimizer_state(engine: "DeepSpeedEngine", keep: bool) -> Tensors:
    """Gathers the dense optimizer's state. Called on all ranks.

    Example: {"gate.weight//exp_avg": of the parameter's shape, …, "step": the number of steps}.
    keep: whether this rank wants it; it is empty otherwise, and before the first step.
    """
    optimizer = base_optimizer(engine)
    flats = flat_parameters(engine)
    if not flats:
        return {}
    first_flat = flats[0]
    first_state = optimizer.state.get(first_flat)
    if not first_state:
        return {}
    _link_state(engine)
    # DeepSpeed may have made new ones.
    first_state = optimizer.state[first_flat]
    names = []
    for name, value in first_state.items():
        if value.shape == first_flat.shape:
            names.append(name)
    state = {}
    if keep:
        state["step"] = first_state["step"].detach().cpu().clone()
    for parameter_name, parameter in _trained_parameters(engine):
        for name in names:
            value = _gather_state(engine, parameter, name)
            if keep:
                key = _state_key(parameter_name, name)
                state[key] = _copy(value)
    return state


def gather_average(engine: "DeepSpeedEngine") -> Tensors:
    """Gathers the moving average of the trained weights by name, on the device.

    Called on all ranks, which all get it. Empty where there is none, or none yet.
    """
    flats = flat_parameters(engine)
    if not flats or AVERAGE not in base_optimizer(engine).state[flats[0]]:
        return {}
    _link_state(engine)
    average = {}
    for name, parameter in _trained_parameters(engine):
        average[name] = _gather_state(engine, parameter, AVERAGE)
    return average


def drop_average(engine: "DeepSpeedEngine") -> None:
    """Forgets the moving average that a checkpoint had, where a run goes on without one."""
    for state in base_optimizer(engine).state.values():
        state.pop(AVERAGE, None)


def put_average(dense: Tensors, optimizer: Tensors) -> None:
    """Makes the average the model that a checkpoint holds, and the weights a part of the state.

    Both are changed where there is an average. So whoever reads the dense model has the average,
    and who resumes has the weights. `take_average` is the inverse.

    Example: one weight, without its other states:

        dense        {"gate.weight": w}             {"gate.weight": average}
        optimizer    {"gate.weight//ema": average}  {"gate.weight//trained": w}
    """
    for key in list(optimizer):
        name, _, state = key.rpartition(_SEPARATOR)
        if state == AVERAGE:
            average = optimizer.pop(key)
            optimizer[_state_key(name, _TRAINED)] = dense[name]
            dense[name] = average


def take_average(dense: Tensors, optimizer: Tensors) -> None:
    """Undoes `put_average`: the weights go back to the model, their average to the state.

    Raises KeyError where the model lacks a weight.
    """
    for key in list(optimizer):
        name, _, state = key.rpartition(_SEPARATOR)
        if state == _TRAINED:
            weight = optimizer.pop(key)
            optimizer[_state_key(name, AVERAGE)] = dense[name]
            dense[name] = weight


def _gather_state(
    engine: "DeepSpeedEngine", parameter: torch.nn.Parameter, name: str
) -> torch.Tensor:
    """Gathers one of a parameter's states. Called on all ranks."""
    if engine.zero_optimization_stage() == 0:
        return base_optimizer(engine).state[parameter][name]
    return deepspeed.utils.safe_get_full_optimizer_state(parameter, name)


def _state_key(parameter_name: str, name: str) -> str:
    """Names a parameter's state in a checkpoint."""
    return f"{parameter_name}{_SEPARATOR}{name}"


def restore_optimizer_state(engine: "DeepSpeedEngine", state: Tensors) -> None:
    """Fills a new engine's optimizer with what `gather_optimizer_state` gave. Called on all ranks.

    Stage and number of ranks may be others. Raises ValueError for another shape, KeyError for a
    parameter that the state lacks.
    """
    if not state:
        return
    names = _state_names(state)
    _make_state(engine, state["step"], names)
    _link_state(engine)
    for parameter_name, parameter in _trained_parameters(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for name in names:
            key = _state_key(parameter_name, name)
            value = state[key].to(engine.device)
            if value.shape != shape:
                raise ValueError(
                    f"the optimizer's {name} of {parameter_name} is {list(value.shape)}, "
                    f"not {list(shape)}"
                )
            _set_state(engine, parameter, name, value)


def _state_names(state: Tensors) -> list[str]:
    """Lists the names of a parameter's states, of Adam exp_avg and exp_avg_sq."""
    names = set()
    for key in state:
        _, separator, name = key.rpartition(_SEPARATOR)
        if separator:
            names.add(name)
    return sorted(names)


def _make_state(
    engine: "DeepSpeedEngine", step: torch.Tensor, names: list[str]
) -> None:
    """Makes the optimizer's state, which Adam itself makes in its first step only."""
    optimizer = base_optimizer(engine)
    defaults = optimizer.defaults
    counts_on_device = defaults.get("fused") or defaults.get("capturable")
    for flat in flat_parameters(engine):
        # Each has a copy: the kernel counts in it.
        flat_step = step.clone()
        if counts_on_device:
            flat_step = step.to(flat.device, copy=True)
        flat_state = {"step": flat_step}
        for name in names:
            flat_state[name] = torch.zeros_like(flat)
        optimizer.state[flat] = flat_state


def _set_state(
    engine: "DeepSpeedEngine",
    parameter: torch.nn.Parameter,
    name: str,
    value: torch.Tensor,
) -> None:
    """Sets one parameter's state from the whole of it."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        base_optimizer(engine).state[parameter][name].copy_(value)
    elif stage < 3:
        deepspeed.utils.safe_set_full_optimizer_state(parameter, value, name)
    else:
        partition: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]  # ZeRO 3 adds it
        part = _take_partition(value, partition.numel())
        deepspeed.utils.safe_set_local_optimizer_state(parameter, part, name)


def _link_state(engine: "DeepSpeedEngine") -> None:
    """Has ZeRO 1 or 2 know which parts of the optimizer's state belong to which parameter.

    DeepSpeed does so itself after it has stepped the first of several groups (stage_1_and_2.py,
    `_optimizer_step`), when the others have no state yet, and never again.
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer = engine.optimizer
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _take_partition(value: torch.Tensor, length: int) -> torch.Tensor:
    """Takes this rank's part of a parameter that stage 3 has partitioned.

    Parts have equal lengths; the last one is filled up with zeros.
    """
    first = dist.get_rank() * length
    last = first + length
    part = value.flatten()[first:last]
    missing = length - len(part)
    return torch.nn.functional.pad(part, (0, missing))


def _trained_parameters(
    engine: "DeepSpeedEngine",
) -> list[tuple[str, torch.nn.Parameter]]:
    """Lists the names and parameters that the optimizer steps."""
    parameters = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            parameters.append((name, parameter))
    return parameters


def base_optimizer(engine: "DeepSpeedEngine") -> torch.optim.Optimizer:
    """Returns PyTorch's optimizer, which ZeRO wraps."""
    if engine.zero_optimization_stage() == 0:
        return engine.optimizer
    return engine.optimizer.optimizer


def flat_parameters(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """Lists what PyTorch's optimizer steps on this rank: the parameters, or ZeRO's flat pieces."""
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage == 0:
        return [parameter for _, parameter in _trained_parameters(engine)]
    if stage < 3:
        return optimizer.single_partition_of_fp32_groups
    return optimizer.fp32_partitioned_groups_flat


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copies a tensor to the CPU, in float32; one in float64 stays so."""
    if tensor.dtype != torch.float64:
        tensor = tensor.float()
    return tensor.detach().cpu().clone()
