"""The process group of a run's ranks: rendezvous, device, backend, and reductions over it."""

import contextlib
import gc
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist

from syncrec.reduction import Reduction
from trainer.distributed.launchers import (
    World,
    describe_missing,
    device_of_rank,
    enter_world,
    find_shared_device,
    read_world,
)
from trainer.distributed.liveness import watch_peers
from trainer.distributed.resources import (
    count_cores_per_rank,
    keep_freed_memory,
)
from trainer.errors import (
    RANKS_LOST_ADVICE,
    InputError,
    LostRanks,
    explain_os_error,
)
from trainer.interrupts import begin_work
from trainer.process_name import rank_for_messages

_PORT_IS_FREE = 15.0  # seconds
_OTHER_PORT = (
    "give each run a MASTER_PORT of its own (deepspeed --master_port, torchrun "
    "--master-port)"
)

# gloo's errors have no class of their own, and reach Python from inside a backward too: each names
# its source file first. These are the sentences of gloo/transport/tcp (pair.cc, unbound_buffer.cc,
# error.cc, loop.cc) and gloo/rendezvous/context.cc for a peer that is gone or does not answer.
# Others, such as a size that is not the peer's, are faults. A wait that ends because another link
# was given up says its sentence without a source file.
_GLOO_LOST = re.compile(
    r"^Application timeout caused pair closure$|"
    r"^\[\S*\.(?:cc|h):\d+\]\s.*("
    r"connection closed by peer|connection reset|connection refused|broken pipe|"
    r"socket closed|socket not connected|pair closure|timed out|connect timeout|"
    r"no route to host|network is (?:unreachable|down)|host is down|"
    r"connectFullMesh failed)",
    re.IGNORECASE | re.DOTALL,
)
_BACKEND_LOST = (
    dist.DistBackendError,
    dist.DistNetworkError,
    dist.DistStoreError,
)
_SOURCE_FILE = re.compile(r"^\[\S*\.(?:cc|cpp|h|hpp):\d+\]\s*")
_LONGEST_REASON = 160
_FLIGHT_ENTRIES = "2000"  # collectives of a rank
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Ranks:
    """This process's rank in the run, and the device that it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the rank that writes and prints."""
        return self.rank == 0


@contextlib.contextmanager
def join_process_group(
    timeout_minutes: float = 30,
    device: str = "auto",
    flight_folder: Path | None = None,
) -> Iterator[Ranks]:
    """Joins the process group that the launcher describes, or makes one of one rank.

        with join_process_group(timeout_minutes=30) as ranks:
            train(config, ranks)

    device: "cuda" (with NCCL), "cpu" (with gloo), or "auto": CUDA where there is a device and
    DS_ACCELERATOR does not say cpu. The same code follows either. flight_folder: see
    `record_collectives`. The group is left in order at the end, and where an
    InputError is the end.

    The ranks watch each other meanwhile (trainer.distributed.liveness). Where others are gone it is
    LostRanks, or what one of them said when it left. That and any other failure are left to the
    exit: a rank that waits for the others here could wait for ever.
    """
    begin_work()
    with translate_backend_errors():
        ranks, store = _join(timeout_minutes, device, flight_folder)
        addresses = [os.environ["MASTER_ADDR"]]
        liveness = watch_peers(store, ranks.rank, ranks.world_size, addresses)
    try:
        with translate_backend_errors():
            yield ranks
    except LostRanks as lost:
        raise liveness.explain_loss(lost) from lost.__cause__
    except InputError as error:
        liveness.report_error(error)
        # The variables of its frames hold the group too.
        traceback.clear_frames(error.__traceback__)
        _leave_group()
        raise
    except SystemExit:  # a script's own way out
        liveness.leave()
        raise
    except OSError as error:
        refusal = explain_os_error(error)
        if refusal is None:
            liveness.report_fault(error)
            raise
        liveness.report_error(refusal)
        raise refusal from None
    except BaseException as error:
        liveness.report_fault(error)
        raise
    liveness.leave()
    _leave_group()


def _leave_group() -> None:
    """Leaves the process group.

    Its threads end where nothing refers to it any more; TorchRec's modules do, in circles.
    """
    dist.destroy_process_group()
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None:
        # It keeps the first group that it meets; the next run of this process has another.
        deepspeed.utils.groups._WORLD_GROUP = None
    gc.collect()


@contextlib.contextmanager
def translate_backend_errors() -> Iterator[None]:
    """Raises LostRanks for what gloo or NCCL raises where other ranks are gone.

    It is one line; what was raised is its cause. Other errors pass.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        text = _SOURCE_FILE.sub("", str(error))
        reason = " ".join(text.split())[:_LONGEST_REASON]
        raise LostRanks(
            f"rank {rank_for_messages()}: lost the others ({reason}): {RANKS_LOST_ADVICE}",
            one_rank=True,
        ) from error


def _is_lost(error: RuntimeError) -> bool:
    """Whether a backend raised it because its peers are gone."""
    if isinstance(error, _BACKEND_LOST):
        return True
    if type(error) is not RuntimeError:
        return False
    text = str(error)
    return _GLOO_LOST.match(text) is not None


def sum_over_ranks(values_N: np.ndarray) -> np.ndarray:
    """The sum over all ranks of (N,) of the host, over the CPU's backend. Collective.

    rank 0   [1, 2]
    rank 1   [3, 4]    →    [4, 6]    on both
    """
    total_N = torch.from_numpy(np.array(values_N))
    dist.all_reduce(total_N)
    return total_N.numpy()


def choose_device(device: str) -> str:
    """The kind of device that this process computes on, "cuda" or "cpu"; see `join_process_group`.

    What was asked for is left in DS_ACCELERATOR, for DeepSpeed. Raises InputError where there is
    no such device, or DeepSpeed computes on another already.
    """
    if device not in DEVICES:
        raise InputError(f"device is {device!r}: give auto, cpu or cuda")
    if device == "auto":
        # DeepSpeed's own switch holds for all of the run.
        is_allowed = os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
        return "cuda" if is_allowed and torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device is cuda: {_why_no_cuda()}")
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import get_accelerator

        before = get_accelerator().device_name()
        if before != device:
            raise InputError(
                f"device is {device}: this process has computed on {before}, where DeepSpeed "
                "stays; begin another process"
            )
    os.environ["DS_ACCELERATOR"] = device
    return device


def _why_no_cuda() -> str:
    """Why this process has no CUDA device, and the way out."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built for CPU alone; install one for CUDA "
            "(docs/cuda.md), or take device=cpu"
        )
    return (
        "this process sees no CUDA device (nvidia-smi, CUDA_VISIBLE_DEVICES); mend that, or "
        "take device=cpu"
    )


def record_collectives(folder: Path) -> None:
    """Has NCCL's watchdog leave each rank's last collectives where one does not end in time.

    PyTorch's flight recorder; it writes folder/rank-0 and so on, and makes no folder. What is in the
    environment already stands. Called before the process group is made.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _FLIGHT_ENTRIES)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/rank-")


def _join(
    timeout_minutes: float, device_kind: str, flight_folder: Path | None
) -> tuple[Ranks, dist.Store]:
    """Joins the group; this process's ranks, and the group's store."""
    timeout = timedelta(minutes=timeout_minutes)
    device_kind = choose_device(device_kind)
    world = read_world()
    store = _open_store(world, timeout)
    _await_ranks(store, world, timeout)
    local_rank = world.local_rank
    local_size = world.local_size
    if local_rank is None or local_size is None:
        local_rank, local_size = _count_neighbours(world, store)
        world = replace(world, local_rank=local_rank, local_size=local_size)
    enter_world(world)
    if device_kind == "cuda":
        device = _take_device(world, local_rank, local_size, store)
        backend = "cpu:gloo,cuda:nccl"
        if flight_folder is not None:
            record_collectives(flight_folder)
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
        # A person's or a launcher's own choice stands.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(count_cores_per_rank(world.size))
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=store,
        rank=world.rank,
        world_size=world.size,
    )
    ranks = Ranks(
        rank=world.rank,
        world_size=world.size,
        local_rank=local_rank,
        device=device,
    )
    return ranks, store


def _take_device(
    world: World, local_rank: int, local_size: int, store: dist.Store
) -> torch.device:
    """The rank's CUDA device, which no other rank has.

    DeepSpeed and TorchRec read its number from LOCAL_RANK. Raises InputError.
    """
    devices = torch.cuda.device_count()
    number = device_of_rank(world.rank, local_rank, local_size, devices)
    uuid = torch.cuda.get_device_properties(number).uuid
    name = f"{socket.gethostname()} {uuid}"
    names = _exchange(store, "device", world, name)
    shared = find_shared_device(names)
    if shared is not None:
        one, other = shared
        host = names[one].split(" ")[0]
        raise InputError(
            f"ranks {one} and {other} share one device of {host}: start at most one "
            "rank a device (--ntasks-per-node, --num_gpus)"
        )
    # DeepSpeed wants them alike.
    for variable in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):
        if variable in os.environ:
            os.environ[variable] = str(number)
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def _exchange(
    store: dist.Store,
    key: str,
    world: World,
    value: str,
) -> list[str]:
    """The values of all ranks in their order, through the store; each gives its own."""
    store.set(f"{key}-{world.rank}", value)
    keys = []
    for rank in range(world.size):
        keys.append(f"{key}-{rank}")
    contents = store.multi_get(keys)
    return [content.decode() for content in contents]


def _open_store(world: World, timeout: timedelta) -> dist.Store:
    """The store at which the ranks of this attempt meet: the rendezvous.

    Raises InputError where another program or run has its port.
    """
    if world.size == 1:
        return dist.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _open_store_of_torchrun(world, timeout)
    if world.rank == 0:
        _check_address(world)
        store = _serve_store(world, timeout)
    else:
        store = _reach_store(world, timeout)
    key = f"rank-{world.rank}"
    if store.add(key, 1) > 1:
        _refuse_taken_rank(store, f"{key}-process", world)
    store.set(f"{key}-process", _describe_process())
    return store


def _refuse_taken_rank(store: dist.Store, key: str, world: World) -> NoReturn:
    """Says why this process cannot be the rank that another one is already.

    Raises LostRanks where that one was on this host and has ended: a scheduler has replaced it while
    the others wait for all to come, and has to do so with them. Raises InputError otherwise.
    """
    here = socket.gethostname()
    if store.check([key]):
        host, number, started = json.loads(store.get(key))
        if host == here and _read_start(number) != started:
            raise LostRanks(
                f"rank {world.rank} on {here} comes in the place of a process that has ended while "
                "the others wait for it: all have to begin anew",
                one_rank=True,
            )
    raise InputError(
        f"rank {world.rank} is taken at {world.address}:{world.port}: another run's ranks "
        f"meet there, or RANK was given twice; {_OTHER_PORT}",
        one_rank=True,
    )


def _describe_process() -> str:
    """This process, for its host to tell later whether it has ended: ["host1", 4711, 123456]."""
    number = os.getpid()
    return json.dumps([socket.gethostname(), number, _read_start(number)])


def _read_start(process: int) -> int | None:
    """When a process of this host was started, in the kernel's ticks; None where it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    # 7 (a name) S 1 …: what follows the name begins with the third field; the start is the 22nd.
    _, _, rest = text.rpartition(")")
    return int(rest.split()[19])


def _reach_store(world: World, timeout: timedelta) -> dist.TCPStore:
    """The first rank's store. Raises LostRanks where it does not answer."""
    try:
        return dist.TCPStore(
            world.address,
            world.port,
            world.size,
            is_master=False,
            timeout=timeout,
            wait_for_workers=False,
        )
    except dist.DistNetworkError as error:
        host = socket.gethostname()
        raise LostRanks(
            f"rank {world.rank} on {host}: rank 0 does not answer at {world.address}:{world.port} "
            f"within {timeout.total_seconds():g} s: see what is said there, and whether it is "
            f"reached from {host} (firewall, MASTER_ADDR)",
            one_rank=True,
        ) from error


def _await_ranks(store: dist.Store, world: World, timeout: timedelta) -> None:
    """Returns on the first rank once all have come; each says on which host it is.

    Raises LostRanks, which names those that do not come.
    """
    store.set(f"came-{world.rank}", socket.gethostname())
    if world.rank != 0:
        return
    keys = [f"came-{rank}" for rank in range(world.size)]
    with contextlib.suppress(dist.DistStoreError):
        store.wait(keys, timeout)
        return
    hosts: list[str | None] = []
    for key in keys:
        came = store.check([key])
        hosts.append(store.get(key).decode() if came else None)
    where = f"{world.address}:{world.port}"
    raise LostRanks(
        f"{describe_missing(world, hosts)} within {timeout.total_seconds():g} s: see what is said "
        f"there, and whether {where} is reached from there (firewall, MASTER_ADDR)"
    )


def _open_store_of_torchrun(world: World, timeout: timedelta) -> dist.Store:
    """torchrun's own store, under a prefix of this attempt.

    The store outlives the processes that torchrun restarts, with the addresses of those that are
    gone in it.
    """
    store = dist.TCPStore(
        world.address, world.port, world.size, is_master=False, timeout=timeout
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt-{attempt}", store)


def _serve_store(world: World, timeout: timedelta) -> dist.TCPStore:
    """The store of the first rank.

    Loaders of an attempt that has just ended may hold its port for some seconds. Raises InputError
    where it is held longer.
    """
    deadline = time.monotonic() + _PORT_IS_FREE
    while True:
        try:
            return dist.TCPStore(
                world.address,
                world.port,
                world.size,
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
            )
        except dist.DistNetworkError as error:
            if not _is_port_in_use(error):
                raise
            if time.monotonic() > deadline:
                host = socket.gethostname()
                raise InputError(
                    f"port {world.port} (MASTER_PORT) on {host} is in use by another program or "
                    f"run: {_OTHER_PORT}"
                ) from None
        time.sleep(0.5)


def _is_port_in_use(error: dist.DistNetworkError) -> bool:
    """Whether a store could not listen at a port that another process has."""
    text = str(error)
    return "EADDRINUSE" in text or "already in use" in text


def _check_address(world: World) -> None:
    """Refuses an address derived from a list of hosts where the first rank is on another one."""
    if world.derived_from is None:
        return
    host = socket.gethostname()
    way_out = f"set MASTER_ADDR to the first rank's host ({host})"
    try:
        entries = socket.getaddrinfo(world.address, None)
    except OSError:
        raise InputError(
            f"{world.address}, the first host of {world.derived_from}, has no address here: "
            f"{way_out}"
        ) from None
    addresses = {str(entry[4][0]) for entry in entries}
    if not any(map(_is_of_this_host, addresses)):
        raise InputError(
            f"the first rank is on {host}, not on {world.address}, the first host of "
            f"{world.derived_from}: {way_out}"
        )


def _is_of_this_host(address: str) -> bool:
    """Whether an IP address is one of this host's, which a socket can be bound to."""
    family = socket.AF_INET
    if ":" in address:
        family = socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _count_neighbours(world: World, store: dist.Store) -> tuple[int, int]:
    """Local rank and ranks of this host, where the launcher does not say them.

    Ranks of one host are those of the same host name.
    """
    host = socket.gethostname()
    hosts = _exchange(store, "host", world, host)
    neighbours = []
    for rank, other_host in enumerate(hosts):
        if other_host == host:
            neighbours.append(rank)
    return neighbours.index(world.rank), len(neighbours)


class RankReduction(Reduction):
    """Sums and gathers over the default process group.

    exchanging: what is entered while the others are waited for, such as a clock. Tensor names end in their axes: B rows of this rank, C its collected rows, W ranks, R numbers of
    a row.
    """

    def __init__(
        self,
        exchanging: Callable[
            [], AbstractContextManager[None]
        ] = contextlib.nullcontext,
    ):
        self.world_size = dist.get_world_size()
        self.rank = dist.get_rank()
        self._exchanging = exchanging

    def start_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        work = dist.all_reduce(values, async_op=True)

        def wait() -> torch.Tensor:
            with self._exchanging():
                work.wait()
            return values

        return wait

    def gather(self, values_B: torch.Tensor) -> torch.Tensor:
        return _Gather.apply(values_B, self._exchanging)

    def collect(
        self,
        values_CR: torch.Tensor,
        place_C: torch.Tensor,
        rows: int,
    ) -> torch.Tensor:
        return _Collect.apply(values_CR, place_C, rows, self._exchanging)


class _Collect(torch.autograd.Function):
    """Rows of all ranks at their places; each gets back all ranks' gradients of its rows, summed.

    A sum over ranks, of which all but one have zeros at a place: it has one size, whatever each
    rank gives. Of two ranks and 3 rows of R = 2:

        rank 0   values [[1, 2], [5, 6]]   place [0, 2]     [[1, 2],
        rank 1   values [[3, 4]]           place [1]    →    [3, 4],    on both
                                                             [5, 6]]
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_CR: torch.Tensor,
        place_C: torch.Tensor,
        rows: int,
        exchanging: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor:
        ctx.save_for_backward(place_C)
        ctx.exchanging = exchanging
        collected = values_CR.new_zeros(rows, values_CR.shape[1])
        collected.index_copy_(0, place_C, values_CR)
        with exchanging():
            dist.all_reduce(collected)
        return collected

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (place_C,) = ctx.saved_tensors
        summed = gradient.contiguous().clone()
        with ctx.exchanging():
            dist.all_reduce(summed)
        return summed.index_select(0, place_C), None, None, None


class _Gather(torch.autograd.Function):
    """All ranks' tensors, one after the other; each gets back all ranks' gradients of it, summed.

    Of two ranks:

        rank 0   values [1, 2]
        rank 1   values [3, 4]    →    [1, 2, 3, 4]    on both
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_B: torch.Tensor,
        exchanging: Callable[[], AbstractContextManager[None]],
    ) -> torch.Tensor:
        ctx.exchanging = exchanging
        rows = dist.get_world_size() * len(values_B)
        gathered = values_B.new_empty(rows, *values_B.shape[1:])
        with exchanging():
            dist.all_gather_into_tensor(gathered, values_B.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ranks = dist.get_world_size()
        gradient_WB = gradient.contiguous().unflatten(0, (ranks, -1))
        if gradient.is_cuda:
            summed_B = torch.empty_like(gradient_WB[0])
            with ctx.exchanging():
                dist.reduce_scatter_tensor(summed_B, gradient_WB)
            return summed_B, None
        # gloo's reduce_scatter is an all-reduce, which sends twice as much.
        received_WB = torch.empty_like(gradient_WB)
        with ctx.exchanging():
            dist.all_to_all_single(received_WB, gradient_WB)
        return received_WB.sum(0), None
