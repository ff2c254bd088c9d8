"""Causal self-attention over packed sequences, section 4.2.2.

Sequences are padded by buckets for the kernel and packed again at once. On CUDA a kernel takes them
packed (syncrec/layers/varlen.py). Shapes: K experts, M packed tokens, P padded slots, r width, w
any width. See AttentionLayout in syncrec/batch/attention_layout.py.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncrec.batch import attention_layout
from syncrec.batch.attention_layout import AttentionLayout
from syncrec.layers import varlen


def causal_attention(
    qkv_KMR: Tensor,
    layout: AttentionLayout,
    heads: int,
) -> Tensor:
    """softmax(Q Kᵀ / √(r / heads)) V within each sequence (eq. 5).

    Each token sees itself and what is older.

    Args:
        qkv_KMR: queries, keys and values beside each other, (K, M, 3 r).
        layout: where sequences begin, and their buckets.
        heads: of the attention; r is divisible by it.

    Returns (K, M, r).
    """
    experts, _, width = qkv_KMR.shape
    width = width // 3
    head_dim = width // heads
    if varlen.available(qkv_KMR.device, qkv_KMR.dtype, head_dim):
        return varlen.attend(qkv_KMR, layout, heads)
    padded = pad(qkv_KMR, layout)
    outputs = []
    for bucket, (sequences, length) in split_buckets(padded, layout, dim=1):
        bucket = bucket.view(experts, sequences, length, 3, heads, head_dim)
        query, key, value = bucket.unbind(3)
        mixed = _attend(_flatten(query), _flatten(key), _flatten(value))
        mixed = mixed.transpose(1, 2)
        outputs.append(mixed.reshape(experts, sequences * length, width))
    return unpad(torch.cat(outputs, dim=1), layout)


def _flatten(x: Tensor) -> Tensor:
    """(experts, sequences, length, heads, width) → (experts · sequences, heads, length, width)."""
    return x.flatten(0, 1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in calls of as many sequences as a kernel takes.

    query, key, value: (sequences, heads, length, width).
    """
    most = attention_layout.MOST_SEQUENCES
    if len(query) <= most:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    pieces = zip(
        query.split(most), key.split(most), value.split(most), strict=True
    )
    outputs = []
    for piece in pieces:
        outputs.append(F.scaled_dot_product_attention(*piece, is_causal=True))
    return torch.cat(outputs)


def split_buckets(
    slots: Tensor,
    layout: AttentionLayout,
    dim: int,
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Each bucket's slots, and its shape: (sequences, padded length). dim: the P slots' dimension.

    Example: `shapes` ((1, 3), (2, 3)) and dim 0:

        slots     tensor([a, b, c,   e, f, f,   d, d, d])
        first     tensor([a, b, c]), (1, 3)
        second    tensor([e, f, f, d, d, d]), (2, 3)
    """
    sizes = []
    for sequences, length in layout.shapes:
        sizes.append(sequences * length)
    # split, not slices: the gradient of a slice is a whole tensor of zeros.
    return zip(slots.split(sizes, dim=dim), layout.shapes, strict=True)


def pad(x_KMW: Tensor, layout: AttentionLayout) -> Tensor:
    """Packed tokens in the slots of the layout's buckets: (K, M, w) → (K, P, w).

    For what is causal within a sequence and is packed again by `unpad`.

    Example: the four users of AttentionLayout, with 3, 1, 0 and 2 tokens, K and w 1:

        x_KMW     tensor([a, b, c,   d,   e, f])
        result    tensor([a, b, c,   e, f, f,   d, d, d])
    """
    return _Move.apply(x_KMW, layout.pad_P, layout.unpad_M)


def unpad(x_KPW: Tensor, layout: AttentionLayout) -> Tensor:
    """The other way: (K, P, w) → (K, M, w)."""
    return _Move.apply(x_KPW, layout.unpad_M, layout.pad_P)


class _Move(torch.autograd.Function):
    """Rows of (K, from, w) gathered into (K, to, w), with a gather for backward too.

    Padding and unpadding are each other's inverse on real tokens. A padded slot has gradient zero:
    its output is dropped, and no real query sees its key or value. So the gradient of padding is
    unpadding. The gradient of unpadding is padding with the padded slots at zero: `index` names
    their sequence's last token, so they have to be cleared.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_KFW: Tensor,
        index_T: Tensor,
        inverse_F: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(index_T, inverse_F)
        ctx.clear = len(inverse_F) > len(index_T)
        return _gather(x_KFW, index_T)

    @staticmethod
    def backward(ctx: Any, grad_KTW: Tensor) -> tuple[Tensor, None, None]:
        index_T, inverse_F = ctx.saved_tensors
        if not ctx.clear:
            return _gather(grad_KTW, inverse_F), None, None
        experts, _, width = grad_KTW.shape
        grad = grad_KTW.new_zeros(experts, len(inverse_F), width)
        return grad.index_copy_(1, index_T, grad_KTW), None, None


def _gather(x_KFW: Tensor, index_T: Tensor) -> Tensor:
    """Rows of each expert: (K, from, w) → (K, to, w).

    Example: K = 2, w = 1:

        x_KFW      tensor([[a, b, c], [d, e, f]])
        index_T    tensor([2, 0])
        result     tensor([[c, a], [f, d]])
    """
    experts, rows, width = x_KFW.shape
    if experts == 1:
        return x_KFW[0].index_select(0, index_T).unsqueeze(0)
    # One gather of whole rows: index_select over an inner dimension copies row by row.
    offsets = torch.arange(
        0,
        experts * rows,
        rows,
        device=index_T.device,
    ).unsqueeze(1)
    index = (offsets + index_T).view(-1)
    gathered = x_KFW.reshape(experts * rows, width).index_select(0, index)
    return gathered.view(experts, -1, width)


def group_layer_norm(
    x_KMR: Tensor,
    scale_K1R: Tensor,
    shift_K1R: Tensor,
) -> Tensor:
    """LayerNorm of K experts at once: (K, M, r)."""
    return torch.addcmul(
        shift_K1R,
        F.layer_norm(x_KMR, x_KMR.shape[-1:]),
        scale_K1R,
    )


class GroupLayerNorm(nn.Module):
    """`group_layer_norm` with its weights, (K, 1, r) each (section 4.2.2)."""

    def __init__(self, experts: int, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(experts, 1, dim))
        self.shift = nn.Parameter(torch.zeros(experts, 1, dim))

    def forward(self, x_KMR: Tensor) -> Tensor:
        """(K, M, r) → (K, M, r)."""
        return group_layer_norm(x_KMR, self.scale, self.shift)
