"""The exponential moving average (EMA) of the dense weights: what is validated, kept and exported.

After step t it is the mean of the weights after the steps 1 … t, in which those of an earlier step
count `decay` times as much as those of the next one (Polyak averaging; Adam corrects its mean the
same way). So it needs no first value and no warm-up:

    decay 0.5, a weight that is 1, 2 and 4 after three steps:
    average    1    (0.5 · 1 + 2) / 1.5    (0.25 · 1 + 0.5 · 2 + 4) / 1.75

It lies beside the optimizer's state, whole or in ZeRO's parts, and is saved and resumed with it.
Buffers (λ, φ̄) and the item table are not averaged.
"""

from typing import TYPE_CHECKING

import torch

from trainer.checkpoint.zero_state import (
    AVERAGE,
    base_optimizer,
    flat_parameters,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class WeightAverage:
    """Averages the weights of an engine after each of its steps."""

    def __init__(self, engine: "DeepSpeedEngine", decay: float):
        """decay: above 0, below 1."""
        self._engine = engine
        self._decay = decay

    @torch.no_grad()
    def update(self, steps: int, made: torch.Tensor) -> None:
        """Takes in the weights after so many steps. Nothing waits for the device.

        made: on the device, whether the last step was made; the average stays where it was not.
        """
        states = base_optimizer(self._engine).state
        weights = flat_parameters(self._engine)
        averages = []
        for weight in weights:
            state = states[weight]
            if AVERAGE not in state:
                state[AVERAGE] = weight.detach().clone()
            averages.append(state[AVERAGE])
        if not weights:
            return
        share = (1 - self._decay) / (1 - self._decay**steps)
        share_of_step = (share * made).to(weights[0])
        changes = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(changes, share_of_step)
        torch._foreach_add_(averages, changes)
