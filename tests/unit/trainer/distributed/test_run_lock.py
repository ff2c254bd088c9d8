import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.checkpoint.resume import check_run_folder, remove_failed_start
from trainer.distributed import run_lock
from trainer.distributed.run_lock import (
    lock_run_folder,
    lock_run_folder_on_first_rank,
)
from trainer.errors import InputError
from trainer.run_files import LOCK

ROOT = Path(__file__).parents[4]
HOST = socket.gethostname()
HOLDER = """
import os, signal, sys, time
from pathlib import Path
from trainer.distributed.run_lock import lock_run_folder
with lock_run_folder(Path(sys.argv[1])):
    if "fork" in sys.argv:
        if os.fork() == 0:
            time.sleep(3600)
    print(os.getpid(), flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def holder():
    """Starts a process that holds a run's folder; with "fork" it has a child, as a trainer has loaders."""
    started = []

    def start(run, *how):
        command = [sys.executable, "-c", HOLDER, str(run), *how]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.ranks
def test_a_folder_that_another_process_has_is_refused_with_its_owner(
    holder, tmp_path
):
    run = tmp_path / "run"
    process = holder(run)
    before = {entry.name: entry.read_bytes() for entry in run.iterdir()}
    with pytest.raises(InputError) as refused, lock_run_folder(run):
        pytest.fail("two have it")
    line = f"{run}: another run writes in this folder (host {HOST}, process {process.pid}): wait"
    assert str(refused.value).startswith(line) and refused.value.status == 2
    assert {entry.name: entry.read_bytes() for entry in run.iterdir()} == before


@pytest.mark.ranks
def test_who_was_killed_holds_nothing_though_its_loaders_live_on(
    holder, tmp_path
):
    process = holder(tmp_path / "run", "fork")
    process.kill()
    process.wait()
    with lock_run_folder(tmp_path / "run"):
        owner = json.loads((tmp_path / "run" / LOCK).read_text())
        assert owner == {"host": HOST, "pid": os.getpid()}


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    with lock_run_folder(tmp_path / "new"):
        assert (
            check_run_folder(tmp_path / "new") == tmp_path / "new"
        )  # a lock makes it no run
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with lock_run_folder(tmp_path / "empty"):
        pass
    assert list((tmp_path / "empty").iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock_run_folder(tmp_path / "run"):
        (tmp_path / "run" / "config.yaml").touch()
        raise ZeroDivisionError
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == [
        "config.yaml"
    ]


def test_a_run_that_could_not_begin_leaves_its_lock_neither(tmp_path):
    run = tmp_path / "run"
    with lock_run_folder(run):
        (run / "config.yaml").touch()
        remove_failed_start(run)
        assert not run.exists()
    assert not run.exists()


def test_the_next_one_has_it_and_not_the_file_that_is_gone(tmp_path):
    """The lock's file is taken away at the end: who has opened it before locks nothing with it."""
    run = tmp_path / "run"
    run.mkdir()
    with lock_run_folder(run):
        pass
    with lock_run_folder(run), pytest.raises(InputError), lock_run_folder(run):
        pass


def test_another_hosts_lock_is_waited_for(tmp_path, capsys, monkeypatch):
    """It may be dead, and its lock live until the server misses it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    held = open(run / LOCK)  # noqa: SIM115 (a timer closes it)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(1.0, held.close).start()
    with lock_run_folder(run):
        pass
    assert (
        "waits up to 100 s for the lock of process 1 of host elsewhere"
        in capsys.readouterr().err
    )
    (run / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with open(run / LOCK) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(run_lock, "_LEASE", 0.0)
        with (
            pytest.raises(InputError, match=r"\(host elsewhere, process 1\)"),
            lock_run_folder(run),
        ):
            pass


@pytest.mark.ranks
def test_an_owner_that_is_gone_from_this_host_is_waited_for(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (run / LOCK).write_text(json.dumps({"host": HOST, "pid": gone.pid}))
    held = open(run / LOCK)  # noqa: SIM115 (a timer closes it)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.7, held.close).start()
    with lock_run_folder(run):
        pass


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]
)
def test_where_a_file_system_has_no_locks_it_is_said(
    tmp_path, capsys, monkeypatch, number
):
    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run_folder(tmp_path / "run"):
        pass
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "this file system has no locks" in said


@pytest.mark.parametrize("where", ["file/run", "file", "file/a/b"])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, ranks, where):
    (tmp_path / "file").touch()
    run = tmp_path / where
    with (
        pytest.raises(InputError) as refused,
        lock_run_folder_on_first_rank(run, True),
    ):
        pytest.fail("it was made")
    assert (
        str(refused.value).startswith(f"{run}: cannot be written (")
        and refused.value.status == 2
    )


def test_a_disk_that_is_only_read_is_one_line(tmp_path, ranks, monkeypatch):
    def refuse(self, *arguments, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(
        InputError, match=r"run: cannot be written \(Read-only file system\)"
    ):
        lock_run_folder_on_first_rank(tmp_path / "run", True).__enter__()
