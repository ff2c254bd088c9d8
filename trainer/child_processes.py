"""Processes that a command starts: they end with it, and a request to stop reaches them once.

A terminal sends Ctrl-C to its whole process group. What a command starts gets a group of its own,
so that the command decides what its children hear, and when.
"""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

from trainer.interrupts import CtrlC, leave_terminal, stop_signals

_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG
_LOOK_AGAIN = 0.2  # seconds


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process where its parent dies: nobody would know of it."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
    if prctl is not None:
        prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(128 + signal.SIGKILL)


def end_with(parent: int) -> Callable[[], None]:
    """For subprocess.Popen(preexec_fn=…): the command is killed where its parent is.

    Else a command that was killed leaves one behind that writes, and cannot be given again at once.
    The thread that starts the command has to wait for it.
    """
    return functools.partial(die_with_parent, parent)


def set_up_worker(parent: int) -> None:
    """Has a worker process leave Ctrl-C to its parent, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


class StoppableCommands:
    """Runs commands one after the other, and passes on a request to stop.

        with StoppableCommands() as commands:
            status = commands.run(["deepspeed", "train.py"])
            if commands.stopped:
                ...

    Signals (`stop_signals`) become SIGTERM to all processes of the command that runs. A second
    Ctrl-C kills them. `run` waits for the whole group: a launcher may end before its ranks do,
    which are still writing a checkpoint.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._group: int | None = None
        self._ctrl_c = CtrlC()
        self._before: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Self:
        for number in stop_signals():
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Runs a command to its end; its status, negative for a signal."""
        child = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdin=subprocess.DEVNULL,
            process_group=0,
            preexec_fn=end_with(os.getpid()),
        )
        self._group = child.pid
        if self.stopped:  # asked between two lines
            self._ask_to_end()
        status = child.wait()
        while self.stopped and _has_processes(self._group):
            time.sleep(_LOOK_AGAIN)
        self._group = None
        return status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler."""
        self.stopped = True
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT and self._ctrl_c.is_second():
            self._kill()
        self._ask_to_end()

    def _ask_to_end(self) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGTERM)

    def _kill(self) -> None:
        if self._group is not None:
            kill_tree(self._group)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, signal.SIGKILL)


def kill_tree(process: int) -> None:
    """Kills a process and all that it has started, in whatever group."""
    children: dict[int, list[int]] = {}
    for state in _read_processes():
        children.setdefault(state.parent, []).append(state.number)
    doomed = [process]
    for number in doomed:
        doomed += children.get(number, [])
    for number in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _has_processes(group: int) -> bool:
    """Whether a process group has a process that has not ended."""
    return any(state.group == group for state in _read_processes())


class _ProcessState(NamedTuple):
    number: int
    parent: int
    group: int


def _read_processes() -> Iterator[_ProcessState]:
    """The processes of this machine that have not ended."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # 7 (a name) S 1 7 …: number, name, state, parent, group
            text = file.read_text("utf-8", "replace")
            number, _, _ = text.partition(" ")
            _, _, rest = text.rpartition(")")
            state, parent, group = rest.split()[:3]
            if state not in "ZX":
                yield _ProcessState(int(number), int(parent), int(group))
