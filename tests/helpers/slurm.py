"""A private Slurm on this machine: a controller and two nodes, in a folder, without munge; or why there is none."""

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

from tests.ranks.conftest import free_port

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "sinfo", "scontrol")
# The first node's name is this machine's, which it knows, as a cluster's nodes know each other's.
HOST = os.uname().nodename.split(".")[0]
NODES = (HOST, f"{HOST}-second")  # Slurm sorts them
_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=15
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
NodeName={first} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_first} CPUs=4
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_second} CPUs=4
PartitionName=all Nodes={first},{second} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def why_not() -> str | None:
    """Why there can be none; None where there can."""
    missing = [
        name for name in PROGRAMS if shutil.which(name, path=_PATH) is None
    ]
    if missing:
        return (
            f"{', '.join(missing)}: not installed (apt-get install slurm-wlm)"
        )
    if os.geteuid() != 0:
        return "slurmd starts processes as root alone"
    return None


@contextlib.contextmanager
def cluster(folder: Path):
    """The environment in which `srun` and `sbatch` reach it. Raises RuntimeError where it does not start."""
    (folder / "state").mkdir()
    conf = folder / "slurm.conf"
    ports = {
        name: free_port()
        for name in ("controller", "port_first", "port_second")
    }
    conf.write_text(
        _CONF.format(
            host=HOST, folder=folder, first=NODES[0], second=NODES[1], **ports
        )
    )
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _PATH}
    commands = [
        ["slurmctld", "-D", "-f", conf],
        *(["slurmd", "-D", "-f", conf, "-N", node] for node in NODES),
    ]
    daemons = []
    try:
        for command in commands:
            command = [
                shutil.which(command[0], path=_PATH),
                *map(str, command[1:]),
            ]
            log = open(folder / "daemons.log", "a")  # noqa: SIM115 (it outlives this loop)
            daemons.append(
                subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log
                )
            )
        _wait(environment, folder, daemons)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _wait(environment, folder, daemons):
    """Until both nodes take jobs."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and all(
        daemon.poll() is None for daemon in daemons
    ):
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True
        )
        if done.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.2)
    logs = [
        (folder / name).read_text()[-2000:]
        for name in ("daemons.log", "controller.log")
        if (folder / name).exists()
    ]
    raise RuntimeError("Slurm does not start:\n" + "\n".join(logs))
