"""Counting a dataset's events by item and day: one pass over the shards, all ranks together.

Each rank counts the shards of its own streams, and gets the counts of the others. So all ranks have
the same counts, at any number of ranks, of a dataset of any format version.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.home_blocks import read_home_blocks
from trainer.data.recent_counts import (
    Days,
    PairCounter,
    Pairs,
    RecentCounts,
    merge_pairs,
)
from trainer.distributed.consensus import run_on_all_ranks

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks


def count_recent(
    dataset: Dataset,
    ranks: "Ranks",
    config: StreamConfig,
    beat: Callable[[], None] | None = None,
) -> RecentCounts:
    """Counts all events of a dataset by item and day. Called on all ranks.

    config: its `verify` and `damaged` count; damaged blocks that are skipped are not counted. beat:
    called after each block. Raises InputError, the same on all ranks, where a shard cannot be used.
    """
    days = Days.of(dataset)
    pairs = run_on_all_ranks(
        lambda: _count_home_shards(dataset, ranks, config, days, beat)
    )
    return RecentCounts(days, _gather_pairs(pairs, ranks))


def _count_home_shards(
    dataset: Dataset,
    ranks: "Ranks",
    config: StreamConfig,
    days: Days,
    beat: Callable[[], None] | None,
) -> Pairs:
    """The pairs of the shards whose home this rank is."""
    counter = PairCounter(days)
    for _, block in read_home_blocks(dataset, ranks, config):
        counter.add(block.items_N, block.ticks_N)
        if beat is not None:
            beat()
    return counter.pairs()


def _gather_pairs(pairs: Pairs, ranks: "Ranks") -> Pairs:
    """The pairs of all ranks together. Called on all ranks.

    Two ranks that have touched the same item on the same day:

        rank 0    73 84 | 2 1
        rank 1    73 75 | 1 4    →    73 75 84 | 3 4 1    on both
    """
    if ranks.world_size == 1:
        return pairs
    total: Pairs = merge_pairs([])
    for rank in range(ranks.world_size):
        size = torch.tensor([len(pairs[0])])
        dist.broadcast(size, rank)
        part = []
        for values_K in pairs:
            sent = torch.zeros(int(size), dtype=torch.int64)
            if rank == ranks.rank:
                sent = torch.from_numpy(values_K.astype(np.int64))
            dist.broadcast(sent, rank)
            part.append(sent.numpy())
        key_K, events_K = part
        total = merge_pairs([total, (key_K, events_K)])
    return total
