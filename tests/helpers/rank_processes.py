"""Real ranks for a test, on the CPU whatever the machine has: who wants a device says so.

They are forked by a server that has imported the stack (tests/helpers/rank_server.py), and find each
other by RANK, WORLD_SIZE and MASTER_PORT as under any launcher. Tests that are about a launcher start
that one.
"""

import atexit
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
# PyTorch sees no device, and DeepSpeed, which looks for itself, takes the CPU. One thread a rank.
ON_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# How long the others may take to end once a rank has failed, before they are killed.
GRACE = 60.0
_DRAW = random.SystemRandom()  # tests seed the other
_PLACE = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def cpu_environment(**more: str) -> dict[str, str]:
    """This process's environment for another one that is to run on the CPU."""
    return os.environ | ON_CPU | more


@dataclass
class Finished:
    """What ranks have left, as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str
    returncodes: list[int] = field(default_factory=list)


class Server:
    """The process that forks ranks; one for each process that runs tests.

    prefix: words before its command, such as those that start it on another host.
    """

    _running: "Server | None" = None

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.path = str(Path(self._folder.name) / "socket")
        self.python = Path(self._folder.name) / "python"
        shim = Path(__file__).with_name("forked_python.py")
        words = [sys.executable, "-S", "-E", str(shim), self.path]
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self.python.chmod(0o700)
        command = [sys.executable, "-m", "tests.helpers.rank_server", self.path]
        self._process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            env=cpu_environment(),
            stdin=subprocess.DEVNULL,
        )
        self._owner = socket.socket(socket.AF_UNIX)

    def wait_ready(self) -> None:
        """Returns once it has imported the stack."""
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(OSError):
                self._owner.connect(self.path)
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server of ranks does not start")
            time.sleep(0.05)
        assert self._owner.recv(16) == b"ready\n"

    @classmethod
    def get(cls) -> "Server":
        """The one that runs, or a new one."""
        if cls._running is None or cls._running._process.poll() is not None:
            cls._running = cls()
            cls._running.wait_ready()
            atexit.register(cls._running.close)
        return cls._running

    def close(self) -> None:
        """Ends it, and the ranks that still run."""
        self._owner.close()
        self._process.wait(30)


class RankProcess:
    """A process that the server has forked, as `subprocess.Popen` would give it."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        module: bool = False,
        output: Path | None = None,
    ) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="rank-")
        folder = output or Path(self._scratch.name)
        self._stdout = folder / "stdout"
        self._stderr = folder / "stderr"
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(Server.get().path)
        request = {
            "command": command,
            "module": module,
            "environment": environment,
            "folder": str(ROOT),
            "stdout": str(self._stdout),
            "stderr": str(self._stderr),
        }
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._connection.makefile("r")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self, wait: float = 0.0) -> int | None:
        """The status, where it has ended within so many seconds."""
        if self.returncode is None:
            self._connection.settimeout(max(wait, 0.001))
            with contextlib.suppress(TimeoutError):
                self.returncode = int(self._connection.recv(16) or "-9")
        return self.returncode

    def kill(self) -> None:
        """SIGKILL, to all that it has started too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return self._stdout.read_text() if self._stdout.exists() else ""

    @property
    def stderr(self) -> str:
        """What it has said."""
        return self._stderr.read_text() if self._stderr.exists() else ""


def forked_python() -> str:
    """A program that stands for Python, and imports the stack by being forked from the server."""
    return str(Server.get().python)


def free_port() -> int:
    """A port that nobody listens on now, nor on the one after it, which supervisors take.

    Not one of those that the system gives to connections; and each process that runs tests has its
    own, since the ranks of two may start at the same moment.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    first = 10_000 + int(worker) % 4 * 5_000
    while True:
        port = first + 2 * _DRAW.randrange(2_500)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for number in (port, port + 1):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", number))
            return port


def run_ranks(
    ranks: int,
    target: str | Path,
    *arguments: object,
    module: bool = False,
    timeout: float = 300,
    **environment: str,
) -> Finished:
    """Runs a script or a module on so many ranks, to its end. Runs draw no report (WITHOUT_REPORT).

    The status is that of the first rank that fails, as a launcher gives it: 256 − N for signal N.
    """
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [str(target), *map(str, arguments)]
        place["WITHOUT_REPORT"] = "1"
        whole = cpu_environment(**place) | environment
        processes.append(RankProcess(command, whole, module))
    return _finish(processes, timeout)


def run_alone(
    target: str | Path,
    *arguments: object,
    module: bool = False,
    timeout: float = 300,
    **environment: str,
) -> Finished:
    """Runs a script or a module as a person would: in one process that no launcher has started."""
    whole = cpu_environment() | environment
    for name in _PLACE:
        if name not in environment:
            whole.pop(name, None)
    command = [str(target), *map(str, arguments)]
    return _finish([RankProcess(command, whole, module)], timeout)


def _finish(processes: list[RankProcess], timeout: float) -> Finished:
    """Waits for all of them; where one has failed, for the others a while."""
    deadline = time.monotonic() + timeout
    first_failure: int | None = None
    killed: set[int] = set()
    while any(process.returncode is None for process in processes):
        for process in processes:
            if process.returncode is not None or process.poll(0.02) is None:
                continue
            if process.returncode and first_failure is None:
                first_failure = process.returncode
                deadline = min(deadline, time.monotonic() + GRACE)
        if time.monotonic() > deadline:
            timed_out = first_failure is None
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    killed.add(process.pid)
            deadline = time.monotonic() + 30
            if timed_out:
                first_failure = 256 - signal.SIGKILL
    codes = [process.returncode or 0 for process in processes]
    status = first_failure or 0
    stdout = "".join(process.stdout for process in processes)
    stderr = "".join(process.stderr for process in processes)
    return Finished(status % 256, stdout, stderr, codes)


def start_on_cpu_ranks(ranks: int, module: str, *arguments: object) -> Finished:
    """Runs a module on so many ranks, to its end."""
    return run_ranks(ranks, module, *arguments, module=True)


def run_on_cpu_ranks(ranks: int, module: str, *arguments: object) -> str:
    """The same, which has to end well; returns what they printed."""
    done = start_on_cpu_ranks(ranks, module, *arguments)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
