"""Towers of all domains at once are each domain's own tower, gradients and dropout's masks too."""

from itertools import pairwise

import pytest
import torch

from syncrec.config import ModelConfig
from syncrec.layers.tower import Tower, TowerGroup

STARTS = (0, 5, 5, 12)  # the second domain has no token


def by_loop(group, x_MR, starts):
    """The reference: one call a domain."""
    pieces = [x_MR[slice(*bounds)] for bounds in pairwise(starts)]
    return torch.cat(
        [tower(piece) for tower, piece in zip(group, pieces, strict=True)]
    )


def results(call, group, x_MR, seed=0):
    """The output, and the gradients of input and weights."""
    torch.manual_seed(seed)
    output = call(x_MR)
    scale = torch.linspace(-1, 2, output.numel(), dtype=torch.float64)
    loss = (output.double() * scale.view_as(output)).sum()
    return output, *torch.autograd.grad(loss, [x_MR, *group.parameters()])


def drawn(dtype, dropout=0.0):
    torch.manual_seed(1)
    config = ModelConfig(dim=8, ffn_dim=12, dropout=dropout)
    group = TowerGroup(Tower(config) for _ in range(3)).to(dtype).train()
    for parameter in group.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return group, torch.randn(STARTS[-1], 8, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_it_is_a_tower_a_domain(dropout):
    group, x_MR = drawn(torch.float64, dropout)
    found = results(lambda x: group(x, STARTS), group, x_MR)
    expected = results(lambda x: by_loop(group, x, STARTS), group, x_MR)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_computes_in_the_same_precisions():
    group, x_MR = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(lambda x: group(x, STARTS), group, x_MR)
        expected = results(lambda x: by_loop(group, x, STARTS), group, x_MR)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_its_weights_have_the_names_of_a_list_of_towers():
    """Checkpoints of before are read."""
    group, _ = drawn(torch.float32)
    listed = torch.nn.ModuleList(Tower(ModelConfig(dim=8)) for _ in range(3))
    assert list(group.state_dict()) == list(listed.state_dict())
    assert "2.inner.bias" in group.state_dict()
