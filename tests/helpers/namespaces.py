"""`deepspeed` on two hosts that are network namespaces of one machine."""

import contextlib
import os
import subprocess

from benchmarks.namespaces import ADDRESSES
from tests.helpers.rank_processes import Server
from tests.ranks.conftest import BIN, ROOT, deepspeed


@contextlib.contextmanager
def servers(hosts):
    """On each host a server that has the stack loaded, by the host's name: the launcher and its ranks are forked there."""
    begun = {name: Server(["ip", "netns", "exec", name]) for name, *_ in hosts}
    try:
        for server in begun.values():
            server.wait_ready()
        yield begun
    finally:
        for server in begun.values():
            server.close()


def start(hosts, forked, folder, script, *arguments, port, slots=1):
    """Starts `deepspeed` on both, by `servers`; their processes, which write to folder/host0.log and host1.log.

    slots: ranks of a host.
    """
    (folder / "hostfile").write_text(
        "".join(f"{address} slots={slots}\n" for *_, address in hosts)
    )
    processes = []
    for rank, (name, cable, _) in enumerate(hosts):
        options = [
            "--hostfile",
            folder / "hostfile",
            "--no_ssh",
            "--node_rank",
            rank,
        ]
        options += ["--master_addr", ADDRESSES[0], "--master_port", port]
        python = str(forked[name].python)
        command = deepspeed(
            None,
            script,
            *arguments,
            prefix=[python],
            options=list(map(str, options)),
        )
        environment = os.environ | {
            "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": cable,
            "FORKED_PYTHON": python,
        }
        log = open(folder / f"host{rank}.log", "w")  # noqa: SIM115 (it outlives this loop)
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        )
    return processes


def finish(processes, folder, timeout=300):
    """The exit statuses of both and what they printed; whoever is left after the time is killed, and has None."""
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(timeout=timeout))
        except subprocess.TimeoutExpired:
            statuses.append(None)
            process.kill()
    return statuses, [
        (folder / f"host{rank}.log").read_text()
        for rank in range(len(processes))
    ]
