"""What an examination found, as plain data: JSON takes it, and a test makes it up.

Bytes, seconds, and bytes a second throughout.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RankFacts:
    """What a rank found of its own process, host and device.

    driver: of the device; "" where there is none. busy_cores: cores of the host that are busy, over
    the last minute. other_processes: on the device. device_memory: free on it; None without one.
    problem: "" or why the rank did not find out.
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


@dataclass(frozen=True)
class DataFacts:
    """What a rank found of the dataset.

    problem: "" or why it cannot be used. capacity: what the table takes of this rank. no_room: ""
    or the arithmetic by which it does not fit. shm_need: of a rank's loaders. read: bytes of shards
    a second, and users.
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

    problem: "" or why it cannot write there. seen: seconds until it opened the first rank's file by
    name; listed: until a listing had it; None: not within the patience. heard: whether the first
    rank opened this rank's file; of the first rank always. lock: "held" by the first rank, as it is;
    "free": the first rank's lock does not hold here; "none": the file system has none.
    """

    problem: str = ""
    seen: float | None = 0.0
    listed: float | None = 0.0
    heard: bool = True
    lock: str = "held"
    free: int = 0


@dataclass(frozen=True)
class Link:
    """The way between two hosts: seconds of a message's way, bytes a second."""

    hosts: tuple[str, str]
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Collective:
    """All ranks' exchange: seconds of a small one, bytes a second that each rank sends in it."""

    name: str
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Examination:
    """All that was found. Lists of facts have one for each rank, in order; None: not looked at.

    differences: sentences about ranks that differ in what all have to have the same. clocks: by
    host, seconds that it is ahead of the first rank's. need_gbit: the least that a link has to have.
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
