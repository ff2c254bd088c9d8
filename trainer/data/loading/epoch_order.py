"""The order of one epoch: which user is in which slot. This is where users are shuffled.

An epoch permutes the shards by (seed, epoch) and deals them to the streams, as one deals cards. It
shuffles users within their block. Slot i of the epoch is the next user of stream i mod streams.
Streams differ by a few users in length; a slot past a stream's end stays empty.

An example without shuffling: four shards of 3, 4, 4 and 2 users, blocks of 2 users, 2 streams.

    shard 0    users 0 1 | 2            blocks end at a bar
    shard 1    users 3 4 | 5 6
    shard 2    users 7 8 | 9 10
    shard 3    users 11 12

    stream 0   shards 0 and 2: users  0  1  2  7  8  9 10
    stream 1   shards 1 and 3: users  3  4  5  6 11 12

    slot       0  1  2  3  4  5  6  7  8  9 10 11 12
    stream     0  1  0  1  0  1  0  1  0  1  0  1  0
    user       0  3  1  4  2  5  7  6  8 11  9 12 10

Letters at the end of names: S streams, N shards, K blocks of the epoch, J blocks that are asked
for, U users.
"""

from dataclasses import dataclass

import numpy as np

from trainer.data.counter_rng import RandomStream, permutation, random_bits
from trainer.data.format.dataset import Dataset
from trainer.data.loading.jagged import (
    count_within_rows,
    join_ranges,
    row_begins,
)

_BLOCKS_AT_ONCE = (
    128  # that are shuffled in one go: their bits stay in the cache
)
EMPTY = -1  # in place of the user of an empty slot


@dataclass(frozen=True)
class EpochOrder:
    """The shards and the blocks of an epoch in reading order, stream after stream.

    Shards: shard_N, their numbers; users_N; slot_N, the slot of each one's first user.
    Streams: shards_S and users_S, how many each has; begin_S, users of the streams before it.
    Blocks: shard_K, each one's shard; place_K, its number in that shard; users_K; begin_K, users
    of the blocks before it; first_user_K, the number of its first user.
    slots: up to the last user.
    """

    shard_N: np.ndarray
    users_N: np.ndarray
    slot_N: np.ndarray
    shards_S: np.ndarray
    users_S: np.ndarray
    begin_S: np.ndarray
    shard_K: np.ndarray
    place_K: np.ndarray
    users_K: np.ndarray
    begin_K: np.ndarray
    first_user_K: np.ndarray
    slots: int

    @property
    def streams(self) -> int:
        """How many streams there are."""
        return len(self.users_S)

    def count_users_before(self, slot: int) -> np.ndarray:
        """For each stream, how many of its users come before a slot: int64 (S,).

        In the example of the module's head: 7 slots come before slot 7, of them 4 of stream 0
        and 3 of stream 1.
        """
        stream_S = np.arange(self.streams)
        slots_S = -((stream_S - slot) // self.streams)
        slots_S = np.maximum(0, slots_S)
        return np.minimum(slots_S, self.users_S)

    def find_users(
        self,
        begin: int,
        end: int,
        shuffle: "BlockShuffle | None",
    ) -> np.ndarray:
        """The user in each of the slots begin … end − 1, int64; `EMPTY` where a slot is empty.

        In the example of the module's head, for the slots 4 … 7:

            stream 0, of which users 2 and 3 are meant    block 1 from its position 0, block 2
            stream 1, of which users 2 and 3 are meant    block 1, both positions
            returns                                       [2, 5, 7, 6]

        Blocks that hold such a user are listed stream after stream, then the users of each block,
        and each user is put into its slot.
        """
        first_S = self.begin_S + self.count_users_before(begin)
        last_S = self.begin_S + self.count_users_before(end)
        # Streams that have users there.
        active = np.flatnonzero(first_S < last_S)
        first_S = first_S[active]
        last_S = last_S[active]
        # The blocks that hold them, stream after stream, and the users of each: those at the
        # positions first_J … last_J − 1 of the block.
        first_block_S = np.searchsorted(self.begin_K, first_S, side="right") - 1
        end_block_S = np.searchsorted(self.begin_K, last_S, side="left")
        blocks_S = end_block_S - first_block_S
        block_J = join_ranges(first_block_S, blocks_S)
        begin_J = self.begin_K[block_J]
        first_J = np.repeat(first_S, blocks_S) - begin_J
        first_J = np.maximum(first_J, 0)
        last_J = np.repeat(last_S, blocks_S) - begin_J
        last_J = np.minimum(last_J, self.users_K[block_J])
        users_J = last_J - first_J
        row_U = np.repeat(np.arange(len(block_J)), users_J)
        position_U = join_ranges(first_J, users_J)
        # The slot of each block's position 0, counted from `begin`.
        stream_J = np.repeat(active, blocks_S)
        turn_J = begin_J - self.begin_S[stream_J]
        slot_J = turn_J * self.streams + stream_J - begin
        slot_U = slot_J[row_U] + position_U * self.streams
        if shuffle is not None:
            order_JP = shuffle.order_blocks(self, block_J)
            position_U = order_JP[row_U, position_U]
        first_user_J = self.first_user_K[block_J]
        users = np.full(end - begin, EMPTY)
        users[slot_U] = first_user_J[row_U] + position_U
        return users


def order_epoch(
    dataset: Dataset,
    seed: int,
    epoch: int,
    shuffle: bool,
) -> EpochOrder:
    """Deals an epoch's shards to the streams. shuffle: in another order each epoch.

    In the example of the module's head:

        shard_N    [0, 2,  1, 3]              users_N         [3, 4, 4, 2]
        slot_N     [0, 6,  1, 9]              shards_S        [2, 2]
        users_S    [7, 6]                     begin_S         [0, 7]
        shard_K    [0, 0, 2, 2,  1, 1, 3]     place_K         [0, 1, 0, 1,  0, 1, 0]
        users_K    [2, 1, 2, 2,  2, 2, 2]     first_user_K    [0, 2, 7, 9,  3, 5, 11]
        begin_K    [0, 2, 3, 5,  7, 9, 11]    slots           13
    """
    streams = dataset.streams
    block_users = dataset.block_users
    shards = len(dataset.shards)
    shard_users = np.array([shard.users for shard in dataset.shards])
    shard_first_user = np.array([shard.first_user for shard in dataset.shards])
    cards = np.arange(shards)
    if shuffle:
        cards = permutation(shards, seed, RandomStream.SHARD_ORDER, epoch)
    hands = [cards[stream::streams] for stream in range(streams)]
    shard_N = np.concatenate(hands)
    shards_S = np.array([len(hand) for hand in hands])
    stream_N = np.repeat(np.arange(streams), shards_S)
    users_N = shard_users[shard_N]
    users_S = np.bincount(stream_N, weights=users_N, minlength=streams)
    users_S = users_S.astype(np.int64)
    begin_S = row_begins(users_S)
    turn_N = row_begins(users_N) - begin_S[stream_N]

    blocks_N = -(-users_N // block_users)
    shard_K = np.repeat(shard_N, blocks_N)
    place_K = count_within_rows(blocks_N)
    # Users of the shard that come before the block.
    passed_K = place_K * block_users
    users_K = np.minimum(block_users, shard_users[shard_K] - passed_K)

    last_slot_S = np.arange(streams) + (users_S - 1) * streams
    return EpochOrder(
        shard_N=shard_N,
        users_N=users_N,
        slot_N=turn_N * streams + stream_N,
        shards_S=shards_S,
        users_S=users_S,
        begin_S=begin_S,
        shard_K=shard_K,
        place_K=place_K,
        users_K=users_K,
        begin_K=row_begins(users_K),
        first_user_K=shard_first_user[shard_K] + passed_K,
        slots=int(last_slot_S[users_S > 0].max()) + 1,
    )


class BlockShuffle:
    """Shuffles the users of blocks: a permutation for each (seed, epoch, shard, block).

    It keeps the last blocks of a call: a stream's next users are in that block, or begin another.
    """

    def __init__(
        self,
        seed: int,
        epoch: int,
        block_users: int,
    ):
        self.epoch = epoch
        self._seed = seed
        self._block_users = block_users
        self._last_orders: dict[int, np.ndarray] = {}

    def order_blocks(
        self, order: EpochOrder, block_J: np.ndarray
    ) -> np.ndarray:
        """Which user of its block is at each position of it: int32 (J, block_users).

        The end of a shorter block's row says nothing.
        """
        if len(block_J) == 0:
            self._last_orders = {}
            return np.zeros((0, self._block_users), np.int32)
        new_blocks = []
        for block in block_J.tolist():
            if block not in self._last_orders:
                new_blocks.append(block)
        known = self._shuffle(order, np.array(new_blocks, np.int64))
        known |= self._last_orders
        orders = {block: known[block] for block in block_J.tolist()}
        self._last_orders = {}
        ends_run = np.diff(block_J, append=-1) != 1  # of blocks of one stream
        for block in block_J[ends_run].tolist():
            self._last_orders[block] = orders[block]
        return np.stack(list(orders.values()))

    def _shuffle(
        self, order: EpochOrder, block_J: np.ndarray
    ) -> dict[int, np.ndarray]:
        """The order of each of these blocks."""
        orders = {}
        positions = np.arange(self._block_users)[None]
        for begin in range(0, len(block_J), _BLOCKS_AT_ONCE):
            block_C = block_J[begin : begin + _BLOCKS_AT_ONCE]
            # Bits of one block all differ: the mixer is a bijection. So any kind of sort
            # gives the same.
            shard_C1 = order.shard_K[block_C, None]
            place_C1 = order.place_K[block_C, None]
            bits_CP = random_bits(
                self._seed,
                RandomStream.USER_ORDER,
                self.epoch,
                shard_C1,
                place_C1,
                positions,
            )
            order_CP = np.argsort(bits_CP, axis=1).astype(np.int32)
            for block, order_P in zip(block_C.tolist(), order_CP, strict=True):
                # Not a view, which would keep them all.
                orders[block] = order_P.copy()
        short = order.users_K[block_J] < self._block_users
        for block in block_J[short].tolist():
            users = int(order.users_K[block])
            orders[block][:users] = permutation(
                users,
                self._seed,
                RandomStream.USER_ORDER,
                self.epoch,
                int(order.shard_K[block]),
                int(order.place_K[block]),
            )
        return orders
