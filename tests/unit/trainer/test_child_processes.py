"""Commands end with what started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PARENT = """
import sys
from pathlib import Path
from trainer.child_processes import StoppableCommands

child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
with StoppableCommands() as commands:
    commands.run([sys.executable, "-c", child])
"""


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits to be asked does not."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.ranks
def test_a_command_is_killed_with_its_parent():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    assert is_alive(child) and os.getpgid(child) != os.getpgid(parent.pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
