"""Groups of ranks on this machine that wait for commands, so that what they do can be timed in
turn; see `scaling_rank`.
"""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import namespaces, suite

if TYPE_CHECKING:
    from benchmarks.scaling import Settings


ROOT = Path(__file__).resolve().parents[1]
ONE = "one rank"
TWIN = "two apart"
PAIR = "two ranks"
HOSTS = "two hosts"
_PATIENCE = 300  # seconds for an answer


class Group:
    """Ranks that wait for commands; see `scaling_rank`. Each has a core of its own, where there
    are enough.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        cores: list[int],
        arguments: list[str],
        hosts: Sequence[tuple] = (),
    ):
        """hosts: of `namespaces.two_hosts`, one for each rank; else all are here."""
        self.name = name
        self.ranks = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, core in enumerate(cores):
            namespace, interface, _ = (
                hosts[rank] if hosts else (None, "lo", None)
            )
            environment = {
                "RANK": rank,
                "WORLD_SIZE": len(cores),
                "LOCAL_RANK": 0 if hosts else rank,
                "LOCAL_WORLD_SIZE": 1 if hosts else len(cores),
                "MASTER_ADDR": hosts[0][2] if hosts else "127.0.0.1",
                "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": interface,
                "OMP_NUM_THREADS": 1,
                "PYTHONPATH": ROOT,
            }
            prefix = ["ip", "netns", "exec", namespace] if hosts else []
            prefix += ["taskset", "--cpu-list", str(core)]
            log = open(folder / f"{name} {rank}.log", "w")  # noqa: SIM115 (it outlives this loop)
            process = subprocess.Popen(
                [
                    *prefix,
                    sys.executable,
                    "-m",
                    "benchmarks.scaling_rank",
                    *arguments,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ
                | {key: str(value) for key, value in environment.items()},
            )
            self.ranks.append((process, log))

    def tell(self, do: str, **options: Any) -> None:
        """Sends a command to all ranks; `options` are the same for all, or a list with one for
        each.
        """
        for rank, (process, _) in enumerate(self.ranks):
            own = {
                name: value[rank] if isinstance(value, list) else value
                for name, value in options.items()
            }
            process.stdin.write(json.dumps({"do": do, **own}) + "\n")
            process.stdin.flush()

    def hear(self) -> list:
        """Every rank's answer. Raises RuntimeError with the end of a rank's output where there
        is none.
        """
        answers = []
        for process, log in self.ranks:
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                line = (
                    process.stdout.readline() if ready.select(_PATIENCE) else ""
                )
            if not line:
                raise RuntimeError(
                    f"{self.name}: a rank gave no answer:\n{Path(log.name).read_text()[-3000:]}"
                )
            answers.append(json.loads(line))
        return answers

    def ask(self, do: str, **options: Any) -> list:
        """`tell` and `hear`."""
        self.tell(do, **options)
        return self.hear()

    def end(self) -> None:
        """Whoever is left is killed."""
        for process, log in self.ranks:
            process.kill()
            process.wait()
            log.close()


class Groups:
    """All groups that take turns: `one`, `twin` (on the other core), `pair`, and `apart` on two
    hosts, or None.
    """

    def __init__(self, arguments: list[str], hosts: list[tuple]):
        self.arguments = arguments
        self.with_hosts = hosts

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(suite.scratch("")))
            self.hosts = (
                stack.enter_context(namespaces.two_hosts())
                if self.with_hosts
                else None
            )
            cores = sorted(os.sched_getaffinity(0))
            first = cores[0]
            second = cores[1 % len(cores)]

            def group(name, cores, hosts=()):
                made = Group(folder, name, cores, self.arguments, hosts)
                stack.callback(made.end)
                return made

            self.one = group(ONE, [first])
            self.twin = group(TWIN, [second])
            self.pair = group(PAIR, [first, second])
            self.apart = (
                group(HOSTS, [first, second], self.hosts)
                if self.hosts
                else None
            )
            for made in (self.one, self.twin, self.pair, self.apart):
                if made is not None:
                    made.hear()  # they are there
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def cases(self, settings: "Settings") -> list[tuple]:
        """[(name, group, Gbit/s of the cable or None)]: what is timed in turn."""
        cases = [
            (ONE, self.one, None),
            (TWIN, self.one, None),
            (PAIR, self.pair, None),
        ]
        if self.apart:
            cases += [(HOSTS, self.apart, None)]
            cases += [
                (f"{HOSTS}, {gbit:g} Gbit/s", self.apart, gbit)
                for gbit in settings.gbit
            ]
        return cases

    def limit(self, gbit: float | None) -> None:
        """Of the cable between the hosts."""
        if self.hosts:
            namespaces.limit(self.hosts, gbit and gbit * 1e9)

    def links(self, settings: "Settings") -> dict:
        """{case: bytes a second of collectives that do nothing else, and their latency}."""
        found = {}
        for name, group, gbit in self.cases(settings)[2:]:
            self.limit(gbit)
            found[name] = group.ask("link")[0]
        return found
