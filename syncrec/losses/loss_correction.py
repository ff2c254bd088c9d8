"""LC-NTG: the negative transfer gap, and the loss weights that follow from it (section 4.3).

φ_d, the negative transfer gap, is how much lower the mean loss of domain d's targets is by the
cross-domain task than by the single-domain task; below 0 the other domains harm d. λ_d, the loss
correction weight, is what domain d's part of the cross-domain loss is multiplied by.

Shapes: D domains.
"""

from typing import Any

import torch
from torch import Tensor, nn

from syncrec.config import ModelConfig

_LEAST = 1e-6  # λ of a domain that was seen; 0 is one that was not
_ROUNDING = 1e-5  # that λ in float32 may be off after many batches


def transfer_gap(
    single_sum_D: Tensor,
    cross_sum_D: Tensor,
    count_D: Tensor,
) -> Tensor:
    """φ_d = mean single-domain loss − mean cross-domain loss of d (Def. 2, eq. 10), (D,).

    Both means are over the same targets, those that both views predict. Negative where the other
    domains harm d; 0 where d is absent.

    single_sum_D, cross_sum_D: sums of the losses over the global batch. count_D: of its targets.

    Example: three domains. The others help the first, harm the second, and the third is absent:

        single_sum_D    tensor([8.0, 2.0, 0.0])
        cross_sum_D     tensor([6.0, 3.0, 0.0])
        count_D         tensor([4, 2, 0])
        result          tensor([0.5, -0.5, 0.0])
    """
    return (single_sum_D - cross_sum_D) / count_D.clamp(min=1)


class LossCorrection(nn.Module):
    """λ ← softmax((α λ + β φ) / δ) over the domains of the batch (section 4.3, eq. 11).

    λ is saved state. A domain that is absent from the batch keeps its λ. 1 / D of the whole is
    reserved for each domain that was never seen. The present domains share what is left of 1 in
    proportion to the softmax, each of them at least 1e-6 (1 / D where that is less). So, before
    `total` multiplies it:

    - Every λ lies within [0, 1], and 0 is a domain that was never seen.
    - The domains that were seen have (number seen) / D together: 1 once all were.
    - Where absent domains hold nearly everything, the present ones share the little that is theirs,
      n · 1e-6 at least.

    The old λ and φ carry no gradient; α and β (start 1 and 1) do. All is computed in float64. λ
    starts at 0.
    """

    lambda_D: Tensor

    def __init__(self, config: ModelConfig, domains: int):
        super().__init__()
        self.temperature = config.correction_temperature
        self.total = domains if config.correction_total == "domains" else 1
        self.alpha = nn.Parameter(
            torch.ones(1), requires_grad=config.learn_scales
        )
        self.beta = nn.Parameter(
            torch.ones(1), requires_grad=config.learn_scales
        )
        self.register_buffer("lambda_D", torch.zeros(domains))

    def forward(self, phi_D: Tensor, present_D: Tensor) -> Tensor:
        """The loss weights of the domains (D,), with gradients towards α and β.

        They are the new λ times `total`; the new λ becomes the state where the module trains.

        phi_D: φ of the global batch. present_D: bool, which domains it has. Both are equal on all
        ranks, so λ is too.

        Example: the first batch of three domains, the third of which it lacks, δ = 1:

            phi_D        tensor([0.5, -0.5, 0.0])
            present_D    tensor([True, True, False])
            result       tensor([0.4874, 0.1793, 0.0000])
        """
        old_D = self.lambda_D.detach()
        weighed_lambda_D = self.alpha.double() * old_D.double()
        weighed_phi_D = self.beta.double() * phi_D.detach().double()
        logits_D = (weighed_lambda_D + weighed_phi_D) / self.temperature
        reserved_D = torch.where(old_D > 0, old_D.double(), 1 / len(old_D))
        absent_D = reserved_D.masked_fill(present_D, 0)
        share = 1 - absent_D.sum()
        new_D = _share_by_softmax(share, logits_D, present_D)
        new_D = new_D.to(old_D.dtype)
        lambda_D = torch.where(present_D, new_D, old_D)
        if self.training:
            self.lambda_D = lambda_D.detach().clone()
        return self.total * lambda_D

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Evens out a state that does not add up: of an earlier version, or of other domains."""
        name = f"{prefix}lambda_D"
        if name in state_dict:
            state_dict[name] = _even_out(state_dict[name])
        super()._load_from_state_dict(state_dict, prefix, *args)


def _even_out(lambda_D: Tensor) -> Tensor:
    """λ that add up to (number seen) / D, each at least the floor.

    Where they do so already they come back to the bit. Otherwise they keep their proportions as far
    as the floor lets them. A domain whose λ is 0 was never seen.

    Example: four domains, of which three were seen:

        lambda_D    tensor([0.5, 0.25, 0.25, 0.0])
        result      tensor([0.3750, 0.1875, 0.1875, 0.0000])
    """
    domains = len(lambda_D)
    seen_D = lambda_D != 0
    seen = int(seen_D.sum())
    whole = seen / domains
    floor = _floor(domains)
    old_D = lambda_D.double()
    total = old_D.sum().item()
    adds_up = abs(total - whole) <= _ROUNDING
    if adds_up and (old_D[seen_D] >= floor * (1 - _ROUNDING)).all():
        return lambda_D
    above_D = old_D.clamp(min=floor).masked_fill(~seen_D, 0)
    free = whole - seen * floor
    new_D = floor + free * above_D / above_D.sum()
    return new_D.masked_fill(~seen_D, 0).to(lambda_D.dtype)


def _share_by_softmax(
    share: Tensor,
    logits_D: Tensor,
    present_D: Tensor,
) -> Tensor:
    """`share` of 1 among the present domains, by the softmax of their logits; (D,), float64.

    Who would get less than the floor gets the floor; the others share the rest by the softmax over
    themselves.

    Example: the third domain is absent, the second hardly gets anything:

        share        tensor(0.75)
        logits_D     tensor([0.0, -50.0, 0.0, 0.0])
        present_D    tensor([True, True, False, True])
        result       tensor([0.3750, 1e-6, 1e-6, 0.3750]); the caller takes nothing of an absent one
    """
    # As float64: of integers times the floor PyTorch would make float32.
    count = present_D.sum(dtype=torch.float64)
    floor = _floor(len(logits_D))
    share = share.maximum(count * floor)
    position_D = torch.arange(len(logits_D), device=logits_D.device)
    with torch.no_grad():
        present_logits_D = logits_D.masked_fill(~present_D, float("-inf"))
        softmax_D = torch.softmax(present_logits_D, dim=0)
        falling_D, order_D = softmax_D.sort(descending=True, stable=True)
        # What the least of the first n would get if these alone were above the floor, for every n.
        rest_D = share - (count - 1 - position_D) * floor
        # Not by cumsum, which has no deterministic way on CUDA: row d has the weights up to the
        # d-th.
        sums_D = falling_D.expand(len(falling_D), -1).tril().sum(1)
        above_D = (rest_D * falling_D / sums_D >= floor) & (position_D < count)
        positions_D = torch.empty_like(order_D).scatter_(0, order_D, position_D)
        above = above_D.sum(dtype=torch.float64).maximum(count.clamp(max=1))
        free_D = present_D & (positions_D < above)
    free_logits_D = logits_D.masked_fill(~free_D, float("-inf"))
    weights_D = torch.softmax(free_logits_D, dim=0)
    # With no domain present the softmax is 0 / 0, and the caller takes nothing of it.
    shares_D = (share - (count - above) * floor) * weights_D.nan_to_num()
    return torch.where(free_D, shares_D, floor)


def _floor(domains: int) -> float:
    """The least λ of a domain that was seen."""
    return min(_LEAST, 1 / domains)
