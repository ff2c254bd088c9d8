"""A stack of Transformer experts that run side by side as one batched computation (section 4.2.2).

Shapes: K experts of this stack, M packed tokens, r width, h inner width of the feed-forward network.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.batch.attention_layout import AttentionLayout
from syncrec.config import ModelConfig
from syncrec.layers import fused_block
from syncrec.layers.attention import (
    GroupLayerNorm,
    causal_attention,
    group_layer_norm,
)
from syncrec.layers.dropout import add_dropped
from syncrec.layers.tower import init_linear


class ExpertStack(nn.Module):
    """K experts f_TRM of eq. 5 to 7 (section 4.2.2), each of `blocks` attention blocks.

    Residuals and LayerNorm are those of [28] in the paper.

    Example: K = 3 and the four users of AttentionLayout, with 3, 1, 0 and 2 tokens:

        x_MR      (6, r)
        result    (3, 6, r)
    """

    def __init__(self, config: ModelConfig, experts: int):
        super().__init__()
        self.experts = experts
        blocks = [Block(config, experts) for _ in range(config.blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.last_norm: nn.Module = nn.Identity()
        if config.norm == "pre":
            self.last_norm = GroupLayerNorm(experts, config.dim)

    def forward(self, x_MR: Tensor, layout: AttentionLayout) -> Tensor:
        """x_MR: (M, r) → (K, M, r), one output an expert."""
        x_KMR = x_MR.expand(self.experts, -1, -1)
        for block in self.blocks:
            x_KMR = block(x_KMR, layout)
        return self.last_norm(x_KMR)


class Block(nn.Module):
    """Multi-head self-attention (eq. 5, 6) and point-wise feed-forward network (eq. 7).

    Section 4.2.2. The weights of all K experts are stacked:

        qkv         (K, r, 3 r)    W^Q, W^K and W^V of eq. 5
        out         (K, r, r)      W^O of eq. 6
        w1, b1      (K, r, h), (K, 1, h)
        w2, b2      (K, h, r), (K, 1, r)
        attention_norm_scale, …_shift, ffn_norm_scale, …_shift     (K, 1, r)
    """

    def __init__(self, config: ModelConfig, experts: int):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.pre_norm = config.norm == "pre"
        self.kernel = config.kernel
        dim = config.dim
        inner = config.ffn_dim
        self.qkv = nn.Parameter(torch.empty(experts, dim, 3 * dim))
        self.out = nn.Parameter(torch.empty(experts, dim, dim))
        self.w1 = nn.Parameter(torch.empty(experts, dim, inner))
        self.b1 = nn.Parameter(torch.zeros(experts, 1, inner))
        self.w2 = nn.Parameter(torch.empty(experts, inner, dim))
        self.b2 = nn.Parameter(torch.zeros(experts, 1, dim))
        # No modules for the norms: ZeRO 3 brings a module's weights when it is called, and a kernel
        # calls none.
        self.attention_norm_scale = nn.Parameter(torch.ones(experts, 1, dim))
        self.attention_norm_shift = nn.Parameter(torch.zeros(experts, 1, dim))
        self.ffn_norm_scale = nn.Parameter(torch.ones(experts, 1, dim))
        self.ffn_norm_shift = nn.Parameter(torch.zeros(experts, 1, dim))
        for weight in (self.qkv, self.out, self.w1, self.w2):
            init_linear(weight)

    def forward(self, x_KMR: Tensor, layout: AttentionLayout) -> Tensor:
        """(K, M, r) → (K, M, r).

        x_KMR: each expert's own input. layout: where the sequences begin.
        """
        attention_norm = (self.attention_norm_scale, self.attention_norm_shift)
        ffn_norm = (self.ffn_norm_scale, self.ffn_norm_shift)
        if fused_block.chosen(self.kernel, x_KMR, not self.pre_norm):
            matrices = (self.qkv, self.out, self.w1, self.w2)
            biases = (self.b1, self.b2)
            weights = (
                *matrices,
                *biases,
                *attention_norm,
                *ffn_norm,
            )
            return fused_block.block(
                x_KMR,
                layout.starts_S,
                weights,
                self.heads,
                self.dropout,
                self.training,
            )

        def attend(x_KMR: Tensor) -> Tensor:
            return self._attend(x_KMR, layout)

        x_KMR = self._add_residual(attention_norm, attend, x_KMR)
        return self._add_residual(ffn_norm, self._feed_forward, x_KMR)

    def _add_residual(
        self,
        norm: tuple[Tensor, Tensor],
        layer: Callable[[Tensor], Tensor],
        x_KMR: Tensor,
    ) -> Tensor:
        """Applies a layer with its residual and its norm.

        Args:
            norm: the LayerNorm's scale and shift.
            layer: attention or the feed-forward network.
            x_KMR: its input.

        Returns (K, M, r). With f the layer:

            norm=post    LayerNorm(x + drop(f(x)))
            norm=pre     x + drop(f(LayerNorm(x)))
        """
        if self.pre_norm:
            normed_KMR = group_layer_norm(x_KMR, *norm)
            y_KMR = layer(normed_KMR)
            return add_dropped(x_KMR, y_KMR, self.dropout, self.training)
        y_KMR = layer(x_KMR)
        sum_KMR = add_dropped(x_KMR, y_KMR, self.dropout, self.training)
        return group_layer_norm(sum_KMR, *norm)

    def _attend(self, x_KMR: Tensor, layout: AttentionLayout) -> Tensor:
        """Eq. 5 and 6: (K, M, r) → (K, M, r).

        qkv_KMR      (K, M, 3 r)
        mixed_KMR    (K, M, r)
        """
        qkv_KMR = torch.bmm(x_KMR, self.qkv)
        mixed_KMR = causal_attention(qkv_KMR, layout, self.heads)
        return torch.bmm(mixed_KMR, self.out)

    def _feed_forward(self, x_KMR: Tensor) -> Tensor:
        """Eq. 7: (K, M, r) → (K, M, r).

        inner_KMH    (K, M, h)
        """
        inner_KMH = torch.baddbmm(self.b1, x_KMR, self.w1)
        return torch.baddbmm(self.b2, F.gelu(inner_KMH), self.w2)
