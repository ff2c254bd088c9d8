"""One process has a lock, until it closes it or ends."""

import fcntl
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import trainer.files.lock
from trainer.files.lock import lock_folder, take_lock, wait_for_lock

ROOT = Path(__file__).parents[4]
HOLDER = """
import sys, time
from pathlib import Path
from trainer.files.lock import take_lock

lock = take_lock(Path(sys.argv[1]))
print(lock is not None, flush=True)
time.sleep(60)
"""


def test_a_lock_is_taken_once_and_again_after_it_is_closed(tmp_path):
    lock = take_lock(tmp_path / "lock")
    assert lock is not None and take_lock(tmp_path / "lock") is None
    lock.close()
    again = take_lock(tmp_path / "lock")
    assert again is not None
    again.close()


@pytest.mark.ranks
def test_a_killed_process_has_no_lock_any_more(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    holder = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "True"
        assert take_lock(tmp_path / "lock") is None
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    lock = wait_for_lock(tmp_path / "lock")
    assert lock is not None
    lock.close()


def test_who_waits_for_a_lock_gets_it_once_it_is_free(tmp_path, monkeypatch):
    file = tmp_path / "lock"
    lock = take_lock(file)
    monkeypatch.setattr(trainer.files.lock, "PATIENCE", 0.2)
    assert wait_for_lock(file) is None
    monkeypatch.setattr(trainer.files.lock, "PATIENCE", 60.0)
    threading.Timer(0.2, lock.close).start()
    again = wait_for_lock(file)
    assert again is not None
    again.close()


def test_a_lock_that_its_owner_removes_is_not_taken(tmp_path, monkeypatch):
    """Else two processes would have one each, of files of one name."""
    file = tmp_path / "work" / "lock"
    file.parent.mkdir()
    flock = fcntl.flock

    def remove_and_lock(handle, how):
        shutil.rmtree(file.parent)
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    assert wait_for_lock(file) is None


def test_a_folder_is_locked_once_and_what_replaces_it_is_free(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with lock_folder(folder) as is_ours:
        assert is_ours and not list(folder.iterdir())
        with lock_folder(folder) as is_ours_too:
            assert not is_ours_too
        folder.rename(tmp_path / "old")
        folder.mkdir()
        with lock_folder(folder) as is_ours_too:
            assert is_ours_too


def test_a_folder_that_is_replaced_while_it_is_locked_is_not_ours(
    tmp_path, monkeypatch
):
    folder = tmp_path / "folder"
    folder.mkdir()
    flock = fcntl.flock

    def replace_and_lock(handle, how):
        folder.rename(tmp_path / "old")
        folder.mkdir()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", replace_and_lock)
    with lock_folder(folder) as is_ours:
        assert not is_ours
