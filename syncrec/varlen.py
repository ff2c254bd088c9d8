"""Causal self-attention over packed sequences as one kernel that knows where they begin: no padding, no buckets.

PyTorch has it as FlashAttention 2: on CUDA from compute capability 8.0, for 16-bit floats, heads of up to 256 in steps of 8.
Elsewhere attention goes by buckets (attention.py). Shapes: K experts, M packed tokens, S sequences, r width.
"""

import torch
from torch.nn.attention.varlen import varlen_attn

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


def attend(qkv_KMR, starts_S, longest, heads):
    """softmax(Q Kᵀ / √(r / heads)) V within each sequence, each token seeing itself and what is older (eq. 5).

    qkv_KMR: (K, M, 3 r), contiguous. starts_S: where each sequence begins, and M: (S + 1,), integers on the same device; some
    may have no tokens. longest: the tokens of the longest. The experts' tokens are K · S sequences, one after the other.
    Returns (K, M, r).
    """
    experts, tokens, width = qkv_KMR.shape
    firsts = tokens * torch.arange(experts + 1, device=qkv_KMR.device).unsqueeze(1)  # of each expert, and the end
    begins = torch.cat([(firsts[:-1] + starts_S[:-1]).flatten(), firsts[-1]]).to(torch.int32)
    query, key, value = qkv_KMR.view(experts * tokens, 3, heads, width // 3 // heads).unbind(1)
    mixed = varlen_attn(query, key, value, begins, begins, longest, longest, window_size=_CAUSAL)
    return mixed.reshape(experts, tokens, width // 3)
