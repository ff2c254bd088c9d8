"""Two hosts on one machine: network namespaces joined by a cable."""

import contextlib
import os
import shutil
import subprocess
import uuid

from tests.distributed.conftest import BIN, ROOT, deepspeed

ADDRESSES = ("10.203.0.1", "10.203.0.2")


def ip(*words, check=True):
    """Runs `ip`."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def why_not():
    """Why this machine cannot have them, or None."""
    if shutil.which("ip") is None:
        return "needs `ip` (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"probe-{uuid.uuid4().hex[:6]}"
    if ip("netns", "add", name, check=False).returncode:
        return "this machine does not let us make network namespaces"
    ip("netns", "delete", name)
    return None


@contextlib.contextmanager
def two_hosts():
    """[(namespace, interface, address)] of each host."""
    tag = uuid.uuid4().hex[:6]
    names = [f"host{i}-{tag}" for i in (0, 1)]
    cables = [f"veth{i}{tag}" for i in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip("link", "set", cable, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, cables, ADDRESSES, strict=True))
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def start(hosts, folder, script, *arguments, port):
    """Starts `deepspeed` on both; their processes, which write to folder/host0.log and host1.log."""
    (folder / "hostfile").write_text("".join(f"{address} slots=1\n" for *_, address in hosts))
    processes = []
    for rank, (name, cable, _) in enumerate(hosts):
        options = ["--hostfile", folder / "hostfile", "--no_ssh", "--node_rank", rank]
        options += ["--master_addr", ADDRESSES[0], "--master_port", port]
        prefix = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
        command = deepspeed(None, script, *arguments, prefix=prefix, options=list(map(str, options)))
        environment = os.environ | {"PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
        log = open(folder / f"host{rank}.log", "w")  # noqa: SIM115 (it outlives this loop)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
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
    return statuses, [(folder / f"host{rank}.log").read_text() for rank in range(len(processes))]
