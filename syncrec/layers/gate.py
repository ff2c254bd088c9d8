"""The gate of each task: how much of every expert goes into its output (section 4.2.1).

Shapes: M packed tokens, S sequences, K experts, T longest sequence, r width.
"""

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.batch.views import View
from syncrec.config import ModelConfig
from syncrec.layers.grouped_linear import grouped_linear


class Gate(nn.Module):
    """A distribution over the K experts (g of section 4.2.1, eq. 3).

    `token` takes it from e_t alone, so it is causal. `sequence` is eq. 3 literally: one
    distribution a sequence from all its positions, the target of an inner position among them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.literal = config.gate == "sequence"
        positions = config.max_length if self.literal else 1
        self.weight = nn.Parameter(
            torch.empty(positions, config.experts, config.dim)
        )
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, x_MR: Tensor, view: View, tokens: slice) -> Tensor:
        """The experts' weights (M, K). x_MR: inputs of the view's tokens in the slice `tokens`.

        Example: two tokens, K = 3:

            x_MR      (2, r)
            result    tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
        """
        if self.literal:
            return self._weigh_sequences(x_MR, view, tokens)
        # In fp32 also under autocast: its product has K columns, and casts of (M, r) would take
        # longer than they save.
        with torch.autocast(x_MR.device.type, enabled=False):
            scores_MK = F.linear(x_MR, self.weight[0])
            return torch.softmax(scores_MK, dim=-1)

    def _weigh_sequences(
        self,
        x_MR: Tensor,
        view: View,
        tokens: slice,
    ) -> Tensor:
        """Eq. 3 literally: each sequence's weights, for all of its tokens, (M, K)."""
        sequence_M = view.sequence_M[tokens]
        by_position_MKR = self.weight.index_select(0, view.position_M[tokens])
        scores_MK = torch.einsum("mr,mkr->mk", x_MR, by_position_MKR)
        none_SK = scores_MK.new_zeros(view.sequences, scores_MK.shape[1])
        scores_SK = none_SK.index_add(0, sequence_M, scores_MK)
        return torch.softmax(scores_SK, dim=-1).index_select(0, sequence_M)


class OnlyExpert(nn.Module):
    """The gate of one expert (section 4.2.1), whose weight is 1: nothing is learned or computed."""

    def __init__(self, config: ModelConfig):
        super().__init__()

    def forward(self, x_MR: Tensor, view: View, tokens: slice) -> Tensor:
        """Ones, (M, 1); arguments as for `Gate`."""
        return x_MR.new_ones(1, 1).expand(len(x_MR), 1)


class GateGroup(nn.ModuleList):
    """The gates of the single-domain tasks, each for the tokens of its domain, at once."""

    def forward(self, x_MR: Tensor, view: View) -> Tensor:
        """The experts' weights (M, K). x_MR: inputs of the single-domain view's tokens.

        Example: two domains of two tokens and one, K = 2:

            view.task_starts    (0, 2, 3)
            result              tensor([[0.4, 0.6], [0.7, 0.3], [0.5, 0.5]])
        """
        first = self[0]
        if isinstance(first, OnlyExpert) or cast(Gate, first).literal:
            return self._weigh_by_domain(x_MR, view)
        with torch.autocast(x_MR.device.type, enabled=False):
            # (1, K, r) each, seen as (K, r).
            weights = [cast(Gate, gate).weight.flatten(0, 1) for gate in self]
            scores_MK = grouped_linear(x_MR, view.task_starts, weights)
            return torch.softmax(scores_MK, dim=-1)

    def _weigh_by_domain(self, x_MR: Tensor, view: View) -> Tensor:
        """Where each gate has more to do than one product."""
        weights = []
        tasks = [slice(*bounds) for bounds in pairwise(view.task_starts)]
        # split, not slices: the gradient of a slice is a whole tensor of zeros.
        inputs = x_MR.split([task.stop - task.start for task in tasks])
        for gate, task_MR, task in zip(self, inputs, tasks, strict=True):
            weights.append(gate(task_MR, view, task))
        return torch.cat(weights)
