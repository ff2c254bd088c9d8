import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks.conftest import free_port
from trainer.distributed.agreement import (
    Signals,
    StopSignal,
    agree,
    by_the_first,
    ranks_lost,
)
from trainer.errors import InputError, RanksLost
from trainer.files.atomic import StorageLate

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("said", product([False, True], repeat=4))
def test_ranks_agree_on_each_thing_by_itself(ranks, said):
    assert agree(*said) == Signals(*said)
    trouble, stop, due, writing = said
    assert agree(writing=writing, due=due, stop=stop, trouble=trouble) == Signals(*said)


def test_nothing_said_is_nothing_agreed_on(ranks):
    assert agree() == Signals()


def test_what_the_first_rank_alone_does_is_told_to_all(ranks):
    assert by_the_first(lambda: {"a": [1, None, "ü"]}, True) == {"a": [1, None, "ü"]}
    assert by_the_first(lambda: time.sleep(1.2), True) is None


def test_what_the_first_rank_alone_meets_is_raised(ranks):
    def refuse():
        raise InputError("log.csv: row 3")

    with pytest.raises(InputError, match=r"log\.csv: row 3"):
        by_the_first(refuse, True)
    with pytest.raises(ZeroDivisionError):
        by_the_first(lambda: 1 // 0, True)


def test_what_the_first_rank_alone_meets_keeps_its_status(ranks):
    """A storage that is late is tried again, what is wrong is not."""

    def be_late():
        raise StorageLate("part.parquet: is not seen on this host")

    with pytest.raises(InputError) as late:
        by_the_first(be_late, True)
    assert late.value.status == StorageLate.status == 5


# Signals.


@pytest.fixture
def noted():
    """The handlers that were there before: they note what reaches them."""
    reached, numbers = [], (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {
        number: signal.signal(number, lambda sent, frame: reached.append(sent))
        for number in numbers
    }
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_to_stop_is_noted_and_reaches_nobody_else(noted, number):
    with StopSignal() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # schedulers say it more than once
        assert stop.asked
    assert noted == []
    os.kill(os.getpid(), number)
    assert noted == [number]


def test_who_presses_ctrl_c_twice_does_not_wait(noted):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert noted == []


def test_handlers_are_put_back_after_an_exception(noted):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_leave_the_signals_alone(noted):
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)] and signal.getsignal(signal.SIGTERM) == before


# The watchdog, which ends the process that it is in.

WATCHED = """
import time
from trainer.distributed.agreement import Watchdog
with Watchdog(0.2, lambda: "step 7") as dog:
    {body}
print("went on")
"""


def watched(body):
    program = WATCHED.format(body=body.replace("\n", "\n    "))
    environment = os.environ | {"RANK": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_process_without_progress_is_ended_with_its_line():
    done = watched("time.sleep(3600)")
    assert done.returncode == RanksLost.status == 4 and done.stdout == ""
    assert done.stderr.startswith(
        "error: rank 3: no progress for 0 s in step 7: another rank or host is gone or hangs"
    )
    assert (
        done.stderr.count("\n") == 1
        and "goes on from the last checkpoint" in done.stderr
    )


def test_it_watches_again_after_it_was_held():
    done = watched("with dog.held():\n    time.sleep(0.6)\ntime.sleep(3600)")
    assert done.returncode == 4 and "in step 7" in done.stderr


def test_it_is_held_where_no_progress_is_expected_and_kept_by_beats():
    """Far longer than it waits; the beats come in a busy loop, so that a slow machine does not miss them. After its end nothing
    is watched."""
    body = """
with dog.held():
    with dog.held():
        time.sleep(0.5)
    time.sleep(0.5)
end = time.monotonic() + 0.6
while time.monotonic() < end:
    dog.beat()
import atexit; atexit.register(time.sleep, 0.6)
"""
    done = watched(body.strip())
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


# Other ranks that are gone.

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] "
CLOSED = f"{GLOO}Connection closed by peer [10.0.0.7]:41022\nmore"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(CLOSED), "Connection closed by peer [10.0.0.7]:41022 more"),
        (
            RuntimeError(f"{GLOO}Read error [::1]:7: Connection reset by peer"),
            "Read error [::1]:7: Connection reset by peer",
        ),
        (
            RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1000ms"),
            "Timed out waiting 1000ms",
        ),
        (
            RuntimeError("Application timeout caused pair closure"),
            "Application timeout caused pair closure",
        ),
        (
            RuntimeError(f"{GLOO}Application timeout caused pair closure"),
            "Application timeout caused pair closure",
        ),
        (
            RuntimeError(f"{GLOO}writev [10.0.0.7]:1: Broken pipe"),
            "writev [10.0.0.7]:1: Broken pipe",
        ),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1."),
            "NCCL communicator was aborted on rank 1.",
        ),
        (dist.DistNetworkError("Connection reset by peer"), "Connection reset by peer"),
        (dist.DistBackendError("NCCL " + "x" * 1000), "NCCL " + "x" * 155),
    ],
)
def test_what_a_backend_raises_is_one_line_of_its_own_rank(monkeypatch, error, reason):
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(RanksLost) as lost, ranks_lost():
        raise error
    line = str(lost.value)
    assert (
        line.startswith(
            f"rank 5: lost the others ({reason}): another rank or host is gone"
        )
        and "\n" not in line
    )
    assert lost.value.status == 4
    assert lost.value.__cause__ is error  # whose trace is printed below the line


def test_a_rank_that_never_comes_is_one_line():
    """What the backend really raises, where a group of two is joined by one."""
    store = dist.TCPStore(
        "127.0.0.1",
        free_port(),
        2,
        True,
        timedelta(seconds=0.5),
        wait_for_workers=False,
    )
    with pytest.raises(RanksLost, match=r"^rank \d+: lost the others \("), ranks_lost():
        dist.init_process_group(
            "gloo", store=store, rank=0, world_size=2, timeout=timedelta(seconds=0.5)
        )
    assert not dist.is_initialized()


def raised_in_torch_distributed(text):
    exec(
        compile(
            f"raise RuntimeError({text!r})", "/lib/torch/distributed/new.py", "exec"
        )
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        ValueError("Connection closed by peer"),
        OSError(28, "No space left on device"),
        InputError("data=DIR is missing"),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("CUDA out of memory. NCCL has 2 GiB. Timed out waiting"),
        torch.OutOfMemoryError(f"{GLOO}Connection closed by peer"),
        RuntimeError("the server timed out"),
        RuntimeError("it is said that Application timeout caused pair closure"),
        RuntimeError("gloo and NCCL are installed"),
        RuntimeError(
            "[enforce fail at /pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length. 16 vs 4"
        ),
    ],
)
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as passed, ranks_lost():
        raise error
    assert passed.value is error


def test_a_fault_in_torch_distributed_is_a_fault():
    with pytest.raises(RuntimeError, match="words that nobody knows"), ranks_lost():
        raised_in_torch_distributed("words that nobody knows")


def test_a_tensor_of_a_wrong_size_is_a_fault(ranks):
    with pytest.raises((ValueError, RuntimeError)) as fault, ranks_lost():
        dist.all_gather([torch.empty(3)], torch.ones(4))
    assert not isinstance(fault.value, RanksLost)
