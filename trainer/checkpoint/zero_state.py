"""The dense model's weights and optimizer state, whole and in float32 on the CPU, whatever the ZeRO stage.

ZeRO's own checkpoints are pickles that only the same number of ranks and the same stage read. Weights come back before the
engine is built, which is the same at every stage; the optimizer's state after it.
"""

import torch
import torch.distributed as dist

from trainer.distributed.deepspeed_engine import deepspeed

_SEPARATOR = "//"  # between a parameter's name and its state's


def gradients(engine):
    """This rank's part of the dense gradient's tensors after backward, the mean over ranks, as they go into the step: all of it
    at stage 0, a partition at the others."""
    if engine.zero_optimization_stage() == 0:
        found = [parameter.grad for _, parameter in _trained(engine)]
    elif engine.zero_offload_optimizer():
        found = [flat.grad for flat in _flat_parameters(engine)]
    else:
        found = [
            gradient
            for group in engine.optimizer.averaged_gradients.values()
            for gradient in group
        ]
    return [gradient for gradient in found if gradient is not None]


def full_state(engine, keep: bool):
    """The dense model's parameters and buffers: {name: tensor}, empty unless `keep`. Called on all ranks."""
    state = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(
            parameter, enabled=hasattr(parameter, "ds_id")
        ):
            if keep:
                state[name] = _copy(parameter)
    if keep:
        state |= {name: _copy(buffer) for name, buffer in engine.module.named_buffers()}
    return state


def full_optimizer_state(engine, keep: bool):
    """{"parameter//exp_avg": tensor of the parameter's shape, …, "step": number of steps}, empty unless `keep`, and before the
    first step. Called on all ranks."""
    optimizer, flats = base_optimizer(engine), _flat_parameters(engine)
    if not flats or not optimizer.state.get(flats[0]):
        return {}
    _link_state(engine)
    names = [
        name
        for name, value in optimizer.state[flats[0]].items()
        if value.shape == flats[0].shape
    ]
    state = (
        {"step": optimizer.state[flats[0]]["step"].detach().cpu().clone()}
        if keep
        else {}
    )
    for parameter_name, parameter in _trained(engine):
        for name in names:
            if engine.zero_optimization_stage() == 0:
                value = optimizer.state[parameter][name]
            else:
                value = deepspeed.utils.safe_get_full_optimizer_state(parameter, name)
            if keep:
                state[f"{parameter_name}{_SEPARATOR}{name}"] = _copy(value)
    return state


def restore_optimizer_state(engine, state):
    """Gives a new engine what `full_optimizer_state` gave, at any stage and number of ranks. Called on all ranks."""
    if not state:
        return
    optimizer, stage = base_optimizer(engine), engine.zero_optimization_stage()
    step, names = (
        state["step"],
        sorted({key.rpartition(_SEPARATOR)[2] for key in state if _SEPARATOR in key}),
    )
    for flat in _flat_parameters(
        engine
    ):  # Adam makes its state in its first step; here it is needed before
        optimizer.state[flat] = {
            "step": step.clone(),
            **{name: torch.zeros_like(flat) for name in names},
        }
        if optimizer.defaults.get("fused") or optimizer.defaults.get("capturable"):
            optimizer.state[flat]["step"] = step.to(
                flat.device, copy=True
            )  # each its own: the kernel counts in it
    _link_state(engine)
    for parameter_name, parameter in _trained(engine):
        for name in names:
            value = state[f"{parameter_name}{_SEPARATOR}{name}"].to(engine.device)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if value.shape != shape:
                raise ValueError(
                    f"the optimizer's {name} of {parameter_name} is {list(value.shape)}, not {list(shape)}"
                )
            if stage == 0:
                optimizer.state[parameter][name].copy_(value)
            elif stage < 3:
                deepspeed.utils.safe_set_full_optimizer_state(parameter, value, name)
            else:
                deepspeed.utils.safe_set_local_optimizer_state(
                    parameter, _partition(value, parameter.ds_tensor.numel()), name
                )


def _link_state(engine):
    """Has ZeRO 1 or 2 know which parts of the optimizer's state belong to which parameter.

    DeepSpeed does so itself after it has stepped the first of several groups (stage_1_and_2.py, `_optimizer_step`), when the
    others have no state yet, and never again.
    """
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _partition(value, length):
    """This rank's part of a parameter that stage 3 has taken apart: equal lengths, the last filled up."""
    first = dist.get_rank() * length
    part = value.flatten()[first : first + length]
    return torch.nn.functional.pad(part, (0, length - len(part)))


def _trained(engine):
    return [
        (name, parameter)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]


def base_optimizer(engine):
    """PyTorch's optimizer, which ZeRO wraps."""
    return (
        engine.optimizer
        if engine.zero_optimization_stage() == 0
        else engine.optimizer.optimizer
    )


def _flat_parameters(engine):
    """What PyTorch's optimizer steps on this rank: the parameters, or ZeRO's flat pieces of them."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for _, parameter in _trained(engine)]
    return (
        engine.optimizer.single_partition_of_fp32_groups
        if stage < 3
        else engine.optimizer.fp32_partitioned_groups_flat
    )


def _copy(tensor):
    return tensor.detach().float().cpu().clone()
