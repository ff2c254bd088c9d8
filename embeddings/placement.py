"""Where a rank's rows lie, and whether they fit: capacity planning before anything is allocated."""

import os
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from embeddings.config import TableConfig
from embeddings.control_groups import available_host_memory

_FLOAT = 4
_STATE = {  # floats of a row's optimizer state: (in units of r, besides)
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
}
# FBGEMM's software cache takes 16 bytes for each cached row (which one it is, when it was last
# used) and 4 bytes for each row.
_CACHED_ROW = 16
_ROW = 4
# Bytes of rows that are in memory at once where a table is written, read or sent.
PIECE = 1 << 26
_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6))


@dataclass(frozen=True)
class Room:
    """Free bytes: on this rank's device (None: there is none but the host), and for it on the host."""

    device: int | None
    host: int


@dataclass(frozen=True)
class HostNeeds:
    """What a rank takes of its host beside the rows.

    checkpoints: whether they are written, and so the rows are copied to the host, wherever they lie.
    loaders: bytes of the processes that build batches.
    """

    checkpoints: bool = False
    loaders: int = 0


@dataclass(frozen=True)
class Capacity:
    """What this rank's rows take, in bytes, and where.

    Attributes:
        rows: how many they are.
        cached: whether they lie on the host, with a cache on the device.
        device: what they take of the device.
        host: what they take of the host.
        checkpoint: what a checkpoint takes of the host while it is written; 0 where none is.
        copied: whether that is a copy of all rows, which is written while training goes on. False:
            there is room for a piece of them only, and training waits.
    """

    rows: int
    cached: bool
    device: int
    host: int
    checkpoint: int = 0
    copied: bool = True

    def __str__(self) -> str:
        if self.cached:
            text = (
                f"{format_size(self.host)} a rank in the host's memory, cached in "
                f"{format_size(self.device)} of the device's"
            )
        elif self.device:
            text = f"{format_size(self.device)} a rank on the device"
        else:
            text = f"{format_size(self.host)} a rank"
        if self.copied:
            return text
        return (
            f"{text}; the host has no room for a second copy: training waits while a checkpoint is "
            "written"
        )


def plan_capacity(
    config: TableConfig,
    optimizer: str,
    rows: int,
    dim: int,
    room: Room,
    beside: HostNeeds = HostNeeds(),
    copies: int = 1,
) -> Capacity:
    """Settles table.placement for a rank with so many rows.

    optimizer: the name in force (never "auto"). copies: of the table; of rows that all of them hold
    a rank writes a part. Raises ValueError with the arithmetic where the rows fit nowhere, and where
    there is no device to cache them on.
    """
    capacity = _place_rows(config, optimizer, rows, dim, room, beside)
    if not beside.checkpoints:
        return capacity
    copy = capacity.host
    if not capacity.cached and capacity.device:
        copy = capacity.device
    copy = -(-copy // copies)
    free = room.host - beside.loaders - capacity.host
    if copy <= free:
        return replace(capacity, checkpoint=copy)
    piece = min(copy, PIECE)
    if piece <= free:
        return replace(capacity, checkpoint=piece, copied=False)
    raise ValueError(
        f"a checkpoint takes {format_size(piece)} of the host at least beside rows of "
        f"{format_size(capacity.host)}; {_describe_host(room, beside)}: use more hosts, or fewer "
        "ranks a host"
    )


def _place_rows(
    config: TableConfig,
    optimizer: str,
    rows: int,
    dim: int,
    room: Room,
    beside: HostNeeds,
) -> Capacity:
    """Where the rows lie: on the host, on the device, or on the host with a cache on the device."""
    wide, besides = _STATE[optimizer]
    table = rows * _FLOAT * (dim + wide * dim + besides)
    needs = (
        f"{rows:,} rows a rank of {dim} floats with {optimizer}'s state are "
        f"{format_size(table)}"
    )
    host = _describe_host(room, beside)
    fits_host = table <= room.host - beside.loaders
    if room.device is None:
        if config.placement == "cached":
            raise ValueError(
                "table.placement=cached needs CUDA: on cpu all rows lie in the host's memory as "
                "it is; use auto"
            )
        if not fits_host:
            raise ValueError(
                f"{needs}; {host}: use more hosts, or a smaller model.dim"
            )
        return Capacity(rows, False, 0, table)
    share = int(config.device_share * room.device)
    device = (
        f"table.device_share {config.device_share:g} of the {format_size(room.device)} left on "
        f"the device is {format_size(share)}"
    )
    fits_device = table <= share
    if config.placement == "device" and not fits_device:
        raise ValueError(
            f"{needs}; {device}: use table.placement=cached, or more ranks"
        )
    if config.placement != "cached" and fits_device:
        return Capacity(rows, False, table, 0)
    if not fits_host:
        raise ValueError(
            f"{needs}; {device}, and {host}: use more ranks or hosts"
        )
    cached_rows = int(config.cache_share * rows)
    cache = cached_rows * (_FLOAT * dim + _CACHED_ROW) + rows * _ROW
    if cache > share:
        raise ValueError(
            f"a cache of table.cache_share {config.cache_share:g} of {rows:,} rows of {dim} floats "
            f"takes {format_size(cache)}; {device}: lower table.cache_share"
        )
    return Capacity(rows, True, cache, table)


def free_room(device: torch.device) -> Room:
    """What is free now, the least over all ranks, so that all of them plan alike.

    Called on all ranks.
    """
    cuda = device.type == "cuda"
    free_on_device = torch.cuda.mem_get_info(device)[0] if cuda else 0
    free_on_host = available_host_memory() // count_ranks_of_host()
    least = torch.tensor([free_on_device, free_on_host])
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    on_device, host = least.tolist()
    return Room(on_device if cuda else None, host)


def count_ranks_of_host() -> int:
    """How many ranks this host has.

    Whoever joined the group left it in the environment (trainer.distributed.launchers); all ranks,
    where it did not.
    """
    ranks = dist.get_world_size()
    local_size = os.environ.get("LOCAL_SIZE", ranks)
    local_size = os.environ.get("LOCAL_WORLD_SIZE", local_size)
    return max(1, min(int(local_size), ranks))


def count_devices_of_host(device: torch.device) -> int:
    """How many devices TorchRec is to count on a host: it looks for rank r on device r % that.

    One, where each rank sees one device of its own.
    """
    if device.type == "cuda" and torch.cuda.device_count() == 1:
        return 1
    return count_ranks_of_host()


def _describe_host(room: Room, beside: HostNeeds) -> str:
    loaders = ""
    if beside.loaders:
        loaders = f", of which loaders take {format_size(beside.loaders)}"
    return f"the host has {format_size(room.host)} left for a rank{loaders}"


def format_size(count: float) -> str:
    """Bytes for a message: `0.0 kB`, `64.0 MB`, `1.2 TB`."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
