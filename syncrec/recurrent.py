"""A stack of recurrent experts, in place of attention blocks: GRU4Rec's encoder (Hidasi et al., ICLR 2016).

Shapes: K experts of this stack, M packed tokens, r width.
"""

import torch
from torch import nn


class RecurrentStack(nn.Module):
    """K GRUs of `blocks` layers and width r, side by side over the same sequences."""

    def __init__(self, config, experts):
        super().__init__()
        self.experts, self.dropout = experts, config.dropout
        between = config.dropout if config.blocks > 1 else 0.0  # PyTorch warns of dropout behind the only layer
        self.layers = nn.ModuleList(
            nn.GRU(config.dim, config.dim, config.blocks, batch_first=True, dropout=between) for _ in range(experts)
        )

    def forward(self, x_MR, layout):
        """x_MR: (M, r) → (K, M, r), one output an expert; a token's sees itself and what is older."""
        # What fills a sequence up lies behind its end, where nothing that is read looks.
        padded = x_MR.index_select(0, layout.pad_P).split([rows * longest for rows, longest in layout.shapes])
        buckets = [part.view(*shape, -1) for part, shape in zip(padded, layout.shapes, strict=True)]
        outputs = []
        with torch.autocast(x_MR.device.type, enabled=False):  # PyTorch has no GRU in bf16 for every processor
            for gru in self.layers:
                by_bucket = [gru(bucket)[0].flatten(0, 1) for bucket in buckets]
                outputs.append(torch.cat([*by_bucket, x_MR[:0]]).index_select(0, layout.unpad_M))
        return torch.stack(outputs)
