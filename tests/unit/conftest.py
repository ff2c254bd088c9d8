"""Tests in here start no process, or are marked `ranks`."""

import multiprocessing.process
import os
import subprocess
from pathlib import Path

import pytest

_MARKS = ("ranks", "slow")
_may_start = True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test of the lane `unit` that starts a process fails; so does one of its fixtures that does."""
    global _may_start
    _may_start = any(item.get_closest_marker(mark) for mark in _MARKS)
    try:
        return (yield)
    finally:
        _may_start = True


def _refuse():
    if not _may_start:
        pytest.fail(
            "this test starts a process: mark it with `@pytest.mark.ranks`"
        )


def _execute_child(self, command, *arguments, **named):
    words = (
        [command] if isinstance(command, (str, bytes, os.PathLike)) else command
    )
    # A compiler of kernels may run: whether it does depends on the machine.
    if Path(os.fsdecode(words[0])).name not in ("c++", "g++", "clang++"):
        _refuse()
    return _popen(self, command, *arguments, **named)


def _start(self):
    _refuse()
    return _fork(self)


_popen = subprocess.Popen._execute_child
subprocess.Popen._execute_child = _execute_child
_fork = multiprocessing.process.BaseProcess.start
multiprocessing.process.BaseProcess.start = _start
