"""The batch schedule (a distributed batch sampler): who is in each batch, and on which rank.

It is computed from the dataset's description and its users' lengths, without any shard. A dataset
has a fixed number of logical streams, whose users take turns in the slots of an epoch
(`epoch_order.py`, where users are shuffled). A batch is a range of slots: global_batch_size of
them, or as many as `tokens_per_batch` allows. Nothing of this depends on the number of ranks, and
the position in the data is one integer, the step: a run resumes anywhere, on any ranks.

Rank r is the home of the streams r, r + world_size, …; `token_balance.py` moves some users to other
ranks, so that all have equally much to do.

An example: 13 users in 2 streams, without shuffling; global_batch_size 4, 2 ranks.

    slot       0  1  2  3 |  4  5  6  7 |  8  9 10 11 | 12
    stream     0  1  0  1 |  0  1  0  1 |  0  1  0  1 |  0
    user       0  3  1  4 |  2  5  7  6 |  8 11  9 12 | 10
    home rank  0  1  0  1 |  0  1  0  1 |  0  1  0  1 |  0
    batch           0     |      1      |      2      |  3

    users(epoch=0, step=1, rank=0)   [2, 7], where no user is moved

The last batch has one user. Rank 1 has none, and fills its batch up with users of weight 0.
"""

from collections.abc import Callable, Sequence

import numpy as np

from trainer.config.run import RunConfig
from trainer.data.format.dataset import Dataset
from trainer.data.loading.epoch_order import (
    BlockShuffle,
    EpochOrder,
    order_epoch,
)
from trainer.data.loading.token_balance import balance_tokens, count_view_tokens
from trainer.errors import InputError

_CHUNK_SLOTS = 1 << 15  # whose users are computed in one go
_KEPT_CHUNKS = 2
_KEPT_EPOCHS = 2
_UNLIMITED = 2**31 - 1


class BatchSchedule:
    """The batches of every epoch and rank."""

    def __init__(
        self,
        dataset: Dataset,
        global_batch_size: int,
        world_size: int,
        seed: int,
        shuffle: bool = True,
        *,
        max_length: int = _UNLIMITED,
        tokens_per_batch: int = 0,
        balance: bool = True,
    ):
        """max_length: tokens of a sequence at most.

        tokens_per_batch: how many interactions of the training part a batch may hold, of each user
        the newest max_length; 0: no limit. balance: even out what the ranks have to do. Else each
        user stays on its home rank.

        Raises InputError where there are more ranks than streams, users or tokens for them.
        """
        if world_size > dataset.streams:
            raise InputError(
                f"{world_size} ranks, but {dataset.place} has {dataset.streams} streams: "
                "use at most as many ranks, or prepare again with "
                f"--streams {world_size} or more, best a multiple of the ranks"
            )
        if world_size > global_batch_size:
            raise InputError(
                f"global_batch_size={global_batch_size} is below the number of ranks, "
                f"{world_size}: raise it"
            )
        least_tokens = world_size * max_length
        if 0 < tokens_per_batch < least_tokens:
            raise InputError(
                f"tokens_per_batch={tokens_per_batch} is below what one user of full length "
                f"takes on each rank, {world_size} x model.max_length={max_length}: raise it "
                f"to {least_tokens} or more, or use fewer ranks"
            )
        self.dataset = dataset
        self.batch_size = global_batch_size
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.max_length = max_length
        self.tokens_per_batch = tokens_per_batch
        self.balance = balance
        self._steps: dict[int, int] = {}
        self._first_slots: dict[
            int, np.ndarray
        ] = {}  # of batches of limited tokens
        self._orders: dict[int, EpochOrder] = {}
        self._chunks: dict[tuple[int, int], np.ndarray] = {}
        self._home_shards: dict[tuple[int, int], frozenset[int]] = {}
        self._block_shuffle: BlockShuffle | None = None

    @classmethod
    def of_run(
        cls, config: RunConfig, dataset: Dataset, world_size: int
    ) -> "BatchSchedule":
        """The schedule of a training on so many ranks."""
        return cls(
            dataset,
            config.global_batch_size,
            world_size,
            config.seed,
            config.stream.shuffle,
            max_length=config.model.max_length,
            tokens_per_batch=config.tokens_per_batch,
            balance=config.stream.balance,
        )

    def steps(self, epoch: int) -> int:
        """Batches of the epoch: the same on every rank.

        In the example of the module's head: 13 slots, 4 a batch, 4 batches.
        """
        if epoch not in self._steps:
            if self.tokens_per_batch:
                first_slots = self._cut_by_tokens(epoch)
                self._first_slots[epoch] = first_slots
                self._steps[epoch] = len(first_slots) - 1
            else:
                order = self._order(epoch)
                steps = _divide_up(order.slots, self.batch_size)
                self._steps[epoch] = steps
        return self._steps[epoch]

    def count_steps(
        self,
        epochs: int,
        rank: int = 0,
        sum_of_ranks: Callable[[np.ndarray], np.ndarray] | None = None,
        most: int = 0,
    ) -> int:
        """Batches of so many epochs, `most` at most (0: no limit).

        Where tokens limit a batch, only a walk through an epoch tells its batches. `sum_of_ranks`
        gives the sum of int64 (N,) over all ranks, which then all call this. With it each rank
        walks through every W-th epoch and tells the others.
        """
        sum_of_cuts = None
        if self.tokens_per_batch > 0 and self.world_size > 1:
            sum_of_cuts = sum_of_ranks
        total = 0
        for first in range(0, epochs, self.world_size):
            end = min(first + self.world_size, epochs)
            numbers = range(first, end)
            if sum_of_cuts is not None:
                self._cut_together(numbers, rank, sum_of_cuts)
            for epoch in numbers:
                total += self.steps(epoch)
            if 0 < most <= total:
                return most
        return total

    def locate(self, position: int) -> tuple[int, int]:
        """The (epoch, step of the epoch) of a position counted in batches from the run's start.

        With 4 batches an epoch:

            position    0       3       4       9
            returns     0, 0    0, 3    1, 0    2, 1
        """
        epoch = 0
        step = position
        steps = self.steps(epoch)
        while step >= steps:
            step -= steps
            epoch += 1
            steps = self.steps(epoch)
        return epoch, step

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Everyone in a batch, in the order of its slots: (user numbers, streams), int64 (B,).

        In the example of the module's head, batch 1 is

            user numbers    [2, 5, 7, 6]
            streams         [0, 1, 0, 1]
        """
        begin, end = self._slots(epoch, step)
        user_T = self._users_of_slots(epoch, begin, end)
        slot_T = np.arange(begin, end)
        stream_T = slot_T % self.dataset.streams
        taken_T = user_T >= 0
        return user_T[taken_T], stream_T[taken_T]

    def ranks(
        self, epoch: int, step: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`batch` with the rank of each user: (user numbers, home ranks, ranks), int64 (B,).

        In the example of the module's head, batch 1 is

            user numbers    [2, 5, 7, 6]
            home ranks      [0, 1, 0, 1]
            ranks           [0, 1, 0, 1]    or others, where users are moved to balance tokens
        """
        users_B, stream_B = self.batch(epoch, step)
        turn_B, home_B = np.divmod(stream_B, self.world_size)
        if self.world_size == 1 or not self.balance:
            return users_B, home_B, home_B
        tokens_B = self.tokens(users_B)
        rank_B = balance_tokens(
            home_B,
            tokens_B,
            self.world_size,
            turn_B,
        )
        return users_B, home_B, rank_B

    def users(
        self,
        epoch: int,
        step: int,
        rank: int,
    ) -> np.ndarray:
        """The numbers of a rank's users in a batch, int64, in the order of the batch's slots.

        In the example of the module's head, of batch 1:

            rank 0     [2, 7]
            rank 1     [5, 6]
        """
        users_B, _, rank_B = self.ranks(epoch, step)
        is_own_B = rank_B == rank
        return users_B[is_own_B]

    def users_per_rank(self, epoch: int, step: int) -> int:
        """How many users the rank with most of them has in a batch, at least 1.

        The other ranks are filled up to it. In the example of the module's head it is 2 in the
        batches 0 … 2, and 1 in batch 3, where rank 1 has nobody.
        """
        order = self._order(epoch)
        begin, end = self._slots(epoch, step)
        before_S = order.count_users_before(begin)
        users_S = order.count_users_before(end) - before_S
        if self.balance:
            users = int(users_S.sum())
            most = _divide_up(users, self.world_size)
        else:
            home_S = np.arange(self.dataset.streams) % self.world_size
            users_W = np.bincount(home_S, weights=users_S)
            most = int(users_W.max())
        return max(1, most)

    def shards(self, epoch: int) -> list[np.ndarray]:
        """The shard numbers of each stream, in reading order.

        shard_N     [0, 2, 1, 3]
        shards_S    [2, 2]
        returns     [0, 2], [1, 3]
        """
        order = self._order(epoch)
        ends_S = np.cumsum(order.shards_S)
        return np.split(order.shard_N, ends_S[:-1])

    def home_shards(self, epoch: int, rank: int) -> frozenset[int]:
        """The numbers of the shards of a rank's own streams in an epoch."""
        key = (epoch, rank)
        if key not in self._home_shards:
            streams = self.shards(epoch)
            own_streams = streams[rank :: self.world_size]
            shards = np.concatenate(own_streams).tolist()
            _drop_oldest(self._home_shards, _KEPT_EPOCHS)
            self._home_shards[key] = frozenset(shards)
        return self._home_shards[key]

    def next_shards(
        self,
        epoch: int,
        step: int,
        rank: int,
    ) -> list[str]:
        """The names of the shards that a rank's own streams begin after a batch.

        Those of this epoch and of the next one, in the order in which the rank will need them.
        """
        _, end = self._slots(epoch, step)
        names = self._list_shards_after(epoch, end, rank)
        names += self._list_shards_after(epoch + 1, 0, rank)
        return names

    def _list_shards_after(
        self,
        epoch: int,
        slot: int,
        rank: int,
    ) -> list[str]:
        """The names of a rank's shards whose first user has this slot or a later one.

        Two streams of two shards each, for rank 0 of 2 from slot 4 on:

            shard_N     [0, 2, 1, 3]
            slot_N      [0, 6, 1, 9]
            stream_N    [0, 0, 1, 1]
            by_slot     [1]             so the name of shard 2
        """
        order = self._order(epoch)
        streams = np.arange(self.dataset.streams)
        stream_N = np.repeat(streams, order.shards_S)
        own_N = stream_N % self.world_size == rank
        later_N = order.slot_N >= slot
        later = np.flatnonzero(own_N & later_N)
        in_order = np.argsort(order.slot_N[later])
        by_slot = later[in_order]
        shards = order.shard_N[by_slot].tolist()
        return [self.dataset.shards[shard].name for shard in shards]

    def tokens(self, users_B: np.ndarray) -> np.ndarray:
        """Tokens of both views of these users, by which ranks are balanced: int64 (B,)."""
        lengths_BD = self.dataset.lengths[users_B]
        return count_view_tokens(lengths_BD, self.max_length)

    def _slots(self, epoch: int, step: int) -> tuple[int, int]:
        """The first slot of a batch and the first one after it."""
        if not self.tokens_per_batch:
            begin = step * self.batch_size
            # A batch may be larger than the epoch: only slots that there are, are computed.
            end = min(begin + self.batch_size, self._order(epoch).slots)
            return begin, max(begin, end)
        self.steps(epoch)
        first_slots = self._first_slots[epoch]
        begin, end = first_slots[step : step + 2].tolist()
        return begin, end

    def _cut_by_tokens(self, epoch: int) -> np.ndarray:
        """Cuts an epoch into batches of limited tokens: each one's first slot, and the end; int64.

        A batch takes the next users as long as their tokens fit, and one user in any case. At
        most 10 tokens a batch:

            slot       0  1  2  3  4  5  6
            tokens     4  5  –  6  2  1  9     slot 2 is empty
            batch      0  0  0  1  1  1  2
            returns    [0, 3, 6, 7]

        Chunks of slots come one after the other, so that an epoch need not fit into memory; a batch
        goes on from one chunk to the next.
        """
        slots = self._order(epoch).slots
        first_slots = [0]
        # What the batch has of the chunks before this one.
        batch_tokens = 0
        batch_users = 0
        for chunk_begin in range(0, slots, _CHUNK_SLOTS):
            chunk_end = min(chunk_begin + _CHUNK_SLOTS, slots)
            user_T = self._compute_users(epoch, chunk_begin, chunk_end)
            slot_C = np.flatnonzero(user_T >= 0)
            sums_C = self._sum_tokens(user_T[slot_C])
            first = 0  # of the chunk's users that is in the batch
            while True:
                room = self.tokens_per_batch - batch_tokens
                limit = sums_C[first] + room
                above = np.searchsorted(sums_C, limit, side="right")
                most_users = self.batch_size - batch_users
                end = min(int(above) - 1, first + most_users)
                if end == first and batch_users == 0:
                    end += 1  # one user always fits
                if end >= len(slot_C):
                    batch_tokens += int(sums_C[-1] - sums_C[first])
                    batch_users += len(slot_C) - first
                    break
                first_slots.append(chunk_begin + int(slot_C[end]))
                first = end
                batch_tokens = 0
                batch_users = 0
        first_slots.append(slots)
        return np.array(first_slots)

    def _sum_tokens(self, users_C: np.ndarray) -> np.ndarray:
        """Tokens of the first 0, 1, … C of these users together: int64 (C + 1,).

        With max_length 5:

            lengths_CD  [[3, 0], [2, 9], [0, 1]]
            tokens_C    [3, 5, 1]
            returns     [0, 3, 8, 9]
        """
        lengths_CD = self.dataset.lengths[users_C]
        lengths_C = lengths_CD.sum(1, dtype=np.int32)
        tokens_C = np.minimum(lengths_C, self.max_length)
        sums_C = np.cumsum(tokens_C, dtype=np.int64)
        return np.concatenate([[0], sums_C])

    def _cut_together(
        self,
        epochs: Sequence[int],
        rank: int,
        sum_of_ranks: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Has each rank cut one of these epochs, at most as many as there are ranks.

        Ranks exchange the cuts by sums: each adds its own to zeros of the others.

            cuts of rank 0    [0, 3, 6, 7]    of epochs[0]
            cuts of rank 1    [0, 4, 7]       of epochs[1]
            sizes_E           [4, 3]
            all_cuts          [0, 3, 6, 7, 0, 4, 7]
        """
        cuts = np.zeros(0, np.int64)
        sizes_E = np.zeros(len(epochs), np.int64)
        takes_part = rank < len(epochs)
        if takes_part:
            cuts = self._cut_by_tokens(epochs[rank])
            sizes_E[rank] = len(cuts)
        sizes_E = sum_of_ranks(sizes_E)
        ends_E = np.cumsum(sizes_E)
        begins_E = np.concatenate([[0], ends_E[:-1]])
        all_cuts = np.zeros(ends_E[-1], np.int64)
        if takes_part:
            begin = begins_E[rank]
            end = ends_E[rank]
            all_cuts[begin:end] = cuts
        all_cuts = sum_of_ranks(all_cuts)
        for epoch, begin, end in zip(epochs, begins_E, ends_E, strict=True):
            self._first_slots[epoch] = all_cuts[begin:end]
            self._steps[epoch] = int(end - begin) - 1

    def _users_of_slots(
        self,
        epoch: int,
        begin: int,
        end: int,
    ) -> np.ndarray:
        """The user in each of the slots begin … end − 1, int64; −1 where a slot is empty."""
        first_chunk = begin // _CHUNK_SLOTS
        end_chunk = _divide_up(end, _CHUNK_SLOTS)
        parts = []
        for chunk in range(first_chunk, end_chunk):
            first = chunk * _CHUNK_SLOTS
            key = (epoch, chunk)
            if key not in self._chunks:
                _drop_oldest(self._chunks, _KEPT_CHUNKS)
                end_of_chunk = first + _CHUNK_SLOTS
                users = self._compute_users(epoch, first, end_of_chunk)
                self._chunks[key] = users
            users = self._chunks[key]
            first_wanted = max(0, begin - first)
            parts.append(users[first_wanted : end - first])
        return np.concatenate(parts)

    def _compute_users(
        self,
        epoch: int,
        begin: int,
        end: int,
    ) -> np.ndarray:
        """`_users_of_slots` without a memory."""
        order = self._order(epoch)
        if not self.shuffle:
            return order.find_users(begin, end, None)
        if self._block_shuffle is None or self._block_shuffle.epoch != epoch:
            block_users = self.dataset.block_users
            self._block_shuffle = BlockShuffle(self.seed, epoch, block_users)
        return order.find_users(begin, end, self._block_shuffle)

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            _drop_oldest(self._orders, _KEPT_EPOCHS)
            self._orders[epoch] = order_epoch(
                self.dataset, self.seed, epoch, self.shuffle
            )
        return self._orders[epoch]


def _divide_up(amount: int, size: int) -> int:
    """amount / size, rounded up."""
    return -(-amount // size)


def _drop_oldest(cache: dict, room: int) -> None:
    """Makes room for one more entry of `room`."""
    while len(cache) >= room:
        oldest = next(iter(cache))
        del cache[oldest]
