"""Dropout against its definition."""

import pytest
import torch

from syncrec.layers.dropout import add_dropped, drop


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_drops_its_share_and_keeps_the_mean(share):
    torch.manual_seed(0)
    x = torch.rand(100, 1001) + 1  # an odd size: not four elements a draw
    y = drop(x, share, training=True)
    kept = y != 0
    assert kept.double().mean().item() == pytest.approx(1 - share, abs=0.005)
    torch.testing.assert_close(
        y[kept], (x / (1 - share))[kept], rtol=1e-4, atol=0
    )
    for axis in (0, 1):  # no stripes
        assert (
            kept.double().mean(axis).std()
            < 2.5 * (share * (1 - share) / kept.shape[axis]) ** 0.5
        )


def test_same_seed_same_mask():
    x = torch.ones(7, 9)
    torch.manual_seed(3)
    first = drop(x, 0.5, training=True)
    other = drop(x, 0.5, training=True)
    torch.manual_seed(3)
    assert torch.equal(first, drop(x, 0.5, training=True))
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("share", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped(share, training):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(drop(x, share, training), x)
    assert torch.equal(add_dropped(x, y, share, training), x + y)


def test_the_gradient_is_dropped_alike():
    x, y = (
        torch.randn(50, 4, dtype=torch.float64),
        torch.randn(50, 4, dtype=torch.float64, requires_grad=True),
    )
    torch.manual_seed(1)
    out = add_dropped(x, y, 0.5, training=True)
    (gradient,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(out - x, gradient * y)
    assert set(gradient.unique().tolist()) == {0.0, 2.0}
