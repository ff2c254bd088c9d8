"""Available host memory: what the kernel says of the machine, and control groups (cgroups) of a job.

Slurm, Kubernetes and Docker limit a job by its group, which lies below others that may have limits
of their own.
"""

from collections.abc import Iterator
from pathlib import Path

# What a group's limit, its use, and the part of that that is files kept just in case are called.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

Names = tuple[str, str, str]


def available_host_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take.

    The kernel's estimate, or what the tightest of its control groups leaves. root: where /proc and
    /sys are.
    """
    sizes = _read_numbers(root / "proc/meminfo")
    least = 1024 * (sizes["MemAvailable"] + sizes.get("SwapFree", 0))
    for folder, names in _list_groups(root):
        available = _read_available(folder, names)
        if available is not None:
            least = min(least, available)
    return least


def _list_groups(root: Path) -> Iterator[tuple[Path, Names]]:
    """(folder, names) of this process's control groups and all that they are in.

    By version 2 and version 1. A container may see its own group as the mounted root while /proc
    names it as its host does: a folder that does not exist is passed over, and the root is always
    looked at.
    """
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (
            (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        )
    except OSError:
        lines = ["0::/"]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            tops = [(mounts, _V2), (mounts / "unified", _V2)]
        elif "memory" in controllers.split(","):
            tops = [(mounts / "memory", _V1), (mounts / controllers, _V1)]
        else:
            continue
        for top, names in dict.fromkeys(tops):
            group = top / path.strip("/")
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    yield folder, names


def _read_available(folder: Path, names: Names) -> int | None:
    """Bytes that a control group leaves; None where it does not exist or has no limit."""
    limit_name, used_name, files_name = names
    try:
        limit = int(
            (folder / limit_name).read_text(encoding="utf-8")
        )  # "max": no limit
        used = int((folder / used_name).read_text(encoding="utf-8"))
        files = _read_numbers(folder / "memory.stat").get(files_name, 0)
    except (OSError, ValueError):
        return None
    return limit - used + files


def _read_numbers(file: Path) -> dict[str, int]:
    """{name: number} of lines such as `MemFree: 12 kB` and `inactive_file 12`."""
    numbers = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, value, *_ = line.replace(":", " ").split()
        numbers[name] = int(value)
    return numbers
