"""Utilization: which share of the device's arithmetic a run uses (MFU), and how much is padding.

MFU is the model's operations by formula (syncrec.operations) over what the devices could have done in
the same time. Their peak is named (`profile.peak_tflops`), from a data sheet, or measured.
"""

import time
from typing import TYPE_CHECKING

import torch

from syncrec.operations import count_slots, packed_work, step_operations
from trainer.config.run import MEASURED_PEAK

if TYPE_CHECKING:
    from syncrec.batch.views import Batch
    from syncrec.config import ModelConfig

_TERA = 1e12
_SECONDS = 0.2  # of the measurement
# Rows of the square matrices whose product is measured.
_ROWS = {"cuda": 8192, "cpu": 768}


class WorkMeter:
    """Counts what this rank's steps compute, from batches on the host."""

    def __init__(self, config: "ModelConfig", peak: float = 0.0):
        """peak: of this rank's device, in operations a second; 0: operations are not counted."""
        self.peak = peak
        self._config = config
        self._reset()

    def _reset(self) -> None:
        self._tokens = 0
        self._slots = 0
        self._operations = 0

    def add(self, batch: "Batch") -> None:
        """Adds one step's batch."""
        tokens, slots = count_slots(self._config, batch)
        self._tokens += tokens
        self._slots += slots
        if self.peak:
            works = packed_work(self._config, batch)
            self._operations += step_operations(self._config, works)

    def take(self) -> tuple[int, int, int]:
        """Tokens, padded slots and operations since the last call."""
        counts = (self._tokens, self._slots, self._operations)
        self._reset()
        return counts


def find_peak(
    peak_tflops: float, device: torch.device, precision: str
) -> float:
    """The peak of this rank's device, in operations a second; 0 where MFU is not asked for.

    peak_tflops: `profile.peak_tflops`. precision: of the model.
    """
    if peak_tflops == MEASURED_PEAK:
        return measure_peak(device, precision)
    return peak_tflops * _TERA


def measure_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a large product of matrices, as the model's precision has it."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows = _ROWS[device.type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    torch.mm(matrix, matrix)
    _wait(device)
    products = 0
    begun = time.perf_counter()
    seconds = 0.0
    while seconds < _SECONDS:
        torch.mm(matrix, matrix)
        _wait(device)
        products += 1
        seconds = time.perf_counter() - begun
    return products * 2 * rows**3 / seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
