import numpy as np
import pytest
import torch
import torch.nn.functional as F

from syncrec import varlen
from syncrec.attention import causal_attention
from syncrec.batch import attention_layout, move


def kernel(query, key, value, begins, key_begins, longest, key_longest, *, window_size):
    """What FlashAttention computes, one sequence after the other. query, key, value: (tokens, heads, head width)."""
    assert begins.dtype == torch.int32 and begins is key_begins and longest == key_longest and window_size == (-1, 0)
    assert query.stride(-1) == 1 and begins[0] == 0 and begins[-1] == len(query)
    lengths = begins.diff().tolist()
    assert min(lengths) >= 0 and max(lengths) == longest
    parts = zip(*(part.split(lengths) for part in (query, key, value)), strict=True)
    heads_first = ([part.transpose(0, 1) for part in sequence] for sequence in parts)
    mixed = [F.scaled_dot_product_attention(*sequence, is_causal=True).transpose(0, 1) for sequence in heads_first]
    return torch.cat(mixed)


@pytest.mark.parametrize(("experts", "heads"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 9, 9, 2], [0, 3, 0, 0, 17, 1, 0], list(range(1, 40))])
def test_it_is_what_the_buckets_compute(monkeypatch, experts, heads, lengths):
    """Outputs and gradients; sequences of one token, and those that have none, among them."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    lengths_S = np.array(lengths)
    layout, starts_S = move(attention_layout(lengths_S), "cpu"), torch.from_numpy(np.append(0, lengths_S.cumsum()))
    generator = torch.Generator().manual_seed(1)
    qkv_KMR = torch.randn(experts, sum(lengths), 3 * 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(experts, sum(lengths), 8, generator=generator, dtype=torch.float64)
    found = []
    for attend in (
        lambda qkv: causal_attention(qkv, layout, heads),
        lambda qkv: varlen.attend(qkv, starts_S, layout.shapes[0][1], heads),
    ):
        leaf = qkv_KMR.clone().requires_grad_()
        output = attend(leaf)
        (output * weight).sum().backward()
        found.append((output.detach(), leaf.grad))
    for by_buckets, by_offsets in zip(*found, strict=True):
        torch.testing.assert_close(by_offsets, by_buckets, rtol=1e-12, atol=1e-12)


H100, V100 = (9, 0), (7, 0)
KINDS = {
    "bf16 on an H100": (True, "cuda", torch.bfloat16, 128, H100),
    "fp16, the widest head": (True, "cuda", torch.float16, 256, H100),
    "fp32": (False, "cuda", torch.float32, 128, H100),
    "a head that is too wide": (False, "cuda", torch.bfloat16, 264, H100),
    "a head of no multiple of 8": (False, "cuda", torch.bfloat16, 20, H100),
    "an older device": (False, "cuda", torch.bfloat16, 128, V100),
    "a CPU": (False, "cpu", torch.bfloat16, 128, None),
}


@pytest.mark.parametrize(("expected", "device", "dtype", "head_dim", "capability"), KINDS.values(), ids=KINDS)
def test_where_the_kernel_can_be_had(monkeypatch, expected, device, dtype, head_dim, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert varlen.available(torch.device(device), dtype, head_dim) is expected
