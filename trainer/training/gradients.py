"""Between backward and update: both gradients are clipped, and a step with a number that is none is kept from any change.

Nothing here waits for the device. What the norms are and whether all numbers are finite stays there: the dense optimizer's
kernel is told not to step, and the table's gradient is made zero. The host learns of it later (`Known`). What the ranks
signal each other (`trainer.distributed.agreement.Signals`) travels in the same reduction; a step in which a rank signals trouble is not made
either.
"""

import torch
import torch.distributed as dist

from trainer.checkpoint.zero_state import base_optimizer, gradients
from trainer.distributed.agreement import Signals


class Known:
    """A tensor's values on their way from the device to the host."""

    def __init__(self, tensor):
        self._value, self._event = tensor.detach().to("cpu", non_blocking=True), None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def on_host(self) -> bool:
        """True where there is no device to be waited for: the same on all ranks."""
        return self._event is None

    def value(self):
        """The number, or the list of numbers; waits until it has arrived, and for nothing that came after."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()


class Gradients:
    """Clips and guards what comes of one backward; built around an engine."""

    def __init__(self, engine, clip):
        """clip: the largest norm of either gradient, 0 for none."""
        self._engine, self._clip = engine, clip
        self._optimizer = base_optimizer(engine)

    @property
    def can_be_held(self):
        """True where a step of the dense optimizer can be kept from changing anything without asking the host: PyTorch's fused
        Adam takes that from the device."""
        return bool(self._optimizer.defaults.get("fused"))

    def check(self, gradient, counted, loss, signals: Signals):
        """Clips the dense gradient where it is. Called on all ranks.

        gradient: (ids, r), of the looked-up vectors. counted: the part of it that the norm is taken
        over. signals: this rank's.

        Returns three tensors on the device. The table's gradient, clipped; it is zero where the step
        is not to be made, because a number is not finite on any rank or a rank signals trouble. The
        outcome: 1 where all is finite, and the ranks' signals summed. The dense gradient's norm.
        """
        dense, ranks = gradients(self._engine), dist.get_world_size()
        square = (
            torch.nn.utils.get_total_norm(dense)
            .to(gradient.device, torch.float64)
            .square()
        )
        if self._engine.zero_optimization_stage() == 0:  # every rank has all of it
            square = square / ranks
        counted_norm = torch.linalg.vector_norm(counted, dtype=torch.float64)
        probe = gradient.sum().double() + loss.double()
        # In one reduction, which is made anyhow; from pinned memory, so that the host does not wait for the copy.
        told = torch.tensor(
            signals.numbers(), dtype=torch.float64, pin_memory=gradient.is_cuda
        )
        told = told.to(gradient.device, non_blocking=True)
        sums = torch.cat([torch.stack([counted_norm.square(), square, probe]), told])
        dist.all_reduce(sums)  # what is no number on one rank is none on all
        told = sums[3:]
        finite = sums.sum().isfinite()
        made = finite & (told[0] == 0)
        # The losses carry the number of ranks as a factor, which the table divides by.
        norm, dense_norm = sums[0].sqrt() / ranks, sums[1].sqrt()
        if self._clip:
            gradient = gradient * self._share(norm).to(gradient.dtype)
            torch._foreach_mul_(dense, self._share(dense_norm).float())
        if self.can_be_held:
            self._optimizer.found_inf = made.logical_not().float()
        gradient = torch.where(made, gradient, gradient.new_zeros(()))
        return gradient, torch.cat([finite.double().unsqueeze(0), told]), dense_norm

    def _share(self, norm):
        return (self._clip / norm).clamp(max=1)
