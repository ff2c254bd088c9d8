"""Who is in which batch, and on which rank: computed from a dataset's facts and its users' lengths, without any shard.

A dataset has a fixed number of logical streams. An epoch permutes the shards by (seed, epoch), deals them to the streams and
shuffles users within their block; slot i of the epoch is the next user of stream i mod streams. A batch is a range of slots:
global_batch_size of them, or as many as `tokens_per_batch` allows. Streams differ by a few users in length; a slot past a
stream's end stays empty. Nothing of this depends on the ranks, and the position in the data is one integer, the step.

Rank r is the home of the streams r, r + world_size, …; `balance.py` moves some users to other ranks, so that all have equally
much to do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainer.data.counter_rng import RandomStream, permutation, random_bits
from trainer.data.format.dataset import Dataset
from trainer.data.loading.token_balance import balanced, view_tokens
from trainer.errors import InputError

_CHUNK_SLOTS = 1 << 15  # whose users are found in one go
_KEPT_CHUNKS, _KEPT_EPOCHS = 2, 2
_UNLIMITED = 2**31 - 1


class Plan:
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
        """max_length: tokens of a sequence at most. tokens_per_batch: interactions of the training part, a user's newest
        max_length, that a batch may hold; 0: no limit. balance: even out what the ranks have to do; else each user stays on
        its home rank.

        Raises InputError where there are more ranks than streams, users or tokens for them.
        """
        if world_size > dataset.streams:
            raise InputError(
                f"{world_size} ranks, but {dataset.place} has {dataset.streams} streams: use at most as many ranks, or "
                f"prepare again with --streams {world_size} or more, best a multiple of the ranks"
            )
        if world_size > global_batch_size:
            raise InputError(
                f"global_batch_size={global_batch_size} is below the number of ranks, {world_size}: raise it"
            )
        if 0 < tokens_per_batch < world_size * max_length:
            raise InputError(
                f"tokens_per_batch={tokens_per_batch} is below what one user of full length takes on each rank, {world_size} x "
                f"model.max_length={max_length}: raise it to {world_size * max_length} or more, or use fewer ranks"
            )
        self.dataset, self.batch_size, self.world_size = (
            dataset,
            global_batch_size,
            world_size,
        )
        self.seed, self.shuffle, self.max_length = seed, shuffle, max_length
        self.tokens_per_batch, self.balance = tokens_per_batch, balance
        self._stream = np.arange(dataset.streams)
        self._shard_users = np.array([shard.users for shard in dataset.shards])
        self._shard_first_user = np.array(
            [shard.first_user for shard in dataset.shards]
        )
        self._steps, self._bounds, self._orders = {}, {}, {}
        self._chunks, self._shuffled, self._home_shards = {}, (None, {}), {}

    def steps(self, epoch):
        """Batches of the epoch: the same on every rank."""
        if epoch not in self._steps:
            if self.tokens_per_batch:
                self._bounds[epoch] = self._walk(epoch)
                self._steps[epoch] = len(self._bounds[epoch]) - 1
            else:
                self._steps[epoch] = -(-self._order(epoch).slots // self.batch_size)
        return self._steps[epoch]

    def count_steps(
        self,
        epochs: int,
        rank: int = 0,
        sum_of_ranks: Callable[[np.ndarray], np.ndarray] | None = None,
        most: int = 0,
    ) -> int:
        """Batches of so many epochs, `most` at most (0: no limit).

        Where tokens limit a batch, an epoch has to be walked through to know its batches. With `sum_of_ranks`, the sum of int64
        (N,) over all ranks, which then all call this, each walks through every W-th epoch, and tells the others.
        """
        total = 0
        for first in range(0, epochs, self.world_size):
            numbers = range(first, min(first + self.world_size, epochs))
            if (
                self.tokens_per_batch
                and self.world_size > 1
                and sum_of_ranks is not None
            ):
                self._walk_together(numbers, rank, sum_of_ranks)
            total += sum(self.steps(epoch) for epoch in numbers)
            if 0 < most <= total:
                return most
        return total

    def locate(self, position):
        """The (epoch, step of the epoch) of a position counted in batches from the start of the run."""
        epoch = 0
        while position >= (steps := self.steps(epoch)):
            position, epoch = position - steps, epoch + 1
        return epoch, position

    def batch(self, epoch, step):
        """Everyone in a batch, in the order of its slots: (user numbers, streams), both int64 (B,)."""
        begin, end = self._slots(epoch, step)
        users = self._users(epoch, begin, end)
        there = users >= 0
        return users[there], np.arange(begin, end)[there] % self.dataset.streams

    def ranks(self, epoch, step):
        """`batch` with the rank that each user is on: (user numbers, home ranks, ranks), all int64 (B,)."""
        users_B, stream_B = self.batch(epoch, step)
        turn_B, home_B = np.divmod(stream_B, self.world_size)
        if self.world_size == 1 or not self.balance:
            return users_B, home_B, home_B
        return (
            users_B,
            home_B,
            balanced(home_B, self.tokens(users_B), self.world_size, turn_B),
        )

    def users(self, epoch, step, rank):
        """The numbers of the users that a rank has in a batch, int64, in the order of the batch's slots."""
        users_B, _, rank_B = self.ranks(epoch, step)
        return users_B[rank_B == rank]

    def users_per_rank(self, epoch, step):
        """How many users the rank with most of them has in a batch, at least 1; the others are filled up to it."""
        begin, end = (
            np.minimum(self._before(slot), self._order(epoch).users_S)
            for slot in self._slots(epoch, step)
        )
        users_S = end - begin
        if self.balance:
            return max(1, -(-int(users_S.sum()) // self.world_size))
        return max(
            1, int(np.bincount(self._stream % self.world_size, weights=users_S).max())
        )

    def shards(self, epoch):
        """The shard numbers of each stream, in reading order: a list of arrays."""
        return np.split(
            self._order(epoch).shard_N, np.cumsum(self._order(epoch).shards_S)[:-1]
        )

    def home_shards(self, epoch: int, rank: int) -> frozenset[int]:
        """The numbers of the shards of the streams that a rank is the home of, in an epoch."""
        key = epoch, rank
        if key not in self._home_shards:
            while len(self._home_shards) >= _KEPT_EPOCHS:
                del self._home_shards[next(iter(self._home_shards))]
            streams = self.shards(epoch)[rank :: self.world_size]
            self._home_shards[key] = frozenset(
                shard for stream in streams for shard in stream.tolist()
            )
        return self._home_shards[key]

    def next_shards(self, epoch, step, rank):
        """The names of the shards that the rank's own streams begin after a batch, in this epoch and the next, in the order in
        which it will need them."""
        _, end = self._slots(epoch, step)
        names = []
        for number, after in ((epoch, end), (epoch + 1, 0)):
            order = self._order(number)
            stream_N = np.repeat(self._stream, order.shards_S)
            users_N = self._shard_users[order.shard_N]
            slot_N = (
                np.cumsum(users_N) - users_N - order.begin_S[stream_N]
            ) * self.dataset.streams + stream_N
            later = np.flatnonzero(
                (stream_N % self.world_size == rank) & (slot_N >= after)
            )
            names += [
                self.dataset.shards[shard].name
                for shard in order.shard_N[later[np.argsort(slot_N[later])]]
            ]
        return names

    def tokens(self, users_B):
        """Tokens of both views of the given users, as ranks are balanced by."""
        return view_tokens(self.dataset.lengths[users_B], self.max_length)

    def _slots(self, epoch, step):
        """The first slot of a batch and the first one after it."""
        if not self.tokens_per_batch:
            return step * self.batch_size, (step + 1) * self.batch_size
        self.steps(epoch)
        return tuple(map(int, self._bounds[epoch][step : step + 2]))

    def _before(self, slot):
        """For each stream, how many of its users come before a slot."""
        return np.maximum(0, -((self._stream - slot) // self.dataset.streams))

    def _walk(self, epoch):
        """Where batches of limited tokens begin: the first slot of each and the end, int64."""
        limit, slots = self.tokens_per_batch, self._order(epoch).slots
        bounds = [0]
        tokens = users = 0  # of the batch that a chunk before has begun
        for first in range(0, slots, _CHUNK_SLOTS):
            users_C = self._found(epoch, first, min(first + _CHUNK_SLOTS, slots))
            slot_C = np.flatnonzero(users_C >= 0)
            tokens_C = self.dataset.lengths[users_C[slot_C]].sum(1, dtype=np.int32)
            sums_C = np.concatenate(
                [[0], np.cumsum(np.minimum(tokens_C, self.max_length), dtype=np.int64)]
            )
            place = 0
            while True:
                end = (
                    int(
                        np.searchsorted(
                            sums_C, sums_C[place] + limit - tokens, side="right"
                        )
                    )
                    - 1
                )
                end = min(end, place + self.batch_size - users)
                if end == place and not users:
                    end += 1  # one user always fits
                if end >= len(slot_C):
                    tokens, users = (
                        tokens + int(sums_C[-1] - sums_C[place]),
                        users + len(slot_C) - place,
                    )
                    break
                bounds.append(first + int(slot_C[end]))
                place, tokens, users = end, 0, 0
        return np.array([*bounds, slots])

    def _walk_together(self, epochs, rank, sum_of_ranks):
        """Has the ranks walk through an epoch each, at most as many as there are."""
        place = rank if rank < len(epochs) else None
        bounds = np.zeros(0, np.int64) if place is None else self._walk(epochs[place])
        sizes_E = np.zeros(len(epochs), np.int64)
        if place is not None:
            sizes_E[place] = len(bounds)
        ends_E = np.cumsum(sum_of_ranks(sizes_E))
        begins_E = np.concatenate([[0], ends_E[:-1]])
        bounds_N = np.zeros(ends_E[-1], np.int64)
        if place is not None:
            bounds_N[begins_E[place] : ends_E[place]] = bounds
        bounds_N = sum_of_ranks(bounds_N)
        for epoch, begin, end in zip(epochs, begins_E, ends_E, strict=True):
            self._bounds[epoch] = bounds_N[begin:end]
            self._steps[epoch] = int(end - begin) - 1

    def _users(self, epoch, begin, end):
        """The user in each of the slots begin … end − 1, int64; −1 where a slot is empty."""
        parts = []
        for number in range(begin // _CHUNK_SLOTS, -(-end // _CHUNK_SLOTS)):
            first, key = number * _CHUNK_SLOTS, (epoch, number)
            if key not in self._chunks:
                while len(self._chunks) >= _KEPT_CHUNKS:
                    del self._chunks[next(iter(self._chunks))]
                self._chunks[key] = self._found(epoch, first, first + _CHUNK_SLOTS)
            parts.append(self._chunks[key][max(0, begin - first) : end - first])
        return np.concatenate(parts)

    def _found(self, epoch, begin, end):
        """`_users` without a memory."""
        order, streams = self._order(epoch), self.dataset.streams
        first_S, last_S = (
            order.begin_S + np.minimum(self._before(slot), order.users_S)
            for slot in (begin, end)
        )
        own = np.flatnonzero(first_S < last_S)
        first_S, last_S = first_S[own], last_S[own]
        # The blocks that hold them, stream after stream, and the range of places in each.
        low_S = np.searchsorted(order.begin_K, first_S, side="right") - 1
        count_S = np.searchsorted(order.begin_K, last_S, side="left") - low_S
        block = np.repeat(low_S - np.cumsum(count_S) + count_S, count_S) + np.arange(
            int(count_S.sum())
        )
        first_K = np.maximum(np.repeat(first_S, count_S) - order.begin_K[block], 0)
        last_K = np.minimum(
            np.repeat(last_S, count_S) - order.begin_K[block], order.users_K[block]
        )
        places_K = last_K - first_K
        row = np.repeat(np.arange(len(block)), places_K)
        place = np.arange(len(row)) + np.repeat(
            first_K - np.cumsum(places_K) + places_K, places_K
        )
        stream_K = np.repeat(own, count_S)
        slot_K = (
            (order.begin_K[block] - order.begin_S[stream_K]) * streams
            + stream_K
            - begin
        )  # of the block's place 0
        found = np.full(end - begin, -1)
        shuffled = (
            self._orders_of(epoch, order, block)[row, place] if self.shuffle else place
        )
        found[slot_K[row] + place * streams] = order.first_user_K[block][row] + shuffled
        return found

    def _orders_of(self, epoch, order, block_K):
        """How each block's users are shuffled: int32 (K, block_users); the end of a shorter block's row says nothing.

        Blocks of the last call are kept: a stream's next users are in the block of those before, or begin another.
        """
        kept = self._shuffled[1] if self._shuffled[0] == epoch else {}
        numbers = block_K.tolist()
        new = np.array([number for number in numbers if number not in kept], np.int64)
        rows = {}
        for part in (
            np.array_split(new, -(-len(new) // 128)) if len(new) else ()
        ):  # bits that stay in the cache
            shard, place = (of_K[part, None] for of_K in (order.shard_K, order.place_K))
            # Bits of one block all differ: the mixer is a bijection. So any kind of sort gives the same.
            bits = random_bits(
                self.seed,
                RandomStream.USER_ORDER,
                epoch,
                shard,
                place,
                np.arange(self.dataset.block_users)[None],
            )
            rows |= zip(
                part.tolist(),
                map(np.copy, np.argsort(bits, axis=1).astype(np.int32)),
                strict=True,
            )
        for number in new[order.users_K[new] < self.dataset.block_users].tolist():
            users = int(order.users_K[number])
            rows[number][:users] = permutation(
                users,
                self.seed,
                RandomStream.USER_ORDER,
                epoch,
                int(order.shard_K[number]),
                int(order.place_K[number]),
            )
        here = {
            number: rows[number] if number in rows else kept[number]
            for number in numbers
        }
        last = [
            number
            for number, after in zip(numbers, [*numbers[1:], -1], strict=False)
            if after != number + 1
        ]
        self._shuffled = epoch, {number: here[number] for number in last}
        return (
            np.stack(list(here.values()))
            if here
            else np.zeros((0, self.dataset.block_users), np.int32)
        )

    def _order(self, epoch):
        """The epoch's blocks in order."""
        if epoch not in self._orders:
            count, streams, block_users = (
                len(self._shard_users),
                self.dataset.streams,
                self.dataset.block_users,
            )
            dealt = (
                permutation(count, self.seed, RandomStream.SHARD_ORDER, epoch)
                if self.shuffle
                else np.arange(count)
            )
            of_stream = [dealt[stream::streams] for stream in self._stream]
            shards = np.concatenate(of_stream)
            users_S = np.array(
                [self._shard_users[own].sum() for own in of_stream], np.int64
            )
            blocks = -(-self._shard_users[shards] // block_users)
            shard_K = np.repeat(shards, blocks)
            place_K = np.arange(len(shard_K)) - np.repeat(
                np.cumsum(blocks) - blocks, blocks
            )
            users_K = np.minimum(
                block_users, self._shard_users[shard_K] - place_K * block_users
            )
            while len(self._orders) >= _KEPT_EPOCHS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = _Order(
                shard_N=shards,
                shards_S=np.array([len(own) for own in of_stream]),
                users_S=users_S,
                begin_S=np.cumsum(users_S) - users_S,
                shard_K=shard_K,
                place_K=place_K,
                users_K=users_K,
                begin_K=np.cumsum(users_K) - users_K,
                first_user_K=self._shard_first_user[shard_K] + place_K * block_users,
                slots=int((self._stream + (users_S - 1) * streams)[users_S > 0].max())
                + 1,
            )
        return self._orders[epoch]


@dataclass(frozen=True)
class _Order:
    """An epoch: S streams one after the other, of N shards and K blocks in all. users, shards: how many; begin: how many users
    come before in this order; shard, place: a block's shard and place in it; first_user: the number of its first user. slots:
    those up to the last user."""

    shard_N: np.ndarray
    shards_S: np.ndarray
    users_S: np.ndarray
    begin_S: np.ndarray
    shard_K: np.ndarray
    place_K: np.ndarray
    users_K: np.ndarray
    begin_K: np.ndarray
    first_user_K: np.ndarray
    slots: int
