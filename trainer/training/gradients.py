"""Gradient clipping and the guard against non-finite steps, between backward and update.

Both gradients, the dense one and the item table's, are clipped to a norm. A step with a number that
is not finite is kept from any change.

Nothing here waits for the device. The norms, and whether all numbers are finite, stay there: the
dense optimizer's kernel is told not to step, and the table's gradient is made zero. The host learns
of it later (`HostCopy`). What the ranks signal each other
(`trainer.distributed.agreement.Signals`) travels in the same reduction; a step in which a rank
signals trouble is not made either.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from trainer.checkpoint.zero_state import base_optimizer, collect_gradients
from trainer.distributed.agreement import Signals

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class HostCopy:
    """An asynchronous copy of a tensor's values from the device to the host."""

    def __init__(self, tensor: torch.Tensor):
        self._values = tensor.detach().to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def on_host(self) -> bool:
        """True where there is no device to wait for: the same on all ranks."""
        return self._event is None

    def values(self) -> list[float]:
        """Returns the numbers.

        Waits until they have arrived, and for nothing that came after.
        """
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class Gradients:
    """Clips and guards the gradients of one backward; built around an engine."""

    def __init__(self, engine: "DeepSpeedEngine", clip: float):
        """clip: the largest norm of either gradient, 0 for none.

        `made` is, on the device, whether the step that was checked last is made.
        """
        self._engine = engine
        self._clip = clip
        self._optimizer = base_optimizer(engine)
        self.made: torch.Tensor | None = None

    @property
    def skips_on_device(self) -> bool:
        """True where the dense optimizer can skip a step without asking the host.

        PyTorch's fused Adam takes from the device whether it is to step.
        """
        return bool(self._optimizer.defaults.get("fused"))

    def check(
        self,
        gradient: torch.Tensor,
        counted: torch.Tensor,
        loss: torch.Tensor,
        signals: Signals,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clips both gradients where they are, and checks them. Called on all ranks.

        gradient: (ids, r), of the looked-up vectors. counted: the part of it that the norm is taken
        over. signals: this rank's.

        Returns three tensors on the device. The table's gradient, clipped; it is zero where the
        step is skipped, because a number is not finite on any rank or a rank signals trouble. The
        outcome: 1 where all is finite, and the ranks' signals summed. The dense gradient's norm.
        """
        dense = collect_gradients(self._engine)
        sums = self._reduce(gradient, counted, dense, loss, signals)
        counted_square = sums[0]
        dense_square = sums[1]
        signal_sums = sums[3:]
        trouble = signal_sums[0]
        finite = sums.sum().isfinite()
        made = finite & (trouble == 0)
        self.made = made
        # The losses carry the number of ranks as a factor, which the table divides by.
        norm = counted_square.sqrt() / dist.get_world_size()
        dense_norm = dense_square.sqrt()
        if self._clip:
            share = self._clip_share(norm)
            dense_share = self._clip_share(dense_norm)
            gradient = gradient * share.to(gradient.dtype)
            torch._foreach_mul_(dense, dense_share.float())
        if self.skips_on_device:
            skipped = made.logical_not().float()
            self._optimizer.found_inf = skipped  # type: ignore[attr-defined]  # as GradScaler sets it
        gradient = torch.where(made, gradient, gradient.new_zeros(()))
        outcome = torch.cat([finite.double().unsqueeze(0), signal_sums])
        return gradient, outcome, dense_norm

    def _reduce(
        self,
        gradient: torch.Tensor,
        counted: torch.Tensor,
        dense: list[torch.Tensor],
        loss: torch.Tensor,
        signals: Signals,
    ) -> torch.Tensor:
        """Sums over ranks, in float64: both squared norms, a probe for finiteness, the signals.

        They go in one reduction, which is made anyhow.
        """
        dense_norm = torch.nn.utils.get_total_norm(dense)
        dense_square = dense_norm.to(gradient.device, torch.float64).square()
        # Every rank has all of it.
        if self._engine.zero_optimization_stage() == 0:
            dense_square = dense_square / dist.get_world_size()
        counted_norm = torch.linalg.vector_norm(counted, dtype=torch.float64)
        probe = gradient.sum().double() + loss.double()
        # From pinned memory, so that the host does not wait for the copy.
        own_signals = torch.tensor(
            signals.numbers(), dtype=torch.float64, pin_memory=gradient.is_cuda
        )
        own_signals = own_signals.to(gradient.device, non_blocking=True)
        numbers = torch.stack([counted_norm.square(), dense_square, probe])
        sums = torch.cat([numbers, own_signals])
        # What is not finite on one rank is not finite on all.
        dist.all_reduce(sums)
        return sums

    def _clip_share(self, norm: torch.Tensor) -> torch.Tensor:
        """Returns what a gradient of that norm is multiplied by."""
        return (self._clip / norm).clamp(max=1)
