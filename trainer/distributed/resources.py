"""What a process has of its machine: its share of the cores, and memory that it keeps."""

import ctypes
import os


def cores_per_rank(world_size):
    """The cores that each rank of this machine has for itself, at least 1: those that this process may run on, shared among
    the machine's ranks, which launchers give in the environment."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_of_this_machine(world_size))


def ranks_of_this_machine(world_size: int) -> int:
    """How many of the ranks are on this machine, at least 1, as launchers say in the environment; else all."""
    local = int(
        os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))
    )
    return max(1, min(local, world_size))


def keep_freed_memory():
    """Has glibc keep what is freed, up to 32 MiB a block (its limit): each step asks for the same blocks again, and a block
    that went back to the kernel comes anew, page fault by page fault (17,000 a step at 2,300 tokens; 400 with this)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)
