"""Each verdict, of findings that are made up."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.doctor.facts import (
    Collective,
    DataFacts,
    Examination,
    FolderFacts,
    Link,
    RankFacts,
)
from trainer.doctor.judge_ranks import count_sockets
from trainer.doctor.judgement import judge
from trainer.doctor.verdict import Level, has_fault

GOOD_DATA = DataFacts(
    fingerprint="5f0c" * 8,
    capacity="1.0 GB a rank",
    read_bytes=1e8,
    read_users=1e4,
)
FIRST = ("host0", "host0", "host1", "host2")


def healthy():
    """Four ranks on three hosts, with nothing amiss."""
    ranks = [
        RankFacts(
            rank,
            host,
            cores=8,
            host_memory=10**11,
            shm_size=10**10,
            shm_free=10**10,
            open_files=65536,
        )
        for rank, host in enumerate(FIRST)
    ]
    pairs = [["host0", "host1"], ["host0", "host2"], ["host1", "host2"]]
    return Examination(
        ranks,
        data=[GOOD_DATA] * 4,
        folder=[FolderFacts(free=10**12)] * 4,
        clocks={"host0": 0.0, "host1": 0.001, "host2": -0.002},
        links=[Link(pair, 5e-5, 1.2e9) for pair in pairs],
        collectives=[
            Collective("all-reduce", 1e-4, 1e9),
            Collective("all-to-all", 1e-4, 1e9),
        ],
        patience=5.0,
    )


def change(part, number, **values):
    """The examination with other values in the facts of one rank, or in one link."""
    found = healthy()
    items = list(getattr(found, part))
    items[number] = dataclasses.replace(items[number], **values)
    return dataclasses.replace(found, **{part: items})


def change_all(**values):
    return dataclasses.replace(healthy(), **values)


def not_ok(examination):
    return [
        verdict
        for verdict in judge(examination)
        if verdict.level is not Level.OK
    ]


FOUND = {
    "no answer": (
        change("ranks", 2, problem="no answer within 15 s"),
        "ranks",
        Level.FAULT,
        "rank 2 on host1: no answer within 15 s: look at its driver",
    ),
    "version": (
        change_all(differences=["rank 2 on host1 has other versions (torch 0.9, rank 0 on host0 has 2): give all ranks the same"]),
        "same everywhere",
        Level.FAULT,
        "rank 2 on host1 has other versions (torch 0.9",
    ),
    "device": (
        change_all(differences=["rank 2 on host1 has another device (driver 550, rank 0 on host0 has 560): give all ranks the same"]),
        "same everywhere",
        Level.WARNING,
        "rank 2 on host1 has another device",
    ),
    "process on the device": (
        change("ranks", 2, other_processes=["process 77 (3120 MiB)"]),
        "other programs",
        Level.WARNING,
        "rank 2 on host1: its device also has process 77 (3120 MiB)",
    ),
    "load": (
        change("ranks", 3, busy_cores=7.5),
        "other programs",
        Level.WARNING,
        "host2: 7.5 programs compute on its 8 cores",
    ),
    "no room": (
        change("data", 3, no_room="9 rows are 3.0 GB; the host has 1.0 GB left: use more hosts"),
        "memory",
        Level.FAULT,
        "rank 3 on host2: 9 rows are 3.0 GB; the host has 1.0 GB left: use more hosts",
    ),
    "shm full": (
        change("ranks", 2, shm_free=0),
        "shared memory",
        Level.FAULT,
        "host1: /dev/shm has 0.0 kB of 10.0 GB free, its loaders need 64.0 MB: empty it",
    ),
    "shm for two ranks": (
        change("data", 1, shm_need=6 * 10**9),
        "shared memory",
        Level.FAULT,
        "host0: /dev/shm has 10.0 GB of 10.0 GB free, its loaders need 12.0 GB",
    ),
    "shm small": (
        change("ranks", 2, shm_size=64 * 10**6, shm_free=64 * 10**6),
        "shared memory",
        Level.WARNING,
        "host1: /dev/shm is only 64.0 MB",
    ),
    "files": (
        change("ranks", 1, open_files=128),
        "open files",
        Level.FAULT,
        "rank 1 on host0: may open 128 files, and needs 266: `ulimit -n 65536`",
    ),
    "few files": (
        change("ranks", 1, open_files=1024),
        "open files",
        Level.WARNING,
        "rank 1 on host0: may open 1,024 files: `ulimit",
    ),
    "clock an hour off": (
        change_all(clocks={"host0": 0.0, "host1": -3600.0, "host2": 0.0}),
        "clocks",
        Level.FAULT,
        "host1: its clock is 60 min behind host0's: set it",
    ),
    "clock seconds off": (
        change_all(clocks={"host0": 0.0, "host1": 0.0, "host2": 2.0}),
        "clocks",
        Level.WARNING,
        "host2: its clock is 2.0 s ahead of host0's",
    ),
    "no data": (
        change("data", 2, problem="/data: is not a dataset folder", fingerprint="", read_bytes=0.0),
        "data",
        Level.FAULT,
        "host1: /data: is not a dataset folder; other hosts have it",
    ),
    "other data": (
        change("data", 2, fingerprint="a" * 32),
        "data",
        Level.FAULT,
        "host1: has another dataset (aaaaaaaaaaaa, not 5f0c5f0c5f0c): give all the same",
    ),
    "not shared": (
        change("folder", 2, seen=None, listed=None),
        "run's folder",
        Level.FAULT,
        "host1: not shared, host1 does not see within 5.0 s what host0 writes there: run=DIR",
    ),
    "not shared, other way": (
        change("folder", 3, heard=False),
        "run's folder",
        Level.FAULT,
        "host2: not shared, host0 does not see within 5.0 s what host2 writes there",
    ),
    "read-only": (
        change("folder", 2, problem="Read-only file system"),
        "run's folder",
        Level.FAULT,
        "host1: cannot be written (Read-only file system): give",
    ),
    "listed late": (
        change("folder", 2, listed=3.0),
        "run's folder",
        Level.WARNING,
        "host1: lists new files after 3.0 s",
    ),
    "never listed": (
        change("folder", 2, listed=None),
        "run's folder",
        Level.WARNING,
        "host1: lists new files not within 5.0 s",
    ),
    "lock of one host": (
        change("folder", 2, lock="free"),
        "locks",
        Level.WARNING,
        "host1: a lock of host0 does not hold there",
    ),
    "no locks": (
        change("folder", 2, lock="none"),
        "locks",
        Level.WARNING,
        "host1: the file system has no locks",
    ),
    "slow disk": (
        change("data", 3, read_bytes=1e6),
        "shards read",
        Level.WARNING,
        "host2: 1.0 MB/s, the median is 100.0 MB/s: look at its disk",
    ),
    "slow link": (
        change("links", 1, bandwidth=2.5e6),
        "links",
        Level.FAULT,
        "host0 – host2: 20 Mbit/s, 50 µs, less than 1 Gbit/s",
    ),
    "slower link": (
        change("links", 2, bandwidth=5e8),
        "links",
        Level.WARNING,
        "host1 – host2: 4 Gbit/s, 50 µs, the median is 9.6 Gbit/s",
    ),
}  # fmt: skip


def test_where_nothing_is_amiss_each_check_has_one_line():
    verdicts = judge(healthy())
    assert {verdict.level for verdict in verdicts} == {Level.OK}
    checks = [verdict.check for verdict in verdicts]
    assert len(checks) == len(set(checks)) == 15
    assert not has_fault(verdicts)


@pytest.mark.parametrize(
    ("found", "check", "level", "says"), FOUND.values(), ids=FOUND
)
def test_what_is_amiss_is_named_and_nothing_else(found, check, level, says):
    [verdict] = not_ok(found)
    assert (verdict.check, verdict.level) == (check, level)
    assert verdict.text.startswith(says), verdict.text
    assert ": " in verdict.text and has_fault([verdict]) == (
        level is Level.FAULT
    )


def test_what_was_not_asked_for_is_said():
    found = change_all(data=None, folder=None)
    assert {verdict.check for verdict in not_ok(found)} == {
        "memory",
        "data",
        "run's folder",
        "locks",
        "shards read",
    }
    assert {verdict.level for verdict in not_ok(found)} == {Level.SKIPPED}


def test_one_rank_alone_has_no_network():
    found = Examination([healthy().ranks[0]])
    skipped = {verdict.check for verdict in not_ok(found)}
    assert {"clocks", "links", "all-reduce", "all-to-all"} <= skipped
    assert not has_fault(judge(found))


@given(st.integers(1, 40), st.integers(0, 40))
def test_many_hosts_with_one_fault_are_few_lines(hosts, sick):
    sick = min(sick, hosts)
    ranks = []
    for rank in range(hosts):
        shm = 0 if rank < sick else 10**9
        facts = RankFacts(rank, f"h{rank}", cores=8, shm_size=10**9)
        ranks.append(dataclasses.replace(facts, shm_free=shm, open_files=65536))
    lines = [
        verdict
        for verdict in judge(Examination(ranks))
        if verdict.check == "shared memory"
    ]
    faults = [one for one in lines if one.level is Level.FAULT]
    assert len(faults) == min(sick, 5)
    assert bool(faults) == bool(sick) and len(lines) == max(1, len(faults))
    if sick > 4:
        assert faults[-1].finding.startswith(f"and {sick - 4} more")


def test_sockets_are_as_the_docs_count_them():
    assert count_sockets(0, 2) == 9 and count_sockets(1, 2) == 6
    assert count_sockets(0, 250) > 990
