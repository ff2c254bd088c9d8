"""λ by what each domain's items are worth to the cross-domain predictions: Shapley values.

The re-weighting of CGRec, beside LC-NTG: Park et al., "Cracking the Code of Negative Transfer: A
Cooperative Game Theoretic Approach for Cross-Domain Sequential Recommendation", CIKM 2023.
docs/paper_interpretation.md says what is ours in it.

Shapes: D domains, C = 2^D coalitions (coalition c holds the domains whose bits are set in c), N
interactions, M packed tokens, r width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from syncrec.batch.views import MicroBatch
from syncrec.config import ModelConfig

MOST_DOMAINS = 6  # 64 forward passes a step


def shapley_values(value_C: Tensor) -> Tensor:
    """Σ_S |S|! (D − |S| − 1)! / D! (v(S ∪ d) − v(S)) over the coalitions S without d, for every d.

    value_C: v(c), (2^D,). Returns (D,), whose sum is v(all) − v(none).

    Example: two domains; the coalitions are none, the first, the second, both:

        value_C    tensor([0.0, 1.0, 2.0, 4.0])
        result     tensor([1.5, 2.5])
    """
    players = len(value_C).bit_length() - 1
    # Filled in, not copied from the host: a copy would wait for the device.
    weights = []
    for coalition in range(len(value_C) // 2):
        weight = 1 / (players * math.comb(players - 1, coalition.bit_count()))
        weights.append(value_C.new_full((1,), weight))
    weight_S = torch.cat(weights)
    # The last dimension is the first player's.
    by_player = value_C.view((2,) * players)
    gains = []
    for player in range(players):
        gain = by_player.diff(dim=players - 1 - player)
        gains.append(gain.flatten())
    gains_DS = torch.stack(gains)
    return (gains_DS * weight_S).sum(1)


class ShapleyCorrection(nn.Module):
    """λ = softmax(Shapley value / δ) over the domains of the batch, in section 4.3's place.

    λ is saved state, and without gradient. The value of a coalition is the negated mean
    cross-domain loss of all targets of the global batch where the model is shown the items of the
    coalition's domains alone. So a domain whose items help gets a greater λ than one whose items
    harm. A domain that is absent from the batch keeps its λ, which multiplies nothing; the present
    ones' sum to 1. λ starts at 0.

    Raises ValueError for more than 6 domains.
    """

    lambda_D: Tensor

    def __init__(self, config: ModelConfig, domains: int):
        super().__init__()
        if domains > MOST_DOMAINS:
            raise ValueError(
                f"model.loss_correction is shapley: with {domains} domains it takes {2**domains} "
                f"more forward passes a step, and is for {MOST_DOMAINS} domains at most; use "
                "negative_transfer_gap or none"
            )
        self.temperature = config.correction_temperature
        self.total = domains if config.correction_total == "domains" else 1
        self.register_buffer("lambda_D", torch.zeros(domains))

    def forward(self, loss_C: Tensor, present_D: Tensor) -> Tensor:
        """The loss weights (D,): the new λ times `total`.

        The new λ becomes the state where the module trains.

        loss_C: mean cross-domain loss of the global batch with each coalition's items, float64.
        present_D: bool. Both are equal on all ranks, so λ is too.
        """
        logits_D = shapley_values(-loss_C) / self.temperature
        logits_D = logits_D.masked_fill(~present_D, float("-inf"))
        weights_D = torch.softmax(logits_D, dim=0).to(self.lambda_D.dtype)
        lambda_D = torch.where(present_D, weights_D, self.lambda_D)
        if self.training:
            self.lambda_D = lambda_D
        return self.total * lambda_D


@torch.no_grad()
def coalition_losses(
    model: nn.Module,
    micro_batch: MicroBatch,
    inputs_NR: Tensor,
    loss_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """loss_of(shown_NR) for every coalition, (C,).

    shown_NR are the inputs with those of other domains at zero, (N, r). The model is as in
    evaluation meanwhile: without dropout nothing is drawn, and λ does not depend on how users are
    spread over ranks. Positions, times and SOS belong to no domain.
    """
    bit_N = _list_domain_bits(micro_batch, inputs_NR)
    losses = []
    with _evaluation_mode(model):
        for coalition in range(2 ** cast(int, model.domains)):
            belongs_N1 = (bit_N & coalition).bool().unsqueeze(1)
            shown_NR = torch.where(belongs_N1, inputs_NR, 0.0)
            losses.append(loss_of(shown_NR))
        return torch.stack(losses)


def _list_domain_bits(micro_batch: MicroBatch, inputs_NR: Tensor) -> Tensor:
    """2^domain of every interaction that is some token's input; of the others, 0.

    An input of the cross-domain view is among the newest of its own domain too, so the
    single-domain view has it.
    """
    view = micro_batch.single
    bits = []
    for domain, (start, end) in enumerate(pairwise(view.task_starts)):
        bits.append(view.input_M.new_full((end - start,), 1 << domain))
    bit_of_input = view.input_M.new_zeros(1 + len(inputs_NR))
    bit_of_input.scatter_(0, view.input_M, torch.cat(bits))
    return bit_of_input[1:]  # the first is SOS


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
