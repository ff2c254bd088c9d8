"""Harm: a negative transfer gap φ, averaged over batches, that is below 0 beyond its noise.

One number a domain, 0 where the other domains do not harm it. What corrects follows from it: λ
(`loss_correction: harm`) and how much of the gradient passes between the tasks' experts
(`stop_gradient: harm`). Where no domain is harmed they leave the model alone: it is an MMoE of
both tasks.

Beyond the paper, whose λ (section 4.3, eq. 11) also takes from a domain that gains less than
others, and whose stop-gradient holds everywhere. Shapes: D domains, M tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from syncrec.config import ModelConfig

_DECAY = 0.99  # of the means, from batch to batch
_STANDARD_ERRORS = 3.0  # a mean gap less far below 0 is noise
_LEAST_BATCHES = 10.0  # before which nothing is known of the noise
_FLOOR = 0.1  # the least λ, so that the gap goes on being measured


class GapAverage(nn.Module):
    """φ̄, the mean of φ over the last hundred batches or so, and its noise, by domain.

    Saved state, in float64. A domain that is absent from a batch keeps what it has.

    Attributes:
        sums_2D: sums of φ and of ones, weighed by age.
        noise_3D: of squared distances of φ from the mean before it, of ones, and of squared
            weights: the same weights, from the second batch on.
    """

    sums_2D: Tensor
    noise_3D: Tensor

    def __init__(self, config: ModelConfig, domains: int):
        super().__init__()
        self.config = config
        sums_2D = torch.zeros(2, domains, dtype=torch.float64)
        noise_3D = torch.zeros(3, domains, dtype=torch.float64)
        self.register_buffer("sums_2D", sums_2D)
        self.register_buffer("noise_3D", noise_3D)

    def observe(self, phi_D: Tensor, present_D: Tensor) -> None:
        """Takes in a batch's φ, equal on all ranks. present_D: bool, where the batch has one.

        Example: the first batch, which lacks the second domain:

            phi_D        tensor([0.5, 0.0])
            present_D    tensor([True, False])
            sums_2D      tensor([[0.005, 0.0], [0.01, 0.0]])
        """
        phi_D = phi_D.detach().to(self.sums_2D.dtype)
        ones_D = torch.ones_like(phi_D)
        new = 1 - _DECAY
        squared_D = (phi_D - self.mean_D) ** 2
        noise_3D = torch.stack(
            [
                _DECAY * self.noise_3D[0] + new * squared_D,
                _DECAY * self.noise_3D[1] + new * ones_D,
                _DECAY**2 * self.noise_3D[2] + new**2 * ones_D,
            ]
        )
        has_mean_D = present_D & (self.sums_2D[1] > 0)
        self.noise_3D = torch.where(has_mean_D, noise_3D, self.noise_3D)
        seen_2D = torch.stack([phi_D, ones_D])
        sums_2D = _DECAY * self.sums_2D + new * seen_2D
        self.sums_2D = torch.where(present_D, sums_2D, self.sums_2D)

    @property
    def mean_D(self) -> Tensor:
        """φ̄; 0 where nothing was seen."""
        return self.sums_2D[0] / self.sums_2D[1].clamp(min=1e-30)

    @property
    def standard_error_D(self) -> Tensor:
        """How far φ̄ is off by chance; infinite before a domain was in ten batches.

        With weights w and deviations e it is √(Σ w e² / Σ w · Σ w² / (Σ w)²).
        """
        squared_D, weight_D, weight_squared_D = self.noise_3D
        known_weight_D = weight_D.clamp(min=1e-30)
        share_D = weight_squared_D / known_weight_D**2
        error_D = (squared_D / known_weight_D * share_D).sqrt()
        known_D = (weight_D > 0) & (share_D <= 1 / _LEAST_BATCHES)
        return error_D.masked_fill(~known_D, float("inf"))

    @property
    def harm_D(self) -> Tensor:
        """How far φ̄ is below 0 beyond three standard errors; 0 elsewhere.

        Example: the first domain gains, the second's gap is noise, the third is harmed:

            mean_D              tensor([0.20, -0.02, -0.40])
            standard_error_D    tensor([0.01, 0.01, 0.01])
            result              tensor([0.00, 0.00, 0.37])
        """
        beyond_D = self.mean_D + _STANDARD_ERRORS * self.standard_error_D
        return (-beyond_D).clamp(min=0)

    @property
    def unharmed_D(self) -> Tensor:
        """exp(−harm / `harm_temperature`): 1 where a domain is not harmed, towards 0 where it is."""
        return torch.exp(-self.harm_D / self.config.harm_temperature)

    @property
    def lambda_D(self) -> Tensor:
        """λ: 1 where a domain is not harmed, towards 0.1 where it is."""
        return _FLOOR + (1 - _FLOOR) * self.unharmed_D

    @property
    def single_weight_D(self) -> Tensor:
        """The weight of Y^single in a domain's prediction; a half before anything was seen.

        It is σ(−φ̄ / τ): nearly all where other domains harm it.

        Example: τ = 0.3. Others help the first domain, harm the second, the third is unseen:

            mean_D    tensor([0.3, -0.3, 0.0])
            result    tensor([0.2689, 0.7311, 0.5000])
        """
        return torch.sigmoid(-self.mean_D / self.config.prediction_temperature)


def scale_gradient(output_KMR: Tensor, gate_M: Tensor) -> Tensor:
    """The same tensor, whose gradient is multiplied by a gate at each token, (K, M, r).

    gate_M: 1 passes the gradient, 0 stops it (SG of eq. 2 and 4).
    """
    return _ScaledGradient.apply(output_KMR, gate_M)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_KMR: Tensor, gate_M: Tensor) -> Tensor:
        ctx.save_for_backward(gate_M)
        return output_KMR.view_as(output_KMR)

    @staticmethod
    def backward(ctx: Any, gradient_KMR: Tensor) -> tuple[Tensor, None]:
        (gate_M,) = ctx.saved_tensors
        gate_M1 = gate_M.to(gradient_KMR.dtype).unsqueeze(1)
        return gradient_KMR * gate_M1, None
