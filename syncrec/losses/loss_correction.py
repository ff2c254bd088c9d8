"""The negative transfer gap and the loss weights that follow from it (section 4.3: LC-NTG).

Shapes: D domains.
"""

import torch
from torch import nn

_KEPT = 0.99  # of the mean gap, from batch to batch
_LEAST = 1e-6  # λ of a domain that was seen; 0 is one that was not
_ROUNDING = 1e-5  # that λ in float32 may be off after many batches


def transfer_gap(single_sum_D, cross_sum_D, count_D):
    """φ_d = mean single-domain loss − mean cross-domain loss of d over the same targets (Def. 2, eq. 10).

    Sums and counts are those of the global batch. Negative where the other domains harm d; 0 where d is absent.
    """
    return (single_sum_D - cross_sum_D) / count_D.clamp(min=1)


class PredictionMix(nn.Module):
    """How much of a domain's prediction is its single-domain task's: σ(−φ̄_d / τ), where φ̄ is the mean of φ over the last
    hundred batches or so. Half where neither view predicts the domain better, nearly all where other domains harm it.

    Not in the paper, which predicts by the cross-domain task whatever the gap is.
    """

    def __init__(self, config, domains):
        super().__init__()
        self.temperature = config.prediction_temperature
        self.register_buffer(
            "gap_2D", torch.zeros(2, domains)
        )  # sums of φ and of ones, both weighed by age

    def observe(self, phi_D, present_D):
        """A batch's φ, equal on all ranks."""
        seen_2D = torch.stack([phi_D, torch.ones_like(phi_D)]).to(self.gap_2D.dtype)
        self.gap_2D = torch.where(
            present_D, _KEPT * self.gap_2D + (1 - _KEPT) * seen_2D, self.gap_2D
        )

    @property
    def own_D(self):
        """The weight of Y^single by domain; a half before anything was seen."""
        sum_D, weight_D = self.gap_2D
        return torch.sigmoid(-sum_D / (weight_D.clamp(min=1e-30) * self.temperature))


class LossCorrection(nn.Module):
    """λ ← softmax((α λ + β φ) / δ) over the domains of the batch (eq. 11), and λ as saved state.

    A domain that is absent from the batch keeps its λ. 1 / D of the whole is kept for each domain that was never seen. The
    present domains share what is left of 1 in proportion to the softmax, each of them at least 1e-6 (1 / D where that is
    less). So, before `total` multiplies it:

    - Every λ lies within [0, 1], and 0 is a domain that was never seen.
    - The domains that were seen have (number seen) / D together: 1 once all were.
    - Where absent domains hold nearly everything, the present ones share the little that is theirs, n · 1e-6 at least.

    The old λ and φ carry no gradient; α and β (start 1 and 1) do. All is computed in float64. λ starts at 0.
    """

    def __init__(self, config, domains):
        super().__init__()
        self.temperature = config.correction_temperature
        self.total = domains if config.correction_total == "domains" else 1
        self.alpha = nn.Parameter(torch.ones(1), requires_grad=config.learn_scales)
        self.beta = nn.Parameter(torch.ones(1), requires_grad=config.learn_scales)
        self.register_buffer("lambda_D", torch.zeros(domains))

    def forward(self, phi_D, present_D):
        """The loss weights of the domains (D,), with gradients towards α and β: the new λ, which becomes the state where the
        module trains, times `total`.

        phi_D: φ of the global batch; present_D: bool. Both equal on all ranks, so λ is too.
        """
        old_D = self.lambda_D.detach()
        logits_D = (
            self.alpha.double() * old_D.double()
            + self.beta.double() * phi_D.detach().double()
        ) / self.temperature
        kept_D = torch.where(old_D > 0, old_D.double(), 1 / len(old_D))
        share = 1 - kept_D.masked_fill(present_D, 0).sum()
        new_D = _shared_out(share, logits_D, present_D).to(old_D.dtype)
        lambda_D = torch.where(present_D, new_D, old_D)
        if self.training:
            self.lambda_D = lambda_D.detach().clone()
        return self.total * lambda_D

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Evens out a state that does not add up: one saved by an earlier version, or of other domains."""
        name = f"{prefix}lambda_D"
        if name in state_dict:
            state_dict[name] = _evened_out(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _evened_out(lambda_D):
    """λ that add up to (number seen) / D, each at least the floor; as they are, to the bit, where they do.

    Otherwise they keep their proportions as far as the floor lets them. Whose λ is 0 was never seen.
    """
    domains = len(lambda_D)
    seen_D = lambda_D != 0
    seen = int(seen_D.sum())
    whole = seen / domains
    least = _floor(domains)
    old_D = lambda_D.double()
    if (
        abs(old_D.sum().item() - whole) <= _ROUNDING
        and (old_D[seen_D] >= least * (1 - _ROUNDING)).all()
    ):
        return lambda_D
    above_D = old_D.clamp(min=least).masked_fill(~seen_D, 0)
    free = whole - seen * least
    return (
        (least + free * above_D / above_D.sum())
        .masked_fill(~seen_D, 0)
        .to(lambda_D.dtype)
    )


def _shared_out(share, logits_D, present_D):
    """`share` of 1 among the present domains, by the softmax of their logits and at least the floor each; (D,), float64.

    Who would get less than the floor gets the floor; the others share the rest by the softmax over themselves.
    """
    count = present_D.sum(
        dtype=torch.float64
    )  # of integers times the floor PyTorch would make float32
    floor = _floor(len(logits_D))
    share = share.maximum(count * floor)
    by_rank = torch.arange(len(logits_D), device=logits_D.device)  # the most first
    with torch.no_grad():
        softmax_D = torch.softmax(
            logits_D.masked_fill(~present_D, float("-inf")), dim=0
        )
        falling_D, order_D = softmax_D.sort(descending=True, stable=True)
        # What the least of the first n would get if these alone were above the floor, for every n.
        rest_D = share - (count - 1 - by_rank) * floor
        # Not by cumsum, which has no deterministic way on CUDA: row d has the weights up to the d-th.
        sums_D = falling_D.expand(len(falling_D), -1).tril().sum(1)
        above_D = (rest_D * falling_D / sums_D >= floor) & (by_rank < count)
        rank_D = torch.empty_like(order_D).scatter_(0, order_D, by_rank)
        above = above_D.sum(dtype=torch.float64).maximum(count.clamp(max=1))
        free_D = present_D & (rank_D < above)
    weights_D = torch.softmax(logits_D.masked_fill(~free_D, float("-inf")), dim=0)
    # With no domain present the softmax is 0 / 0, and the caller takes nothing of it.
    return torch.where(
        free_D, (share - (count - above) * floor) * weights_D.nan_to_num(), floor
    )


def _floor(domains):
    return min(_LEAST, 1 / domains)
