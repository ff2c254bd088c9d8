"""What a training step on a device would wait for, found on a CPU."""

import sys
import traceback
from collections import Counter
from unittest import mock

import deepspeed
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from syncrec.batch.views import map_tensors
from trainer.training.gradients import HostCopy
from trainer.training.prefetch import Prefetcher

# Where a host may wait: for the second stream, which has only the next batch's counts before it; and for the step before.
ALLOWED = {
    Prefetcher.prepare.__code__,
    Prefetcher.send.__code__,
    HostCopy.values.__code__,
}
WAITING = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "nonzero",
    "unique",
}
WAITING_OPS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "is_nonzero",
}
WAITING_OPS |= {"equal", "repeat_interleave"}


class Device:
    """Which tensors would be on the device: what is moved there, weights and states, and what is computed of them.

    On a CPU any tensor can be read without waiting; so it is noted which of them are read, and by whom.
    """

    def __init__(self):
        self.tensors, self.waits = {}, Counter()

    def add(self, value):
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = (
                value  # kept, so that no other tensor gets its number
            )
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.add(item)

    def moved(self, tensor):
        self.add(tensor)
        return tensor

    def holds(self, value):
        if isinstance(value, (list, tuple)):
            return any(map(self.holds, value))
        return isinstance(value, torch.Tensor) and id(value) in self.tensors

    def read(self, what):
        frames = [frame for frame, _ in traceback.walk_stack(sys._getframe())]
        if not any(frame.f_code in ALLOWED for frame in frames):
            files = [
                (frame.f_code.co_filename, frame.f_lineno) for frame in frames
            ]
            file, line = next(
                (file, line)
                for file, line in files
                if "/torch/" not in file and file != __file__
            )
            self.waits[f"{what} in {file}:{line}"] += 1


class Functions(TorchFunctionMode):
    """What Python calls by name; tolist and the like go past the dispatcher on a CPU."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        made_there = (
            name in ("tensor", "as_tensor")
            and (kwargs or {}).get("device") is not None
        )  # copied from pageable memory
        if made_there or (name in WAITING and self.device.holds(args)):
            self.device.read(name)
        found = function(*args, **(kwargs or {}))
        if self.device.holds(args) or self.device.holds(
            list((kwargs or {}).values())
        ):
            self.device.add(found)
        return found


class Operators(TorchDispatchMode):
    """What is called below Python, in backward too."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        on_device = self.device.holds(args) or self.device.holds(
            list((kwargs or {}).values())
        )
        by_mask = name in ("index", "index_put", "index_put_") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in args[1]
        )
        if on_device and (name in WAITING_OPS or by_mask):
            self.device.read(name)
        found = function(*args, **(kwargs or {}))
        if on_device:
            self.device.add(found)
        return found


class LookAhead:
    """Steps on given batches, each made ready during the step before, as a run does it."""

    def __init__(self, trainer, batches, moved=lambda tensor: tensor):
        """moved: called with each tensor of a batch that has been made ready."""
        self.trainer, self.moved = trainer, moved
        self.following = iter(batches[1:])
        self.ready = self.made_ready(batches[0])

    def made_ready(self, batch):
        ready = self.trainer.prepare(batch)
        map_tensors(ready.batch, self.moved)
        return ready

    def look_ahead(self):
        batch = next(self.following, None)
        self.ready = None if batch is None else self.made_ready(batch)
        return self.ready

    def step(self):
        return self.trainer.train_step(self.ready, self.look_ahead)


def waits(trainer, given):
    """What the host would wait for in steps on these batches."""
    device = Device()
    device.add(
        [
            *trainer.engine.module.parameters(),
            *trainer.engine.module.buffers(),
            *trainer.table.shard()[1].values(),
        ]
    )
    steps = LookAhead(trainer, given, device.moved)
    accelerator = type(deepspeed.accelerator.get_accelerator())
    synchronize = mock.patch.object(
        accelerator, "synchronize", lambda *_: device.read("synchronize")
    )
    with synchronize, Functions(device), Operators(device):
        for _ in given:
            steps.step()
    assert len(device.tensors) > 1000  # it has seen the step, backward and all
    return device.waits
