"""`launch/doctor.py` on real ranks: the whole command, a rank that does not come, and two hosts with
faults that it has to name."""

import json
import re

import pytest

from benchmarks.namespaces import limit, two_hosts, why_no_limit, why_not
from tests.helpers import HELPERS
from tests.helpers.namespaces import finish, servers, start
from tests.helpers.rank_processes import free_port, run_alone
from tests.ranks.conftest import ranks_of, run

DOCTOR = "launch/doctor.py"
SOME = "--config", "demo"


def rows(output):
    """{check: [(level, finding)]} of a printed table, a finding's rows joined."""
    found = {}
    last = None
    for line in output.splitlines():
        match = re.fullmatch(r" (.{15})   (.{7})   (.*?) *", line)
        if match is None:
            continue
        check, level, finding = (part.strip() for part in match.groups())
        if check and check != "check" and "─" not in check:
            last = [level, finding]
            found.setdefault(check, []).append(last)
        elif last is not None and not check:
            last[1] += f" {finding}"
    return found


def test_two_ranks_are_examined_and_nothing_is_left(dataset, tmp_path):
    words = [*SOME, f"data={dataset}", f"run={tmp_path / 'run'}"]
    record = tmp_path / "found.json"
    done = run(ranks_of(2, DOCTOR, *words, "--json", record))
    assert max(map(len, done.stdout.splitlines())) <= 100
    shown = rows(done.stdout)
    assert shown["ranks"] == [["ok", "2 ranks on 1 host"]]
    for check in (
        "data",
        "memory",
        "run's folder",
        "all-to-all",
        "shards read",
    ):
        assert [level for level, _ in shown[check]] == ["ok"], shown[check]
    found = json.loads(record.read_text())
    assert len(found["found"]["ranks"]) == len(found["found"]["data"]) == 2
    assert {line["check"] for line in found["verdicts"]} == set(shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.json"]


def test_a_fault_is_the_status_of_all(tmp_path):
    done = run(
        ranks_of(2, DOCTOR, f"data={tmp_path}", f"run={tmp_path / 'run'}"),
        status=(2,),
    )
    assert done.returncodes == [2, 2]
    [[level, finding]] = rows(done.stdout)["data"]
    assert level == "fault" and "is not a dataset folder" in finding


def test_a_rank_that_does_not_come_is_named():
    place = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_PORT": str(free_port()), "SLURM_JOB_NODELIST": "n[7-9]"}
    done = run_alone(DOCTOR, "--wait", "1", **place)
    assert done.returncode == 4
    assert re.search(
        r"^error: rank 1 on n8, rank 2 on n9 did not come \(\S+ did\) within 1 s: ",
        done.stderr,
        re.M,
    )


def test_a_first_rank_that_does_not_come_is_named_by_its_address():
    port = free_port()
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = run_alone(DOCTOR, "--wait", "1", MASTER_PORT=str(port), **place)
    assert done.returncode == 4
    assert re.search(
        rf"^error: rank 1 on \S+: rank 0 does not answer at 127.0.0.1:{port} within 1 s: ",
        done.stderr,
        re.M,
    )


@pytest.fixture(scope="module")
def machines():
    """Two hosts, and on each a server of ranks."""
    if reason := why_not() or why_no_limit():
        pytest.skip(reason)
    with two_hosts() as hosts, servers(hosts) as forked:
        yield hosts, forked


def examine(machines, folder, dataset, faults, port):
    """The table that the first host prints, and both statuses."""
    run_folder = folder / "shared" / "run"
    run_folder.parent.mkdir()
    statuses, logs = finish(
        start(
            *machines,
            folder,
            HELPERS / "examined_host.py",
            faults,
            *SOME,
            f"data={dataset}",
            f"run={run_folder}",
            "--patience",
            "1",
            "--min-gbit",
            "0.1",
            port=port,
        ),
        folder,
    )
    assert not list(run_folder.parent.iterdir())
    return rows(logs[0]), statuses, "\n".join(log[-4000:] for log in logs)


@pytest.mark.slow
def test_two_hosts_without_a_fault(machines, dataset, tmp_path):
    shown, statuses, logs = examine(machines, tmp_path, dataset, "none", 29811)
    assert statuses == [0, 0], logs
    levels = {level for lines in shown.values() for level, _ in lines}
    assert "fault" not in levels and "–" not in levels, logs
    assert shown["links"][0][1].startswith(
        "slowest of 1 pair: machine0 – machine1, "
    )


FAULTS = {
    "data": ("data", r"machine1: \S+ is not a dataset folder"),
    "folder": (
        "run's folder",
        r"machine1: not shared, machine1 does not see within 1.0 s what machine0 writes",
    ),
    "shm": ("shared memory", r"machine1: /dev/shm has 0.0 kB of 1.0 MB free"),
    "files": (
        "open files",
        r"rank 1 on machine1: may open 128 files, and needs",
    ),
    "version": (
        "same everywhere",
        r"rank 1 on machine1 has other versions \(torch 0.9, rank 0 on machine0 has",
    ),
    "clock": ("clocks", r"machine1: its clock is 60 min ahead of machine0's"),
    "link": (
        "links",
        r"machine0 – machine1: (1[5-9]|2[0-6])(\.\d)? Mbit/s, .* less than 0.1 Gbit/s",
    ),
}


@pytest.fixture(scope="module")
def sick(machines, dataset, tmp_path_factory):
    """What is shown where the second host has every fault at once, and the link is limited."""
    limit(machines[0], 20e6)
    try:
        yield examine(
            machines,
            tmp_path_factory.mktemp("sick"),
            dataset,
            ",".join(FAULTS),
            29821,
        )
    finally:
        limit(machines[0], None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_by_name(sick, fault):
    shown, statuses, logs = sick
    assert 0 not in statuses, logs
    check, says = FAULTS[fault]
    assert len(shown[check]) == 1
    level, finding = shown[check][0]
    assert level == "fault" and re.match(says, finding), finding
