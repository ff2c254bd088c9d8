"""Tests in here start no process, or are marked `ranks`."""

import multiprocessing.process
import subprocess

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


def _guard(start):
    def guarded(*arguments, **named):
        if not _may_start:
            pytest.fail(
                "this test starts a process: mark it with `@pytest.mark.ranks`"
            )
        return start(*arguments, **named)

    return guarded


subprocess.Popen._execute_child = _guard(subprocess.Popen._execute_child)
_process = multiprocessing.process.BaseProcess
_process.start = _guard(_process.start)
