"""A linear layer of each group of rows: what domains have of their own, in one tensor.

Rows of a group stand together. A product for each group is written into its part of one result, so
that all that follows works on the whole, not group by group: a device launches as few kernels as
for one group, but for the products. Groups may have any number of rows, none too. So they are not
padded to a batched product, whose size the largest group would settle for all.

Shapes: M rows, G groups, I width in, O width out.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def grouped_linear(
    x_MI: Tensor,
    starts: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
) -> Tensor:
    """x Wᵀ + b by group, (M, O).

    Args:
        x_MI: rows, sorted by group.
        starts: where each group's rows begin, and M; G + 1 numbers.
        weights: of each group, (O, I). Where some have less than O rows, the result is 0 beyond
            them.
        biases: of each group, (O,); none for none.

    Example: two groups of two rows and one, I = 2, O = 2:

        x_MI       tensor([[1, 0], [0, 1], [1, 1]])
        starts     (0, 2, 3)
        weights    tensor([[1, 2], [3, 4]]), tensor([[5, 6]])
        result     tensor([[1, 3], [2, 4], [11, 0]])
    """
    result = _GroupedLinear.apply(x_MI, tuple(starts), *weights, *biases)
    return cast(Tensor, result)


class _GroupedLinear(torch.autograd.Function):
    """Forward and backward write each group's products where they belong: nothing is copied."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, starts: tuple[int, ...], *parameters: Tensor
    ) -> Tensor:
        groups = len(starts) - 1
        weights = parameters[:groups]
        biases = parameters[groups:]
        ctx.starts = starts
        ctx.has_biases = bool(biases)
        ctx.save_for_backward(x_MI, *weights)
        widths = [len(weight) for weight in weights]
        widest = max(widths)
        result_MO = x_MI.new_empty(len(x_MI), widest)
        if min(widths) < widest:
            result_MO.zero_()
        for group, weight_OI in enumerate(weights):
            begin = starts[group]
            rows = starts[group + 1] - begin
            x_rows = x_MI.narrow(0, begin, rows)
            result = result_MO.narrow(0, begin, rows)
            result = result.narrow(1, 0, widths[group])
            if biases:
                torch.addmm(biases[group], x_rows, weight_OI.T, out=result)
            else:
                torch.mm(x_rows, weight_OI.T, out=result)
        return result_MO

    @staticmethod
    def backward(ctx: Any, gradient_MO: Tensor) -> tuple[Tensor | None, ...]:
        x_MI, *weights = ctx.saved_tensors
        needs_x, _, *needs_parameters = ctx.needs_input_grad
        gradient_MI = torch.empty_like(x_MI) if needs_x else None
        of_weights: list[Tensor | None] = []
        of_biases: list[Tensor | None] = []
        for group, weight_OI in enumerate(weights):
            begin = ctx.starts[group]
            rows = ctx.starts[group + 1] - begin
            gradient = gradient_MO.narrow(0, begin, rows)
            gradient = gradient.narrow(1, 0, len(weight_OI))
            x_rows = x_MI.narrow(0, begin, rows)
            if gradient_MI is not None:
                target = gradient_MI.narrow(0, begin, rows)
                torch.mm(gradient, weight_OI, out=target)
            needed = needs_parameters[group]
            of_weights.append(gradient.T @ x_rows if needed else None)
            if ctx.has_biases:
                needed = needs_parameters[len(weights) + group]
                of_biases.append(gradient.sum(0) if needed else None)
        return gradient_MI, None, *of_weights, *of_biases
