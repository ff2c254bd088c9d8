"""Tests in here start no process, or are marked `ranks`."""

import multiprocessing.process
import subprocess

import pytest

_MARK_IT = "this test starts a process: mark it with `@pytest.mark.ranks`"


@pytest.fixture(autouse=True)
def no_process(request, monkeypatch):
    """A test of the lane `unit` that starts a process fails."""
    if request.node.get_closest_marker("ranks") or request.node.get_closest_marker(
        "slow"
    ):
        return

    def refuse(*arguments, **named):
        pytest.fail(_MARK_IT)

    monkeypatch.setattr(subprocess.Popen, "_execute_child", refuse)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
