"""The shared input layer: item vectors, SOS and positions become a token's input (section 4.1).

Shapes: N interactions, M packed tokens, T longest sequence, r width.
"""

import torch
from torch import Tensor, nn

from syncrec.batch.views import View
from syncrec.config import ModelConfig
from syncrec.layers.dropout import drop
from syncrec.layers.gate import Gate, OnlyExpert  # noqa: F401 — moved
from syncrec.layers.tower import Tower, init_linear  # noqa: F401 — moved


class InputEmbedding(nn.Module):
    """The inputs of tokens (section 4.1): item vectors, the learned SOS vector, and positions.

    The item vectors are handed in. Positions are counted back from the newest token. They are for
    attention alone: a recurrence knows the order by itself.

    Example: two domains, the four users of syncrec/batch/build.py's head, width r. rows_NR are the
    vectors of its seven interactions. The tokens of the cross-domain view become

        view.input_M       tensor([0, 1, 2, 3,   0,   0, 6])
        view.position_M    tensor([3, 2, 1, 0,   0,   1, 0])
        result (7, r)      start + positions[3], rows_NR[0] + positions[2], rows_NR[1] + …
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, config.dim))
        self.positions = None
        if config.encoder == "transformer":
            self.positions = nn.Parameter(
                torch.empty(config.max_length, config.dim)
            )
        self.dropout = config.dropout
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.init_std)

    def forward(self, view: View, rows_NR: Tensor) -> Tensor:
        """rows_NR: vectors of the batch's interactions. Returns the tokens' inputs (M, r)."""
        vectors = torch.cat([self.start, rows_NR]).index_select(0, view.input_M)
        if self.positions is not None:
            vectors = vectors + self.positions.index_select(0, view.position_M)
        return drop(vectors, self.dropout, self.training)
