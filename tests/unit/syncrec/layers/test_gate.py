"""Gates of all domains at once are each domain's own gate, whichever kind it is."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from syncrec.config import ModelConfig
from syncrec.layers.gate import Gate, GateGroup, OnlyExpert

STARTS = (0, 4, 4, 9)  # the second domain has no token


def view():
    """What gates look at: sequences of three tokens and one, and of two, two and one."""
    return SimpleNamespace(
        task_starts=STARTS,
        sequence_M=torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 4]),
        position_M=torch.tensor([2, 1, 0, 0, 1, 0, 1, 0, 0]),
        sequences=5,
    )


@pytest.mark.parametrize(
    ("kind", "gate"),
    [(Gate, "token"), (Gate, "sequence"), (OnlyExpert, "token")],
)
def test_it_is_a_gate_a_domain(kind, gate):
    torch.manual_seed(0)
    config = ModelConfig(dim=8, experts=3, cross_experts=2, gate=gate)
    group = GateGroup(kind(config) for _ in range(3)).double()
    for parameter in group.parameters():
        parameter.data.normal_()
    x_MR = torch.randn(9, 8, dtype=torch.float64, requires_grad=True)

    def by_loop():
        weights = []
        for one, bounds in zip(group, pairwise(STARTS), strict=True):
            tokens = slice(*bounds)
            weights.append(one(x_MR[tokens], view(), tokens))
        return torch.cat(weights)

    found = []
    for call in (lambda: group(x_MR, view()), by_loop):
        weights_MK = call()
        results = [weights_MK]
        if kind is Gate:
            scale = torch.arange(weights_MK.numel()).view_as(weights_MK)
            loss = (weights_MK * scale).sum()
            leaves = [x_MR, *group.parameters()]
            results += torch.autograd.grad(loss, leaves)
        found.append(results)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    sums_M = found[0][0].sum(1)
    torch.testing.assert_close(sums_M, torch.ones_like(sums_M))
