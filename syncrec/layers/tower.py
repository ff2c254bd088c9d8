"""The tower of each task: from the mixed experts to the task's output (section 4.2.1).

Shapes: M packed tokens, r width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.config import ModelConfig
from syncrec.layers.dropout import add_dropped


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
