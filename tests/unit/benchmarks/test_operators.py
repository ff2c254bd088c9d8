"""The counter counts what launches a kernel, by part, in forward and in backward."""

import torch

from benchmarks.operators import OperatorCounter


def test_what_launches_nothing_is_not_counted():
    x = torch.ones(4)
    with OperatorCounter() as counter:
        torch.empty(3)
        x.view(2, 2).T.unsqueeze(0).expand(3, 2, 2)
        x.split([1, 3])
        x.detach()
        assert counter.total("") == 0
        (x.view(2, 2) + 1).exp()
        x.new_zeros(3)
        x.mul_(2)
    assert counter.counts[""] == {
        "aten.add": 1,
        "aten.exp": 1,
        "aten.new_zeros": 1,
        "aten.mul_": 1,
    }


def test_each_part_has_its_own_and_backward_is_counted():
    weight = torch.ones(2, 2, requires_grad=True)
    with OperatorCounter() as counter, counter.entered("outside"):
        product = counter.wrap("inside", torch.mm)(torch.ones(2, 2), weight)
        loss = product.sum()
        with counter.entered("backward"):
            loss.backward()
    assert counter.counts["inside"] == {"aten.mm": 1}
    assert counter.counts["outside"] == {"aten.ones": 1, "aten.sum": 1}
    assert counter.counts["backward"]["aten.mm"] == 1
