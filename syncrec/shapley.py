"""CGRec's loss weights: domains as players of a cooperative game (Park et al., "Cracking the Code of Negative Transfer: A
Cooperative Game Theoretic Approach for Cross-Domain Sequential Recommendation", CIKM 2023).

A coalition's worth is the negated mean cross-domain loss of the global batch where the model sees the coalition's items alone.
A domain's contribution is its Shapley value, and λ = softmax(contribution / δ): who contributes little, or harms, is held back.

Shapes: D domains, C = 2^D coalitions, N interactions of the batch.
"""

import math

import torch
from torch import nn

MOST_DOMAINS = 6


class ShapleyCorrection(nn.Module):
    """The domains' loss weights, and the newest λ as saved state. What a `LossCorrection` learns, α and β, it has not."""

    alpha = beta = None

    def __init__(self, config, domains):
        """Raises ValueError where there are too many domains for a forward pass of every coalition in every step."""
        super().__init__()
        if domains > MOST_DOMAINS:
            raise ValueError(
                f"model.loss_correction=shapley takes 2^D forward passes a step, {2**domains:,} with {domains} domains: it is "
                f"for at most {MOST_DOMAINS}"
            )
        self.temperature = config.correction_temperature
        self.total = domains if config.correction_total == "domains" else 1
        self.register_buffer("lambda_D", torch.zeros(domains))

    def forward(self, worth_C, present_D):
        """The loss weights (D,), without gradient. worth_C: as `coalitions` orders them; present_D: bool, domains with targets
        in the global batch, the others' weight is 0. Both equal on all ranks."""
        values_D = shapley_values(worth_C, len(present_D)).to(self.lambda_D.dtype)
        lambda_D = torch.softmax((values_D / self.temperature).masked_fill(~present_D, -torch.inf), dim=0).nan_to_num()
        if self.training:
            self.lambda_D = lambda_D.clone()
        return self.total * lambda_D


def coalitions(domains, device=None):
    """Whether each domain is in each coalition: bool (C, D). Coalition c has domain d where bit d of c is set."""
    return (torch.arange(2**domains, device=device).unsqueeze(1) >> torch.arange(domains, device=device)) & 1 > 0


def shapley_values(worth_C, domains):
    """Σ over coalitions S without d of |S|! (D − |S| − 1)! / D! · (worth(S + d) − worth(S)): (D,)."""
    member_CD = coalitions(domains, worth_C.device)
    size_C, number_C = member_CD.sum(1), torch.arange(len(worth_C), device=worth_C.device)
    weight_D = [math.factorial(s) * math.factorial(domains - s - 1) / math.factorial(domains) for s in range(domains)]
    weight_D = worth_C.new_tensor(weight_D)
    values = []
    for domain in range(domains):
        without = number_C[~member_CD[:, domain]]
        values.append((weight_D[size_C[without]] * (worth_C[without + 2**domain] - worth_C[without])).sum())
    return torch.stack(values)


def domain_of_inputs(batch, domains):
    """The domain of each interaction that is an input of any view: int64 (N,), 0 for one that is none."""
    view = batch.single
    starts_D = torch.tensor(view.task_starts, device=view.input_M.device)
    domain_M = torch.repeat_interleave(torch.arange(domains, device=starts_D.device), starts_D.diff())
    # SOS, the first input, is no interaction: it goes to a place before them.
    return domain_M.new_zeros(1 + batch.interactions).index_copy(0, view.input_M, domain_M)[1:]
