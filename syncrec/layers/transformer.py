"""A stack of Transformer experts that run side by side as one batched computation (section 4.2.2).

Shapes: K experts of this stack, M packed tokens, r width, h inner width of the feed-forward network.
"""

import torch
import torch.nn.functional as F
from torch import nn

from syncrec.layers import fused_block
from syncrec.layers.attention import GroupLayerNorm, causal_attention, group_layer_norm
from syncrec.layers.dropout import add_dropped
from syncrec.layers.embedding import init_linear


class ExpertStack(nn.Module):
    """K experts f_TRM of eq. 5 to 7, each of `blocks` attention blocks with residuals and LayerNorm [28 in the paper]."""

    def __init__(self, config, experts):
        super().__init__()
        self.experts = experts
        self.blocks = nn.ModuleList(
            Block(config, experts) for _ in range(config.blocks)
        )
        self.last_norm = (
            GroupLayerNorm(experts, config.dim)
            if config.norm == "pre"
            else nn.Identity()
        )

    def forward(self, x_MR, layout):
        """x_MR: (M, r) → (K, M, r), one output an expert."""
        x_KMR = x_MR.expand(self.experts, -1, -1)
        for block in self.blocks:
            x_KMR = block(x_KMR, layout)
        return self.last_norm(x_KMR)


class Block(nn.Module):
    """Multi-head self-attention (eq. 5, 6) and point-wise feed-forward network (eq. 7)."""

    def __init__(self, config, experts):
        super().__init__()
        self.heads, self.dropout, self.pre_norm, self.kernel = (
            config.heads,
            config.dropout,
            config.norm == "pre",
            config.kernel,
        )
        dim, inner = config.dim, config.ffn_dim
        self.qkv = nn.Parameter(torch.empty(experts, dim, 3 * dim))
        self.out = nn.Parameter(torch.empty(experts, dim, dim))
        self.w1 = nn.Parameter(torch.empty(experts, dim, inner))
        self.b1 = nn.Parameter(torch.zeros(experts, 1, inner))
        self.w2 = nn.Parameter(torch.empty(experts, inner, dim))
        self.b2 = nn.Parameter(torch.zeros(experts, 1, dim))
        # No modules of their own: ZeRO 3 brings a module's weights when it is called, and a kernel calls none.
        for norm in ("attention_norm", "ffn_norm"):
            self.register_parameter(
                f"{norm}_scale", nn.Parameter(torch.ones(experts, 1, dim))
            )
            self.register_parameter(
                f"{norm}_shift", nn.Parameter(torch.zeros(experts, 1, dim))
            )
        for weight in (self.qkv, self.out, self.w1, self.w2):
            init_linear(weight)

    def forward(self, x_KMR, layout):
        """(K, M, r) → (K, M, r)."""
        if fused_block.chosen(self.kernel, x_KMR, not self.pre_norm):
            weights = (
                self.qkv,
                self.out,
                self.w1,
                self.w2,
                self.b1,
                self.b2,
                *self._norm("attention"),
                *self._norm("ffn"),
            )
            return fused_block.block(
                x_KMR, layout.starts_S, weights, self.heads, self.dropout, self.training
            )
        x_KMR = self._around(self._norm("attention"), self._attend, x_KMR, layout)
        return self._around(self._norm("ffn"), self._feed_forward, x_KMR)

    def _norm(self, name):
        return getattr(self, f"{name}_norm_scale"), getattr(self, f"{name}_norm_shift")

    def _around(self, norm, layer, x_KMR, *args):
        if self.pre_norm:
            return add_dropped(
                x_KMR,
                layer(group_layer_norm(x_KMR, *norm), *args),
                self.dropout,
                self.training,
            )
        return group_layer_norm(
            add_dropped(x_KMR, layer(x_KMR, *args), self.dropout, self.training), *norm
        )

    def _attend(self, x_KMR, layout):
        return torch.bmm(
            causal_attention(torch.bmm(x_KMR, self.qkv), layout, self.heads), self.out
        )

    def _feed_forward(self, x_KMR):
        return torch.baddbmm(
            self.b2, F.gelu(torch.baddbmm(self.b1, x_KMR, self.w1)), self.w2
        )
