"""Causal self-attention over packed sequences as one kernel that knows where they begin.

It needs no padding and no buckets. PyTorch has it as FlashAttention 2: on CUDA from compute
capability 8.0, for 16-bit floats, heads of up to 256 in steps of 8. Elsewhere attention goes by
buckets (syncrec/layers/attention.py). Shapes: K experts, M packed tokens, S sequences, r width.
"""

from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from syncrec.batch import attention_layout
from syncrec.batch.attention_layout import AttentionLayout

_CAUSAL = (-1, 0)  # every token sees all before it, and none after


def available(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel takes queries, keys and values of this kind.

    dtype: of the matrix products, autocast counted in.
    """
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def attend(qkv_KMR: Tensor, layout: AttentionLayout, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √(r / heads)) V within each sequence (eq. 5). Returns (K, M, r).

    Each token sees itself and what is older. qkv_KMR: (K, M, 3 r), contiguous. Some of the layout's
    sequences may have no tokens.

    The experts' tokens are K · S sequences, one after the other, which go into one call where the
    kernel takes so many. Otherwise each expert's go into calls of their own, a piece of the layout
    each.

    Example: K = 2 and four users with 3, 1, 0 and 2 tokens:

        qkv_KMR            (2, 6, 3 r)
        layout.starts_S    tensor([0, 3, 4, 4, 6])
        begins, end        tensor([0, 3, 4, 4,   6, 9, 10, 10,   12])
    """
    experts, tokens, width = qkv_KMR.shape
    qkv = qkv_KMR.view(experts * tokens, width)
    longest = layout.shapes[0][1]
    sequences = len(layout.starts_S) - 1
    if experts * sequences <= attention_layout.MOST_SEQUENCES:
        experts_and_end = torch.arange(experts + 1, device=qkv_KMR.device)
        firsts = tokens * experts_and_end.unsqueeze(1)
        begins = (firsts[:-1] + layout.starts_S[:-1]).flatten()
        begins = torch.cat([begins, firsts[-1]])
        mixed = _attend(qkv, begins, longest, heads)
        return mixed.view(experts, tokens, -1)
    bounds = []
    sizes = []
    first = 0
    for count, size in layout.pieces:
        begins = layout.starts_S[first : first + count + 1]
        first += count
        if size:  # else all of its sequences are empty
            bounds.append(begins - begins[0])
            sizes.append(size)
    # split, not slices: the gradient of a slice is a whole tensor of zeros.
    pieces = qkv.split(sizes * experts)
    outputs = []
    for piece, begins in zip(pieces, bounds * experts, strict=True):
        outputs.append(_attend(piece, begins, longest, heads))
    return torch.cat(outputs).view(experts, tokens, -1)


def _attend(qkv_MR: Tensor, begins: Tensor, longest: int, heads: int) -> Tensor:
    """One call. Returns (M, r).

    Args:
        qkv_MR: (M, 3 r).
        begins: where each sequence begins, and the end.
        longest: no sequence has more tokens.
        heads: of the attention.
    """
    tokens, width = qkv_MR.shape
    width = width // 3
    head_dim = width // heads
    qkv = qkv_MR.view(tokens, 3, heads, head_dim)
    query, key, value = qkv.unbind(1)
    begins = begins.to(torch.int32)
    mixed = varlen_attn(
        query,
        key,
        value,
        begins,
        begins,
        longest,
        longest,
        window_size=_CAUSAL,
    )
    return cast(Tensor, mixed).reshape(tokens, width)
