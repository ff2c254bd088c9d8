"""This process among the others: device, backend, threads, and what the model is handed to reduce over ranks."""

import contextlib
import gc
import os
import traceback
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from syncrec.reduction import Reduction
from trainer.control import ranks_lost
from trainer.errors import InputError, RanksLost
from trainer.resources import cores_per_rank, keep_freed_memory


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
    """Joins the process group that the launcher describes in the environment (deepspeed, torchrun), or makes one of one.

    CUDA and NCCL where there is a CUDA device and DS_ACCELERATOR does not say cpu, else CPU and
    gloo; the same code follows either.
    """
    for name, alone in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # DeepSpeed's own switch holds for all of the run.
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    if not cuda and "OMP_NUM_THREADS" not in os.environ:  # a person's or a launcher's own choice stands
        torch.set_num_threads(cores_per_rank(world_size))
    if "MASTER_PORT" not in os.environ and world_size == 1:
        store = dist.HashStore()
        _init(cuda, timeout_minutes, store=store, rank=0, world_size=1)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives the processes that it restarts, with the addresses of those that are gone in it.
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
        store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        _init(cuda, timeout_minutes, store=store, rank=rank, world_size=world_size)
    else:
        _init(cuda, timeout_minutes)
    return Ranks(rank, world_size, local_rank, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


@contextlib.contextmanager
def joined(timeout_minutes=30):
    """`start` for a `with`: the process group is left in order at the end, and where an InputError is the end.

    Where other ranks are gone it is RanksLost. That and any other failure are left to the exit: a rank that waits for the
    others here could wait for ever.
    """
    with ranks_lost():
        ranks = start(timeout_minutes)
    try:
        with ranks_lost():
            yield ranks
    except RanksLost:
        raise
    except InputError as error:
        traceback.clear_frames(error.__traceback__)  # their variables hold the group too
        leave()
        raise
    leave()


def leave():
    """Leaves the process group; its threads end where nothing refers to it any more (TorchRec's modules do, in circles)."""
    dist.destroy_process_group()
    gc.collect()


def sum_of_ranks(values_N: np.ndarray) -> np.ndarray:
    """The sum over all ranks of (N,) of the host, over the CPU's backend. Called on all ranks."""
    total_N = torch.from_numpy(np.array(values_N))
    dist.all_reduce(total_N)
    return total_N.numpy()


def _init(cuda, timeout_minutes, **where):
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **where)


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
        collected = values_CR.new_zeros(rows, values_CR.shape[1]).index_copy_(0, place_C, values_CR)
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
        gathered = values_B.new_empty(dist.get_world_size() * len(values_B), *values_B.shape[1:])
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
