"""The counter counts what launches a kernel, by part, in forward and in backward."""

import torch

from benchmarks.operators import OperatorCounter, table


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


def test_an_operator_of_backward_is_of_the_part_that_it_is_the_gradient_of():
    weight = torch.ones(2, 2, requires_grad=True)
    with OperatorCounter() as counter, counter.entered("outside"):
        product = counter.wrap("inside", torch.mm)(torch.ones(2, 2), weight)
        again = counter.wrap("second", torch.exp)(product)
        loss = again.sum() + counter.wrap("inside", torch.sum)(weight)
        with counter.entered("accumulated"):
            loss.backward()
            loss = weight.sum()
            loss.backward()
    assert counter.counts["inside"] == {"aten.mm": 1, "aten.sum": 1}
    assert counter.counts["second"] == {"aten.exp": 1}
    assert counter.counts["outside"]["aten.sum"] == 1
    assert counter.backward["inside"]["aten.mm"] == 1
    assert counter.backward["second"] == {"aten.mul": 1}
    # What is added to a weight's gradient that is there is of no part's forward.
    assert counter.backward["accumulated"] == {"aten.add_": 1}
    assert counter.total_backward("inside") >= 1
    counter.clear()
    assert counter.total("inside") == counter.total_backward("inside") == 0


def test_the_table_has_forward_and_backward_and_their_sum():
    parts = {"experts": 3, "losses": 1}
    backward = {"experts": 6, "losses": 0}
    result = {"precision": "bf16", "parts": parts, "backward": backward}
    record = {"results": [result | {"domains": 2}, result | {"domains": 9}]}
    lines = table(record).splitlines()
    assert "bf16, D = 2" in lines[0] and "bf16, D = 9" in lines[0]
    assert "| experts |" in lines[2] and "3 + 6" in lines[2]
    assert lines[-1].split("|")[1].strip() == "step" and "10" in lines[-1]
