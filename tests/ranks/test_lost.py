"""Ranks that die, hang, cannot go on or come twice, where no launcher takes the others down."""

import signal
import socket
import time

import pytest

from tests.helpers import HELPERS
from tests.helpers.left import losses
from tests.helpers.rank_processes import (
    RankProcess,
    cpu_environment,
    forked_python,
)
from tests.helpers.stages import SETTINGS
from tests.ranks.conftest import deepspeed, free_port, run

FAULTY = HELPERS.joinpath("faulty.py")
HOST = socket.gethostname()
# Far longer than a test may take: what ends these ranks is not that somebody has waited too long.
STEPS = [
    *SETTINGS,
    "max_steps=6",
    "timeout_minutes=30",
    "checkpoint.every_steps=2",
    "log.every=1",
]


@pytest.fixture
def by_hand():
    """Starts one rank with each of the lists of arguments, without a launcher."""
    started = []

    def start(*arguments, **environment):
        port = str(free_port())
        for rank, own in enumerate(arguments):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(arguments)),
                "LOCAL_RANK": str(rank),
            }
            place |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            place |= {"LOCAL_WORLD_SIZE": str(len(arguments))}
            variables = cpu_environment() | place | environment
            command = [str(FAULTY), *map(str, own)]
            started.append(RankProcess(command, variables))
        return started

    yield start
    for process in started:
        process.kill()


def finished(processes):
    """[(status, stderr)] of all."""
    deadline = time.monotonic() + 240
    for process in processes:
        while process.poll(0.1) is None:
            assert time.monotonic() < deadline
    return [(process.returncode, process.stderr) for process in processes]


def errors_of(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_a_rank_that_dies_ends_one_that_waits_elsewhere(
    by_hand, dataset, tmp_path
):
    arguments = [f"data={dataset}", f"run={tmp_path / 'run'}", *STEPS]
    fault = f"4 0 hang {tmp_path}/a;4 1 KILL {tmp_path}/b"
    (status, text), (killed, _) = finished(
        by_hand(arguments, arguments, FAULT=fault)
    )
    assert killed == -signal.SIGKILL and status == 4
    assert errors_of(text)[0].startswith(
        f"error: rank 0: lost the others (rank 1 on {HOST} is gone)"
    )


@pytest.mark.slow
def test_supervised_ranks_begin_again_where_one_dies_and_one_hangs(
    dataset, tmp_path
):
    """The launcher sees supervisors, which all live on."""
    arguments = [
        f"data={dataset}",
        f"run={tmp_path / 'run'}",
        *STEPS,
        "--max-restarts",
        "1",
    ]
    fault = f"4 0 hang {tmp_path}/a;4 1 KILL {tmp_path}/b"
    done = run(
        deepspeed(2, FAULTY, *arguments), FAULT=fault, OMP_NUM_THREADS="1"
    )
    assert "rank 1: ended with signal 9; restart 1 of 1" in done.stderr
    assert "rank 0: ended with status 4; restart 1 of 1" in done.stderr
    assert losses(tmp_path / "run").keys() == set(range(1, 7))


def test_what_one_host_alone_cannot_use_is_said_with_its_name(
    by_hand, dataset, tmp_path
):
    """As a mount that is missing on one host: the first rank's output says it too."""
    here, missing = [f"data={dataset}"], [f"data={tmp_path / 'host1'}"]
    rest = [f"run={tmp_path / 'run'}", *STEPS]
    found = finished(by_hand([*here, *rest], [*missing, *rest]))
    assert [status for status, _ in found] == [2, 2]
    lines = [line for _, text in found for line in errors_of(text)]
    assert len(lines) == 1 and lines[0].startswith(
        f"error: rank 1 on {HOST}: "
    ), lines
    assert str(tmp_path / "host1") in lines[0] and lines[0] in found[0][1]
    assert not (tmp_path / "run").exists()


def test_what_all_ranks_cannot_use_is_said_once(by_hand, tmp_path):
    arguments = [
        f"data={tmp_path / 'nowhere'}",
        f"run={tmp_path / 'run'}",
        *STEPS,
    ]
    found = finished(by_hand(arguments, arguments))
    assert [status for status, _ in found] == [2, 2]
    (line,) = [line for _, text in found for line in errors_of(text)]
    assert line.startswith(f"error: {tmp_path / 'nowhere'}"), line


def test_a_run_that_is_started_twice_is_refused_and_goes_on(
    by_hand, dataset, tmp_path
):
    folder = tmp_path / "run"
    arguments = [f"data={dataset}", f"run={folder}", *STEPS]
    first = list(
        by_hand(arguments, arguments, FAULT=f"4 1 wait {tmp_path}/fault")
    )
    while not (tmp_path / "fault").exists():
        assert first[0].poll() is None
        time.sleep(0.05)
    second = run(
        deepspeed(2, FAULTY, *arguments), status=(2,), OMP_NUM_THREADS="1"
    )
    (line,) = errors_of(second.stderr)
    owner = f"host {HOST}, process {first[0].pid}"
    assert line.startswith(
        f"error: {folder}: another run writes in this folder ({owner})"
    ), line
    (tmp_path / "fault.go").touch()
    assert [status for status, _ in finished(first)] == [0, 0]
    assert list(losses(folder)) == list(range(1, 7))


def test_ctrl_c_stops_with_a_checkpoint(dataset, tmp_path):
    """It reaches the loaders too, and more than once is said nothing."""
    arguments = [
        f"data={dataset}",
        f"run={tmp_path / 'run'}",
        *STEPS,
        "stream.workers=1",
    ]
    command = [forked_python(), str(FAULTY), *arguments]
    done = run(
        command,
        status=(75,),
        FAULT=f"3 0 ctrl-c {tmp_path}/fault",
        OMP_NUM_THREADS="1",
    )
    said = [
        line
        for line in done.stderr.splitlines()
        if "stopped after step 3, as asked" in line
    ]
    assert (
        len(said) == 1
        and "Traceback" not in done.stderr
        and "KeyboardInterrupt" not in done.stderr
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
