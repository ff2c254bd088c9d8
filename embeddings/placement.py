"""Where a rank's rows lie and whether they fit: reckoned before anything is allocated."""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from embeddings.control_groups import host_memory

_FLOAT = 4
_STATE = {  # floats that a fused optimizer keeps of a row of r: (in units of r, besides)
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
}
# FBGEMM's software cache keeps 16 bytes for each place (whose row it is, when it was last used) and 4 bytes for each row.
_PLACE, _MAPPED = 16, 4
PIECE = (
    1 << 26
)  # bytes of rows that are held at once where a table is written, read or sent


@dataclass(frozen=True)
class Room:
    """Bytes that are free: on this rank's device (None: there is none but the host), and for this rank on the host."""

    device: int | None
    host: int


@dataclass(frozen=True)
class HostNeeds:
    """What a rank takes of its host beside the rows. checkpoints: they are written, and so the rows are copied to the host,
    wherever they lie. loaders: bytes of the processes that build batches."""

    checkpoints: bool = False
    loaders: int = 0


@dataclass(frozen=True)
class Capacity:
    """What this rank's rows take, in bytes, and where: on the device, on the host.

    checkpoint: what a checkpoint takes of the host while it is written; 0 where none is. copied: that is a copy of all rows,
    from which is written while training goes on; False: there is room for a piece of them only, and training waits.
    """

    rows: int
    cached: bool
    device: int
    host: int
    checkpoint: int = 0
    copied: bool = True

    def __str__(self):
        if self.cached:
            rows = f"{_size(self.host)} a rank in the host's memory, cached in {_size(self.device)} of the device's"
        else:
            rows = f"{_size(self.device or self.host)} a rank" + (
                " on the device" if self.device else ""
            )
        if self.copied:
            return rows
        return f"{rows}; the host has no room for a second copy: training waits while a checkpoint is written"


def plan_capacity(
    config, optimizer, rows, dim, room: Room, beside: HostNeeds = HostNeeds()
) -> Capacity:
    """Settles table.placement for a rank with so many rows.

    optimizer: the name in force (never "auto"). Raises ValueError with the arithmetic where they fit nowhere, and where
    there is no device to cache them on.
    """
    capacity = _placed(config, optimizer, rows, dim, room, beside)
    if not beside.checkpoints:
        return capacity
    copy = capacity.host if capacity.cached else capacity.device or capacity.host
    left = room.host - beside.loaders - capacity.host
    if copy <= left:
        return replace(capacity, checkpoint=copy)
    piece = min(copy, PIECE)
    if piece <= left:
        return replace(capacity, checkpoint=piece, copied=False)
    raise ValueError(
        f"a checkpoint takes {_size(piece)} of the host at least beside rows of {_size(capacity.host)}; "
        f"{_left_of_host(room, beside)}: use more hosts, or fewer ranks a host"
    )


def _placed(config, optimizer, rows, dim, room, beside):
    """Where the rows lie."""
    wide, besides = _STATE[optimizer]
    table = rows * _FLOAT * (dim + wide * dim + besides)
    what = f"{rows:,} rows a rank of {dim} floats with {optimizer}'s state are {_size(table)}"
    if room.device is None:
        if config.placement == "cached":
            raise ValueError(
                "table.placement=cached needs CUDA: on cpu all rows lie in the host's memory as it is; use auto"
            )
        if table > room.host - beside.loaders:
            raise ValueError(
                f"{what}; {_left_of_host(room, beside)}: use more hosts, or a smaller model.dim"
            )
        return Capacity(rows, False, 0, table)
    cache = int(config.cache_share * rows) * (_FLOAT * dim + _PLACE) + rows * _MAPPED
    share = int(config.device_share * room.device)
    device = f"table.device_share {config.device_share:g} of the {_size(room.device)} left on the device is {_size(share)}"
    if config.placement == "device" or (config.placement == "auto" and table <= share):
        if table > share:
            raise ValueError(
                f"{what}; {device}: use table.placement=cached, or more ranks"
            )
        return Capacity(rows, False, table, 0)
    if table > room.host - beside.loaders:
        raise ValueError(
            f"{what}; {device}, and {_left_of_host(room, beside)}: use more ranks or hosts"
        )
    if cache > share:
        raise ValueError(
            f"a cache of table.cache_share {config.cache_share:g} of {rows:,} rows of {dim} floats takes {_size(cache)}; "
            f"{device}: lower table.cache_share"
        )
    return Capacity(rows, True, cache, table)


def free_room(device: torch.device) -> Room:
    """What is free now, the least over all ranks, so that all of them plan alike. Called on all ranks."""
    cuda = device.type == "cuda"
    found = torch.tensor(
        [
            torch.cuda.mem_get_info(device)[0] if cuda else 0,
            host_memory() // ranks_of_host(),
        ]
    )
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    on_device, host = found.tolist()
    return Room(on_device if cuda else None, host)


def ranks_of_host():
    """How many ranks this host has, as whoever joined the group left in the environment (trainer.distributed.launchers); all of them, where
    it did not."""
    ranks = dist.get_world_size()
    return max(
        1,
        min(
            int(
                os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", ranks))
            ),
            ranks,
        ),
    )


def devices_of_host(device: torch.device) -> int:
    """How many devices TorchRec is to count on a host: it looks for rank r on device r % that. One, where each rank sees one
    device of its own."""
    return (
        1
        if device.type == "cuda" and torch.cuda.device_count() == 1
        else ranks_of_host()
    )


def _left_of_host(room, beside):
    loaders = (
        f", of which loaders take {_size(beside.loaders)}" if beside.loaders else ""
    )
    return f"the host has {_size(room.host)} left for a rank{loaders}"


def _size(count):
    for unit, bytes_of_it in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_of_it:
            return f"{count / bytes_of_it:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
