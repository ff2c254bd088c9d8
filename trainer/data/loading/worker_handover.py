"""The worker hand-over: how a batch goes from a worker process to the trainer, in shared memory.

The batch is a dataclass full of tensors. All go as one piece of shared memory, which is used again:

    worker                                                  trainer

    RankBatch(ids, weight, …)
        │  BatchPacker
        ▼
    piece   0        64          …            last byte
            ┌────────┬───────────┬───────────┬───┐
            │ ids    │ weight    │ …         │ 1 │ ─────▶   unpack: tensors that are views of the
            └────────┴───────────┴───────────┴───┘          piece, in a RankBatch as before
                                               0  ◀─────    when the last of them is gone:
    the worker may fill the piece again                     the last byte says that it is free

Each tensor on its own would be a file descriptor, a mapping and a thread's wake-up, which for a
small batch takes longer than building it. Fresh shared memory comes page by page, which takes as
long again. So a worker keeps its pieces, and fills one anew once the trainer has let go of all
tensors in it. Integers go as int32, which holds every row, token and slot. That is half as much to
write, to map and to bring to a device; `syncrec.batch.build.move` widens them there.
"""

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from trainer.distributed.resources import count_local_ranks
from trainer.errors import InputError

SHARED_MEMORY = "/dev/shm"  # what holds the pieces, on Linux
_ALIGNED = 64  # bytes
_IN_HAND = 2  # batches of a rank: the one that is trained on, and the next one
_MAKE_ROOM = (
    "give it more (docker run --shm-size, a Kubernetes emptyDir with medium: Memory), "
    "or lower stream.prefetch, stream.workers (0: none is needed) or the batch"
)
_KEPT = 16  # pieces that a worker fills again; a trainer that holds on to more gets new ones
_FREE = 0  # values of a piece's last byte
_IN_USE = 1


@dataclass(frozen=True)
class PackedBatch:
    """A dataclass packed by `BatchPacker`.

    value: the dataclass with a `_Slot` in place of each tensor. piece: memory with the tensors'
    bytes, the last of which says whether it is in use.
    """

    value: Any
    piece: torch.Tensor

    def pin_memory(self) -> "PackedBatch":
        """The same in pinned memory (a DataLoader calls this)."""
        pinned = replace(self, piece=self.piece.pin_memory())
        _free(self.piece)
        return pinned


@dataclass(frozen=True)
class _Slot:
    """Where in a piece a tensor's bytes are, and what they are."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def view(self, piece: torch.Tensor) -> torch.Tensor:
        """The tensor, which shares the piece."""
        data = piece[self.begin : self.end]
        return data.view(self.dtype).view(self.shape)


class _Layout:
    """Gives tensors slots one after the other."""

    def __init__(self):
        self.size = 0
        self.tensors: list[torch.Tensor] = []
        self.slots: list[_Slot] = []

    def add(self, tensor: torch.Tensor) -> _Slot:
        """The tensor's slot; int64 becomes int32."""
        dtype = tensor.dtype
        if dtype == torch.int64:
            dtype = torch.int32
        length = tensor.numel() * dtype.itemsize
        slot = _Slot(self.size, self.size + length, dtype, tuple(tensor.shape))
        self.tensors.append(tensor)
        self.slots.append(slot)
        self.size += -(-length // _ALIGNED) * _ALIGNED
        return slot


class BatchPacker:
    """Copies the CPU tensors of a dataclass into a piece of memory; int64 becomes int32.

    So it does with those of the dataclasses in it.
    """

    def __init__(self, shared: bool = True):
        """shared: memory that another process can map."""
        self._shared = shared
        self._pieces: list[torch.Tensor] = []

    def __call__(self, value: Any) -> PackedBatch:
        """The value packed.

        What `unpack` makes of it does not change while anyone holds one of its tensors.
        """
        layout = _Layout()
        outline = _map_fields(value, torch.Tensor, layout.add)
        piece = self._take_piece(layout.size + 1)
        for tensor, slot in zip(layout.tensors, layout.slots, strict=True):
            slot.view(piece).copy_(tensor)
        return PackedBatch(outline, piece)

    def _take_piece(self, size: int) -> torch.Tensor:
        """A piece of at least so many bytes that nobody uses, from now on in use."""
        if not self._shared:
            return torch.full((size,), _IN_USE, dtype=torch.uint8)
        free = []
        in_use = []
        for piece in self._pieces:
            if piece[-1] == _FREE:
                free.append(piece)
            else:
                in_use.append(piece)
        for piece in free:
            if len(piece) >= size:
                piece[-1] = _IN_USE
                return piece
        self._pieces = in_use  # those that are free are too small
        size += size // 4  # the next batches are not quite as large
        piece = torch.empty(0, dtype=torch.uint8).set_(_allocate_shared(size))
        piece[-1] = _IN_USE
        if len(self._pieces) < _KEPT:
            self._pieces.append(piece)
        return piece


def refuse_small_shared_memory(
    piece_bytes: int,
    workers: int,
    prefetch: int,
    world_size: int,
) -> None:
    """Raises InputError where shared memory cannot hold what this machine's loaders keep ready.

    Each of the machine's ranks has `prefetch` pieces of each of its `workers`, and two that it
    computes with.
    """
    pieces = workers * prefetch + _IN_HAND
    ranks = count_local_ranks(world_size)
    needed = ranks * pieces * piece_bytes
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system, whose shared memory lies elsewhere
        return
    if needed > status.f_blocks * status.f_frsize:
        raise InputError(
            f"{_describe_shared_memory()}, but the loaders need {_format_bytes(needed)} "
            f"({ranks} ranks x {pieces} batches x {_format_bytes(piece_bytes)}): "
            f"{_MAKE_ROOM}",
            one_rank=True,
        )


def _allocate_shared(size: int) -> torch.UntypedStorage:
    try:
        return torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{_describe_shared_memory()}, which is not enough for one more batch of "
            f"{_format_bytes(size)} ({reason}): {_MAKE_ROOM}",
            one_rank=True,
        ) from None


def _describe_shared_memory() -> str:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"{SHARED_MEMORY} cannot be looked at"
    size = _format_bytes(status.f_blocks * status.f_frsize)
    free = _format_bytes(status.f_bavail * status.f_frsize)
    return f"{SHARED_MEMORY} has {size}, {free} of them free"


def _format_bytes(size: int) -> str:
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    kibibytes = -(-size // 2**10)
    return f"{kibibytes} KiB"


def unpack(packed: PackedBatch) -> Any:
    """The value with its tensors, which share the piece.

    The first tensor lies at the piece's first byte, and that matters where the piece is pinned. An
    asynchronous copy to a device has to keep the piece until it is done. PyTorch's allocator of
    pinned memory records the copy's stream only for memory that it knows: by its context, which is
    NumPy's here, or by its block's first address. So it knows the first tensor alone. `move` copies
    all of them on one stream, and the first one's record keeps the piece.
    """
    root = packed.piece.numpy()
    weakref.finalize(root, _free, packed.piece).atexit = False
    # Holds on to `root` as long as there is a tensor in it.
    piece = torch.from_numpy(root)

    def view_in_piece(slot: _Slot) -> torch.Tensor:
        return slot.view(piece)

    return _map_fields(packed.value, _Slot, view_in_piece)


def _free(piece: torch.Tensor) -> None:
    piece[-1] = _FREE


def _map_fields(
    value: Any,
    kind: type,
    function: Callable[[Any], Any],
) -> Any:
    """The same dataclass with function(field) for each field of that kind.

    So inside it, in dataclasses and tuples of dataclasses.
    """
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, kind):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = _map_fields(item, kind, function)
        elif isinstance(item, tuple) and item and is_dataclass(item[0]):
            changed[field.name] = tuple(
                _map_fields(inner, kind, function) for inner in item
            )
    return replace(value, **changed)
