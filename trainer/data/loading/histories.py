"""Users' histories by their numbers: out of blocks of shards, of which those that are needed again are kept decoded."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import ShardFile
from trainer.files.open_files import NoDescriptors, files_to_keep

_FOREIGN_BLOCKS = 64  # kept beside those of a rank's own streams
_OPEN_FILES = 256  # fewer where the process may have few


@dataclass(frozen=True)
class Users:
    """Some users' whole histories, jagged, oldest first: numbers int64 (B,), lengths int64 (B,), rows of M int32 (N,), ticks
    uint16 (N,)."""

    number_B: np.ndarray
    lengths_B: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


NO_USERS = Users(
    np.zeros(0, np.int64),
    np.zeros(0, np.int64),
    np.zeros(0, np.int32),
    np.zeros(0, np.uint16),
)


class Histories:
    """Reads users, in any order. The newest blocks stay decoded and the newest shards open, as many as `blocks` says."""

    def __init__(
        self,
        dataset: Dataset,
        blocks: int,
        verify: bool = True,
        report: Callable[[str], None] | None = None,
        open_shard: Callable[..., ShardFile] = ShardFile,
    ):
        """blocks: at least as many as hold users of one `read` and of the next, or they are decoded again.

        verify, report: as `ShardFile` has them. open_shard: what opens a shard.
        """
        self.dataset, self.verify, self.report = dataset, verify, report
        self.opened = 0  # shards, so far
        self._room, self._blocks, self._files = blocks, {}, {}
        self._whole = set()  # shards whose files have been compared
        self._open_shard, self._most_files = open_shard, files_to_keep(_OPEN_FILES)
        self._first_user = np.array([shard.first_user for shard in dataset.shards])

    @classmethod
    def of_plan(cls, plan, verify=True, report=None, open_shard=ShardFile):
        """With room for one rank of a `Plan`: each of its own streams has a current block and a next one, and where users
        are moved between ranks, some blocks of other streams are met again."""
        own = -(-plan.dataset.streams // plan.world_size)
        foreign = (
            min(plan.dataset.streams - own, _FOREIGN_BLOCKS) if plan.balance else 0
        )
        return cls(plan.dataset, 2 * own + foreign, verify, report, open_shard)

    def read(self, number_B: np.ndarray, home: Collection[int] | None = None) -> Users:
        """The given users (int64 numbers), in the given order, without those of damaged blocks.

        home: the shards whose files are compared with their sha256 before anything is read of them; of the others, which other
        ranks compare, each block with its CRC-32 alone. None: all. Raises InputError as `ShardFile` does.
        """
        shard_B = np.searchsorted(self._first_user, number_B, side="right") - 1
        block_B, place_B = np.divmod(
            number_B - self._first_user[shard_B], self.dataset.block_users
        )
        order = np.lexsort((block_B, shard_B))
        shard_B, block_B, place_B = shard_B[order], block_B[order], place_B[order]
        starts = np.flatnonzero(
            np.diff(shard_B, prepend=-1) | np.diff(block_B, prepend=-1)
        ).tolist()
        histories, read = [], []
        for begin, end in pairwise([*starts, len(order)]):
            shard = int(shard_B[begin])
            block = self._block(
                shard, int(block_B[begin]), home is None or shard in home
            )
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
        items, ticks = zip(
            *(histories[place] for place in np.argsort(read_B).tolist()), strict=True
        )
        lengths_B = np.fromiter(map(len, items), np.int64, len(items))
        return Users(
            number_B[np.sort(read_B)],
            lengths_B,
            np.concatenate(items),
            np.concatenate(ticks),
        )

    def close(self):
        """Lets all files go."""
        for file in self._files.values():
            file.close()
        self._blocks, self._files = {}, {}

    def _block(self, shard, number, whole):
        """(ends, items, ticks) of a block, where user k's are those from ends[k] to ends[k + 1]; None: it cannot be used."""
        key = shard, number
        if whole and shard not in self._whole:
            self._file(shard, whole)
            self._whole.add(shard)
        if key in self._blocks:
            self._blocks[key] = self._blocks.pop(key)  # the newest now
            return self._blocks[key]
        block = self._file(shard, whole).block(number)
        if block is None:
            return None
        self._blocks[key] = (
            np.concatenate([[0], np.cumsum(block.lengths_B)]),
            block.items_N,
            block.ticks_N,
        )
        return self._blocks[key]

    def _file(self, shard, whole):
        if shard in self._files:
            self._files[shard] = self._files.pop(shard)
            if whole:
                self._files[shard].compare()
        else:
            self._close_oldest(self._most_files - 1)
            self._files[shard] = self._opened(shard, whole)
            self.opened += 1
        return self._files[shard]

    def _opened(self, shard, whole):
        """A shard, for which older ones are closed where the process may have no more."""
        while True:
            try:
                return self._open_shard(
                    self.dataset,
                    self.dataset.shards[shard],
                    self.verify,
                    self.report,
                    whole,
                )
            except NoDescriptors:
                if not self._files:
                    raise
                self._most_files = max(1, len(self._files) // 2)
                self._close_oldest(self._most_files - 1)

    def _close_oldest(self, kept):
        while len(self._files) > kept:
            self._files.pop(next(iter(self._files))).close()


def read_users(plan, epoch, steps, rank, verify=True, report=None):
    """Yields (step, Users) of one rank for the given steps of an epoch; a batch may be empty.

    verify, report: as `ShardFile` has them. Users of damaged blocks are not in their batch.
    """
    histories = Histories.of_plan(plan, verify, report)
    try:
        for step in steps:
            yield (
                step,
                histories.read(
                    plan.users(epoch, step, rank), plan.home_shards(epoch, rank)
                ),
            )
    finally:
        histories.close()
