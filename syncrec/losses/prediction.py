"""The next-item losses (section 4.3.1 and 4.3.2), one value a target.

All are positive and minimised. Shapes: L targets, n negatives, r width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NOWHERE = -1e30  # the score of what a target is not compared with


def prediction_loss(
    kind: str,
    positive_L: Tensor,
    negative_Ln: Tensor,
    allowed_Ln: Tensor | None,
    items: int | Tensor,
) -> Tensor:
    """The loss of each target (L,).

    Args:
        kind: `model.loss`: bpr_probability, bpr, bce or sampled_softmax.
        positive_L: scores y · M(x) of the targets.
        negative_Ln: scores of the negatives that each target is compared with.
        allowed_Ln: False where a shared negative is the target itself, or None.
        items: number of items in the domain, or of each target's domain, (L, 1).

    The negatives of `sampled_softmax` stand for all the others: their sum is scaled by
    (items − 1) / n, so that with all items as negatives it is the full softmax (Jean et al., 2015).

    Example: three targets of a domain with 10 items, and two negatives that they share. The third
    target is the second negative:

        positive_L     tensor([2.0, 0.5, 1.0])
        negative_Ln    tensor([[0.1, 1.0], [0.3, 0.2], [0.0, 1.0]])
        allowed_Ln     tensor([[True, True], [True, True], [True, False]])
        items          10
    """
    if kind == "sampled_softmax":
        return _sampled_softmax(positive_L, negative_Ln, allowed_Ln, items)
    if kind == "bce":
        return F.softplus(-positive_L) + _mean(
            F.softplus(negative_Ln), allowed_Ln
        )
    if kind == "bpr_probability":
        positive_L = torch.sigmoid(positive_L)
        negative_Ln = torch.sigmoid(negative_Ln)
    distance_Ln = negative_Ln - positive_L.unsqueeze(1)
    return _mean(F.softplus(distance_Ln), allowed_Ln)


def _sampled_softmax(
    positive_L: Tensor,
    negative_Ln: Tensor,
    allowed_Ln: Tensor | None,
    items: int | Tensor,
) -> Tensor:
    """log(e^p + s Σ e^n) − p, with the scale s; the scores are passed over as rarely as can be."""
    if isinstance(items, Tensor):
        items = items.flatten()
    others = torch.as_tensor(items - 1, dtype=negative_Ln.dtype).clamp(min=1)
    if allowed_Ln is None:
        scale = (others / negative_Ln.shape[1]).log()
    else:
        scale = (others / allowed_Ln.sum(1).clamp(min=1)).log()
        # Finite: where a target is compared with nothing, its gradient is 0, and not 0 · ∞.
        negative_Ln = torch.where(allowed_Ln, negative_Ln, _NOWHERE)
    among_L = torch.logsumexp(negative_Ln, dim=1) + scale
    return F.softplus(among_L - positive_L)


def _mean(values_Ln: Tensor, allowed_Ln: Tensor | None) -> Tensor:
    """The mean over the allowed negatives of each target, (L,)."""
    if allowed_Ln is None:
        return values_Ln.mean(1)
    return (values_Ln * allowed_Ln).sum(1) / allowed_Ln.sum(1).clamp(min=1)
