"""Causal self-attention over packed sequences as one kernel that knows where they begin: no padding, no buckets.

PyTorch has it as FlashAttention 2: on CUDA from compute capability 8.0, for 16-bit floats, heads of up to 256 in steps of 8.
Elsewhere attention goes by buckets (attention.py). Shapes: K experts, M packed tokens, S sequences, r width.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

from syncrec.batch import build

_CAUSAL = (-1, 0)  # every token sees all before it, and none after


def available(device, dtype, head_dim):
    """True where the kernel takes queries, keys and values of this kind. dtype: of the matrix products, autocast counted in."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def attend(qkv_KMR, layout, heads):
    """softmax(Q Kᵀ / √(r / heads)) V within each sequence, each token seeing itself and what is older (eq. 5).

    qkv_KMR: (K, M, 3 r), contiguous. layout: an AttentionLayout; some of its sequences may have no tokens. The experts'
    tokens are K · S sequences, one after the other, which go into one call where the kernel takes so many. Otherwise each
    expert's go into calls of their own, a piece of the layout each. Returns (K, M, r).
    """
    experts, tokens, width = qkv_KMR.shape
    longest = layout.shapes[0][1]
    sequences = len(layout.starts_S) - 1
    if experts * sequences <= build.MOST_SEQUENCES:
        firsts = tokens * torch.arange(experts + 1, device=qkv_KMR.device).unsqueeze(
            1
        )  # of each expert, and the end
        begins = torch.cat([(firsts[:-1] + layout.starts_S[:-1]).flatten(), firsts[-1]])
        return _attend(
            qkv_KMR.view(experts * tokens, width), begins, longest, heads
        ).view(experts, tokens, -1)
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
    pieces = qkv_KMR.view(experts * tokens, width).split(sizes * experts)
    mixed = [
        _attend(piece, begins, longest, heads)
        for piece, begins in zip(pieces, bounds * experts, strict=True)
    ]
    return torch.cat(mixed).view(experts, tokens, -1)


def _attend(qkv_MR, begins, longest, heads):
    """One call. begins: where each sequence begins, and the end. longest: no sequence has more tokens. Returns (M, r)."""
    tokens, width = qkv_MR.shape
    query, key, value = qkv_MR.view(tokens, 3, heads, width // 3 // heads).unbind(1)
    begins = begins.to(torch.int32)
    mixed = varlen_attn(
        query, key, value, begins, begins, longest, longest, window_size=_CAUSAL
    )
    return mixed.reshape(tokens, width // 3)
