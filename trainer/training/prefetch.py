"""Prefetch: the next batch's copy to the device and the exchange of its ids, during this step.

On CUDA this is done on a second stream. The host has to learn there how many ids come from which
rank, and waits for that stream alone, while the step before keeps the device busy on the other. On
a CPU the same is done in the same order.
"""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from embeddings.table import Exchange, ItemTable
from syncrec.batch.views import Batch, map_tensors, move


@dataclass(frozen=True)
class PrefetchedBatch:
    """A batch on the device, and the exchange of its ids."""

    batch: Batch
    exchange: Exchange


class Prefetcher:
    """The second stream, where the device has streams."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)

    def prepare(self, batch: Batch, table: ItemTable) -> PrefetchedBatch:
        """Starts to copy a batch and to exchange its ids. Called on all ranks.

        batch: in pinned memory, where there is a device.
        """
        with self._on_stream():
            batch = move(batch, self._device)
            exchange = table.exchange(batch.distinct)
            return PrefetchedBatch(batch, exchange)

    def send(self, prefetched: PrefetchedBatch) -> None:
        """Has the ids themselves sent, once it is known how many there are. Called on all ranks."""
        with self._on_stream():
            prefetched.exchange.send()

    def take(self, prefetched: PrefetchedBatch) -> tuple[Batch, Exchange]:
        """Hands a batch over to the step's own stream, which waits for the second."""
        self.send(prefetched)
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)

            # Its memory may be used again only once this stream is through with it.
            def record(tensor: torch.Tensor) -> torch.Tensor:
                tensor.record_stream(stream)
                return tensor

            map_tensors(prefetched.batch, record)
        return prefetched.batch, prefetched.exchange

    def _on_stream(self) -> AbstractContextManager[object]:
        """Within it, work is queued on the second stream."""
        if self._stream is None:
            return contextlib.nullcontext()
        return torch.cuda.stream(self._stream)
