"""The tower of each task: from the mixed experts to the task's output (section 4.2.1).

Shapes: M packed tokens, r width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.config import ModelConfig
from syncrec.layers.dropout import add_dropped
from syncrec.layers.grouped_linear import grouped_linear


def init_linear(weight: Tensor) -> None:
    """Draws a weight with variance 1 / fan-in where r goes in: outputs keep the inputs' scale.

    weight: (…, in, out) of stacked experts, or (out, in) of `nn.Linear`.
    """
    fan_axis = -2
    if weight.dim() == 2:
        fan_axis = -1
    fan_in = weight.shape[fan_axis]
    nn.init.normal_(weight, std=fan_in**-0.5)


class Tower(nn.Module):
    """h of eq. 2 and 4 (section 4.2.1): a feed-forward network with layer normalisation.

    Around it goes a residual, as in the experts.

    Example: M = 7 tokens, r = 128, ffn_dim 256:

        x_MR            (7, 128)
        inner(x_MR)     (7, 256)
        y_MR, result    (7, 128)
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inner = nn.Linear(config.dim, config.ffn_dim)
        self.outer = nn.Linear(config.ffn_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        for layer in (self.inner, self.outer):
            init_linear(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_MR: Tensor) -> Tensor:
        """(M, r) → (M, r)."""
        y_MR = self.outer(F.gelu(self.inner(x_MR)))
        return self.norm(add_dropped(x_MR, y_MR, self.dropout, self.training))


class TowerGroup(nn.ModuleList):
    """The towers of the single-domain tasks, each for the tokens of its domain, at once."""

    def forward(self, x_MR: Tensor, starts: Sequence[int]) -> Tensor:
        """(M, r) → (M, r). starts: where each domain's tokens begin, and M.

        Example: two domains of two tokens and one:

            starts    (0, 2, 3)
            result    the first tower's of x_MR[:2], then the second's of x_MR[2:]
        """
        if isinstance(self[0], nn.Identity):  # tower: off
            return x_MR
        towers = [cast(Tower, tower) for tower in self]
        inner_MH = _apply_layers(x_MR, starts, [each.inner for each in towers])
        y_MR = _apply_layers(
            F.gelu(inner_MH), starts, [each.outer for each in towers]
        )
        first = towers[0]
        sum_MR = add_dropped(x_MR, y_MR, first.dropout, first.training)
        # LayerNorm is in the weights' precision also under autocast: one cast, not one a domain.
        sum_MR = sum_MR.to(first.norm.weight.dtype)
        lengths = [end - begin for begin, end in pairwise(starts)]
        outputs = []
        for tower, domain_MR in zip(towers, sum_MR.split(lengths), strict=True):
            outputs.append(tower.norm(domain_MR))
        return torch.cat(outputs)


def _apply_layers(
    x_MI: Tensor, starts: Sequence[int], layers: Sequence[nn.Linear]
) -> Tensor:
    """Each group's rows through its own layer, in autocast's precision where that is on."""
    dtype = x_MI.dtype
    device = x_MI.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    weights = _cast_together([layer.weight for layer in layers], dtype)
    biases = _cast_together([layer.bias for layer in layers], dtype)
    return grouped_linear(x_MI.to(dtype), starts, weights, biases)


def _cast_together(
    tensors: Sequence[Tensor], dtype: torch.dtype
) -> Sequence[Tensor]:
    """Tensors of one shape in another precision, by one cast."""
    if tensors[0].dtype == dtype:
        return tensors
    return torch.stack(list(tensors)).to(dtype).unbind()
