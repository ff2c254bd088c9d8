"""What this process may still take of its host's memory: the kernel says it of the machine, control groups of a job.

Slurm, Kubernetes and Docker limit a job by its group, which lies below others that may have limits of their own.
"""

from pathlib import Path


def host_memory(root=Path("/")):
    """Bytes that this process may still take: the kernel's estimate, or what the tightest of its control groups leaves.

    root: where /proc and /sys are.
    """
    free = 1024 * (
        _numbers(root / "proc/meminfo")["MemAvailable"]
        + _numbers(root / "proc/meminfo").get("SwapFree", 0)
    )
    return min(
        [
            free,
            *(left for group in _groups(root) if (left := _left_in(group)) is not None),
        ]
    )


# How a group's limit, what it has taken, and what of that are files that are only kept in case are called.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _groups(root):
    """(folder, names) of this process's control groups and all that they are in, by version 2 and version 1.

    A container may see its own group as the mounted root while /proc names it as its host does: what is not there is passed
    over, and the root is always looked at.
    """
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
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
            yield from (
                (folder, names)
                for folder in (group, *group.parents)
                if folder.is_relative_to(top)
            )


def _left_in(group):
    """Bytes that a control group leaves; None where it is not there or has no limit."""
    folder, (limit, used, files) = group
    try:
        left = int((folder / limit).read_text()) - int(
            (folder / used).read_text()
        )  # "max": no limit
        return left + _numbers(folder / "memory.stat").get(files, 0)
    except (OSError, ValueError):
        return None


def _numbers(file):
    """{name: number} of lines such as `MemFree: 12 kB` and `inactive_file 12`."""
    words = [line.replace(":", " ").split() for line in file.read_text().splitlines()]
    return {name: int(value) for name, value, *_ in words}
