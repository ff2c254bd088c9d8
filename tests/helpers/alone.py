"""What usually takes a process of its own, in this one."""

import contextlib
import gc
import importlib
import os
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist


@contextlib.contextmanager
def group_of_one():
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # now: a forked process that collects it waits for its threads for ever


def in_this_process(function, *arguments):
    """For `benchmarks.suite.in_own_process`, within `as_a_script`."""
    deepspeed.utils.groups._WORLD_GROUP = (
        None  # DeepSpeed keeps the first one that it meets
    )
    return function(*arguments)


@contextlib.contextmanager
def deepspeed_on(name):
    """DeepSpeed computes on "cuda" or "cpu" within it.

    Otherwise it keeps the accelerator that it took when it was imported.
    """
    accelerators = deepspeed.accelerator.real_accelerator
    before = accelerators.get_accelerator()
    module = importlib.import_module(
        f"deepspeed.accelerator.{name}_accelerator"
    )
    accelerators.set_accelerator(
        getattr(module, f"{name.upper()}_Accelerator")()
    )
    deepspeed.utils.groups._WORLD_GROUP = None
    try:
        yield
    finally:
        accelerators.set_accelerator(before)
        deepspeed.utils.groups._WORLD_GROUP = None


@contextlib.contextmanager
def as_a_script():
    """A script's main may be called in here: it sees no launcher and no device.

    What it changes in the process is put back.

    The script leaves its process group itself: a process that exits with one is aborted now and then.
    """
    environment, threads = dict(os.environ), torch.get_num_threads()
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name, None)
    try:
        with mock.patch.object(torch.cuda, "is_available", lambda: False):
            yield
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
