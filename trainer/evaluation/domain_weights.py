"""λ on the one scale on which it is shown: 1 where all domains weigh alike.

The loss multiplies by λ in another scale: λ adds up to 1, or to the number of domains, as
`model.correction_total` says. Logs, TensorBoard, reports and `look.json` have relative weights.
This module needs Python alone.
"""

import math
from collections.abc import Mapping

_ROUNDING = 1e-5  # that the mean of relative weights may be off


def relative_weights(
    weights: Mapping[str, float | None] | None,
) -> dict[str, float | None]:
    """Weights by domain, divided by their mean over the domains that have one above 0.

    A domain that was never seen has 0 and stays so; None and NaN stay too. Weights that are
    relative already come back to the bit, so records of any version may be given. So do weights of
    which the greatest is 1: those of `loss_correction: harm`, where 1 is a domain that is not
    harmed. Where it finds every domain harmed, the weights are relative to their mean.

        {"Books": 0.75, "Toys": 0.25}    {"Books": 1.5, "Toys": 0.5}
        {"Books": 1.5, "Toys": 0.5}      {"Books": 1.5, "Toys": 0.5}
        {"Books": 0.5, "Toys": 0.0}      {"Books": 1.0, "Toys": 0.0}
        {"Books": 1.0, "Toys": 0.4}      {"Books": 1.0, "Toys": 0.4}
    """
    given = dict(weights or {})
    seen = []
    for weight in given.values():
        if weight is not None and math.isfinite(weight) and weight > 0:
            seen.append(weight)
    if not seen:
        return given
    mean = sum(seen) / len(seen)
    if abs(mean - 1) <= _ROUNDING or max(seen) == 1:
        return given
    relative = {}
    for domain, weight in given.items():
        relative[domain] = None if weight is None else weight / mean
    return relative
