"""What an examination found, as plain data: JSON takes it, and a test makes it up.

Bytes, seconds, and bytes a second throughout.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankFacts:
    """What a rank found of its own process, host and device.

    Attributes:
        rank: its number.
        host: the name of its host.
        device: the name of its device, or cpu.
        driver: of the device; "" where there is none.
        backend: what carries tensors between devices: gloo, or nccl and its version.
        cores: on which the process may run.
        busy_cores: of the host, over the last minute.
        other_processes: of others on the device, such as "process 77 (3120 MiB)".
        host_memory: free on the host, and in the limits of the process's job.
        device_memory: free on the device; None without one.
        shm_size: of /dev/shm.
        shm_free: of it, what is free.
        open_files: how many the process may have.
        problem: "", or why the rank did not find out; then the others are empty.
    """

    rank: int
    host: str
    device: str = "cpu"
    driver: str = ""
    backend: str = "gloo"
    cores: int = 1
    busy_cores: float = 0.0
    other_processes: list[str] = field(default_factory=list)
    host_memory: int = 0
    device_memory: int | None = None
    shm_size: int = 0
    shm_free: int = 0
    open_files: int = 0
    problem: str = ""

    @property
    def name(self) -> str:
        """`rank 3 on host1`."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class DataFacts:
    """What a rank found of the dataset.

    Attributes:
        problem: "", or why it cannot be used; then the others are empty.
        fingerprint: of the dataset; the same dataset has the same.
        capacity: what the item table takes of this rank, in words.
        no_room: "", or the arithmetic by which it does not fit.
        shm_need: what the loaders of a rank take of /dev/shm.
        read_bytes: of shards a second.
        read_users: of shards a second.
    """

    problem: str = ""
    fingerprint: str = ""
    capacity: str = ""
    no_room: str = ""
    shm_need: int = 0
    read_bytes: float = 0.0
    read_users: float = 0.0


@dataclass(frozen=True)
class FolderFacts:
    """What a rank found of the run's folder, in which the first rank and others wrote.

    Attributes:
        problem: "", or why it cannot write there.
        seen: seconds until it opened the first rank's file by its name; None: not within the
            patience.
        listed: seconds until a listing had that file; None: not within the patience.
        heard: whether the first rank opened this rank's file.
        lock: "held": the first rank's lock holds here; "free": it does not; "none": the file system
            has no locks.
        free: bytes that are free; known to the first rank.
    """

    problem: str = ""
    seen: float | None = 0.0
    listed: float | None = 0.0
    heard: bool = True
    lock: str = "held"
    free: int = 0


@dataclass(frozen=True)
class Link:
    """The link between two hosts.

    Attributes:
        hosts: their names.
        latency: seconds of a small message's way.
        bandwidth: bytes a second of a large one.
    """

    hosts: list[str]
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Collective:
    """An exchange of all ranks.

    Attributes:
        name: all-reduce or all-to-all.
        latency: seconds of a small one.
        bandwidth: bytes a second that each rank sends in a large one.
    """

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Examination:
    """All that was found. Lists of facts have one for each rank, in order.

    Attributes:
        ranks: what each found of itself.
        differences: sentences about ranks that differ in what all have to have the same.
        data: what each found of the dataset; None: not looked at.
        folder: what each found of the run's folder; None: not looked at.
        clocks: by host, seconds that it is ahead of the first rank's.
        links: one for every two hosts.
        collectives: of all ranks; none of one rank.
        need_gbit: the least that a link has to have, in Gbit/s.
        patience: seconds for which files of another host were looked for.
    """

    ranks: list[RankFacts]
    differences: list[str] = field(default_factory=list)
    data: list[DataFacts] | None = None
    folder: list[FolderFacts] | None = None
    clocks: dict[str, float] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    need_gbit: float = 1.0
    patience: float = 0.0

    @property
    def leaders(self) -> dict[str, RankFacts]:
        """The first rank of each host, hosts in the order of their ranks.

        Four ranks, two on each of two hosts: {"host0": rank 0, "host1": rank 2}
        """
        leaders: dict[str, RankFacts] = {}
        for rank in self.ranks:
            leaders.setdefault(rank.host, rank)
        return leaders

    @property
    def first_host(self) -> str:
        """The first rank's."""
        return self.ranks[0].host

    @property
    def answered(self) -> list[RankFacts]:
        """The ranks that told of themselves; all, where none did."""
        answered = [rank for rank in self.ranks if not rank.problem]
        return answered or self.ranks
