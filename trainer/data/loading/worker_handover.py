"""How a dataclass full of tensors goes from a worker process to the trainer: as one piece of shared memory, used again.

Each tensor on its own would be a file descriptor, a mapping and a thread's wake-up of its own, which for a small batch takes
longer than building it; and fresh shared memory comes page by page, which takes as long again. So a worker keeps its pieces,
and fills one anew once the trainer has let go of all tensors in it. Integers go as int32, which holds every row, token and
slot, and is half as much to write, to map and to bring to a device; `syncrec.batch.build.move` widens them there.
"""

import os
import weakref
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from trainer.distributed.resources import ranks_of_this_machine
from trainer.errors import InputError

SHARED_MEMORY = "/dev/shm"  # what holds the pieces, on Linux
_ALIGNED = 64  # bytes
_IN_HAND = 2  # batches of a rank: the one that is trained on, and the next one
_MAKE_ROOM = (
    "give it more (docker run --shm-size, a Kubernetes emptyDir with medium: Memory), or lower stream.prefetch, "
    "stream.workers (0: none is needed) or the batch"
)
_KEPT = 16  # pieces that a worker fills again; a trainer that holds on to more gets new ones


@dataclass(frozen=True)
class Packed:
    """`value` with a `_Place` for each tensor, and a piece of memory with the tensors' bytes, the last of which says whether
    it is in use."""

    value: Any
    piece: torch.Tensor

    def pin_memory(self):
        """The same in pinned memory (a DataLoader calls this)."""
        pinned = replace(self, piece=self.piece.pin_memory())
        _let_go(self.piece)
        return pinned


@dataclass(frozen=True)
class _Place:
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Packer:
    """Copies the CPU tensors of dataclasses, and of the dataclasses in them, into pieces of memory; int64 becomes int32."""

    def __init__(self, shared=True):
        """shared: memory that another process can map."""
        self._shared, self._pieces = shared, []

    def __call__(self, value) -> Packed:
        """The value packed. What `unpack` makes of it stays as it is while anyone holds one of its tensors."""
        places, size = [], 0

        def place(tensor):
            nonlocal size
            dtype = torch.int32 if tensor.dtype == torch.int64 else tensor.dtype
            length = tensor.numel() * dtype.itemsize
            places.append(
                (tensor, _Place(size, size + length, dtype, tuple(tensor.shape)))
            )
            size += -(-length // _ALIGNED) * _ALIGNED
            return places[-1][1]

        empty = _mapped(value, torch.Tensor, place)
        piece = self._free(size + 1)
        for tensor, where in places:
            _at(piece, where).copy_(tensor)
        return Packed(empty, piece)

    def _free(self, size):
        """A piece of at least so many bytes that nobody uses, from now on in use."""
        if not self._shared:
            return torch.ones(size, dtype=torch.uint8)
        free = [piece for piece in self._pieces if not piece[-1]]
        for piece in free:
            if len(piece) >= size:
                break
        else:
            self._pieces = [
                piece
                for piece in self._pieces
                if all(piece is not small for small in free)
            ]
            size += size // 4  # the next batches are not quite as large
            piece = torch.empty(0, dtype=torch.uint8).set_(_new_shared(size))
            if len(self._pieces) < _KEPT:
                self._pieces.append(piece)
        piece[-1] = 1
        return piece


def refuse_small_shared_memory(
    piece_bytes: int, workers: int, prefetch: int, world_size: int
) -> None:
    """Raises InputError where shared memory cannot hold what the loaders of this machine's ranks keep ready: pieces of so many
    bytes, `prefetch` of each of a rank's `workers` and two that it computes with."""
    pieces = workers * prefetch + _IN_HAND
    ranks = ranks_of_this_machine(world_size)
    needed = ranks * pieces * piece_bytes
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:  # another system, whose shared memory lies elsewhere
        return
    if needed > facts.f_blocks * facts.f_frsize:
        raise InputError(
            f"{_holds()}, but the loaders need {_amount(needed)} ({ranks} ranks x {pieces} batches x "
            f"{_amount(piece_bytes)}): {_MAKE_ROOM}",
            one_rank=True,
        )


def _new_shared(size):
    try:
        return torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{_holds()}, which is not enough for one more batch of {_amount(size)} ({reason}): {_MAKE_ROOM}",
            one_rank=True,
        ) from None


def _holds():
    try:
        facts = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"{SHARED_MEMORY} cannot be looked at"
    size, free = (
        blocks * facts.f_frsize for blocks in (facts.f_blocks, facts.f_bavail)
    )
    return f"{SHARED_MEMORY} has {_amount(size)}, {_amount(free)} of them free"


def _amount(size):
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{-(-size // 2**10)} KiB"


def unpack(packed: Packed):
    """The value with its tensors, which share the piece.

    The first tensor lies at the piece's first byte, and that matters where the piece is pinned. An
    asynchronous copy to a device has to keep the piece until it is done. PyTorch's allocator of
    pinned memory records the copy's stream only for memory that it knows: by its context, which is
    NumPy's here, or by its block's first address. So it knows the first tensor alone. `move` copies
    all of them on one stream, and the first one's record keeps the piece.
    """
    root = packed.piece.numpy()
    weakref.finalize(root, _let_go, packed.piece).atexit = False
    piece = torch.from_numpy(
        root
    )  # holds on to `root` as long as there is a tensor in it
    return _mapped(packed.value, _Place, lambda place: _at(piece, place))


def _let_go(piece):
    piece[-1] = 0


def _at(piece, place):
    return piece[place.begin : place.end].view(place.dtype).view(place.shape)


def _mapped(value, kind, function):
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, kind):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = _mapped(item, kind, function)
    return replace(value, **changed)
