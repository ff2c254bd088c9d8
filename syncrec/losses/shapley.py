"""λ by what each domain's items are worth to the cross-domain predictions: the re-weighting of CGRec, beside LC-NTG.

Park et al., "Cracking the Code of Negative Transfer: A Cooperative Game Theoretic Approach for Cross-Domain Sequential
Recommendation", CIKM 2023. docs/readings.md says what is ours in it.

Shapes: D domains, C = 2^D coalitions (coalition c holds the domains whose bits are set in c), N interactions, r width.
"""

import contextlib
import math
from itertools import pairwise

import torch
from torch import nn

MOST_DOMAINS = 6  # 64 forward passes a step


def shapley_values(value_C):
    """Σ_S |S|! (D − |S| − 1)! / D! (v(S ∪ d) − v(S)) over the coalitions S without d, of every player d.

    value_C: v(c), (2^D,). Returns (D,), whose sum is v(all) − v(none).
    """
    players = len(value_C).bit_length() - 1
    # Filled in, not copied from the host: a copy would wait for the device.
    weights = [
        1 / (players * math.comb(players - 1, others.bit_count()))
        for others in range(len(value_C) // 2)
    ]
    weight_S = torch.cat([value_C.new_full((1,), weight) for weight in weights])
    by_player = value_C.view((2,) * players)  # the last dimension is the first player's
    gains_DS = torch.stack(
        [
            by_player.diff(dim=players - 1 - player).flatten()
            for player in range(players)
        ]
    )
    return (gains_DS * weight_S).sum(1)


class ShapleyCorrection(nn.Module):
    """λ = softmax(Shapley value / δ) over the domains of the batch, and λ as saved state. Without gradient.

    The value of a coalition is the negated mean cross-domain loss of all targets of the global batch where the model is shown
    the items of the coalition's domains alone: a domain whose items help gets a greater λ than one whose items harm. A domain
    that is absent from the batch keeps its λ, which multiplies nothing; the present ones' sum to 1. λ starts at 0.

    Raises ValueError for more than 6 domains.
    """

    def __init__(self, config, domains):
        super().__init__()
        if domains > MOST_DOMAINS:
            raise ValueError(
                f"model.loss_correction is shapley: with {domains} domains it takes {2**domains} more forward passes a step, "
                f"and is for {MOST_DOMAINS} domains at most; use negative_transfer_gap or none"
            )
        self.temperature = config.correction_temperature
        self.total = domains if config.correction_total == "domains" else 1
        self.register_buffer("lambda_D", torch.zeros(domains))

    def forward(self, loss_C, present_D):
        """The loss weights (D,): the new λ, which becomes the state where the module trains, times `total`.

        loss_C: mean cross-domain loss of the global batch with each coalition's items, float64; present_D: bool. Both equal on
        all ranks, so λ is too.
        """
        logits_D = shapley_values(-loss_C) / self.temperature
        weights_D = torch.softmax(
            logits_D.masked_fill(~present_D, float("-inf")), dim=0
        )
        lambda_D = torch.where(
            present_D, weights_D.to(self.lambda_D.dtype), self.lambda_D
        )
        if self.training:
            self.lambda_D = lambda_D
        return self.total * lambda_D


@torch.no_grad()
def coalition_losses(model, batch, inputs_NR, loss_of):
    """loss_of(shown_NR) for every coalition, (C,): shown_NR are the inputs with those of other domains at zero, (N, r).

    The model is as in evaluation meanwhile: without dropout nothing is drawn, and λ does not depend on how users are spread
    over ranks. Positions, times and SOS belong to no domain.
    """
    bit_N = _domain_bits(batch, inputs_NR)
    with _as_in_evaluation(model):
        shown = (
            torch.where((bit_N & c).bool().unsqueeze(1), inputs_NR, 0.0)
            for c in range(2**model.domains)
        )
        return torch.stack([loss_of(shown_NR) for shown_NR in shown])


def _domain_bits(batch, inputs_NR):
    """2^domain of every interaction that is some token's input; of the others, 0. An input of the cross-domain view is among
    the newest of its own domain too, so the single-domain view has it."""
    input_M, starts = batch.single.input_M, batch.single.task_starts
    bit_M = torch.cat(
        [
            input_M.new_full((end - start,), 1 << d)
            for d, (start, end) in enumerate(pairwise(starts))
        ]
    )
    return input_M.new_zeros(1 + len(inputs_NR)).scatter_(0, input_M, bit_M)[
        1:
    ]  # the first is SOS


@contextlib.contextmanager
def _as_in_evaluation(model):
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
