"""The fused CPU kernel against the same block in PyTorch's own operations."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from syncrec.batch.attention_layout import build_attention_layout
from syncrec.batch.views import move
from syncrec.config import ModelConfig
from syncrec.layers import fused_block
from syncrec.layers.transformer import Block

if fused_block.why_missing():
    pytest.skip(
        f"no fused kernel here: {fused_block.why_missing()}",
        allow_module_level=True,
    )


def made(lengths, experts, dim, heads, ffn_dim, dtype=torch.float64, seed=0):
    """A block with no weight at its start value, its layout and an input."""
    torch.manual_seed(seed)
    config = ModelConfig(
        dim=dim, heads=heads, ffn_dim=ffn_dim, dropout=0.0, kernel="plain"
    )
    block = Block(config, experts).to(dtype)
    for weight in block.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    layout = move(build_attention_layout(np.asarray(lengths)), "cpu")
    return (
        block,
        layout,
        torch.randn(experts, int(sum(lengths)), dim, dtype=dtype),
    )


def given_to(block):
    norms = (
        block.attention_norm_scale,
        block.attention_norm_shift,
        block.ffn_norm_scale,
        block.ffn_norm_shift,
    )
    return block.qkv, block.out, block.w1, block.w2, block.b1, block.b2, *norms


def outcome(run, x, weights, gradient):
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    for weight in weights:
        weight.grad = None
    y = run(x)
    y.backward(gradient)
    return [y.detach(), x.grad, *(weight.grad for weight in weights)]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(
        st.integers(0, 9) | st.integers(60, 140), min_size=1, max_size=12
    ).filter(sum),
    experts=st.integers(1, 4),
    shape=st.sampled_from([(8, 1, 8), (12, 3, 5), (10, 2, 16)]),
    threads=st.integers(1, 5),
    tile=st.sampled_from([1, 7, 64, 1000]),
)
def test_equals_the_plain_block_whatever_the_tiles_and_threads(
    lengths, experts, shape, threads, tile
):
    dim, heads, ffn_dim = shape
    block, layout, x = made(lengths, experts, dim, heads, ffn_dim)
    weights, gradient = given_to(block), torch.randn_like(x)
    expected = outcome(lambda x: block(x, layout), x, weights, gradient)
    torch.set_num_threads(threads)
    actual = outcome(
        lambda x: fused_block.block(
            x, layout.starts_S, weights, heads, 0.0, True, tile
        ),
        x,
        weights,
        gradient,
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_one_input_for_all_experts_gets_the_sum_of_their_gradients():
    block, layout, _ = made([5, 3, 70], 3, 8, 1, 8)
    x = torch.randn(78, 8, dtype=torch.float64)
    gradient = torch.randn(3, 78, 8, dtype=torch.float64)
    weights = given_to(block)
    expected = outcome(
        lambda x: block(x.expand(3, -1, -1), layout), x, weights, gradient
    )
    actual = outcome(
        lambda x: fused_block.block(
            x.expand(3, -1, -1), layout.starts_S, weights, 1, 0.0, True
        ),
        x,
        weights,
        gradient,
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("half", "tolerance"), [(False, 2e-5), (True, 0.03)])
@pytest.mark.parametrize(
    "shape", [(64, 2, 64), (33, 1, 31), (50, 5, 98), (24, 3, 13)]
)  # whole and broken panels, odd widths
@pytest.mark.parametrize("lengths", [[100, 17, 1, 64, 65], [3], [33, 0, 47]])
def test_fp32_and_bf16_are_as_near_float64_as_their_digits(
    half, tolerance, shape, lengths
):
    dim, heads, ffn_dim = shape
    block, layout, x = made(lengths, 2, dim, heads, ffn_dim)
    gradient = torch.randn_like(x)
    expected = outcome(lambda x: block(x, layout), x, given_to(block), gradient)
    block = block.float()

    def run_fused(x):
        starts_S = layout.starts_S
        return fused_block.block(x, starts_S, given_to(block), heads, 0.0, True)

    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        actual = outcome(
            run_fused, x.float(), given_to(block), gradient.float()
        )
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < tolerance * other.norm()


def test_dropout_is_the_seeds_alone_and_its_gradient_is_exact():
    block, layout, x = made([6, 3], 2, 6, 1, 4)
    weights = given_to(block)

    def run(x, *weights, threads=1, tile=1000):
        torch.manual_seed(5)
        torch.set_num_threads(threads)
        return fused_block.block(
            x, layout.starts_S, weights, 1, 0.4, True, tile
        )

    torch.testing.assert_close(
        run(x, *weights),
        run(x, *weights, threads=3, tile=1),
        rtol=1e-12,
        atol=1e-12,
    )
    assert not torch.allclose(
        run(x, *weights),
        fused_block.block(x, layout.starts_S, weights, 1, 0.4, True),
    )
    given = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_drops_its_share(share):
    block, layout, x = made([2000], 2, 65, 1, 4)
    with torch.no_grad():  # nothing from the first branch, ones from the second: what is left after the residual is the mask
        block.out.zero_()
        block.w2.zero_()
        block.b2.fill_(1e6)
    normed = fused_block.block(
        x, layout.starts_S, given_to(block), 1, share, True
    )
    dropped = (
        normed - block.ffn_norm_shift
    ) / block.ffn_norm_scale < 0  # below its row's mean
    rows = dropped.flatten(0, 1).double()
    assert rows.mean().item() == pytest.approx(share, abs=0.005)
    assert (
        rows.mean(0).std() < 2 * (share * (1 - share) / len(rows)) ** 0.5
    )  # no column has more, and no two go together
    assert (
        abs(np.corrcoef(rows.T.numpy()) - np.eye(65)).max()
        < 6 / len(rows) ** 0.5
    )


def test_outside_training_nothing_is_dropped_and_nothing_drawn():
    block, layout, x = made([4], 1, 4, 1, 4)
    before = torch.get_rng_state()
    assert torch.allclose(
        fused_block.block(x, layout.starts_S, given_to(block), 1, 0.5, False),
        block.eval()(x, layout),
    )
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_no_number_stays_none():
    block, layout, x = made([4, 3], 1, 8, 1, 8, torch.float32)
    x[0, 1, 2] = float("nan")
    y = fused_block.block(x, layout.starts_S, given_to(block), 1, 0.0, False)
    assert y[0, 1:4].isnan().all() and y[0, 4:].isfinite().all()


def test_a_choice_that_cannot_be_had_says_why():
    with pytest.raises(fused_block.Unavailable, match="norm=post"):
        fused_block.chosen("fused", torch.zeros(1), post_norm=False)
    assert not fused_block.chosen("auto", torch.zeros(1), post_norm=False)
