"""A stack of recurrent experts, each a GRU over packed sequences: GRU4Rec's encoder.

It stands in a Transformer expert's place. Shapes: K experts of this stack, M packed tokens, P
padded slots, r width.
"""

import torch
from torch import Tensor, nn

from syncrec.batch.attention_layout import AttentionLayout
from syncrec.config import ModelConfig
from syncrec.layers.attention import pad, split_buckets, unpad
from syncrec.layers.dropout import drop


class BucketGRU(nn.GRU):
    """A GRU over all buckets of a batch in one call, with one result.

    ZeRO stage 3 gathers a module's weights once a call, and in backward once a result, on all ranks
    together. Ranks have different numbers of buckets, so a call or a result for each bucket would
    leave one rank waiting for the others.
    """

    def forward(self, buckets: list[Tensor]) -> Tensor:  # type: ignore[override]
        """Each (sequences, length, r) → (P, r), one after another."""
        states = []
        for bucket in buckets:
            output, _ = super().forward(bucket)
            states.append(output.flatten(0, 1))
        return torch.cat(states)


class RecurrentStack(nn.Module):
    """K experts side by side, each a GRU of `blocks` layers and width r, in section 4.2.2's place.

    Dropout follows every layer, and the state starts at zero (Hidasi et al., "Session-based
    Recommendations with Recurrent Neural Networks", ICLR 2016). A GRU is causal by nature: the
    slots behind a sequence's end change nothing before it.
    """

    def __init__(self, config: ModelConfig, experts: int):
        super().__init__()
        self.dropout = config.dropout
        # PyTorch's own dropout is between layers; where there is one layer it warns.
        between_layers = config.dropout if config.blocks > 1 else 0.0
        self.experts = nn.ModuleList()
        for _ in range(experts):
            expert = BucketGRU(
                config.dim,
                config.dim,
                num_layers=config.blocks,
                dropout=between_layers,
                batch_first=True,
            )
            self.experts.append(expert)

    def forward(self, x_MR: Tensor, layout: AttentionLayout) -> Tensor:
        """x_MR: (M, r) → (K, M, r), one output an expert.

        layout: its buckets are the GRUs' batches.
        """
        slots_PR = pad(x_MR.unsqueeze(0), layout)[0]
        buckets = []
        for bucket, shape in split_buckets(slots_PR, layout, dim=0):
            buckets.append(bucket.view(*shape, -1))
        outputs = []
        for gru in self.experts:
            outputs.append(gru(buckets))
        output_KMR = unpad(torch.stack(outputs), layout)
        return drop(output_KMR, self.dropout, self.training)
