"""Processes without torch that watch each other as ranks do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[4]
HOST = socket.gethostname()
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from trainer.distributed import liveness
from trainer.errors import InputError, LostRanks, RunStopped, exit_on_input_error
from trainer.distributed.process_exit import run_script

rank, size, folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), Path(os.environ["FOLDER"])

class Store:
    def set(self, key, value):
        (folder / (key + ".partial")).write_text(value)
        (folder / (key + ".partial")).rename(folder / key)
    def get(self, key):
        while not (folder / key).exists():
            time.sleep(0.01)
        return (folder / key).read_bytes()

def meet(name):
    (folder / (name + str(rank))).touch()
    while not all((folder / (name + str(other))).exists() for other in range(size)):
        time.sleep(0.01)

liveness._OTHERS_SPEAK = 2.0

@exit_on_input_error
def main():
    watched = liveness.watch_peers(Store(), rank, size, ["127.0.0.1"])
    meet("watches")
    try:
        {body}
    except LostRanks as lost:
        raise watched.explain_loss(lost)
    except InputError as error:
        watched.report_error(error)
        raise
    except Exception as error:
        watched.report_fault(error)
        raise
    watched.leave()

run_script(main)
"""


@pytest.fixture
def ranks(tmp_path):
    """Starts so many ranks; body: what they do once they watch each other."""
    started = []

    def start(size, body):
        program = RANK.replace(
            "{body}", body.strip().replace("\n", "\n        ")
        )
        for rank in range(size):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "FOLDER": str(tmp_path),
            }
            command = [sys.executable, "-c", program]
            pipes = {
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                "text": True,
            }
            started.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=os.environ | place, **pipes
                )
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(processes):
    """[(status, lines of stderr)] of all."""
    done = [process.communicate(timeout=60) for process in processes]
    return [
        (process.returncode, errors.splitlines())
        for process, (_, errors) in zip(processes, done, strict=True)
    ]


DIES = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("dead", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_dies_ends_all_that_wait(ranks, dead):
    """They wait in Python; a kernel of a device that nobody ends is waited for alike, without the interpreter's lock."""
    found = ends(ranks(3, f"if rank == {dead}:\n    {DIES}\ntime.sleep(3600)"))
    for rank, (status, lines) in enumerate(found):
        if rank == dead:
            assert status == -signal.SIGKILL
        else:
            start = f"error: rank {rank}: lost the others (rank {dead} on {HOST} is gone): another rank or host is gone"
            assert (
                status == 4 and len(lines) == 1 and lines[0].startswith(start)
            ), lines


def test_what_the_backend_met_is_explained(ranks):
    """A rank whose backend tells it first waits for the news of who is gone."""
    body = f"if rank == 1:\n    {DIES}\ntime.sleep(0.5)\nraise LostRanks(f'rank {{rank}}: lost the others (closed by peer)')"
    found = ends(ranks(3, body))
    for rank in (0, 2):
        status, lines = found[rank]
        assert status == 4 and lines[0].startswith(
            f"error: rank {rank}: lost the others (rank 1 on {HOST} is gone)"
        ), lines


WAIT = "time.sleep(3600)"
ARE_TOLD = (
    "time.sleep(0.5)\nraise LostRanks('lost the others (closed by peer)')"
)


@pytest.mark.parametrize(
    ("one", "others"),
    [
        (0, WAIT),
        (1, ARE_TOLD),
        pytest.param(0, ARE_TOLD, marks=pytest.mark.slow),
        pytest.param(1, WAIT, marks=pytest.mark.slow),
    ],
)
def test_what_one_rank_cannot_use_is_said_once_and_ends_all_with_its_status(
    ranks, one, others
):
    found = ends(
        ranks(
            3,
            f"if rank == {one}:\n    raise InputError('data/host1: is not there')\n{others}",
        )
    )
    assert [status for status, _ in found] == [2, 2, 2]
    lines = [line for _, lines in found for line in lines]
    assert lines == [f"error: rank {one} on {HOST}: data/host1: is not there"]


def test_what_all_meet_is_said_once(ranks):
    found = ends(ranks(3, "raise InputError('data=DIR is missing')"))
    assert [status for status, _ in found] == [2, 2, 2]
    assert [line for _, lines in found for line in lines] == [
        "error: data=DIR is missing"
    ]


def test_a_stop_that_was_agreed_on_is_said_once_however_late_one_is(ranks):
    found = ends(
        ranks(
            3,
            "time.sleep(2.5 * (rank == 2))\nraise RunStopped('stopped after step 3')",
        )
    )
    assert [status for status, _ in found] == [75, 75, 75]
    assert [line for _, lines in found for line in lines][:1] == [
        "stopped after step 3"
    ]


def test_what_ranks_meet_differently_is_said_for_each(ranks):
    found = ends(
        ranks(
            3,
            "raise InputError('no room' if rank == 1 else 'another rank cannot go on')",
        )
    )
    assert [status for status, _ in found] == [2, 2, 2]
    assert sorted(line for _, lines in found for line in lines) == [
        f"error: 2 ranks, rank 0 on {HOST} among them: another rank cannot go on",
        f"error: rank 1 on {HOST}: no room",
    ]


@pytest.mark.parametrize("one", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_fault_is_named_to_the_others(ranks, one):
    found = ends(ranks(3, f"if rank == {one}:\n    1 / 0\ntime.sleep(3600)"))
    for rank, (status, lines) in enumerate(found):
        if rank == one:
            assert (
                status == 1
                and lines[0] == f"rank {one} on {HOST} failed:"
                and "ZeroDivisionError" in lines[-1]
            )
        else:
            why = f"lost the others (rank {one} on {HOST} failed (ZeroDivisionError: division by zero;"
            assert status == 4 and why in lines[0], lines


def test_who_is_through_may_leave_before_the_others(ranks):
    assert ends(ranks(3, "time.sleep((0.0, 0.5, 1.0)[rank])")) == [
        (0, []),
        (0, []),
        (0, []),
    ]


def test_who_is_stopped_is_not_dead(ranks, tmp_path):
    body = "(folder / 'begun').touch()\nwhile not (folder / 'end').exists():\n    time.sleep(0.01)"
    processes = ranks(3, body)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(2)
    assert [process.poll() for process in processes] == [None, None, None]
    processes[1].send_signal(signal.SIGCONT)
    (tmp_path / "end").touch()
    assert ends(processes) == [(0, []), (0, []), (0, [])]


def test_a_loader_that_lives_on_does_not_hide_its_trainers_death(
    ranks, tmp_path
):
    body = f"""
if rank == 1:
    if (child := os.fork()) == 0:
        for stream in (0, 1, 2):
            os.close(stream)
        time.sleep(60)
        os._exit(0)
    (folder / "loader").write_text(str(child))
    {DIES}
time.sleep(3600)
"""
    found = ends(ranks(3, body))
    loader = int((tmp_path / "loader").read_text())
    os.kill(loader, signal.SIGKILL)  # it was there all the time
    assert [status for status, _ in found] == [4, -signal.SIGKILL, 4]


def test_one_rank_watches_nobody(ranks):
    assert ends(ranks(1, "raise InputError('no such file')")) == [
        (2, ["error: no such file"])
    ]


def test_where_nobody_can_be_reached_the_run_goes_on(
    tmp_path, monkeypatch, capsys
):
    from trainer.distributed import liveness

    class Store:
        def get(self, key):
            return (
                json.dumps(None).encode()
                if key != "liveness"
                else b"9 token nowhere.invalid"
            )

    watched = liveness.watch_peers(Store(), 1, 2, ["127.0.0.1"])
    watched.leave()
    assert (
        f"rank 1 on {HOST}: no connection to port 9 of 127.0.0.1 or nowhere.invalid"
        in capsys.readouterr().err
    )
