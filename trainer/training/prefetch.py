"""A batch made ready beside the step before it: copied to the device, its ids on their way to the ranks that hold the rows.

On CUDA this is done on a second stream. The host has to learn there how many ids come from which rank, and waits for that
stream alone, while the step before keeps the device busy on the other. On a CPU the same is done in the same order.
"""

import contextlib
from dataclasses import dataclass

import torch

from embeddings.table import Exchange, ItemTable
from syncrec.batch.build import Batch, map_tensors, move


@dataclass(frozen=True)
class Ready:
    """A batch on the device, and where its ids are."""

    batch: Batch
    exchange: Exchange


class Beside:
    """The second stream, where the device has streams."""

    def __init__(self, device: torch.device):
        self._device, self._stream = (
            device,
            torch.cuda.Stream(device) if device.type == "cuda" else None,
        )

    def prepare(self, batch: Batch, table: ItemTable) -> Ready:
        """Starts to copy a batch (in pinned memory, where there is a device) and to exchange its ids. Called on all ranks."""
        with self._on_it():
            batch = move(batch, self._device)
            return Ready(batch, table.exchange(batch.distinct))

    def send(self, ready: Ready):
        """Has the ids themselves sent, once it is known how many there are. Called on all ranks."""
        with self._on_it():
            ready.exchange.send()

    def take(self, ready: Ready):
        """(batch, exchange) for the step's own stream, which waits for the second."""
        self.send(ready)
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            map_tensors(ready.batch, lambda tensor: tensor.record_stream(stream))
        return ready.batch, ready.exchange

    def _on_it(self):
        return (
            contextlib.nullcontext()
            if self._stream is None
            else torch.cuda.stream(self._stream)
        )
