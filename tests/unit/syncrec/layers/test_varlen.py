from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from syncrec.batch import attention_layout
from syncrec.batch.attention_layout import build_attention_layout
from syncrec.batch.views import move
from syncrec.layers import attention, varlen
from syncrec.layers.attention import causal_attention


def kernel(
    query, key, value, begins, key_begins, longest, key_longest, *, window_size
):
    """What FlashAttention computes, one sequence after the other. query, key, value: (tokens, heads, head width)."""
    assert (
        begins.dtype == torch.int32
        and begins is key_begins
        and longest == key_longest
        and window_size == (-1, 0)
    )
    assert query.stride(-1) == 1 and begins[0] == 0 and begins[-1] == len(query)
    lengths = begins.diff().tolist()
    assert (
        min(lengths) >= 0
        and max(lengths) <= longest
        and len(lengths) <= attention_layout.MOST_SEQUENCES
    )
    parts = zip(
        *(part.split(lengths) for part in (query, key, value)), strict=True
    )
    heads_first = (
        [part.transpose(0, 1) for part in sequence] for sequence in parts
    )
    mixed = [
        F.scaled_dot_product_attention(*sequence, is_causal=True).transpose(
            0, 1
        )
        for sequence in heads_first
    ]
    return torch.cat(mixed)


@pytest.mark.parametrize(("experts", "heads"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize(
    "lengths",
    [[1], [5, 1, 9, 9, 2], [0, 3, 0, 0, 17, 1, 0], list(range(1, 40))],
)
def test_it_is_what_the_buckets_compute(monkeypatch, experts, heads, lengths):
    """Outputs and gradients; sequences of one token, and those that have none, among them."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    layout = move(build_attention_layout(np.array(lengths)), "cpu")
    generator = torch.Generator().manual_seed(1)
    qkv_KMR = torch.randn(
        experts, sum(lengths), 3 * 8, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(
        experts, sum(lengths), 8, generator=generator, dtype=torch.float64
    )
    found = []
    for attend in (
        lambda qkv: causal_attention(qkv, layout, heads),
        lambda qkv: varlen.attend(qkv, layout, heads),
    ):
        leaf = qkv_KMR.clone().requires_grad_()
        output = attend(leaf)
        (output * weight).sum().backward()
        found.append((output.detach(), leaf.grad))
    for by_buckets, by_offsets in zip(*found, strict=True):
        torch.testing.assert_close(
            by_offsets, by_buckets, rtol=1e-12, atol=1e-12
        )


LENGTHS = {
    "all alike": [3] * 12,
    "some empty": [0, 3, 0, 0, 17, 1, 0, 2, 2],
    "a piece of empty ones": [4, 1, 0, 0, 0, 0, 0, 0, 6, 2],
    "empty ones at the end": [5, 5, 5, 0, 0, 0, 0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("by_offsets", [True, False], ids=["varlen", "buckets"])
def test_no_call_gets_more_sequences_than_a_kernel_takes(
    monkeypatch, lengths, most, by_offsets
):
    """A grid of CUDA ends at 65,535: here sooner. Outputs and gradients are those of one call to the bit."""
    counts = []

    def counted_kernel(query, key, value, begins, *others, **options):
        counts.append(len(begins) - 1)
        return kernel(query, key, value, begins, *others, **options)

    def counted_attention(query, *others, **options):
        counts.append(len(query))
        return attended(query, *others, **options)

    attended = F.scaled_dot_product_attention
    attention_calls = SimpleNamespace(
        scaled_dot_product_attention=counted_attention
    )
    monkeypatch.setattr(attention, "F", attention_calls)
    monkeypatch.setattr(varlen, "varlen_attn", counted_kernel)
    monkeypatch.setattr(varlen, "available", lambda *kind: by_offsets)
    experts = 3
    generator = torch.Generator().manual_seed(2)
    qkv_KMR = torch.randn(experts, sum(lengths), 3 * 8, generator=generator)
    weight_KMR = torch.randn(experts, sum(lengths), 8, generator=generator)
    outcomes = []
    for limit in (10**9, most):
        monkeypatch.setattr(attention_layout, "MOST_SEQUENCES", limit)
        layout = move(build_attention_layout(np.array(lengths)), "cpu")
        assert sum(count for count, _ in layout.pieces) == len(lengths)
        leaf = qkv_KMR.clone().requires_grad_()
        counts.clear()
        output = causal_attention(leaf, layout, heads=2)
        assert 0 < max(counts) <= limit
        (output * weight_KMR).sum().backward()
        outcomes.append((output.detach(), leaf.grad))
    for whole, in_pieces in zip(*outcomes, strict=True):
        assert torch.equal(whole, in_pieces)


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


@pytest.mark.parametrize(
    ("expected", "device", "dtype", "head_dim", "capability"),
    KINDS.values(),
    ids=KINDS,
)
def test_where_the_kernel_can_be_had(
    monkeypatch, expected, device, dtype, head_dim, capability
):
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability
    )
    monkeypatch.setattr(
        torch.backends.cuda, "is_flash_attention_available", lambda: True
    )
    assert varlen.available(torch.device(device), dtype, head_dim) is expected
