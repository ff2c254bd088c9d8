"""Ctrl-C in a training: a checkpoint, one line, nothing that goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ranks.conftest import BIN, MODEL, ROOT, SETTINGS


def training_of(run):
    """The processes whose command line names the run's folder."""
    numbers = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"run={run}".encode() in words:
            numbers.append(int(file.parent.name))
    return numbers


@pytest.mark.parametrize(
    "supervision",
    [pytest.param([], marks=pytest.mark.slow), ["--max-restarts", "2"]],
)
def test_ctrl_c_writes_a_checkpoint(dataset, tmp_path, supervision):
    """Also where the supervisor alone is interrupted (kill -INT, a job manager)."""
    run = tmp_path / "run"
    words = [BIN / "python", "launch/train.py", f"data={dataset}", f"run={run}"]
    words += [*SETTINGS, *MODEL, "max_steps=0", "epochs=1000", "log.every=1"]
    process = subprocess.Popen(
        [*map(str, words), *supervision],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = run / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    (line,) = errors.splitlines()
    assert process.returncode == 75
    assert line.startswith("stopped after step ")
    assert line.endswith("its checkpoint is written, the same command goes on")
    assert list((run / "checkpoints").glob("step-*/manifest.json"))
    assert training_of(run) == []
