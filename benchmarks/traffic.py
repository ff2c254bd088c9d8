"""What the ranks send each other in a step, in three ways that can be held against each other.

- By formula (`expected`, of trainer/planning/traffic.py), from the batch's and the model's sizes alone.
- By call: the functions of `torch.distributed` are replaced by ones that note what they are
  handed (`watch`, `Traffic`). What a rank then sends follows from the algorithm that the
  backend uses (`sent`).
- On the wire: what the network interface counts, where all traffic of a rank passes one that
  nobody else uses (a namespace).

`least` is what no trainer can do without: every distinct row that a rank needs and another one
holds, once there and its gradient once back, and the dense gradients' reduction.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from trainer.planning.traffic import (
    GRADIENTS_BETWEEN,
    IDS_BETWEEN,
    expected,
    messages,
    sent,
)

__all__ = [
    "Call",
    "Traffic",
    "expected",
    "foreign",
    "least",
    "messages",
    "passed",
    "sent",
    "watch",
]

if TYPE_CHECKING:
    import torch

    from embeddings.row_scatter import RowScatter


# Ethernet, IPv4, TCP with timestamps: of every packet that the interface counts. The kernel
# hands a device packets of up to
# 64 KiB; a network with packets of 1,500 bytes has these, and 24 bytes between two frames, on
# each 1,448 bytes: 6 %.
HEADER = 14 + 20 + 32
_LEAST_ID = 4  # a table has less than 2³¹ rows

# The collectives and where their input is among the arguments.
_INPUTS = {
    "all_reduce": "tensor",
    "reduce": "tensor",
    "broadcast": "tensor",
    "all_gather": "tensor",
    "all_gather_into_tensor": "input_tensor",
    "all_to_all_single": "input",
    "reduce_scatter_tensor": "input",
}
_POSITIONS = {
    "all_reduce": 0,
    "reduce": 0,
    "broadcast": 0,
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_to_all_single": 1,
    "reduce_scatter_tensor": 1,
}
# What a call is for, by the function of the trainer that makes it.
_PARTS = {
    "start_sum": "φ, λ and means",
    "gather": "SC-MIM",
    "_reduce": "clip, check, signals",  # trainer.training.gradients.Gradients
    "collect": "SC-MIM",
}

# The same of embeddings.replicas.
_OF_COPIES = {
    "exchange_rows": IDS_BETWEEN,
    "sum_gradients": GRADIENTS_BETWEEN,
}


@dataclass(frozen=True)
class Call:
    """A collective as one rank saw it. part: what for; sent: bytes that the rank sends by the
    backend's algorithm; wire: those that its interface counted, headers left out, or None;
    waited: seconds until the last rank was there; seconds: from then.
    """

    part: str
    kind: str
    payload: int
    sent: float
    wire: int | None
    waited: float
    seconds: float


class Traffic:
    """Within it, the calls of this process are noted in `calls`, and async ones are waited for
    at once. One at a time.

    interface: a network interface that only this rank uses, to read what passes; then every
    call is followed by a pause, so that times mean nothing. meet: ranks meet before each call,
    so that `seconds` is not the wait for a slower rank.
    """

    _active = None

    def __init__(self, interface: str | None = None, meet: bool = False):
        self.interface = interface
        self.meet = meet
        self.calls = []

    def __enter__(self):
        Traffic._active = self
        return self

    def __exit__(self, *exception):
        Traffic._active = None

    def note(
        self, kind: str, function: Callable, args: tuple, kwargs: dict
    ) -> Any:
        """Calls the collective, notes it, and returns what it returned."""
        Traffic._active = None  # what the collective and the meeting are made of is not counted
        begin = time.perf_counter()
        if self.meet:
            dist.barrier()
        met = time.perf_counter()
        before = self._passed()
        returned = function(*args, **kwargs)
        if hasattr(returned, "wait"):
            returned.wait()
        ended = time.perf_counter()
        wire = None if before is None else self._passed() - before
        tensor = (
            args[_POSITIONS[kind]]
            if len(args) > _POSITIONS[kind]
            else kwargs[_INPUTS[kind]]
        )
        # All of ours and TorchRec's name their group.
        group = kwargs.get("group")
        world = dist.get_world_size(group)
        own = 0
        if kind == "all_to_all_single":
            splits = (
                args[3] if len(args) > 3 else kwargs.get("input_split_sizes")
            )
            rows = (
                splits[dist.get_rank(group)] if splits else len(tensor) // world
            )
            own = rows * tensor[:1].nbytes
        bytes_sent = sent(kind, tensor.nbytes, world, own)
        part = _part(kind, tensor)
        self.calls.append(
            Call(
                part,
                kind,
                tensor.nbytes,
                bytes_sent,
                wire,
                met - begin,
                ended - met,
            )
        )
        Traffic._active = self
        return returned

    def _passed(self):
        if self.interface is None:
            return None
        time.sleep(0.02)  # what is on its way arrives
        return passed(self.interface)


def passed(interface: str) -> int:
    """Bytes that left through a network interface of this process's namespace so far, headers
    left out.
    """
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == interface:
            counted, packets = map(int, counts.split()[8:10])
            return counted - HEADER * packets
    raise ValueError(f"there is no network interface {interface}")


@contextlib.contextmanager
def watch():
    """Replaces the functions of `torch.distributed` while it lasts: before anybody keeps one of
    them (DeepSpeed does).
    """
    originals = {kind: getattr(dist, kind) for kind in _INPUTS}

    def watched(kind, function):
        def call(*args, **kwargs):
            active = Traffic._active
            return (
                function(*args, **kwargs)
                if active is None
                else active.note(kind, function, args, kwargs)
            )

        return call

    for kind, function in originals.items():
        setattr(dist, kind, watched(kind, function))
    try:
        yield
    finally:
        for kind, function in originals.items():
            setattr(dist, kind, function)


def _part(kind, tensor):
    """What the collective that is being called is for: by who calls it, and whether backward is
    running.
    """
    frame = sys._getframe(3)
    while frame is not None:
        file = frame.f_code.co_filename
        name = frame.f_code.co_name
        if name in _OF_COPIES:
            return _OF_COPIES[name]
        if f"{os.sep}torchrec{os.sep}" in file:
            # int8, too, travels as bytes.
            if tensor.is_floating_point() or tensor.element_size() == 1:
                return "row gradients" if name == "backward" else "rows"
            return (
                "ids"
                if frame.f_locals.get("label") == "values"
                else "numbers of ids"
            )
        if f"{os.sep}deepspeed{os.sep}" in file:
            if kind in ("all_gather", "all_gather_into_tensor"):
                return "dense weights"
            return "dense gradients"
        if f"{os.sep}trainer{os.sep}" in file:
            if name == "backward":
                return "SC-MIM gradients"
            if name != "forward":
                return _PARTS.get(name, f"{Path(file).stem}.{name}")
        frame = frame.f_back
    return "others"


def foreign(
    ids: "torch.Tensor", rank: int, world: int, scatter: "RowScatter"
) -> int:
    """How many of these rows (int64) other ranks hold."""
    in_shard = -(-scatter.rows // world)
    return int((scatter.stored(ids) // in_shard != rank).sum())


def least(world: int, dim: int, weights: int, distinct_foreign: float) -> float:
    """Bytes that a rank has to send, the mean over ranks: see above. distinct_foreign: distinct
    rows of its batch that others hold.
    """
    rows = distinct_foreign * (_LEAST_ID + 2 * 4 * dim)
    return rows + 2 * (world - 1) / world * 4 * weights
