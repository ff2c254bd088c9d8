"""Supervisors of several ranks, whose children need no torch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks.conftest import free_port

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[4]
HOST = socket.gethostname()
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from trainer.distributed import supervisor
from trainer.errors import exit_on_input_error
from trainer.distributed.process_exit import run_script

supervisor._BY_ITSELF = float(os.environ["GRACE"])

@exit_on_input_error
def main():
    supervisor.supervise(int(os.environ["RESTARTS"]), pause=0.05)
    rank, folder = os.environ["RANK"], Path(os.environ["FOLDER"])
    attempt = len(list(folder.glob(f"{rank}-*")))
    (folder / f"{rank}-{attempt}").write_text(str(os.getpid()))
    end = json.loads(os.environ["ENDS"])[int(rank)][attempt]
    if end == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        time.sleep(3600)
    if end == "stop":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
        time.sleep(3600)
    if end < 0:
        os.kill(os.getpid(), -end)
    sys.exit(end)

run_script(main)
"""


@pytest.fixture
def supervised(tmp_path):
    """Starts a supervisor a rank; ends: how each attempt of each rank ends, a status, -signal, "hang"
    or "stop" (with status 75 where it is asked to)."""
    script, started = tmp_path / "script.py", []
    script.write_text(SCRIPT)
    attempts = tmp_path / "attempts"
    attempts.mkdir()

    def start(ends, restarts, port=None, ranks=None, grace=1.0):
        port = port or free_pair()
        for rank in range(len(ends)) if ranks is None else ranks:
            environment = {
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": str(len(ends)),
                "LOCAL_WORLD_SIZE": str(len(ends)),
                "MASTER_PORT": str(port),
                "RESTARTS": str(restarts),
                "ENDS": json.dumps(ends),
                "FOLDER": str(attempts),
                "GRACE": str(grace),
            }
            command = [sys.executable, str(script)]
            pipes = {
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
            }
            process = subprocess.Popen(
                command, env=os.environ | environment, **pipes
            )
            started.append(process)
        return started

    yield start, attempts
    for process in started:
        process.kill()
        process.communicate()


def free_pair():
    """A port with a free one behind it."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("", port + 1))
            except OSError:
                continue
            return port


def finished(processes):
    """[(status, lines of stderr)] of all."""
    done = [process.communicate(timeout=60) for process in processes]
    return [
        (process.returncode, errors.splitlines())
        for process, (_, errors) in zip(processes, done, strict=True)
    ]


def tried(attempts):
    """How many attempts each rank made."""
    names = [file.name.split("-")[0] for file in attempts.iterdir()]
    return [names.count(rank) for rank in sorted(set(names))]


def begun(attempts):
    """Waits until the first attempt of both has begun."""
    files = [attempts / f"{rank}-0" for rank in (0, 1)]
    while not all(file.exists() and file.read_text() for file in files):
        time.sleep(0.01)


def alive(file):
    """Whether its process is more than an entry that nobody has read the status of."""
    try:
        return (
            Path(f"/proc/{file.read_text()}/stat")
            .read_text()
            .rsplit(")", 1)[1]
            .split()[0]
            != "Z"
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_one_dies_all_begin_again_though_others_hang(supervised):
    """The one that hangs neither ends by itself nor when it is asked to."""
    start, attempts = supervised
    (first, others), (status, lines) = finished(
        start([["hang", 0], [-9, 0]], 2)
    )
    assert (first, status) == (0, 0) and tried(attempts) == [2, 2]
    killed = f"rank 0 on {HOST}: another rank has ended, and this one does not: it is killed"
    assert others == [
        killed,
        "rank 0: ended with signal 9; restart 1 of 2 in 0 s",
    ]
    assert lines == ["rank 1: ended with signal 9; restart 1 of 2 in 0 s"]


@pytest.mark.parametrize("dead", [0, 1])
def test_who_was_through_begins_again_with_the_others(supervised, dead):
    """Else the others would wait for it in the next attempt."""
    start, attempts = supervised
    ends = [[0, 0], [0, 0], [0, 0]]
    ends[dead][0] = 1
    assert [status for status, _ in finished(start(ends, 1))] == [0, 0, 0]
    assert tried(attempts) == [2, 2, 2]


@pytest.mark.parametrize(
    ("ends", "statuses"),
    [
        ([[4, 0], [2, 0]], [4, 2]),  # the same would come of it
        ([[3, 0], [3, 0]], [3, 3]),
        ([["hang", 0], [2, 0]], [128 + 9, 2]),
        ([["hang", 0], [75, 0]], [128 + 9, 75]),
        ([[0], [0]], [0, 0]),
    ],
)
def test_what_a_restart_does_not_mend_is_not_begun_again(
    supervised, ends, statuses
):
    start, attempts = supervised
    assert [status for status, _ in finished(start(ends, 3))] == statuses
    assert tried(attempts) == [1, 1]


def test_restarts_come_to_an_end_with_the_status_of_the_signal(supervised):
    start, attempts = supervised
    found = finished(start([[4, 4, 4], [-11, -6, -9]], 2))
    assert [status for status, _ in found] == [4, 128 + 9] and tried(
        attempts
    ) == [3, 3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_one_ends_all(supervised, number):
    start, attempts = supervised
    processes = start([["stop", 0], ["hang", 0]], 3)
    begun(attempts)
    time.sleep(0.3)  # its handler is there
    processes[0].send_signal(number)
    assert [status for status, _ in finished(processes)] == [75, 128 + 9]
    assert tried(attempts) == [1, 1]


@pytest.mark.parametrize("dead", [0, 1])
def test_a_supervisor_that_is_killed_takes_its_child_along_and_ends_the_others(
    supervised, dead
):
    start, attempts = supervised
    processes = start([["hang", 0], ["hang", 0]], 3)
    files = [attempts / f"{rank}-0" for rank in (0, 1)]
    begun(attempts)
    processes[dead].kill()
    found = finished(processes)
    assert found[dead][0] == -9 and found[1 - dead][0] == 128 + 9
    assert not any(map(alive, files)) and tried(attempts) == [1, 1]
    if dead == 1:
        assert (
            f"error: the supervisor of rank 1 on {HOST} is gone: begin again by hand"
            in found[0][1]
        )


def test_a_port_that_is_taken_is_named(supervised):
    start, attempts = supervised
    port = free_pair()
    with socket.socket() as taken:
        taken.bind(("", port + 1))
        taken.listen()
        ((status, lines),) = finished(start([[0], [0]], 1, port, ranks=[0]))
    assert status == 2 and lines[0].startswith(
        f"error: port {port + 1} on {HOST} is in use"
    ), lines
    assert not tried(attempts)


def test_a_second_run_at_the_same_port_does_not_disturb_the_first(supervised):
    start, attempts = supervised
    port = free_pair()
    first = list(start([["stop", 0], ["stop", 0]], 1, port, grace=60.0))
    begun(attempts)
    second = start([["stop", 0], ["stop", 0]], 1, port)[2:]
    for status, lines in finished(second):
        assert status == 2 and "give another MASTER_PORT" in lines[0], lines
    time.sleep(0.3)
    for process in first:
        process.send_signal(signal.SIGTERM)
    assert finished(first) == [(75, []), (75, [])]
    assert tried(attempts) == [1, 1]
