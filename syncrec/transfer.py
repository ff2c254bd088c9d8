"""The negative transfer gap and the loss weights that follow from it (section 4.3: LC-NTG).

Shapes: D domains.
"""

import torch
from torch import nn

_KEPT = 0.99  # of the mean gap, from batch to batch


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
        self.register_buffer("gap_2D", torch.zeros(2, domains))  # sums of φ and of ones, both weighed by age

    def observe(self, phi_D, present_D):
        """A batch's φ, equal on all ranks."""
        seen_2D = torch.stack([phi_D, torch.ones_like(phi_D)]).to(self.gap_2D.dtype)
        self.gap_2D = torch.where(present_D, _KEPT * self.gap_2D + (1 - _KEPT) * seen_2D, self.gap_2D)

    @property
    def own_D(self):
        """The weight of Y^single by domain; a half before anything was seen."""
        sum_D, weight_D = self.gap_2D
        return torch.sigmoid(-sum_D / (weight_D.clamp(min=1e-30) * self.temperature))


class LossCorrection(nn.Module):
    """λ ← softmax((α λ + β φ) / δ) over the domains of the batch (eq. 11), and λ as saved state.

    A domain that is absent from the batch keeps its λ; the present ones share what is left of 1, of which 1 / D is kept for
    each absent domain that was never seen. The old λ and φ carry no gradient; α and β (start 1 and 1) do. λ starts at 0.
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
        logits_D = (self.alpha * old_D + self.beta * phi_D.detach().to(old_D.dtype)) / self.temperature
        kept_D = torch.where(old_D > 0, old_D, 1 / len(old_D))  # 0: never seen
        free = 1 - kept_D.masked_fill(present_D, 0).sum()
        weights_D = torch.softmax(logits_D.masked_fill(~present_D, float("-inf")), dim=0)
        # With no domain present the softmax is 0 / 0: nothing was seen, nothing changes.
        lambda_D = torch.where(present_D, free * weights_D.nan_to_num(), old_D)
        if self.training:
            self.lambda_D = lambda_D.detach().clone()
        return self.total * lambda_D
