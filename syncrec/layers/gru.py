"""A stack of recurrent experts, each a GRU over the packed sequences: the encoder of GRU4Rec in a Transformer expert's place.

Shapes: K experts of this stack, M packed tokens, P padded slots, r width.
"""

import torch
from torch import nn

from syncrec.layers.attention import pad, unpad
from syncrec.layers.dropout import drop


class RecurrentStack(nn.Module):
    """K experts side by side, each a GRU of `blocks` layers and width r (Hidasi et al., "Session-based Recommendations with
    Recurrent Neural Networks", ICLR 2016), with dropout after every layer and a state that starts at zero.

    A GRU is causal by nature: the slots behind a sequence's end change nothing before it.
    """

    def __init__(self, config, experts):
        super().__init__()
        self.dropout = config.dropout
        # PyTorch's own dropout is between layers; where there is one layer it warns.
        layers = {
            "num_layers": config.blocks,
            "dropout": config.dropout if config.blocks > 1 else 0.0,
            "batch_first": True,
        }
        self.experts = nn.ModuleList(
            nn.GRU(config.dim, config.dim, **layers) for _ in range(experts)
        )

    def forward(self, x_MR, layout):
        """x_MR: (M, r) → (K, M, r), one output an expert."""
        slots_PR = pad(x_MR.unsqueeze(0), layout)[0]
        buckets = slots_PR.split(
            [sequences * length for sequences, length in layout.shapes]
        )
        buckets = [
            bucket.view(*shape, -1)
            for bucket, shape in zip(buckets, layout.shapes, strict=True)
        ]
        outputs = [
            torch.cat([gru(bucket)[0].flatten(0, 1) for bucket in buckets])
            for gru in self.experts
        ]
        return drop(unpad(torch.stack(outputs), layout), self.dropout, self.training)
