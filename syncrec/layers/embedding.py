"""The shared input layer, and what each task has of its own: a gate and a tower (section 4.1, 4.2.1).

Shapes: N interactions, M packed tokens, S sequences, K experts, T longest sequence, r width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from syncrec.layers.dropout import add_dropped, drop


def init_linear(weight):
    """Normal with variance 1 / fan-in where r goes in: outputs keep the inputs' scale. (…, in, out) or (out, in)."""
    nn.init.normal_(weight, std=weight.shape[-1 if weight.dim() == 2 else -2] ** -0.5)


class InputEmbedding(nn.Module):
    """Item vectors (handed in), the learned SOS vector, and positions counted back from the newest token; these are for
    attention, a recurrence knows the order by itself."""

    def __init__(self, config):
        super().__init__()
        self.start = nn.Parameter(torch.empty(1, config.dim))
        with_positions = config.encoder == "transformer"
        self.positions = (
            nn.Parameter(torch.empty(config.max_length, config.dim))
            if with_positions
            else None
        )
        self.dropout = config.dropout
        for weight in self.parameters():
            nn.init.normal_(weight, std=config.init_std)

    def forward(self, view, rows_NR):
        """rows_NR: vectors of the batch's interactions. Returns the tokens' inputs (M, r)."""
        vectors = torch.cat([self.start, rows_NR]).index_select(0, view.input_M)
        if self.positions is not None:
            vectors = vectors + self.positions.index_select(0, view.position_M)
        return drop(vectors, self.dropout, self.training)


class Gate(nn.Module):
    """Distribution over the K experts. `token`: from e_t alone, causal. `sequence`: eq. 3 literally, one distribution a
    sequence from all its positions (the target of an inner position among them)."""

    def __init__(self, config):
        super().__init__()
        self.literal = config.gate == "sequence"
        positions = config.max_length if self.literal else 1
        self.weight = nn.Parameter(torch.empty(positions, config.experts, config.dim))
        nn.init.normal_(self.weight, std=config.init_std)

    def forward(self, x_MR, view, tokens):
        """x_MR: inputs of the view's tokens in the slice `tokens`. Returns (M, K)."""
        if not self.literal:
            # In fp32 also under autocast: its product has K columns, and casts of (M, r) would take longer than they save.
            with torch.autocast(x_MR.device.type, enabled=False):
                return torch.softmax(F.linear(x_MR, self.weight[0]), dim=-1)
        sequence_M = view.sequence_M[tokens]
        by_position_MKR = self.weight.index_select(0, view.position_M[tokens])
        scores_MK = torch.einsum("mr,mkr->mk", x_MR, by_position_MKR)
        scores_SK = scores_MK.new_zeros(view.sequences, scores_MK.shape[1]).index_add(
            0, sequence_M, scores_MK
        )
        return torch.softmax(scores_SK, dim=-1).index_select(0, sequence_M)


class OnlyExpert(nn.Module):
    """The gate of one expert, whose weight is 1: nothing is learnt or computed."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x_MR, view, tokens):
        return x_MR.new_ones(1, 1).expand(len(x_MR), 1)


class Tower(nn.Module):
    """h of eq. 2 and 4: a feed-forward network with layer normalisation, around it a residual as in the experts."""

    def __init__(self, config):
        super().__init__()
        self.inner = nn.Linear(config.dim, config.ffn_dim)
        self.outer = nn.Linear(config.ffn_dim, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = config.dropout
        for layer in (self.inner, self.outer):
            init_linear(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x_MR):
        """(M, r) → (M, r)."""
        y_MR = self.outer(F.gelu(self.inner(x_MR)))
        return self.norm(add_dropped(x_MR, y_MR, self.dropout, self.training))
