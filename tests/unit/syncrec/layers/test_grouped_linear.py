"""A product by group is a linear layer a group, gradients too, also where groups are empty or of unequal width."""

import pytest
import torch
import torch.nn.functional as F

from syncrec.layers.grouped_linear import grouped_linear


def drawn(starts, widths, inner=5, biased=True):
    """Leaves in float64: rows, weights, biases."""
    torch.manual_seed(0)
    shapes = [(starts[-1], inner)]
    shapes += [(width, inner) for width in widths]
    shapes += [(width,) for width in widths] if biased else []
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    x_MI, *parameters = leaves
    return x_MI, parameters[: len(widths)], parameters[len(widths) :]


def by_loop(x_MI, starts, weights, biases):
    """The reference: one `F.linear` a group."""
    widest = max(len(weight) for weight in weights)
    outputs = []
    for group, weight in enumerate(weights):
        rows = x_MI[starts[group] : starts[group + 1]]
        output = F.linear(rows, weight, biases[group] if biases else None)
        outputs.append(F.pad(output, (0, widest - len(weight))))
    return torch.cat(outputs)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("starts", "widths"),
    [
        ((0, 4, 7, 13), (3, 3, 3)),
        ((0, 0, 7, 7), (3, 3, 3)),
        ((0, 9), (4,)),
        ((0, 2, 6), (2, 5)),
        ((0, 0), (3,)),
    ],
)
def test_it_is_a_linear_layer_of_each_group(starts, widths, biased):
    x_MI, weights, biases = drawn(starts, widths, biased=biased)
    leaves = [x_MI, *weights, *biases]
    found, expected = [], []
    for function, results in ((grouped_linear, found), (by_loop, expected)):
        output = function(x_MI, starts, weights, biases)
        scale = torch.arange(output.numel(), dtype=torch.float64)
        scaled = (output * scale.view_as(output)).sum()
        results += [output, *torch.autograd.grad(scaled, leaves)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_its_gradients_are_the_numerical_ones():
    starts = (0, 2, 5)
    x_MI, weights, biases = drawn(starts, (3, 2), inner=2)
    assert torch.autograd.gradcheck(
        lambda x, *parameters: grouped_linear(
            x, starts, parameters[:2], parameters[2:]
        ),
        (x_MI, *weights, *biases),
    )


def test_what_needs_no_gradient_gets_none():
    starts = (0, 2, 5)
    x_MI, weights, _ = drawn(starts, (3, 3), biased=False)
    x_MI = x_MI.detach()
    grouped_linear(x_MI, starts, weights).sum().backward()
    assert x_MI.grad is None and weights[1].grad is not None
