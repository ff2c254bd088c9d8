"""Runs launch/*.py for a study's jobs, several side by side, and passes signals on to them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from trainer.child_processes import end_with, kill_tree
from trainer.errors import InputError
from trainer.interrupts import CtrlC, leave_terminal, stop_signals


class Commands:
    """The commands that run now.

    launch: the folder of train.py and evaluate.py. ranks: processes of each command. parallel:
    commands side by side, which share the cores.
    """

    def __init__(
        self,
        launch: Path,
        ranks: int,
        parallel: int,
    ) -> None:
        self.launch = launch
        self.ranks = ranks
        self.parallel = parallel
        self.stopping = threading.Event()
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._ctrl_c = CtrlC()

    def run(
        self,
        log: Path,
        script: str,
        *arguments: str | Path,
    ) -> None:
        """Runs a script to its end. log: gets its output.

        Raises InputError where it does not end with status 0.
        """
        command = [*self._launcher(), self.launch / script, *arguments]
        with log.open("a", encoding="utf-8") as output:
            # In a session of its own: Ctrl-C is ours to pass on, once.
            child = subprocess.Popen(
                [str(word) for word in command],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with(os.getpid()),
            )
            with self._lock:
                self._children.add(child)
            if self.stopping.is_set():
                child.terminate()
            try:
                status = child.wait()
            finally:
                with self._lock:
                    self._children.remove(child)
        if status:
            raise InputError(
                f"{script} ended with status {status}: {_last_error(log)} (more in {log})"
            )

    @contextlib.contextmanager
    def graceful_shutdown(self) -> Iterator[None]:
        """Within it, signals ask the commands to write a checkpoint and end."""

        before = {}
        for number in stop_signals():
            before[number] = signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """A signal's handler: a second Ctrl-C waits for no checkpoint."""
        self.stopping.set()
        if number == signal.SIGHUP:
            leave_terminal()
        kill = number == signal.SIGINT and self._ctrl_c.is_second()
        with self._lock:
            for child in self._children:
                if kill:
                    kill_tree(child.pid)
                else:
                    child.terminate()

    def _launcher(self) -> list[str | Path]:
        """Words before a script: torchrun for several ranks."""
        if self.ranks == 1:
            return [sys.executable]
        torchrun = Path(sys.executable).with_name("torchrun")
        return [torchrun, "--standalone", f"--nproc-per-node={self.ranks}"]

    def _environment(self) -> dict[str, str]:
        """With a share of the cores, and the modules of this project."""
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // (self.ranks * self.parallel))
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        paths = [str(self.launch.parent)]
        if os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment


def _last_error(log: Path) -> str:
    """The last error line of a log, or its last line."""
    lines = (
        log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    )
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1]
    return lines[-1] if lines else "it said nothing"
