"""Users' histories by their numbers: out of blocks of shards, of which those that are needed again are kept decoded."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.data.dataset import Dataset
from trainer.data.shards import ShardFile

_FOREIGN_BLOCKS = 64  # kept beside those of a rank's own streams
_OPEN_FILES = 256


@dataclass(frozen=True)
class Users:
    """Some users' whole histories, jagged, oldest first: numbers int64 (B,), lengths int64 (B,), rows of M int32 (N,), ticks
    uint16 (N,)."""

    number_B: np.ndarray
    lengths_B: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


NO_USERS = Users(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.uint16))


class Histories:
    """Reads users, in any order. The newest blocks stay decoded and the newest shards open, as many as `blocks` says."""

    def __init__(self, dataset: Dataset, blocks: int, verify: bool = True, report=None):
        """blocks: at least as many as hold users of one `read` and of the next, or they are decoded again.

        verify, report: as `ShardFile` has them.
        """
        self.dataset, self.verify, self.report = dataset, verify, report
        self.opened = 0  # shards, so far
        self._room, self._blocks, self._files = blocks, {}, {}
        self._first_user = np.array([shard.first_user for shard in dataset.shards])

    @classmethod
    def of_plan(cls, plan, verify=True, report=None):
        """With room for one rank of a `Plan`: each of its own streams has a current block and a next one, and where users
        are moved between ranks, some blocks of other streams are met again."""
        own = -(-plan.dataset.streams // plan.world_size)
        foreign = min(plan.dataset.streams - own, _FOREIGN_BLOCKS) if plan.balance else 0
        return cls(plan.dataset, 2 * own + foreign, verify, report)

    def read(self, number_B) -> Users:
        """The given users (int64 numbers), in the given order, without those of damaged blocks.

        Raises InputError as `ShardFile` does.
        """
        shard_B = np.searchsorted(self._first_user, number_B, side="right") - 1
        block_B, place_B = np.divmod(number_B - self._first_user[shard_B], self.dataset.block_users)
        order = np.lexsort((block_B, shard_B))
        shard_B, block_B, place_B = shard_B[order], block_B[order], place_B[order]
        starts = np.flatnonzero(np.diff(shard_B, prepend=-1) | np.diff(block_B, prepend=-1)).tolist()
        histories, read = [], []
        for begin, end in pairwise([*starts, len(order)]):
            block = self._block(int(shard_B[begin]), int(block_B[begin]))
            if block is None:
                continue
            ends, items, ticks = block
            places = place_B[begin:end]
            cuts = zip(ends[places].tolist(), ends[places + 1].tolist(), strict=True)
            histories += [(items[low:high], ticks[low:high]) for low, high in cuts]
            read.append(order[begin:end])
        while len(self._blocks) > self._room:
            del self._blocks[next(iter(self._blocks))]
        if not histories:
            return NO_USERS
        read_B = np.concatenate(read)
        items, ticks = zip(*(histories[place] for place in np.argsort(read_B).tolist()), strict=True)
        lengths_B = np.fromiter(map(len, items), np.int64, len(items))
        return Users(number_B[np.sort(read_B)], lengths_B, np.concatenate(items), np.concatenate(ticks))

    def close(self):
        """Lets all files go."""
        for file in self._files.values():
            file.close()
        self._blocks, self._files = {}, {}

    def _block(self, shard, number):
        """(ends, items, ticks) of a block, where user k's are those from ends[k] to ends[k + 1]; None: it cannot be used."""
        key = shard, number
        if key in self._blocks:
            self._blocks[key] = self._blocks.pop(key)  # the newest now
            return self._blocks[key]
        block = self._file(shard).block(number)
        if block is None:
            return None
        self._blocks[key] = np.concatenate([[0], np.cumsum(block.lengths_B)]), block.items_N, block.ticks_N
        return self._blocks[key]

    def _file(self, shard):
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)
        else:
            while len(self._files) >= _OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = ShardFile(self.dataset, self.dataset.shards[shard], self.verify, self.report)
            self.opened += 1
        return self._files[shard]


def read_users(plan, epoch, steps, rank, verify=True, report=None):
    """Yields (step, Users) of one rank for the given steps of an epoch; a batch may be empty.

    verify, report: as `ShardFile` has them. Users of damaged blocks are not in their batch.
    """
    histories = Histories.of_plan(plan, verify, report)
    try:
        for step in steps:
            yield step, histories.read(plan.users(epoch, step, rank))
    finally:
        histories.close()
