"""The next-item losses (section 4.3.1 and 4.3.2), one value a target.

All are positive and minimised. Shapes: L targets, n negatives, r width.
"""

import torch
import torch.nn.functional as F


def prediction_loss(kind, positive_L, negative_Ln, allowed_Ln, items):
    """The loss of each target.

    positive_L, negative_Ln: scores y · M(x). allowed_Ln: False where a shared negative is the target itself, or None.
    items: number of items in the domain, or of each target's domain, (L, 1). The negatives of `sampled_softmax` stand for all
    the others: their sum is scaled by (items − 1) / n, so that with all items as negatives it is the full softmax (Jean et al.,
    2015).
    """
    if kind == "sampled_softmax":
        others = torch.as_tensor(items - 1, dtype=negative_Ln.dtype).clamp(min=1)
        if allowed_Ln is None:
            scale = (others / negative_Ln.shape[1]).log()
        else:
            scale = (others / allowed_Ln.sum(1, keepdim=True).clamp(min=1)).log()
            negative_Ln = negative_Ln.masked_fill(~allowed_Ln, float("-inf"))
        every = torch.cat([positive_L.unsqueeze(1), negative_Ln + scale], dim=1)
        return torch.logsumexp(every, dim=1) - positive_L
    if kind == "bce":
        return F.softplus(-positive_L) + _mean(F.softplus(negative_Ln), allowed_Ln)
    if kind == "bpr_probability":
        positive_L, negative_Ln = torch.sigmoid(positive_L), torch.sigmoid(negative_Ln)
    return _mean(F.softplus(negative_Ln - positive_L.unsqueeze(1)), allowed_Ln)


def _mean(values_Ln, allowed_Ln):
    if allowed_Ln is None:
        return values_Ln.mean(1)
    return (values_Ln * allowed_Ln).sum(1) / allowed_Ln.sum(1).clamp(min=1)
