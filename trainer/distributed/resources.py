"""A process's share of its machine: cores, ranks beside it, and memory that it keeps."""

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20


def count_cores_per_rank(world_size: int) -> int:
    """The cores that each rank of this machine has for itself, at least 1.

    The cores on which this process may run are shared among the machine's ranks: 4 each of 16,
    where LOCAL_WORLD_SIZE is 4.
    """
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // count_local_ranks(world_size))


def count_local_ranks(world_size: int) -> int:
    """How many ranks are on this machine, at least 1, as launchers say in the environment.

    All ranks, where they do not say it.
    """
    local_size = os.environ.get("LOCAL_SIZE", world_size)
    local_size = os.environ.get("LOCAL_WORLD_SIZE", local_size)
    return max(1, min(int(local_size), world_size))


def keep_freed_memory() -> None:
    """Has glibc's malloc keep what is freed, up to 32 MiB a block (its limit).

    Each step asks for the same blocks again. A block that went back to the kernel comes anew, page
    fault by page fault: 17,000 a step at 2,300 tokens, 400 with this.
    """
    # Other C libraries have none.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
