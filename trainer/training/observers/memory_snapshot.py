"""A snapshot of the device's memory where it runs out, for <https://pytorch.org/memory_viz>.

    run/profile/memory-rank-00000.pickle

It has what lies where at that moment. With `profile.memory` it also has which line of code allocated
it, and the last allocations before: noting them makes each allocation slower.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.distributed.process_group import Ranks
from trainer.run_files import memory_file

_MOST_ENTRIES = 100_000  # allocations that are remembered, some kB each


@contextlib.contextmanager
def snapshot_out_of_memory(
    run: Path, ranks: Ranks, remember: bool
) -> Iterator[None]:
    """Within it a device that runs out of memory leaves a snapshot; the error passes.

    remember: note who allocates what (`profile.memory`). On a CPU nothing is done.
    """
    on_device = ranks.device.type == "cuda"
    if remember and on_device:
        torch.cuda.memory._record_memory_history(max_entries=_MOST_ENTRIES)
    try:
        yield
    except torch.OutOfMemoryError:
        if on_device:
            _dump(run / memory_file(ranks.rank), ranks.rank)
        raise
    finally:
        if remember and on_device:
            torch.cuda.memory._record_memory_history(enabled=None)


def _dump(file: Path, rank: int) -> None:
    """Writes the snapshot, and says where it is; the error that is raised matters more than another."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))
    except (OSError, RuntimeError) as error:
        print(
            f"rank {rank}: {file}: no snapshot of the memory: {error}",
            file=sys.stderr,
            flush=True,
        )
        return
    print(
        f"rank {rank}: the device is out of memory; {file} has what lies in it "
        "(open it at https://pytorch.org/memory_viz)",
        file=sys.stderr,
        flush=True,
    )
