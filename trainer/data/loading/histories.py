"""Reading users' histories by their numbers, out of blocks of shards.

Blocks that are needed again are kept decoded (a cache that drops the oldest, LRU).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from syncrec.batch import compiled
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import ShardFile
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.files.open_files import TooManyOpenFiles, open_file_budget

_FOREIGN_BLOCKS = 64  # kept beside those of a rank's own streams
_OPEN_FILES = 256  # fewer where the process may have few


@dataclass(frozen=True)
class UserHistories:
    """Some users' whole histories, jagged, oldest first.

    number_B: the users' numbers, int64. lengths_B: int64. items_N: rows of the item matrix M,
    int32. ticks_N: when, uint16. Four users, items of two domains at the rows 0–4 and 8–11:

        number_B    [7,           3,    9,       5]
        lengths_B   [4,           2,    3,       1]
        items_N     [0, 9, 1, 2,  9, 8, 3, 9, 4, 11]
        ticks_N     [5, 6, 8, 9,  0, 7, 1, 1, 2, 4]
    """

    number_B: np.ndarray
    lengths_B: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


NO_USERS = UserHistories(
    number_B=np.zeros(0, np.int64),
    lengths_B=np.zeros(0, np.int64),
    items_N=np.zeros(0, np.int32),
    ticks_N=np.zeros(0, np.uint16),
)


@dataclass(frozen=True)
class _DecodedBlock:
    """A block's histories: user k's are those from bounds[k] to bounds[k + 1].

    int64, int32 and uint16. PyTorch takes no memory that may not be written.
    """

    bounds: np.ndarray
    items_N: np.ndarray
    ticks_N: np.ndarray


class Histories:
    """Reads users, in any order.

    The newest blocks stay decoded and the newest shards open, as many as `blocks` says.
    """

    def __init__(
        self,
        dataset: Dataset,
        blocks: int,
        verify: bool = True,
        report: Callable[[str], None] | None = None,
        open_shard: Callable[..., ShardFile] = ShardFile,
    ):
        """blocks: at least as many as hold the users of one `read` and of the next.

        With fewer, blocks are decoded again. verify, report: as `ShardFile` has them. open_shard:
        what opens a shard.
        """
        self.dataset = dataset
        self.verify = verify
        self.report = report
        self.opened = 0  # shards, so far
        self._room = blocks
        self._blocks: dict[tuple[int, int], _DecodedBlock] = {}
        self._files: dict[int, ShardFile] = {}
        self._compared: set[int] = set()  # shards whose whole file has been
        self._open_shard = open_shard
        self._most_files = open_file_budget(_OPEN_FILES)
        first_users = [shard.first_user for shard in dataset.shards]
        self._first_user = np.array(first_users)

    @classmethod
    def of_schedule(
        cls,
        plan: BatchSchedule,
        verify: bool = True,
        report: Callable[[str], None] | None = None,
        open_shard: Callable[..., ShardFile] = ShardFile,
    ) -> "Histories":
        """Reads one rank's users of a batch schedule.

        Each of the rank's own streams has a current block and a next one. Where users are moved
        between ranks, some blocks of other streams are met again.
        """
        streams = plan.dataset.streams
        own_streams = -(-streams // plan.world_size)
        foreign_blocks = 0
        if plan.balance:
            foreign_blocks = min(streams - own_streams, _FOREIGN_BLOCKS)
        blocks = 2 * own_streams + foreign_blocks
        return cls(plan.dataset, blocks, verify, report, open_shard)

    def read(
        self, number_B: np.ndarray, home: Collection[int] | None = None
    ) -> UserHistories:
        """These users (int64 numbers), in this order, without those of damaged blocks.

        home: the shards whose files are compared with their sha256 before anything is read of
        them; None: all. The other shards are compared by other ranks; of these each block is
        compared with its CRC-32 alone. Raises InputError as `ShardFile` does.
        """
        shard_B, block_B, place_B = self._locate(number_B)
        order = np.lexsort((block_B, shard_B))
        shard_B = shard_B[order]
        block_B = block_B[order]
        new_shard = np.diff(shard_B, prepend=-1)
        new_block = np.diff(block_B, prepend=-1)
        starts = np.flatnonzero(new_shard | new_block).tolist()
        blocks: list[_DecodedBlock] = []
        source_B = np.full(len(order), -1)
        for begin, end in pairwise([*starts, len(order)]):
            shard = int(shard_B[begin])
            at_home = home is None or shard in home
            block_number = int(block_B[begin])
            block = self._read_block(shard, block_number, at_home)
            if block is not None:
                source_B[order[begin:end]] = len(blocks)
                blocks.append(block)
        self._drop_blocks()
        is_read_B = source_B >= 0
        if not is_read_B.any():
            return NO_USERS
        lengths_B, items_N, ticks_N = _gather(
            blocks, source_B[is_read_B], place_B[is_read_B]
        )
        return UserHistories(
            number_B=number_B[is_read_B],
            lengths_B=lengths_B,
            items_N=items_N,
            ticks_N=ticks_N,
        )

    def _locate(
        self, number_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The shard of each user, its block there, and its place in the block: int64 (B,).

        Two shards of 4 users each in blocks of 2 users:

            number_B    [7, 3, 2]
            shard_B     [1, 0, 0]
            block_B     [1, 1, 1]
            place_B     [1, 1, 0]
        """
        shards_begun_B = np.searchsorted(
            self._first_user,
            number_B,
            side="right",
        )
        shard_B = shards_begun_B - 1
        in_shard_B = number_B - self._first_user[shard_B]
        block_B, place_B = np.divmod(in_shard_B, self.dataset.block_users)
        return shard_B, block_B, place_B

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._blocks = {}
        self._files = {}

    def _read_block(
        self,
        shard: int,
        number: int,
        compare: bool,
    ) -> _DecodedBlock | None:
        """A block; None where it cannot be used. compare: the whole file first."""
        key = (shard, number)
        if compare and shard not in self._compared:
            self._get_file(shard, compare)
            self._compared.add(shard)
        if key in self._blocks:
            self._blocks[key] = self._blocks.pop(key)  # the newest now
            return self._blocks[key]
        block = self._get_file(shard, compare).block(number)
        if block is None:
            return None
        ends_B = np.cumsum(block.lengths_B)
        self._blocks[key] = _DecodedBlock(
            bounds=np.concatenate([[0], ends_B]),
            items_N=np.require(block.items_N, np.int32, "W"),
            ticks_N=np.require(block.ticks_N, np.uint16, "W"),
        )
        return self._blocks[key]

    def _drop_blocks(self) -> None:
        while len(self._blocks) > self._room:
            oldest = next(iter(self._blocks))
            del self._blocks[oldest]

    def _get_file(self, shard: int, compare: bool) -> ShardFile:
        if shard in self._files:
            file = self._files.pop(shard)
            self._files[shard] = file  # the newest now
            if compare:
                file.compare()
            return file
        self._close_oldest(self._most_files - 1)
        file = self._open_file(shard, compare)
        self._files[shard] = file
        self.opened += 1
        return file

    def _open_file(self, shard: int, compare: bool) -> ShardFile:
        """Opens a shard, and closes older ones where the process may have no more."""
        while True:
            try:
                return self._open_shard(
                    self.dataset,
                    self.dataset.shards[shard],
                    self.verify,
                    self.report,
                    compare,
                )
            except TooManyOpenFiles:
                if not self._files:
                    raise
                self._most_files = max(1, len(self._files) // 2)
                self._close_oldest(self._most_files - 1)

    def _close_oldest(self, room: int) -> None:
        while len(self._files) > room:
            oldest = next(iter(self._files))
            self._files.pop(oldest).close()


def _gather(
    blocks: list[_DecodedBlock], source_B: np.ndarray, place_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`compiled.gather_histories`, and what stands for it where there is no compiler."""
    if not compiled.why_missing():
        arrays = []
        for block in blocks:
            arrays.append((block.bounds, block.items_N, block.ticks_N))
        return compiled.gather_histories(arrays, source_B, place_B)
    items = []
    ticks = []
    for source, place in zip(source_B.tolist(), place_B.tolist(), strict=True):
        block = blocks[source]
        history = slice(block.bounds[place], block.bounds[place + 1])
        items.append(block.items_N[history])
        ticks.append(block.ticks_N[history])
    return (
        np.fromiter(map(len, items), np.int64, len(items)),
        np.concatenate(items),
        np.concatenate(ticks),
    )


def read_users(
    plan: BatchSchedule,
    epoch: int,
    steps: Iterable[int],
    rank: int,
    verify: bool = True,
    report: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, UserHistories]]:
    """Yields (step, Users) of one rank for these steps of an epoch; a batch may be empty.

    verify, report: as `ShardFile` has them. Users of damaged blocks are not in their batch.
    """
    histories = Histories.of_schedule(plan, verify, report)
    try:
        for step in steps:
            number_B = plan.users(epoch, step, rank)
            home = plan.home_shards(epoch, rank)
            users = histories.read(number_B, home)
            yield step, users
    finally:
        histories.close()
