"""Which rank of which world this process is, from what its launcher sets in the environment.

No other module reads these variables to decide by.

    torchrun, deepspeed (also mpich, impi)   RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
    srun (deepspeed's slurm)                 SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID
    mpirun of Open MPI (deepspeed's openmpi,
    Kubeflow's MPI runtime)                  OMPI_COMM_WORLD_RANK, OMPI_COMM_WORLD_SIZE, …
    mpirun of MVAPICH (deepspeed's mvapich)  MV2_COMM_WORLD_RANK, MV2_COMM_WORLD_SIZE, …
    mpiexec of MPICH and of Intel MPI        PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, …

RANK and WORLD_SIZE win where both are set. A process is refused where several were started and it
cannot know its rank, or where two variables contradict each other: each process would be a run of
its own. Needs nothing but Python.
"""

import os
import re
import zlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from trainer.errors import InputError

DEFAULT_PORT = 29500  # torchrun's and DeepSpeed's
_FIRST_PORT = (
    10240  # below the ports that Linux gives away by itself (32768 and up)
)
_PORTS = 10000  # pairs: a supervisor takes the port after the rendezvous's
_LOOPBACK = "127.0.0.1"
_MOST_HOSTS = 100_000  # a host list that names more is no host list
_NAMED = 4  # ranks and hosts that a message names
_ALONE = "for one process alone set RANK=0 WORLD_SIZE=1"

_Variables = Mapping[str, str]


@dataclass(frozen=True)
class World:
    """This process's rank among those that the launcher started.

    Two hosts of two ranks each, as rank 3 sees them:

        World(rank=3, size=4, local_rank=1, local_size=2, address="host0", port=29500)

    None: the launcher does not say.
    """

    rank: int
    size: int
    local_rank: int | None
    # Ranks of this host.
    local_size: int | None
    # Where the first rank listens.
    address: str
    port: int
    # The variable whose first host is the address.
    derived_from: str | None = None


@dataclass(frozen=True)
class _Launcher:
    """A launcher and the names of its variables; of several names, the first that is set counts."""

    name: str
    rank: str
    size: str
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]

    def has_started(self, environment: _Variables) -> bool:
        """Whether this launcher has set rank and size."""
        return self.rank in environment and self.size in environment


@dataclass(frozen=True)
class _Launch:
    """The launcher that started this process, and the variables in which it tells ranks."""

    launcher: _Launcher
    variables: _Variables

    @property
    def rank(self) -> int:
        """This process's number among those that the launcher started."""
        name = self.launcher.rank
        return _parse_number(name, self.variables[name])

    @property
    def size(self) -> int:
        """How many processes the launcher started."""
        name = self.launcher.size
        return _parse_number(name, self.variables[name])

    def describe(self) -> str:
        """`process 1 of 4 that srun started`."""
        return f"process {self.rank} of {self.size} that {self.launcher.name} started"


_OPEN_MPI = _Launcher(
    name="Open MPI's mpirun",
    rank="OMPI_COMM_WORLD_RANK",
    size="OMPI_COMM_WORLD_SIZE",
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
_MVAPICH = _Launcher(
    name="MVAPICH's mpirun",
    rank="MV2_COMM_WORLD_RANK",
    size="MV2_COMM_WORLD_SIZE",
    local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
    local_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
)
_PMI = _Launcher(
    name="mpiexec",
    rank="PMI_RANK",
    size="PMI_SIZE",
    local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
    local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
)
_SLURM = _Launcher(
    name="srun",
    rank="SLURM_PROCID",
    size="SLURM_STEP_NUM_TASKS",
    local_rank=("SLURM_LOCALID",),
    local_size=(),  # SLURM_STEP_TASKS_PER_NODE lists all nodes
)
_OPEN_MPI_JOB_VARIABLES = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
_HOST_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")


def read_world(environment: _Variables = os.environ) -> World:
    """The world that the environment describes; one process alone where it names no launcher.

    Raises InputError where variables are no numbers, contradict each other, or leave open which
    rank this is.
    """
    launch = _detect_launch(environment)
    numbers = _read_rank_and_size(environment, launch)
    if numbers is None:
        _refuse_unknown_rank(environment)
        return World(
            rank=0,
            size=1,
            local_rank=0,
            local_size=1,
            address=_LOOPBACK,
            port=DEFAULT_PORT,
        )
    rank, size = numbers
    if size < 1 or not 0 <= rank < size:
        raise InputError(
            f"rank {rank} of {size}: ranks run from 0 to the world's size less one; see RANK and "
            "WORLD_SIZE"
        )
    local_rank, local_size = _read_local(environment, launch, size)
    address, derived_from = _read_address(environment, launch, size, local_size)
    return World(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        address=address,
        port=_read_port(environment, launch),
        derived_from=derived_from,
    )


def _read_rank_and_size(
    environment: _Variables, launch: _Launch | None
) -> tuple[int, int] | None:
    """Rank and size of the world; None where nothing speaks of several processes.

    RANK and WORLD_SIZE win, then the launcher's own variables. PMIX_RANK, beside which PMIx sets
    no size, serves where WORLD_SIZE is set.
    """
    rank = _read_number(environment, "RANK")
    size = _read_number(environment, "WORLD_SIZE")
    if rank is not None and size is not None:
        _refuse_common_rank(environment, rank, size, launch)
        return rank, size
    if launch is not None:
        return _complete_rank_and_size(launch, rank, size)
    if rank is None and size is not None:
        rank_of_pmix = _read_number(environment, "PMIX_RANK")
        if rank_of_pmix is not None:
            return rank_of_pmix, size
    if rank is None and size in (None, 1):
        return None
    present = "WORLD_SIZE"
    missing = "RANK"
    if size is None:
        present = "RANK"
        missing = "WORLD_SIZE"
    raise InputError(
        f"{present} is {environment[present]} and {missing} is not set: set both or neither"
    )


def enter_world(
    world: World, environment: MutableMapping[str, str] = os.environ
) -> None:
    """Writes the world into the environment as torchrun does.

    The libraries and the children of this process read it there.
    """
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "MASTER_ADDR": world.address,
    }
    if world.size > 1:
        values["MASTER_PORT"] = world.port
    for name, value in values.items():
        if value is not None:
            environment[name] = str(value)


def device_of_rank(
    rank: int,
    local_rank: int,
    local_size: int,
    devices: int,
) -> int:
    """The number of the visible device that a rank of a host takes.

    A launcher may show each process all devices of the host, or one of its own
    (`srun --gpus-per-task=1`):

        device_of_rank(rank=5, local_rank=1, local_size=4, devices=4)    1
        device_of_rank(rank=5, local_rank=1, local_size=4, devices=1)    0

    Raises InputError where there are several and fewer than ranks, so
    that two ranks would share one. It does so too where ranks do not follow each other on a host:
    TorchRec looks for rank r on device r % (ranks of a host).
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
    """The first two ranks that have the same device; None where each has its own.

    devices: each rank's host and what names the device there, in the order of ranks:

        find_shared_device(["host0 GPU-a", "host0 GPU-b", "host0 GPU-a"])    (0, 2)
    """
    first_with: dict[str, int] = {}
    for rank, device in enumerate(devices):
        if device in first_with:
            return first_with[device], rank
        first_with[device] = rank
    return None


def describe_missing(
    world: World,
    hosts: list[str | None],
    environment: _Variables = os.environ,
) -> str:
    """Which ranks did not come, on which hosts, and which hosts did.

    hosts: of each rank that came its host, None of the others. Of two hosts of two ranks each,
    and of the same within Slurm:

        describe_missing(world, ["a", "a", None, None])
        "rank 2 on host 1, rank 3 on host 1 did not come (a did)"
        "rank 2 on n8, rank 3 on n8 did not come (n7 did)"

    A host's name is known where another of its ranks came, or from Slurm's list.
    """
    local_size = world.local_size or world.size
    names = dict(enumerate(_list_hosts(environment)))
    came: list[str] = []
    for rank, host in enumerate(hosts):
        if host is None:
            continue
        names[rank // local_size] = host
        if host not in came:
            came.append(host)
    missing: list[str] = []
    for rank, host in enumerate(hosts):
        number = rank // local_size
        place = names.get(number, f"host {number}")
        if host is None:
            missing.append(f"rank {rank} on {place}")
    absent = _first_few(missing)
    present = _first_few(came)
    return f"{absent} did not come ({present} did)"


def _first_few(words: list[str]) -> str:
    """`a, b, c, d and 3 more`."""
    text = ", ".join(words[:_NAMED])
    more = len(words) - _NAMED
    if more > 0:
        text += f" and {more} more"
    return text


def _list_hosts(environment: _Variables) -> list[str]:
    """The hosts of Slurm's list, in order; none where there is no such list."""
    for name in _HOST_LISTS:
        hosts = environment.get(name)
        if not hosts:
            continue
        try:
            return list(expand_hosts(hosts))
        except ValueError:
            return []
    return []


def expand_hosts(text: str) -> Iterator[str]:
    """The hosts of a list as Slurm writes it, in order: `a[01-03,7],b` is a01, a02, a03, a7, b.

    Raises ValueError where it is none.
    """
    for name in _split_outside_brackets(text):
        yield from _expand_name(name)


def _split_outside_brackets(text: str) -> Iterator[str]:
    """The names between the commas that stand in no brackets."""
    depth = 0
    name = ""
    for letter in text:
        if letter == "[":
            depth += 1
        elif letter == "]":
            depth -= 1
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


def _expand_name(name: str) -> Iterator[str]:
    """The hosts of one name: `a[1-2]b[3,5]` is a1b3, a1b5, a2b3, a2b5."""
    match = re.fullmatch(r"([^\[\]]*)\[([^\[\]]*)\](.*)", name)
    if match is None:
        if not name or re.search(r"[\[\]\s]", name):
            raise ValueError(f"{name!r} is no host")
        yield name
        return
    before, ranges, after = match.groups()
    endings = [""]
    if after:
        endings = list(_expand_name(after))
    for part in ranges.split(","):
        for number in _expand_range(part):
            for ending in endings:
                yield before + number + ending


def _expand_range(text: str) -> Iterator[str]:
    """`08-10` is 08, 09, 10, and `7` is 7."""
    bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if bounds is None:
        raise ValueError(f"{text!r} is no range of hosts")
    first, last = bounds.groups()
    numbers = range(int(first), int(last or first) + 1)
    if not 0 < len(numbers) <= _MOST_HOSTS:
        raise ValueError(f"{text!r} is no range of hosts")
    width = len(first)
    for number in numbers:
        yield str(number).zfill(width)


def expand_counts(text: str) -> list[int]:
    """How many tasks each node has, as Slurm writes it: `2(x3),1` is 2, 2, 2, 1.

    Raises ValueError where it is no such list.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} does not count tasks")
        tasks, repeats = match.groups()
        nodes = int(repeats or 1)
        if nodes > _MOST_HOSTS:
            raise ValueError(f"{text!r} does not count tasks")
        counts += [int(tasks)] * nodes
    return counts


def _read_number(environment: _Variables, name: str) -> int | None:
    """A variable's number; None where it is not set. Raises InputError."""
    text = environment.get(name)
    if text is None:
        return None
    return _parse_number(name, text)


def _parse_number(name: str, text: str) -> int:
    """The number that a variable's text is. Raises InputError."""
    if not (text.isascii() and text.isdecimal()):
        raise InputError(
            f"{name} is {text!r}, which is no number: the launcher sets it; leave it unset "
            "without a launcher"
        )
    return int(text)


def _detect_launch(environment: _Variables) -> _Launch | None:
    """The launcher that started this process; None where none did."""
    for launcher in (_OPEN_MPI, _MVAPICH):
        if launcher.has_started(environment):
            return _Launch(launcher, environment)
    slurm = _detect_slurm_step(environment)
    if not _PMI.has_started(environment):
        return slurm
    # mpiexec starts its helpers by srun, one a node: they are other processes than Slurm's.
    if slurm is not None and _is_same_process(slurm.variables, environment):
        return slurm
    return _Launch(_PMI, environment)


def _is_same_process(slurm: _Variables, environment: _Variables) -> bool:
    """Whether Slurm and PMI give this process one rank of one size."""
    same_rank = slurm[_SLURM.rank] == environment[_PMI.rank]
    same_size = slurm[_SLURM.size] == environment[_PMI.size]
    return same_rank and same_size


def _detect_slurm_step(environment: _Variables) -> _Launch | None:
    """The step of Slurm that srun started; a batch script and salloc's shell are in none."""
    if "SLURM_STEP_ID" not in environment or _SLURM.rank not in environment:
        return None
    tasks_of_job = environment.get("SLURM_NTASKS")
    tasks = environment.get(_SLURM.size, tasks_of_job)
    if tasks is None:
        return None
    variables = dict(environment)
    variables[_SLURM.size] = tasks
    return _Launch(_SLURM, variables)


def _refuse_common_rank(
    environment: _Variables,
    rank: int,
    size: int,
    launch: _Launch | None,
) -> None:
    """Refuses a RANK and a WORLD_SIZE that the processes of one launcher have in common."""
    if launch is None:
        return
    if "TORCHELASTIC_RUN_ID" in environment:
        return  # torchrun gives ranks in an order of its own
    task = launch.rank
    tasks = launch.size
    is_too_small = size < tasks
    is_another_rank = size == tasks and rank != task
    if is_too_small or is_another_rank:
        raise InputError(
            f"RANK is {rank} and WORLD_SIZE is {size}, but this is "
            f"{launch.describe()}: unset RANK and WORLD_SIZE, or start one process"
        )


def _complete_rank_and_size(
    launch: _Launch,
    rank: int | None,
    size: int | None,
) -> tuple[int, int]:
    """The launcher's rank and size. A RANK or a WORLD_SIZE that stands alone has to agree."""
    task = launch.rank
    tasks = launch.size
    started = launch.describe()
    if rank is not None and rank != task:
        raise InputError(f"RANK is {rank}, but this is {started}: unset RANK")
    if size is not None and size != tasks:
        raise InputError(
            f"WORLD_SIZE is {size}, but this is {started}: unset WORLD_SIZE"
        )
    return task, tasks


def _refuse_unknown_rank(environment: _Variables) -> None:
    """Refuses where several processes were asked for and none of them can know its rank."""
    for launcher in (_OPEN_MPI, _MVAPICH, _PMI):
        tasks = _read_number(environment, launcher.size)
        rank_is_set = launcher.rank in environment
        if tasks is not None and tasks > 1:
            raise InputError(
                f"{launcher.size} is {tasks} and {launcher.rank} is not set: set RANK and "
                f"WORLD_SIZE; {_ALONE}"
            )
        if rank_is_set and tasks is None:
            raise InputError(
                f"{launcher.rank} is set and {launcher.size} is not: set RANK and WORLD_SIZE; "
                f"{_ALONE}"
            )
    if "PMIX_RANK" in environment:
        raise InputError(
            f"PMIX_RANK is {environment['PMIX_RANK']}, and how many processes there are is not "
            f"known: set WORLD_SIZE; {_ALONE}"
        )
    tasks = _read_number(environment, "SLURM_NTASKS")
    if tasks is not None and tasks > 1:
        raise InputError(
            f"SLURM_NTASKS is {tasks}, and this process was not started by srun: start it with "
            "`srun python …`; for one process alone use `srun -n 1 python …`, or set RANK=0 "
            "WORLD_SIZE=1"
        )


def _read_local(
    environment: _Variables,
    launch: _Launch | None,
    size: int,
) -> tuple[int | None, int | None]:
    """Local rank, and ranks of this host; each None where the launcher does not say it.

    LOCAL_RANK and LOCAL_WORLD_SIZE, or LOCAL_SIZE, win over the launcher's own variables.
    """
    local_rank = _read_number(environment, "LOCAL_RANK")
    if size == 1:
        return local_rank or 0, 1
    local_size = _read_first_number(
        environment, ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    )
    # Of another size, the ranks are not the launcher's processes.
    if launch is not None and launch.size == size:
        if local_rank is None:
            local_rank = _read_first_number(
                launch.variables, launch.launcher.local_rank
            )
        if local_size is None:
            local_size = _read_local_size(launch)
    if local_size is not None and not 1 <= local_size <= size:
        raise InputError(
            f"{local_size} ranks on this host of {size} in all: see LOCAL_WORLD_SIZE, LOCAL_SIZE "
            "and WORLD_SIZE"
        )
    most = local_size or size
    if local_rank is not None and local_rank >= most:
        raise InputError(
            f"local rank {local_rank} of {most}: see LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    return local_rank, local_size


def _read_first_number(
    environment: _Variables, names: tuple[str, ...]
) -> int | None:
    """The number of the first of these variables that is set."""
    for name in names:
        if name in environment:
            return _read_number(environment, name)
    return None


def _read_local_size(launch: _Launch) -> int | None:
    """How many of the launcher's processes are on this host."""
    if launch.launcher is not _SLURM:
        return _read_first_number(launch.variables, launch.launcher.local_size)
    counts = launch.variables.get("SLURM_STEP_TASKS_PER_NODE")
    node = _read_number(launch.variables, "SLURM_NODEID")
    if counts is None or node is None:
        return None
    try:
        return expand_counts(counts)[node]
    except (ValueError, IndexError):
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE is {counts!r} and SLURM_NODEID is {node}: set "
            "LOCAL_WORLD_SIZE"
        ) from None


def _read_address(
    environment: _Variables,
    launch: _Launch | None,
    size: int,
    local_size: int | None,
) -> tuple[str, str | None]:
    """Where the first rank listens, and the variable that it was derived from or None.

    MASTER_ADDR wins; else it is this host, where all ranks are here, or the first of Slurm's list.
    """
    address = environment.get("MASTER_ADDR")
    if address:
        return address, None
    if size == 1 or local_size == size:
        return _LOOPBACK, None
    for name in _HOST_LISTS:
        hosts = environment.get(name)
        if not hosts:
            continue
        try:
            return next(expand_hosts(hosts)), name
        except ValueError:
            raise InputError(
                f"{name} is {hosts!r}, which names no hosts: set MASTER_ADDR to the first "
                "rank's host"
            ) from None
    way = "MASTER_ADDR=…"
    if launch is not None and launch.launcher is _OPEN_MPI:
        way = "-x MASTER_ADDR=…"
    elif launch is not None and launch.launcher is _PMI:
        way = "-genv MASTER_ADDR …"
    raise InputError(
        f"the {size} ranks are on several hosts and MASTER_ADDR is not set: give the first rank's "
        f"host with {way}"
    )


def _read_port(environment: _Variables, launch: _Launch | None) -> int:
    """MASTER_PORT, or a port that is derived from the job.

    So two jobs of a host do not meet at one port.
    """
    port = _read_number(environment, "MASTER_PORT")
    if port is not None:
        if not 0 < port < 65536:
            raise InputError(
                f"MASTER_PORT is {port}: ports run from 1 to 65535"
            )
        return port
    job = _job_name(environment, launch)
    if job is None:
        return DEFAULT_PORT
    pair = zlib.crc32(job.encode()) % _PORTS
    return _FIRST_PORT + 2 * pair


def _job_name(environment: _Variables, launch: _Launch | None) -> str | None:
    """What names the launcher's job, alike on all of its processes; None where nothing does."""
    if launch is None:
        return None
    if launch.launcher is _SLURM:
        job = environment.get("SLURM_JOB_ID")
        step = environment.get("SLURM_STEP_ID")
        return f"{job}.{step}"
    names: tuple[str, ...] = _JOB_VARIABLES
    if launch.launcher is _OPEN_MPI:
        names = _OPEN_MPI_JOB_VARIABLES + _JOB_VARIABLES
    for name in names:
        job = environment.get(name)
        if job:
            return job
    return None
