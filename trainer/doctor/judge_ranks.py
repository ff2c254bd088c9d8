"""Verdicts on ranks and hosts, each by itself: devices, memory, limits, and what all have the same.

A function fills a check, and returns what is said where nothing is amiss.
"""

from collections import Counter

from embeddings.placement import format_size
from trainer.doctor.facts import Examination, RankFacts
from trainer.doctor.units import count_of
from trainer.doctor.verdict import Check

_FILES_BESIDE = 256  # of libraries, loaders and shards
_FEW_FILES = 4096
_SMALL_SHM = 64 * 10**6  # what containers have where nobody asked for more
_BUSY = 0.5  # of a host's cores, that are busy before anything runs

_LOOK_THERE = "look at its driver, its /dev/shm and its mounts"
_END_THEM = "end them, or take another device"
_MORE_SHM = "empty it, or mount a larger one (--shm-size, medium: Memory)"
_MORE_FILES = "`ulimit -n 65536` before the launcher starts the ranks"


def judge_answers(check: Check, found: Examination) -> str:
    """Hosts that did not tell of themselves:

    rank 2 on host1: no answer within 15 s: look at its driver, its /dev/shm and its mounts
    """
    for rank in found.ranks:
        if rank.problem:
            check.fault(rank.name, rank.problem, _LOOK_THERE)
    ranks = count_of(len(found.ranks), "rank")
    hosts = count_of(len(found.leaders), "host")
    return f"{ranks} on {hosts}"


def judge_differences(check: Check, found: Examination) -> str:
    """Versions, settings and devices that are not the same on all ranks:

    rank 1 on host1 has other versions (numpy 2.1, rank 0 on host0 has 2.2): give all the same

    Other devices or drivers are a warning: all wait for the slowest.
    """
    for sentence in found.differences:
        who, _, difference = sentence.partition(": ")
        if " has another device " in sentence:
            check.warn(who, difference)
        else:
            check.fault(who, difference)
    return "versions, settings, devices and drivers"


def judge_devices(check: Check, found: Examination) -> str:
    """What computes, and by what it is connected: `8 × NVIDIA H200 (nccl 2.27.3, driver 570)`."""
    names: list[str] = []
    for rank in found.answered:
        name = f"{rank.device} ({rank.backend})"
        if rank.driver:
            name = f"{rank.device} ({rank.backend}, driver {rank.driver})"
        names.append(name)
    parts = []
    for name, count in Counter(names).items():
        parts.append(f"{count} × {name}")
    return ", ".join(parts)


def judge_other_programs(check: Check, found: Examination) -> str:
    """Who else computes on a device, or keeps a host's cores busy:

    rank 2 on host1: its device also has process 77 (3120 MiB): end them, or take another device
    host1: 7.5 programs compute on its 8 cores (the last minute's load): see `top` there
    """
    for rank in found.ranks:
        if rank.other_processes:
            others = ", ".join(rank.other_processes)
            check.warn(rank.name, f"its device also has {others}", _END_THEM)
    for host, rank in found.leaders.items():
        busy = rank.busy_cores
        if busy > rank.cores * _BUSY + 1:
            cores = count_of(rank.cores, "core")
            load = f"{busy:.1f} programs compute on its {cores}"
            load += " (the last minute's load)"
            check.warn(host, load, "see `top` there")
    return "none to speak of"


def judge_memory(check: Check, found: Examination) -> str:
    """Free memory against what table, checkpoint and loaders take.

    rank 3 on host2: 4,000 rows a rank of 64 floats … the host has 1.0 GB left for a rank: use …
    """
    free = _free_memory(found)
    if found.data is None:
        check.skip(f"{free}; what a run needs: give data=DIR")
        return ""
    capacity = ""
    for rank, data in zip(found.ranks, found.data, strict=True):
        if data.no_room:
            check.fault(rank.name, data.no_room)
        capacity = capacity or data.capacity
    if capacity:
        return f"{free}; the item table takes {capacity}"
    return free


def _free_memory(found: Examination) -> str:
    """`at least 90.1 GB free a host, 139.0 GB a device`."""
    hosts: list[int] = []
    devices: list[int] = []
    for rank in found.answered:
        hosts.append(rank.host_memory)
        if rank.device_memory is not None:
            devices.append(rank.device_memory)
    least = format_size(min(hosts))
    text = f"at least {least} free a host"
    if devices:
        least = format_size(min(devices))
        text += f", {least} a device"
    return text


def judge_shared_memory(check: Check, found: Examination) -> str:
    """Room in /dev/shm, over which loaders hand their batches.

    host1: /dev/shm has 0.0 kB of 64.0 MB free, its loaders need 138.0 MB: empty it, or mount …

    Where there is no dataset to reckon by, 64 MB have to be free.
    """
    most = 0
    for data in found.data or []:
        most = max(most, data.shm_need)
    neighbours = Counter(rank.host for rank in found.ranks)
    for host, rank in found.leaders.items():
        need = most * neighbours[host] or _SMALL_SHM
        if not rank.problem:
            _judge_room(check, rank, need)
    least = min(rank.shm_free for rank in found.answered)
    size = format_size(least)
    return f"at least {size} of /dev/shm free a host"


def _judge_room(check: Check, rank: RankFacts, need: int) -> None:
    """One host's /dev/shm, of which its ranks' loaders need so many bytes."""
    size = format_size(rank.shm_size)
    if rank.shm_free < need:
        free = format_size(rank.shm_free)
        needed = format_size(need)
        text = f"/dev/shm has {free} of {size} free, its loaders need {needed}"
        check.fault(rank.host, text, _MORE_SHM)
    elif rank.shm_size <= _SMALL_SHM:
        check.warn(rank.host, f"/dev/shm is only {size}", _MORE_SHM)


def judge_open_files(check: Check, found: Examination) -> str:
    """The open-file limit against the sockets of so many ranks.

    rank 1 on host0: may open 128 files, and needs 266: `ulimit -n 65536` before …
    """
    world = len(found.ranks)
    for rank in found.answered:
        need = _FILES_BESIDE + count_sockets(rank.rank, world)
        text = f"may open {rank.open_files:,} files"
        if rank.open_files < need:
            text += f", and needs {need:,}"
            check.fault(rank.name, text, _MORE_FILES)
        elif rank.open_files < _FEW_FILES:
            check.warn(rank.name, text, _MORE_FILES)
    least = min(rank.open_files for rank in found.answered)
    return f"each rank may open {least:,} or more"


def count_sockets(rank: int, world: int) -> int:
    """The sockets of a rank: gloo's, the watch's, and the first rank's for all others.

    Of two ranks the first has 2 + 3 + 1 + 1 + 2 = 9, the other 6 (docs/clusters.md).
    """
    sockets = 2 * (world - 1) + 3 + 1
    if rank == 0:
        sockets += world - 1 + world
    return sockets
