"""What a rank finds of its own process, host and device. Nothing here is collective."""

import os
import resource
import shutil
import socket
import subprocess

import torch

from embeddings.control_groups import available_host_memory
from trainer.distributed.process_group import Ranks
from trainer.doctor.deadline import Unanswered, call_with_deadline
from trainer.doctor.facts import RankFacts

SHARED_MEMORY = "/dev/shm"
_SECONDS = 15.0
_MOST_FILES = 2**40  # where there is no limit


def examine_rank(ranks: Ranks) -> RankFacts:
    """The facts of this rank; with a `problem` where its host or driver does not answer."""
    host = socket.gethostname()
    try:
        return call_with_deadline(lambda: _look(ranks, host), _SECONDS)
    except (Unanswered, OSError) as error:
        return RankFacts(ranks.rank, host, problem=str(error))


def _look(ranks: Ranks, host: str) -> RankFacts:
    """Asks kernel and driver; a driver or a mount may never answer."""
    usage = shutil.disk_usage(SHARED_MEMORY)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = _MOST_FILES
    one_minute, _, _ = os.getloadavg()
    device = "cpu"
    driver = ""
    backend = "gloo"
    device_memory = None
    others: list[str] = []
    if ranks.device.type == "cuda":
        properties = torch.cuda.get_device_properties(ranks.device)
        device = properties.name
        uuid = str(properties.uuid)
        driver = _ask_driver("--query-gpu=driver_version", uuid)
        backend = "nccl " + ".".join(map(str, torch.cuda.nccl.version()))
        device_memory, _ = torch.cuda.mem_get_info(ranks.device)
        others = _other_processes(uuid)
    return RankFacts(
        rank=ranks.rank,
        host=host,
        device=device,
        driver=driver,
        backend=backend,
        cores=len(os.sched_getaffinity(0)),
        busy_cores=one_minute,
        other_processes=others,
        host_memory=available_host_memory(),
        device_memory=device_memory,
        shm_size=usage.total,
        shm_free=usage.free,
        open_files=limit,
    )


def _other_processes(uuid: str) -> list[str]:
    """`process 4711 (3120 MiB)` of each other process that the device has."""
    text = _ask_driver("--query-compute-apps=pid,used_memory", uuid)
    others = []
    for line in text.splitlines():
        pid, _, memory = line.partition(", ")
        if pid != str(os.getpid()):
            others.append(f"process {pid} ({memory})")
    return others


def _ask_driver(question: str, uuid: str) -> str:
    """What nvidia-smi answers; "" where it is not there or does not know.

    _ask_driver("--query-gpu=driver_version", uuid)            "570.86.15"
    _ask_driver("--query-compute-apps=pid,used_memory", uuid)  "77, 3120 MiB\\n78, 12 MiB"
    """
    name = uuid
    if not name.startswith("GPU-"):
        name = f"GPU-{uuid}"
    command = ["nvidia-smi", question, "--format=csv,noheader", f"--id={name}"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
