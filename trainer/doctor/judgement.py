"""Verdicts on what an examination found. Nothing is measured here, and no ranks are needed."""

import statistics
from collections.abc import Callable, Iterable

from trainer.doctor.facts import (
    DataFacts,
    Examination,
    FolderFacts,
    Link,
    RankFacts,
)
from trainer.doctor.verdict import Level, Verdict

_NAMED = 4  # hosts of one check that get a line of their own
_FILES_BESIDE = 256  # of libraries, loaders and shards
_FEW_FILES = 4096
_SMALL_SHM = 64 * 10**6  # what containers have where nobody asked for more
_CLOCK_FAULT = 60.0  # seconds
_CLOCK_WARNING = 1.0
_LATE = 1.0  # seconds of a listing
_SLOW = 0.5  # of the median
_BUSY = 0.5  # of a host's cores, that are busy before anything runs
_GIGABIT = 1e9 / 8  # bytes


def judge(examination: Examination) -> list[Verdict]:
    """One verdict or more for every check, in the order in which a table shows them."""
    verdicts = []
    for check in (
        _judge_answers,
        _judge_differences,
        _judge_devices,
        _judge_other_programs,
        _judge_memory,
        _judge_shared_memory,
        _judge_open_files,
        _judge_clocks,
        _judge_data,
        _judge_run_folder,
        _judge_locks,
        _judge_reading,
        _judge_links,
        _judge_collectives,
    ):
        verdicts += check(examination)
    return verdicts


def _hosts(examination: Examination) -> list[str]:
    """The hosts, in the order of their ranks."""
    return list(dict.fromkeys(rank.host for rank in examination.ranks))


def _by_host(
    examination: Examination, verdict_of: Callable[[RankFacts], Verdict | None]
) -> list[Verdict]:
    """The first verdict of each host that has one; more than a few hosts are counted."""
    by_host: dict[str, Verdict] = {}
    for rank in examination.ranks:
        verdict = verdict_of(rank)
        if verdict is not None:
            by_host.setdefault(rank.host, verdict)
    verdicts = list(by_host.values())
    return _shorten(verdicts)


def _shorten(verdicts: list[Verdict]) -> list[Verdict]:
    """The worst few of one check's verdicts, and a line that counts the others."""
    levels = list(Level)
    ordered = sorted(verdicts, key=lambda one: -levels.index(one.level))
    shown = ordered[:_NAMED]
    more = ordered[_NAMED:]
    if more:
        first = more[0]
        finding = f"and {len(more)} more like these (--json has all)"
        shown.append(Verdict(first.check, first.level, finding))
    return shown


def _or_ok(verdicts: list[Verdict], check: str, finding: str) -> list[Verdict]:
    """The verdicts, or one that all is well."""
    return verdicts or [Verdict(check, Level.OK, finding)]


def _judge_answers(examination: Examination) -> list[Verdict]:
    """Hosts that did not tell of themselves; where all did, how many they are."""
    check = "ranks"

    def verdict_of(rank: RankFacts) -> Verdict | None:
        if not rank.problem:
            return None
        finding = f"rank {rank.rank} on {rank.host}: {rank.problem}"
        way_out = "look at its driver, its /dev/shm and its mounts"
        return Verdict(check, Level.FAULT, finding, way_out)

    count = len(examination.ranks)
    hosts = _hosts(examination)
    finding = f"{_count(count, 'rank')} on {_count(len(hosts), 'host')}"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def _judge_differences(examination: Examination) -> list[Verdict]:
    """Versions and settings that are not the same on all ranks."""
    check = "same everywhere"
    verdicts = []
    for sentence in examination.differences:
        level = Level.FAULT
        if " has another device " in sentence:
            level = Level.WARNING  # all wait for the slowest
        verdicts.append(Verdict(check, level, sentence))
    return _or_ok(verdicts, check, "versions, settings, devices and drivers")


def _judge_devices(examination: Examination) -> list[Verdict]:
    """What computes, and by what it is connected; a mixture is among the differences."""
    counts: dict[str, int] = {}
    for rank in examination.ranks:
        name = f"{rank.device} ({rank.backend}"
        if rank.driver:
            name += f", driver {rank.driver}"
        name += ")"
        counts[name] = counts.get(name, 0) + 1
    parts = [f"{count} × {name}" for name, count in counts.items()]
    return [Verdict("devices", Level.OK, ", ".join(parts))]


def _judge_other_programs(examination: Examination) -> list[Verdict]:
    """Who else computes on a device, or keeps a host's cores busy."""
    check = "other programs"

    def verdict_of(rank: RankFacts) -> Verdict | None:
        if rank.other_processes:
            others = ", ".join(rank.other_processes[:_NAMED])
            finding = (
                f"rank {rank.rank} on {rank.host}: its device also has {others}"
            )
            return Verdict(
                check, Level.WARNING, finding, "end them, or take another"
            )
        if rank.busy_cores > rank.cores * _BUSY + 1:
            finding = (
                f"{rank.host}: {rank.busy_cores:.1f} programs compute on its "
                f"{_count(rank.cores, 'core')} (the last minute's load)"
            )
            return Verdict(check, Level.WARNING, finding, "see `top` there")
        return None

    return _or_ok(_by_host(examination, verdict_of), check, "none to speak of")


def _judge_memory(examination: Examination) -> list[Verdict]:
    """Free memory against what table, checkpoint and loaders take."""
    check = "memory"
    least = min(rank.host_memory for rank in examination.ranks)
    free = f"at least {_size(least)} free a host"
    devices = []
    for rank in examination.ranks:
        if rank.device_memory is not None:
            devices.append(rank.device_memory)
    if devices:
        free += f", {_size(min(devices))} a device"
    if examination.data is None:
        finding = f"{free}; what a run needs: give data=DIR"
        return [Verdict(check, Level.SKIPPED, finding)]

    def verdict_of(rank: RankFacts) -> Verdict | None:
        facts = _data_of(examination, rank)
        if not facts.no_room:
            return None
        # The arithmetic ends in its own way out.
        finding = f"rank {rank.rank} on {rank.host}: {facts.no_room}"
        return Verdict(check, Level.FAULT, finding)

    capacities = []
    for facts in examination.data:
        if facts.capacity:
            capacities.append(facts.capacity)
    finding = free
    if capacities:
        finding += f"; the item table takes {capacities[0]}"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def _data_of(examination: Examination, rank: RankFacts) -> DataFacts:
    """A rank's facts about the dataset; empty ones where nothing was looked at."""
    if examination.data is None:
        return DataFacts()
    return examination.data[rank.rank]


def _judge_shared_memory(examination: Examination) -> list[Verdict]:
    """Room in /dev/shm, over which loaders hand their batches."""
    check = "shared memory"
    way_out = "empty it, or mount a larger one (--shm-size, medium: Memory)"
    neighbours: dict[str, int] = {}
    for rank in examination.ranks:
        neighbours[rank.host] = neighbours.get(rank.host, 0) + 1
    needs = [facts.shm_need for facts in examination.data or []]
    most = max(needs, default=0)

    def verdict_of(rank: RankFacts) -> Verdict | None:
        need = most * neighbours[rank.host] or _SMALL_SHM
        if rank.problem:
            return None
        if rank.shm_free < need:
            finding = (
                f"{rank.host}: /dev/shm has {_size(rank.shm_free)} of {_size(rank.shm_size)} "
                f"free, its loaders need {_size(need)}"
            )
            return Verdict(check, Level.FAULT, finding, way_out)
        if rank.shm_size <= _SMALL_SHM:
            finding = f"{rank.host}: /dev/shm is only {_size(rank.shm_size)}"
            return Verdict(check, Level.WARNING, finding, way_out)
        return None

    least = min(rank.shm_free for rank in examination.ranks)
    finding = f"at least {_size(least)} of /dev/shm free a host"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def _judge_open_files(examination: Examination) -> list[Verdict]:
    """The open-file limit against the sockets of so many ranks (docs/clusters.md)."""
    check = "open files"
    world = len(examination.ranks)
    way_out = "`ulimit -n 65536` before the launcher starts the ranks"

    def verdict_of(rank: RankFacts) -> Verdict | None:
        need = _FILES_BESIDE + count_sockets(rank.rank, world)
        if rank.problem:
            return None
        finding = f"rank {rank.rank} on {rank.host}: may open {rank.open_files:,} files"
        if rank.open_files < need:
            finding += f", and needs {need:,}"
            return Verdict(check, Level.FAULT, finding, way_out)
        if rank.open_files < _FEW_FILES:
            return Verdict(check, Level.WARNING, finding, way_out)
        return None

    least = min(rank.open_files for rank in examination.ranks)
    finding = f"each rank may open {least:,} or more"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def count_sockets(rank: int, world: int) -> int:
    """The sockets of a rank: gloo's, the watch's, and the first rank's for all others.

    Of two ranks the first has 2 + 3 + 1 + 1 + 2 = 9, the other 6.
    """
    sockets = 2 * (world - 1) + 3 + 1
    if rank == 0:
        sockets += world - 1 + world
    return sockets


def _judge_clocks(examination: Examination) -> list[Verdict]:
    """Clocks against the first rank's."""
    check = "clocks"
    first = _hosts(examination)[0]
    verdicts = []
    for host, ahead in examination.clocks.items():
        off = abs(ahead)
        if off < _CLOCK_WARNING:
            continue
        level = Level.FAULT if off >= _CLOCK_FAULT else Level.WARNING
        way = "ahead of" if ahead > 0 else "behind"
        finding = f"{host}: its clock is {_duration(off)} {way} {first}'s"
        way_out = "set it (chronyc makestep, timedatectl set-ntp true)"
        verdicts.append(Verdict(check, level, finding, way_out))
    if len(_hosts(examination)) == 1:
        return [Verdict(check, Level.SKIPPED, "one host")]
    most = max(map(abs, examination.clocks.values()), default=0.0)
    finding = f"within {_duration(most)} of {first}'s"
    return _or_ok(_shorten(verdicts), check, finding)


def _judge_data(examination: Examination) -> list[Verdict]:
    """Whether all ranks have the dataset, and the same."""
    check = "data"
    if examination.data is None:
        return [Verdict(check, Level.SKIPPED, "give data=DIR")]
    prints = [facts.fingerprint for facts in examination.data]
    usual = next(filter(None, prints), "")

    def verdict_of(rank: RankFacts) -> Verdict | None:
        facts = _data_of(examination, rank)
        if facts.problem:
            # The dataset's error ends in its own way out.
            finding = f"{rank.host}: {facts.problem}"
            if usual:
                finding += "; other hosts have it, mount or copy it there"
            return Verdict(check, Level.FAULT, finding)
        if facts.fingerprint != usual:
            finding = (
                f"{rank.host}: has another dataset ({facts.fingerprint[:12]}, "
                f"not {usual[:12]})"
            )
            return Verdict(check, Level.FAULT, finding, "give all the same")
        return None

    finding = f"the same on all hosts ({usual[:12]})"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def _judge_run_folder(examination: Examination) -> list[Verdict]:
    """Whether hosts can write in the run's folder, and see each other there."""
    check = "run's folder"
    folder = examination.folder
    if folder is None:
        return [Verdict(check, Level.SKIPPED, "give run=DIR")]

    def verdict_of(rank: RankFacts) -> Verdict | None:
        return _judge_view(rank, folder[rank.rank], examination)

    listed = [facts.listed or 0.0 for facts in folder]
    free = _size(folder[0].free)
    finding = f"written and renamed in, {free} free"
    if len(_hosts(examination)) > 1:
        finding = f"seen by all hosts, listed after {_duration(max(listed))}, {free} free"
    return _or_ok(_by_host(examination, verdict_of), check, finding)


def _judge_view(
    rank: RankFacts, facts: FolderFacts, examination: Examination
) -> Verdict | None:
    """What is wrong with one rank's view of the run's folder."""
    check = "run's folder"
    first = _hosts(examination)[0]
    shared = "run=DIR has to be one folder, which all hosts see"
    patience = _duration(examination.patience)
    if facts.seen is None or not facts.heard:
        seer, writer = rank.host, first
        if facts.seen is not None:
            seer, writer = first, rank.host
        finding = (
            f"{rank.host}: not shared, {seer} does not see within {patience} what {writer} "
            "writes there"
        )
        if facts.problem:
            finding += f", and cannot write ({facts.problem})"
        return Verdict(check, Level.FAULT, finding, shared)
    if facts.problem:
        finding = f"{rank.host}: cannot be written ({facts.problem})"
        way_out = "give this user the right, or another run=DIR"
        return Verdict(check, Level.FAULT, finding, way_out)
    late = facts.listed is None or facts.listed > _LATE
    if not late:
        return None
    when = f"not within {patience}"
    if facts.listed is not None:
        when = f"after {_duration(facts.listed)}"
    finding = f"{rank.host}: lists new files {when}"
    way_out = "a run waits for them (docs/clusters.md); actimeo=1 shortens it"
    return Verdict(check, Level.WARNING, finding, way_out)


def _judge_locks(examination: Examination) -> list[Verdict]:
    """Whether the first rank's lock holds on the other hosts."""
    check = "locks"
    folder = examination.folder
    if folder is None:
        return [Verdict(check, Level.SKIPPED, "give run=DIR")]
    if len(_hosts(examination)) == 1:
        return [Verdict(check, Level.SKIPPED, "one host")]

    def verdict_of(rank: RankFacts) -> Verdict | None:
        facts = folder[rank.rank]
        if facts.lock == "held":
            return None
        finding = f"{rank.host}: the file system has no locks"
        if facts.lock == "free":
            finding = f"{rank.host}: a lock of {examination.ranks[0].host} does not hold there"
        way_out = "mount with flock, or see to it that one run writes there"
        return Verdict(check, Level.WARNING, finding, way_out)

    unseen = all(facts.seen is None or facts.problem for facts in folder[1:])
    if unseen:
        return [Verdict(check, Level.SKIPPED, "the folder is not shared")]
    return _or_ok(_by_host(examination, verdict_of), check, "hold on all hosts")


def _judge_reading(examination: Examination) -> list[Verdict]:
    """How fast hosts read shards, all at once."""
    check = "shards read"
    if examination.data is None:
        return [Verdict(check, Level.SKIPPED, "give data=DIR")]
    rates: dict[str, float] = {}
    users = 0.0
    for rank in examination.ranks:
        facts = examination.data[rank.rank]
        if facts.read_bytes:
            rates[rank.host] = rates.get(rank.host, 0.0) + facts.read_bytes
            users += facts.read_users
    if not rates:
        return [Verdict(check, Level.SKIPPED, "no host could read any")]
    median = statistics.median(rates.values())
    slowest = min(rates, key=lambda host: rates[host])
    whole = sum(rates.values())
    finding = f"{_size(whole)}/s, {users:,.0f} users/s"
    if len(rates) > 1:
        least = _size(rates[slowest])
        finding += f"; slowest: {slowest}, {least}/s"
    if rates[slowest] < _SLOW * median:
        way_out = "look at its disk or mount, or copy the dataset there"
        return [Verdict(check, Level.WARNING, finding, way_out)]
    return [Verdict(check, Level.OK, finding)]


def _judge_links(examination: Examination) -> list[Verdict]:
    """The slowest pair of hosts, and every pair below what is needed or far below the others."""
    check = "links"
    links = sorted(examination.links, key=lambda link: link.bandwidth)
    if not links:
        return [Verdict(check, Level.SKIPPED, "one host")]
    median = statistics.median(link.bandwidth for link in links)
    need = examination.need_gbit
    verdicts = []
    for link in links:
        if link.bandwidth < need * _GIGABIT:
            finding = f"{_describe_link(link)}, less than {need:g} Gbit/s"
            way_out = (
                "look at its cable, switch and GLOO_SOCKET_IFNAME, or allow "
                "less by --min-gbit"
            )
            verdicts.append(Verdict(check, Level.FAULT, finding, way_out))
        elif link.bandwidth < _SLOW * median:
            finding = f"{_describe_link(link)}, the median is {_rate(median)}"
            way_out = "look at its cable and switch: all wait for the slowest"
            verdicts.append(Verdict(check, Level.WARNING, finding, way_out))
    best = (
        f"slowest of {_count(len(links), 'pair')}: {_describe_link(links[0])}"
    )
    return _or_ok(_shorten(verdicts), check, best)


def _describe_link(link: Link) -> str:
    """`host0 – host1: 0.02 Gbit/s, 0.3 ms`."""
    one, other = link.hosts
    return (
        f"{one} – {other}: {_rate(link.bandwidth)}, {_duration(link.latency)}"
    )


def _judge_collectives(examination: Examination) -> list[Verdict]:
    """What all ranks' exchanges reach."""
    verdicts = []
    for collective in examination.collectives:
        finding = (
            f"a rank sends {_rate(collective.bandwidth)}; a small one takes "
            f"{_duration(collective.latency)}"
        )
        verdicts.append(Verdict(collective.name, Level.OK, finding))
    skipped = [
        Verdict("all-reduce", Level.SKIPPED, "one rank"),
        Verdict("all-to-all", Level.SKIPPED, "one rank"),
    ]
    return verdicts or skipped


def _count(number: int, thing: str) -> str:
    if number == 1:
        return f"1 {thing}"
    return f"{number:,} {thing}s"


def _rate(bandwidth: float) -> str:
    """Bytes a second as networks count: `9.41 Gbit/s`."""
    bits = 8 * bandwidth
    if bits < 1e9:
        return f"{bits / 1e6:.3g} Mbit/s"
    return f"{bits / 1e9:.3g} Gbit/s"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    """`0.2 ms`, `3.0 s`, `60 min`."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.0f} µs"
    if seconds < 1:
        return f"{1e3 * seconds:.1f} ms"
    if seconds < 300:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"


def count_levels(verdicts: Iterable[Verdict], level: Level) -> int:
    """How many verdicts are of a level."""
    return sum(1 for verdict in verdicts if verdict.level is level)
