"""Causal self-attention over packed sequences: padded by buckets for the kernel, packed again at once; on CUDA as they are.

Shapes: K experts, M packed tokens, P padded slots, r width. See AttentionLayout in batch.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

from syncrec.batch import build
from syncrec.layers import varlen


def causal_attention(qkv_KMR, layout, heads):
    """softmax(Q Kᵀ / √(r / heads)) V within each sequence, each token seeing itself and what is older (eq. 5).

    qkv_KMR: (K, M, 3 r). Returns (K, M, r).
    """
    experts, _, width = qkv_KMR.shape
    if varlen.available(qkv_KMR.device, qkv_KMR.dtype, width // 3 // heads):
        return varlen.attend(qkv_KMR, layout, heads)
    padded = pad(qkv_KMR, layout)
    outputs = []
    # split, not slices: the gradient of a slice is a whole tensor of zeros.
    buckets = padded.split(
        [sequences * length for sequences, length in layout.shapes], dim=1
    )
    for bucket, (sequences, length) in zip(buckets, layout.shapes, strict=True):
        bucket = bucket.view(experts, sequences, length, 3, heads, width // 3 // heads)
        mixed = _attend(
            *(part.flatten(0, 1).transpose(1, 2) for part in bucket.unbind(3))
        )
        outputs.append(
            mixed.transpose(1, 2).reshape(experts, sequences * length, width // 3)
        )
    return unpad(torch.cat(outputs, dim=1), layout)


def _attend(query, key, value):
    """In calls of as many sequences as a kernel takes. query, key, value: (sequences, heads, length, width)."""
    if len(query) <= build.MOST_SEQUENCES:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    pieces = zip(
        *(part.split(build.MOST_SEQUENCES) for part in (query, key, value)), strict=True
    )
    return torch.cat(
        [F.scaled_dot_product_attention(*piece, is_causal=True) for piece in pieces]
    )


def pad(x_KMW, layout):
    """Packed tokens in the slots of the layout's buckets: (K, M, w) → (K, P, w). For what is causal within a sequence and is
    packed again by `unpad`."""
    return _Move.apply(x_KMW, layout.pad_P, layout.unpad_M)


def unpad(x_KPW, layout):
    """The other way: (K, P, w) → (K, M, w)."""
    return _Move.apply(x_KPW, layout.unpad_M, layout.pad_P)


class _Move(torch.autograd.Function):
    """Rows of (K, from, w) gathered into (K, to, w), with a gather for backward too.

    Padding and unpadding are each other's inverse on real tokens, and a padded slot has gradient zero: its output is
    dropped, and no real query sees its key or value. So the gradient of padding is unpadding. The gradient of unpadding
    is padding with the padded slots at zero; `there` names their sequence's last token, so they have to be cleared.
    """

    @staticmethod
    def forward(ctx, x_KFW, there, back):
        ctx.save_for_backward(there, back)
        ctx.clear = len(back) > len(there)
        return _gather(x_KFW, there)

    @staticmethod
    def backward(ctx, grad_KTW):
        there, back = ctx.saved_tensors
        if not ctx.clear:
            return _gather(grad_KTW, back), None, None
        grad = grad_KTW.new_zeros(grad_KTW.shape[0], len(back), grad_KTW.shape[2])
        return grad.index_copy_(1, there, grad_KTW), None, None


def _gather(x_KFW, index_T):
    experts, rows, width = x_KFW.shape
    if experts == 1:
        return x_KFW[0].index_select(0, index_T).unsqueeze(0)
    # One gather of whole rows: index_select over an inner dimension copies row by row.
    offsets = torch.arange(0, experts * rows, rows, device=index_T.device).unsqueeze(1)
    return (
        x_KFW.reshape(experts * rows, width)
        .index_select(0, (offsets + index_T).view(-1))
        .view(experts, -1, width)
    )


def group_layer_norm(x_KMR, scale_K1R, shift_K1R):
    """LayerNorm of K experts at once: (K, M, r)."""
    return torch.addcmul(shift_K1R, F.layer_norm(x_KMR, x_KMR.shape[-1:]), scale_K1R)


class GroupLayerNorm(nn.Module):
    """`group_layer_norm` with its weights, (K, 1, r) each."""

    def __init__(self, experts, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(experts, 1, dim))
        self.shift = nn.Parameter(torch.zeros(experts, 1, dim))

    def forward(self, x_KMR):
        return group_layer_norm(x_KMR, self.scale, self.shift)
