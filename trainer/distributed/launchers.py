"""Which rank of which world this process is, from what its launcher sets in the environment. The
one place that knows.

    torchrun, deepspeed (also mpich, impi)   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
    srun (deepspeed's slurm)                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    mpirun of Open MPI (deepspeed's openmpi,
    Kubeflow's MPI runtime)                  OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, …
    mpirun of MVAPICH (deepspeed's mvapich)  MV2_COMM_WORLD_RANK, MV2_COMM_WORLD_SIZE, …
    mpiexec of MPICH and of Intel MPI        PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, …

RANK and WORLD_SIZE win where both are set. Where several processes were started and this one cannot
know its rank, or two variables contradict each other, it is refused: each of them would be a run of
its own. Needs nothing but Python.
"""

import os
import re
import socket
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from trainer.errors import InputError

DEFAULT_PORT = 29500  # torchrun's and DeepSpeed's
_FIRST_PORT = 10240  # below the ports that Linux gives away by itself (32768 and up)
_PORTS = 10000  # pairs: a supervisor takes the port after the rendezvous's
_LOOPBACK = "127.0.0.1"
_MOST_HOSTS = 100_000  # a host list that names more is no host list
_ALONE = "for one process alone set RANK=0 WORLD_SIZE=1"


@dataclass(frozen=True)
class World:
    """This process's place among those that the launcher started. None: the launcher does not
    say."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None  # processes of this host
    address: str  # where the first rank listens
    port: int
    derived_from: str | None = None  # the variable whose first host is the address


@dataclass(frozen=True)
class _Names:
    """What a launcher calls things."""

    launcher: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


_MPI = (
    _Names(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    _Names(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
)
_PMI = _Names(
    "mpiexec",
    "PMI_RANK",
    "PMI_SIZE",
    ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
)
_SLURM = _Names("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",), ())
_RANKS = ("RANK", *(names.rank for names in _MPI), _PMI.rank, "PMIX_RANK", _SLURM.rank)
_HOSTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")


def read_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world that the environment describes; one process alone where no launcher left a word.

    Raises InputError where variables are no numbers, contradict each other, or leave open which
    rank this is.
    """
    rank = _number(environment, "RANK")
    size = _number(environment, "WORLD_SIZE")
    launched = _launched(environment)
    if rank is not None and size is not None:
        _compare(environment, rank, size, launched)
        names, source = launched or (None, environment)
    elif launched is not None:
        names, source = launched
        rank, size = _completed(environment, names, source, rank, size)
    elif (
        rank is None
        and size is not None
        and _number(environment, "PMIX_RANK") is not None
    ):
        names, source, rank = None, environment, _number(environment, "PMIX_RANK")
    elif rank is None and size in (None, 1):
        _refuse_unknown(environment)
        return World(0, 1, 0, 1, _LOOPBACK, DEFAULT_PORT)
    else:
        missing, there = (
            ("WORLD_SIZE", "RANK") if size is None else ("RANK", "WORLD_SIZE")
        )
        raise InputError(
            f"{there} is {environment[there]} and {missing} is not set: set both or neither"
        )
    if size < 1 or not 0 <= rank < size:
        raise InputError(
            f"rank {rank} of {size}: ranks run from 0 to the world's size less one; see RANK and "
            "WORLD_SIZE"
        )
    local_rank, local_size = _local(environment, names, source, rank, size)
    address, derived_from = _address(environment, names, size, local_size)
    return World(
        rank,
        size,
        local_rank,
        local_size,
        address,
        _port(environment, names),
        derived_from,
    )


def enter_world(
    world: World, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Writes the world into the environment as torchrun does, for the libraries and the children of
    this process."""
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "MASTER_ADDR": world.address,
        "MASTER_PORT": world.port if world.size > 1 else None,
    }
    environment.update(
        {name: str(value) for name, value in values.items() if value is not None}
    )


def rank_for_messages(environment: Mapping[str, str] = os.environ) -> int:
    """The rank as far as the environment tells, 0 where it does not: for lines, never to decide who
    does what."""
    for name in _RANKS:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def sign(environment: Mapping[str, str] = os.environ) -> str:
    """This process as a message names it."""
    return f"rank {rank_for_messages(environment)} on {socket.gethostname()}"


def device_of_rank(rank: int, local_rank: int, local_size: int, devices: int) -> int:
    """Which of the visible devices a rank of a host takes.

    A launcher may show each process all devices of the host, or one of its own
    (`srun --gpus-per-task=1`). Raises InputError where there are several and fewer than ranks, so
    that two ranks would share one, and where ranks do not follow each other on a host: TorchRec
    looks for rank r on device r % (ranks of a host).
    """
    if devices == 1:
        return 0
    if local_rank >= devices:
        raise InputError(
            f"local rank {local_rank} of {local_size}, and {devices} devices are visible: two "
            "ranks would share one; start at most one rank a device (--ntasks-per-node, "
            "--num_gpus), or show each rank one device of its own"
        )
    if rank % local_size != local_rank:
        raise InputError(
            f"rank {rank} is local rank {local_rank} of {local_size}: ranks have to follow each "
            "other on a host, as many on each; use srun --distribution=block, mpirun --map-by "
            "slot"
        )
    return local_rank


def find_shared_device(devices: list[str]) -> tuple[int, int] | None:
    """The first two ranks that have the same device; None where each has its own. devices: each
    rank's host and what names the device there, in the order of ranks."""
    first_with = {}
    for rank, device in enumerate(devices):
        if device in first_with:
            return first_with[device], rank
        first_with[device] = rank
    return None


def expand_hosts(text: str) -> Iterator[str]:
    """The hosts of a list as Slurm writes it, in order: `a[01-03,7],b` is a01, a02, a03, a7, b.

    Raises ValueError where it is none.
    """
    for name in _split(text):
        yield from _expand(name)


def _split(text):
    """Names at commas that stand in no brackets."""
    depth = 0
    name = ""
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth not in (0, 1):
            raise ValueError(f"{text!r} is no list of hosts")
        if letter == "," and not depth:
            yield name
            name = ""
        else:
            name += letter
    if depth:
        raise ValueError(f"{text!r} is no list of hosts")
    yield name


def _expand(name):
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", name)
    if match is None:
        if not name or re.search(r"[\[\]\s]", name):
            raise ValueError(f"{name!r} is no host")
        yield name
        return
    before, ranges, after = match.groups()
    for part in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise ValueError(f"{name!r} is no list of hosts")
        first, last = bounds.group(1), bounds.group(2) or bounds.group(1)
        if not 0 <= int(last) - int(first) < _MOST_HOSTS:
            raise ValueError(f"{name!r} is no list of hosts")
        for number in range(int(first), int(last) + 1):
            numbered = f"{before}{number:0{len(first)}d}"
            yield from (
                (numbered + rest for rest in _expand(after)) if after else (numbered,)
            )


def expand_counts(text: str) -> list[int]:
    """How many tasks each node has, as Slurm writes it: `2(x3),1` is 2, 2, 2, 1. Raises ValueError
    where it is no such list."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None or int(match.group(2) or 1) > _MOST_HOSTS:
            raise ValueError(f"{text!r} does not count tasks")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts


def _number(environment, name):
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"{name} is {text!r}, which is no number: the launcher sets it; leave it unset "
            "without a launcher"
        )
    return int(text)


def _launched(environment):
    """(names, variables) of the launcher that started this process; None where none did."""
    for names in _MPI:
        if names.rank in environment and names.size in environment:
            return names, environment
    slurm = _slurm_step(environment)
    if _PMI.rank in environment and _PMI.size in environment:
        same = slurm and all(
            slurm[of_slurm] == environment[of_pmi] for of_slurm, of_pmi in _SAME
        )
        return (
            (_SLURM, slurm) if same else (_PMI, environment)
        )  # mpiexec starts its helpers by srun, one a node
    return (_SLURM, slurm) if slurm else None


_SAME = ((_SLURM.rank, _PMI.rank), (_SLURM.size, _PMI.size))


def _slurm_step(environment):
    """The variables of a step that srun started, else None: a batch script and salloc's shell are
    in no step."""
    if "SLURM_STEP_ID" not in environment or _SLURM.rank not in environment:
        return None
    size = environment.get(_SLURM.size, environment.get("SLURM_NTASKS"))
    return None if size is None else {**environment, _SLURM.size: size}


def _compare(environment, rank, size, launched):
    """Refuses a RANK and a WORLD_SIZE that the processes of one launcher have in common."""
    if (
        launched is None or "TORCHELASTIC_RUN_ID" in environment
    ):  # torchrun gives ranks in an order of its own
        return
    names, source = launched
    of_launcher, tasks = _number(source, names.rank), _number(source, names.size)
    if size < tasks or (size == tasks and rank != of_launcher):
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE is {size}, but this is process {of_launcher} of "
            f"{tasks} that {names.launcher} started: unset RANK and WORLD_SIZE, or start one "
            "process"
        )


def _completed(environment, names, source, rank, size):
    """The launcher's rank and size, with which a RANK or a WORLD_SIZE that stands alone has to
    agree."""
    of_launcher, tasks = _number(source, names.rank), _number(source, names.size)
    for name, told, known in (("RANK", rank, of_launcher), ("WORLD_SIZE", size, tasks)):
        if told is not None and told != known:
            raise InputError(
                f"{name} is {told}, but this is process {of_launcher} of {tasks} that "
                f"{names.launcher} started: unset {name}"
            )
    return of_launcher, tasks


def _refuse_unknown(environment):
    """Refuses where several processes were asked for and none of them can know its rank."""
    for names in (*_MPI, _PMI):
        tasks = _number(environment, names.size)
        if tasks is not None and tasks > 1:
            raise InputError(
                f"{names.size} is {tasks} and {names.rank} is not set: set RANK and WORLD_SIZE; "
                f"{_ALONE}"
            )
        if names.rank in environment and tasks is None:
            raise InputError(
                f"{names.rank} is set and {names.size} is not: set RANK and WORLD_SIZE; {_ALONE}"
            )
    if "PMIX_RANK" in environment:
        raise InputError(
            f"PMIX_RANK is {environment['PMIX_RANK']}, and how many processes there are is not "
            f"known: set WORLD_SIZE; {_ALONE}"
        )
    tasks = _number(environment, "SLURM_NTASKS")
    if tasks is not None and tasks > 1:
        raise InputError(
            f"SLURM_NTASKS is {tasks}, and this process was not started by srun: start it with "
            "`srun python …`; for one process alone use `srun -n 1 python …`, or set RANK=0 "
            "WORLD_SIZE=1"
        )


def _local(environment, names, source, rank, size):
    """(local rank, ranks of this host), each None where the launcher does not say it."""
    if size == 1:
        return _number(environment, "LOCAL_RANK") or 0, 1
    local_rank = _number(environment, "LOCAL_RANK")
    local_size = _number(environment, "LOCAL_WORLD_SIZE")
    if local_size is None:
        local_size = _number(environment, "LOCAL_SIZE")
    if (
        names is not None and _number(source, names.size) == size
    ):  # else ranks are not the launcher's processes
        if local_rank is None:
            local_rank = _first_number(source, names.local_rank)
        if local_size is None:
            local_size = (
                _slurm_local_size(source)
                if names is _SLURM
                else _first_number(source, names.local_size)
            )
    if local_size is not None and not 1 <= local_size <= size:
        raise InputError(
            f"{local_size} ranks on this host of {size} in all: see LOCAL_WORLD_SIZE, LOCAL_SIZE "
            "and WORLD_SIZE"
        )
    if local_rank is not None and local_rank >= (local_size or size):
        raise InputError(
            f"local rank {local_rank} of {local_size or size}: see LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return local_rank, local_size


def _first_number(environment, names):
    for name in names:
        if name in environment:
            return _number(environment, name)
    return None


def _slurm_local_size(environment):
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE")
    node = _number(environment, "SLURM_NODEID")
    if counts is None or node is None:
        return None
    try:
        return expand_counts(counts)[node]
    except (ValueError, IndexError):
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE is {counts!r} and SLURM_NODEID is {node}: set "
            "LOCAL_WORLD_SIZE"
        ) from None


def _address(environment, names, size, local_size):
    """(where the first rank listens, the variable it was derived from or None)."""
    if address := environment.get("MASTER_ADDR"):
        return address, None
    if size == 1 or local_size == size:
        return _LOOPBACK, None
    for name in _HOSTS:
        if text := environment.get(name):
            try:
                return next(expand_hosts(text)), name
            except ValueError:
                raise InputError(
                    f"{name} is {text!r}, which names no hosts: set MASTER_ADDR to the first "
                    "rank's host"
                ) from None
    how = (
        "-x MASTER_ADDR=…"
        if names is _MPI[0]
        else "-genv MASTER_ADDR …"
        if names is _PMI
        else "MASTER_ADDR=…"
    )
    raise InputError(
        f"the {size} ranks are on several hosts and MASTER_ADDR is not set: give the first rank's "
        f"host with {how}"
    )


def _port(environment, names):
    """MASTER_PORT, or a port that goes with the job, so that two jobs of a host do not meet at
    one."""
    port = _number(environment, "MASTER_PORT")
    if port is not None:
        if not 0 < port < 65536:
            raise InputError(f"MASTER_PORT is {port}: ports run from 1 to 65535")
        return port
    job = _job(environment, names)
    return (
        DEFAULT_PORT
        if job is None
        else _FIRST_PORT + 2 * (zlib.crc32(job.encode()) % _PORTS)
    )


def _job(environment, names):
    """What names the launcher's job, alike on all of its processes; None where nothing does."""
    if names is None:
        return None
    if names is _SLURM:
        return f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    own = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid") if names is _MPI[0] else ()
    for name in (*own, "SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID"):
        if environment.get(name):
            return environment[name]
    return None
