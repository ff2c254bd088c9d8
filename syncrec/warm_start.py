"""A model's weights for one that knows other domains, and another span of time.

Shapes: D domains, K knots, r width.
"""

import re

import torch

_OWN = re.compile(
    r"(single_gates|single_towers)\.(\d+)\.(.+)"
)  # what each domain has of its own
_BY_DOMAIN = {
    "correction.lambda_D": 0,
    "prediction.gap_2D": 1,
}  # buffers, and their axis of domains
_KNOTS = "clock.knots_2KR"


def grown_state(state, old_of_D, spans, knots):
    """The state_dict of a SyNCRec whose domain d was domain old_of_D[d] of the model that `state` is of, −1: it is new.

    A new domain's gate and tower begin as the mean of the others', its λ and its gap as never seen. spans: (first, last) time
    of the datasets of both, the old one's first; the clock's vectors stay where they were in time, and what lies beyond the old
    span begins as its end. knots: how many the new model has.
    """
    found, own = {}, {}
    for name, value in state.items():
        if match := _OWN.fullmatch(name):
            own.setdefault((match[1], match[3]), {})[int(match[2])] = value
        elif name in _BY_DOMAIN:
            found[name] = _by_domain(value, old_of_D, _BY_DOMAIN[name])
        else:
            found[name] = _moved(value, *spans, knots) if name == _KNOTS else value
    for (part, rest), by_domain in own.items():
        mean = torch.stack(list(by_domain.values())).mean(0)
        for domain, old in enumerate(old_of_D):
            found[f"{part}.{domain}.{rest}"] = (
                by_domain[old].clone() if old >= 0 else mean.clone()
            )
    return found


def _by_domain(value, old_of_D, axis):
    with_none = torch.cat([value, torch.zeros_like(value.narrow(axis, 0, 1))], dim=axis)
    return with_none.index_select(
        axis, torch.tensor([old if old >= 0 else value.shape[axis] for old in old_of_D])
    )


def _moved(knots_2KR, old_span, new_span, knots):
    """The functions of time at new knots."""
    times = torch.linspace(*new_span, knots, dtype=torch.float64)
    length = max(old_span[1] - old_span[0], torch.finfo(torch.float64).tiny)
    place = ((times - old_span[0]) / length).clamp(0, 1) * (knots_2KR.shape[1] - 1)
    low = place.long().clamp(max=knots_2KR.shape[1] - 2)
    share = (place - low).to(knots_2KR.dtype).unsqueeze(1)
    return torch.lerp(knots_2KR[:, low], knots_2KR[:, low + 1], share)
