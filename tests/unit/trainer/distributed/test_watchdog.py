"""The watchdog, which ends the process that it is in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import LostRanks

pytestmark = pytest.mark.ranks  # they start processes

ROOT = Path(__file__).parents[4]
WATCHED = """
import time
from trainer.distributed.watchdog import Watchdog
with Watchdog(0.2, lambda: "step 7") as dog:
    {body}
print("went on")
"""


def watched(body):
    program = WATCHED.format(body=body.replace("\n", "\n    "))
    environment = os.environ | {"RANK": "3", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_without_progress_is_ended_with_its_line():
    done = watched("time.sleep(3600)")
    assert done.returncode == LostRanks.status == 4 and done.stdout == ""
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
