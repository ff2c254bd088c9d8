"""How a dataclass full of tensors goes from a worker process to the trainer: as one piece of shared memory.

Each tensor on its own would be a file descriptor, a mapping and a thread's wake-up of its own, which for a small batch takes
longer than building it.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Packed:
    """`value` with a `_Place` for each tensor, and the tensors' bytes."""

    value: Any
    buffer: torch.Tensor

    def pin_memory(self):
        """The same in pinned memory (a DataLoader calls this)."""
        return replace(self, buffer=self.buffer.pin_memory())


@dataclass(frozen=True)
class _Place:
    begin: int
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(value) -> Packed:
    """Copies the CPU tensors of a dataclass, and of the dataclasses in it, into shared memory."""
    places, size = [], 0

    def place(tensor):
        nonlocal size
        places.append((tensor, _Place(size, size + tensor.nbytes, tensor.dtype, tuple(tensor.shape))))
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        return places[-1][1]

    empty = _mapped(value, torch.Tensor, place)
    buffer = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    for tensor, where in places:
        _at(buffer, where).copy_(tensor)
    return Packed(empty, buffer)


def unpack(packed: Packed):
    """The value with its tensors, which share the buffer."""
    return _mapped(packed.value, _Place, lambda place: _at(packed.buffer, place))


def _at(buffer, place):
    return buffer[place.begin : place.end].view(place.dtype).view(place.shape)


def _mapped(value, kind, function):
    changed = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if isinstance(item, kind):
            changed[field.name] = function(item)
        elif is_dataclass(item):
            changed[field.name] = _mapped(item, kind, function)
    return replace(value, **changed)
