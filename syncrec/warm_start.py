"""Warm start: a model's weights for one that knows other domains, and another span of time.

Shapes: D domains, K knots, r width.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# What each domain has for itself.
_OF_DOMAIN = re.compile(r"(single_gates|single_towers)\.(\d+)\.(.+)")
# Buffers with an axis of domains, and which axis that is.
_DOMAIN_AXES = {
    "correction.lambda_D": 0,
    "prediction.gap_2D": 1,  # of earlier versions
    "gap.sums_2D": 1,
    "gap.noise_3D": 1,
    "gap_of_mean.sums_2D": 1,
    "gap_of_mean.noise_3D": 1,
}
_KNOTS = "clock.knots_2KR"

Span = tuple[float, float]  # first and last time of a dataset


def grow_state(
    state: Mapping[str, Tensor],
    old_of_D: Sequence[int],
    spans: tuple[Span, Span],
    knots: int,
) -> dict[str, Tensor]:
    """The state_dict of a SyNCRec whose domain d was domain old_of_D[d] of another model.

    A new domain's gate and tower begin as the mean of the others', its λ and its gap as never seen.
    The clock's vectors stay where they were in time, and what lies beyond the old span begins as its
    end.

    Args:
        state: the other model's state_dict.
        old_of_D: −1: the domain is new.
        spans: of the datasets of both, the old one's first.
        knots: how many the new model has.

    Example: old_of_D [1, −1, 0] takes single_gates.1 as single_gates.0, the mean of both as
    single_gates.1, and single_gates.0 as single_gates.2.
    """
    grown = {}
    by_name: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, value in state.items():
        match = _OF_DOMAIN.fullmatch(name)
        if match:
            module, domain, rest = match.groups()
            by_domain = by_name.setdefault((module, rest), {})
            by_domain[int(domain)] = value
        elif name in _DOMAIN_AXES:
            axis = _DOMAIN_AXES[name]
            grown[name] = _select_domains(value, old_of_D, axis)
        elif name == _KNOTS:
            grown[name] = _interpolate_knots(value, *spans, knots)
        else:
            grown[name] = value
    for (module, rest), by_domain in by_name.items():
        values = list(by_domain.values())
        mean = torch.stack(values).mean(0)
        for domain, old in enumerate(old_of_D):
            value = mean
            if old >= 0:
                value = by_domain[old]
            grown[f"{module}.{domain}.{rest}"] = value.clone()
    return grown


def _select_domains(
    value: Tensor,
    old_of_D: Sequence[int],
    axis: int,
) -> Tensor:
    """A buffer by the new domains; 0 for those that are new.

    Example: axis 0:

        value       tensor([0.7, 0.3])
        old_of_D    [1, -1, 0]
        result      tensor([0.3, 0.0, 0.7])
    """
    domains = value.shape[axis]
    zero = torch.zeros_like(value.narrow(axis, 0, 1))
    with_zero = torch.cat([value, zero], dim=axis)
    index = []
    for old in old_of_D:
        if old < 0:
            old = domains
        index.append(old)
    return with_zero.index_select(axis, torch.tensor(index))


def _interpolate_knots(
    knots_2KR: Tensor,
    old_span: Span,
    new_span: Span,
    knots: int,
) -> Tensor:
    """The functions of time at new knots.

    Example: three knots over the old span, five over one that is twice as long, r = 1:

        old_span     (0, 10)
        new_span     (0, 20)
        knots_2KR    tensor([[a, b, c], …])
        result       tensor([[a, b, c, c, c], …])
    """
    times = torch.linspace(*new_span, knots, dtype=torch.float64)
    least = torch.finfo(torch.float64).tiny
    length = max(old_span[1] - old_span[0], least)
    last = knots_2KR.shape[1] - 1
    elapsed = (times - old_span[0]) / length
    along = elapsed.clamp(0, 1) * last
    low = along.long().clamp(max=max(0, last - 1))
    high = (low + 1).clamp(max=last)
    share = (along - low).to(knots_2KR.dtype).unsqueeze(1)
    low_2KR = knots_2KR[:, low]
    high_2KR = knots_2KR[:, high]
    return torch.lerp(low_2KR, high_2KR, share)
