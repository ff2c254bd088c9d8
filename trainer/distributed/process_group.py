"""This process among the others: device, backend, threads, and what the model is handed to reduce over ranks."""

import contextlib
import gc
import os
import socket
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from syncrec.reduction import Reduction
from trainer.distributed.agreement import ranks_lost
from trainer.distributed.launchers import (
    World,
    device_of_rank,
    enter_world,
    find_shared_device,
    read_world,
)
from trainer.distributed.liveness import watch
from trainer.distributed.resources import cores_per_rank, keep_freed_memory
from trainer.errors import InputError, RanksLost

_PORT_IS_FREE = 15.0  # seconds


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self):
        """True on the rank that writes and prints."""
        return self.rank == 0


def start(timeout_minutes=30) -> Ranks:
    """Joins the process group that the launcher describes (trainer.distributed.launchers), or makes one of one.

    CUDA and NCCL where there is a CUDA device and DS_ACCELERATOR does not say cpu, else CPU and
    gloo; the same code follows either.
    """
    ranks, _ = _join(timeout_minutes)
    return ranks


@contextlib.contextmanager
def joined(timeout_minutes=30):
    """`start` for a `with`: the process group is left in order at the end, and where an InputError
    is the end.

    The ranks watch each other meanwhile (trainer.distributed.liveness). Where others are gone it is RanksLost,
    or what one of them said when it left. That and any other failure are left to the exit: a rank
    that waits for the others here could wait for ever.
    """
    with ranks_lost():
        ranks, store = _join(timeout_minutes)
        liveness = watch(
            store, ranks.rank, ranks.world_size, [os.environ["MASTER_ADDR"]]
        )
    try:
        with ranks_lost():
            yield ranks
    except RanksLost as lost:
        raise liveness.explain(lost) from lost.__cause__
    except InputError as error:
        liveness.refuse(error)
        traceback.clear_frames(
            error.__traceback__
        )  # their variables hold the group too
        leave()
        raise
    except SystemExit:  # a script's own way out
        liveness.leave()
        raise
    except BaseException as error:
        liveness.fail(error)
        raise
    liveness.leave()
    leave()


def leave():
    """Leaves the process group; its threads end where nothing refers to it any more (TorchRec's
    modules do, in circles)."""
    dist.destroy_process_group()
    gc.collect()


def sum_of_ranks(values_N: np.ndarray) -> np.ndarray:
    """The sum over all ranks of (N,) of the host, over the CPU's backend. Called on all ranks."""
    total_N = torch.from_numpy(np.array(values_N))
    dist.all_reduce(total_N)
    return total_N.numpy()


def _join(timeout_minutes):
    """(Ranks, the group's store)."""
    world = read_world()
    store = _store(world, timeout_minutes)
    if world.local_rank is None or world.local_size is None:
        world = _with_neighbours(world, store)
    enter_world(world)
    # DeepSpeed's own switch holds for all of the run.
    cuda = (
        torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    )
    device = torch.device("cpu")
    if cuda:
        device = _take_device(world, store)
    else:
        keep_freed_memory()
    if (
        not cuda and "OMP_NUM_THREADS" not in os.environ
    ):  # a person's or a launcher's own choice stands
        torch.set_num_threads(cores_per_rank(world.size))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=world.rank, world_size=world.size
    )
    return Ranks(world.rank, world.size, world.local_rank, device), store


def _take_device(world, store):
    """The rank's CUDA device, which no other rank has. DeepSpeed and TorchRec read its number from
    LOCAL_RANK."""
    number = device_of_rank(
        world.rank, world.local_rank, world.local_size, torch.cuda.device_count()
    )
    uuid = torch.cuda.get_device_properties(number).uuid
    store.set(f"device-{world.rank}", f"{socket.gethostname()} {uuid}")
    devices = store.multi_get([f"device-{rank}" for rank in range(world.size)])
    if shared := find_shared_device(devices):
        host = devices[shared[0]].decode().split(" ")[0]
        raise InputError(
            f"ranks {shared[0]} and {shared[1]} share one device of {host}: start at most one "
            "rank a device (--ntasks-per-node, --num_gpus)"
        )
    for name in (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ):  # DeepSpeed wants them alike
        if name in os.environ:
            os.environ[name] = str(number)
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _store(world: World, timeout_minutes):
    """Where the ranks of this attempt find each other. Raises InputError where another program or
    run has its port."""
    if world.size == 1:
        return dist.HashStore()
    timeout = timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives the processes that it restarts, with the addresses of those
        # that are gone in it.
        store = dist.TCPStore(
            world.address, world.port, world.size, is_master=False, timeout=timeout
        )
        return dist.PrefixStore(
            f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
    if world.rank == 0:
        _check_address(world)
        store = _serve(world, timeout)
    else:
        store = dist.TCPStore(
            world.address,
            world.port,
            world.size,
            is_master=False,
            timeout=timeout,
            wait_for_workers=False,
        )
    if store.add(f"rank-{world.rank}", 1) > 1:
        raise InputError(
            f"rank {world.rank} is taken at {world.address}:{world.port}: another run's ranks "
            f"meet there, or RANK was given twice; {_OTHER_PORT}",
            one_rank=True,
        )
    return store


_OTHER_PORT = "give each run a MASTER_PORT of its own (deepspeed --master_port, torchrun --master-port)"


def _serve(world, timeout):
    """The store of the first rank. A port of an attempt that has just ended may be held for some
    seconds by its loaders."""
    deadline = time.monotonic() + _PORT_IS_FREE
    while True:
        try:
            return dist.TCPStore(
                world.address,
                world.port,
                world.size,
                True,
                timeout,
                wait_for_workers=False,
            )
        except dist.DistNetworkError as error:
            if not _is_in_use(error):
                raise
            if time.monotonic() > deadline:
                where = f"port {world.port} (MASTER_PORT) on {socket.gethostname()}"
                raise InputError(
                    f"{where} is in use by another program or run: {_OTHER_PORT}"
                ) from None
        time.sleep(0.5)


def _is_in_use(error):
    return "EADDRINUSE" in str(error) or "already in use" in str(error)


def _check_address(world):
    """Refuses an address derived from a list of hosts where the first rank is on another one."""
    if world.derived_from is None:
        return
    host = socket.gethostname()
    fix = f"set MASTER_ADDR to the first rank's host ({host})"
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(world.address, None)}
    except OSError:
        raise InputError(
            f"{world.address}, the first host of {world.derived_from}, has no address here: {fix}"
        ) from None
    if not any(_is_of_this_host(address) for address in addresses):
        raise InputError(
            f"the first rank is on {host}, not on {world.address}, the first host of "
            f"{world.derived_from}: {fix}"
        )


def _is_of_this_host(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _with_neighbours(world, store):
    """The world with local rank and ranks of this host, where the launcher does not say them: those
    of the same host name."""
    store.set(f"host-{world.rank}", socket.gethostname())
    hosts = store.multi_get([f"host-{rank}" for rank in range(world.size)])
    same = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    return replace(world, local_rank=same.index(world.rank), local_size=len(same))


class RankReduction(Reduction):
    """Sums and gathers over the default process group."""

    def __init__(self):
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()

    def start_sum(self, values):
        work = dist.all_reduce(values, async_op=True)

        def wait():
            work.wait()
            return values

        return wait

    def gather(self, values_B):
        return _Gather.apply(values_B)

    def collect(self, values_CR, place_C, rows):
        return _Collect.apply(values_CR, place_C, rows)


class _Collect(torch.autograd.Function):
    """Rows of all ranks at their places; each gets back the sum of all ranks' gradients of its rows.

    A sum over ranks, of which all but one have zeros at a place: it has one size, whatever each rank gives.
    """

    @staticmethod
    def forward(ctx, values_CR, place_C, rows):
        ctx.save_for_backward(place_C)
        collected = values_CR.new_zeros(rows, values_CR.shape[1]).index_copy_(
            0, place_C, values_CR
        )
        dist.all_reduce(collected)
        return collected

    @staticmethod
    def backward(ctx, gradient):
        (place_C,) = ctx.saved_tensors
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed.index_select(0, place_C), None, None


class _Gather(torch.autograd.Function):
    """All ranks' tensors, one after the other; each gets back the sum of all ranks' gradients of its part."""

    @staticmethod
    def forward(ctx, values_B):
        gathered = values_B.new_empty(
            dist.get_world_size() * len(values_B), *values_B.shape[1:]
        )
        dist.all_gather_into_tensor(gathered, values_B.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient_WB = gradient.contiguous().unflatten(0, (dist.get_world_size(), -1))
        if gradient.is_cuda:
            own_B = torch.empty_like(gradient_WB[0])
            dist.reduce_scatter_tensor(own_B, gradient_WB)
            return own_B
        # gloo's reduce_scatter is an all-reduce, which sends twice as much.
        received_WB = torch.empty_like(gradient_WB)
        dist.all_to_all_single(received_WB, gradient_WB)
        return received_WB.sum(0)
