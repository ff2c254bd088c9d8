"""Between backward and update: both gradients are clipped, and a step with a number that is none is kept from any change.

Nothing here waits for the device. What the norms are and whether all numbers are finite stays there: the dense optimizer's
kernel is told not to step, and the table's gradient is made zero. The host learns of it later (`Known`).
"""

import torch
import torch.distributed as dist

from trainer.dense import base_optimizer, gradients


class Known:
    """A tensor's value on its way from the device to the host."""

    def __init__(self, tensor):
        self._value, self._event = tensor.detach().to("cpu", non_blocking=True), None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def value(self):
        """The number; waits until it has arrived, and for nothing that came after."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


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

    def check(self, gradient, counted, loss):
        """Clips the dense gradient where it is. Returns the table's, clipped, or zero where anything is not finite on any rank;
        whether all is finite; and the dense gradient's norm. The last two are scalars on the device. On all ranks.

        gradient: (ids, r), of the looked-up vectors. counted: the part of it that the norm is taken over.
        """
        dense, ranks = gradients(self._engine), dist.get_world_size()
        square = torch.nn.utils.get_total_norm(dense).to(gradient.device, torch.float64).square()
        if self._engine.zero_optimization_stage() == 0:  # every rank has all of it
            square = square / ranks
        counted_norm = torch.linalg.vector_norm(counted, dtype=torch.float64)
        sums = torch.stack([counted_norm.square(), square, gradient.sum().double() + loss.double()])
        dist.all_reduce(sums)  # what is no number on one rank is none on all
        finite = sums.sum().isfinite()
        # The losses carry the number of ranks as a factor, which the table divides by.
        norm, dense_norm = sums[0].sqrt() / ranks, sums[1].sqrt()
        if self._clip:
            gradient = gradient * self._share(norm).to(gradient.dtype)
            torch._foreach_mul_(dense, self._share(dense_norm).float())
        if self.can_be_held:
            self._optimizer.found_inf = finite.logical_not().float()
        return torch.where(finite, gradient, gradient.new_zeros(())), finite, dense_norm

    def _share(self, norm):
        return (self._clip / norm).clamp(max=1)
