"""Two hosts on one machine: network namespaces joined by a cable, whose bandwidth can be
limited.
"""

import contextlib
import os
import shutil
import subprocess
import uuid

ADDRESSES = ("10.203.0.1", "10.203.0.2")
# What may pass at once, whatever the limit: four of the largest packets that the kernel hands
# to a device.
_BURST = 2**18


def run(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a command of iproute2."""
    return subprocess.run(words, check=check, capture_output=True, text=True)


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Runs `ip`."""
    return run("ip", *words, check=check)


def why_not() -> str | None:
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


def why_no_limit() -> str | None:
    """Why the cable's bandwidth cannot be limited on this machine, or None."""
    if reason := why_not():
        return reason
    if shutil.which("tc") is None:
        return "needs `tc` (iproute2)"
    with two_hosts() as hosts:
        try:
            limit(hosts, 1e9)
        except subprocess.CalledProcessError as error:
            return (
                "this machine's kernel does not limit bandwidth "
                f"({error.stderr.strip().splitlines()[-1]})"
            )
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


def limit(hosts: list[tuple], bits_per_second: float | None) -> None:
    """From now on so much passes the cable in each direction, headers included; None: as much
    as can.
    """
    for name, cable, _ in hosts:
        if bits_per_second is None:
            run(
                "tc",
                "-n",
                name,
                "qdisc",
                "del",
                "dev",
                cable,
                "root",
                check=False,
            )
        else:
            shape = [
                "rate",
                f"{bits_per_second:.0f}bit",
                "burst",
                str(_BURST),
                "latency",
                "50ms",
            ]
            run(
                "tc",
                "-n",
                name,
                "qdisc",
                "replace",
                "dev",
                cable,
                "root",
                "tbf",
                *shape,
            )
