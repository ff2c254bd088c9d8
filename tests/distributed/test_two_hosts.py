"""Two network namespaces as two hosts: `deepspeed` on each, and the losses of two local ranks."""

import json
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.conftest import BIN, ROOT, deepspeed, run

WORKER = Path(__file__).with_name("stages.py")
ADDRESSES = ("10.203.0.1", "10.203.0.2")


def _ip(*words, check=True):
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def _why_not():
    if shutil.which("ip") is None:
        return "needs `ip` (iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"probe-{uuid.uuid4().hex[:6]}"
    if _ip("netns", "add", name, check=False).returncode:
        return "this machine does not let us make network namespaces"
    _ip("netns", "delete", name)
    return None


@pytest.fixture
def hosts():
    """Two namespaces joined by a cable: [(namespace, interface, address)] of each."""
    if reason := _why_not():
        pytest.skip(reason)
    tag = uuid.uuid4().hex[:6]
    names = [f"host{i}-{tag}" for i in (0, 1)]
    cables = [f"veth{i}{tag}" for i in (0, 1)]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield list(zip(names, cables, ADDRESSES, strict=True))
    finally:
        for name in names:
            _ip("netns", "delete", name, check=False)


def _losses(run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return np.array([record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"])


def test_two_hosts_train_as_two_local_ranks(hosts, dataset, tmp_path):
    steps = "max_steps=20"
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for *_, address in hosts))
    processes = []
    for rank, (name, cable, _) in enumerate(hosts):
        options = ["--hostfile", tmp_path / "hostfile", "--no_ssh", "--node_rank", rank]
        options += ["--master_addr", ADDRESSES[0], "--master_port", 29761]
        prefix = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={cable}"]
        command = deepspeed(None, WORKER, dataset, tmp_path / "two", "1", steps, prefix=prefix, options=list(map(str, options)))
        environment = os.environ | {"PATH": os.pathsep.join([str(BIN), os.environ["PATH"]])}
        log = open(tmp_path / f"host{rank}.log", "w")  # noqa: SIM115 (it outlives this loop)
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + 300
    for rank, process in enumerate(processes):
        try:
            status = process.wait(timeout=max(1, deadline - time.monotonic()))
        finally:
            process.kill()
        assert status == 0, (tmp_path / f"host{rank}.log").read_text()[-4000:]
    run(deepspeed(2, WORKER, dataset, tmp_path / "local", "1", steps))
    two, local = _losses(tmp_path / "two" / "1"), _losses(tmp_path / "local" / "1")
    assert len(local) == 20
    np.testing.assert_allclose(two, local, rtol=1e-6)
