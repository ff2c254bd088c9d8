"""Batches from shards: the same users in batch s of an epoch for any number of ranks, each user once an epoch.

A dataset has a fixed number of logical streams. An epoch permutes the shards by (seed, epoch) and deals them to the
streams; slot i of the epoch is the next user of stream i mod streams, and batch s is the slots of
[s · global_batch_size, (s + 1) · global_batch_size). Rank r owns the streams r, r + world_size, …: which users a batch
holds does not depend on the ranks, and the position in the data is one integer, the step. Streams differ by a few users
in length; a slot past a stream's end stays empty, and users of weight zero make all ranks' batches equally many users. So
does the slot of a user whose block is damaged and skipped: everyone else keeps theirs.
"""

import gc
import signal
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from syncrec.batch import Batch, build_batch, trim
from trainer.data.dataset import SPLIT_LENGTH, Dataset
from trainer.data.negatives import NegativesConfig, shared_negatives, target_negatives
from trainer.data.random import permutation
from trainer.data.shards import read_blocks
from trainer.errors import InputError

_SHARDS, _USERS = 1, 2  # separate the uses of one seed
_HELD_OUT = 2  # the newest interactions of a user: validation, test


@dataclass(frozen=True)
class StreamConfig:
    """How shards become batches."""

    workers: int = 1  # decoding processes a rank; 0: in the training process itself
    prefetch: int = 4  # batches that each worker keeps ready
    verify: bool = True  # check each shard's checksum when it is opened, and each block's when it is read
    damaged: Literal["stop", "skip"] = "stop"  # skip: train without the users of damaged blocks, and count them
    shuffle: bool = True  # another order each epoch; off: the dataset's own order, each epoch alike

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"stream.workers is {self.workers}: give 0 or more")
        if self.prefetch < 1:
            raise ValueError(f"stream.prefetch is {self.prefetch}: give at least 1")


@dataclass(frozen=True)
class Users:
    """Some users' whole histories, jagged: numbers (B), lengths (B), rows of M (N), all int64, oldest first."""

    number_B: np.ndarray
    lengths_B: np.ndarray
    items_N: np.ndarray


class Plan:
    """Who is in which batch. Needs the dataset's counts only, no shard."""

    def __init__(self, dataset: Dataset, global_batch_size: int, world_size: int, seed: int, shuffle: bool = True):
        if world_size > dataset.streams:
            raise InputError(
                f"{world_size} ranks, but {dataset.folder} has {dataset.streams} streams: use at most as many ranks, or "
                f"prepare again with --streams {world_size} or more"
            )
        if world_size > global_batch_size:
            raise InputError(f"global_batch_size={global_batch_size} is below the number of ranks, {world_size}: raise it")
        self.dataset, self.batch_size, self.world_size = dataset, global_batch_size, world_size
        self.seed, self.shuffle = seed, shuffle
        self._lengths, self._steps = {}, {}
        self._stream = np.arange(dataset.streams)
        self._shard_users = np.array([shard.users for shard in dataset.shards])

    def shards(self, epoch):
        """The shard numbers of each stream, in reading order: a list of arrays."""
        count = len(self._shard_users)
        order = permutation(count, self.seed, _SHARDS, epoch) if self.shuffle else np.arange(count)
        return [order[stream :: self.dataset.streams] for stream in self._stream]

    def lengths(self, epoch):
        """The users of each stream, int64 (streams,)."""
        if epoch not in self._lengths:
            self._lengths[epoch] = np.array([self._shard_users[shards].sum() for shards in self.shards(epoch)], np.int64)
        return self._lengths[epoch]

    def steps(self, epoch):
        """Batches of the epoch: the same on every rank."""
        if epoch not in self._steps:
            users = self.lengths(epoch)
            last_slot = int((self._stream + (users - 1) * self.dataset.streams)[users > 0].max())
            self._steps[epoch] = last_slot // self.batch_size + 1
        return self._steps[epoch]

    def locate(self, position):
        """The (epoch, step of the epoch) of a position counted in batches from the start of the run."""
        epoch = 0
        while position >= (steps := self.steps(epoch)):
            position, epoch = position - steps, epoch + 1
        return epoch, position

    def first_user(self, step):
        """For each stream, how many of its users come before batch `step`."""
        return np.maximum(0, -((self._stream - step * self.batch_size) // self.dataset.streams))

    def users_per_rank(self, step):
        """The users that the rank with most of them has in the batch; the others are filled up to it."""
        slots = self.first_user(step + 1) - self.first_user(step)
        return int(np.bincount(self._stream % self.world_size, weights=slots).max())


    def users(self, epoch, step, rank):
        """How many users the rank has in the batch, as long as every shard can be read."""
        first, last = (np.minimum(self.first_user(number), self.lengths(epoch)) for number in (step, step + 1))
        return int((last - first)[rank :: self.world_size].sum())


def read_users(plan, epoch, steps, rank, verify=True, report=None):
    """Yields (step, Users) of one rank for the given increasing steps of an epoch; a batch may be empty.

    verify, report: as `read_blocks` has them. Users of damaged blocks are not in their batch.
    """
    owned = range(rank, plan.dataset.streams, plan.world_size)
    shards = plan.shards(epoch)
    streams = {stream: _StreamReader(plan, epoch, shards[stream], verify, report) for stream in owned}
    for step in steps:
        begin, end = plan.first_user(step), plan.first_user(step + 1)
        parts = []
        for stream in owned:
            parts += streams[stream].take(int(begin[stream]), int(end[stream]))
        yield step, Users(*(_join(part) for part in zip(*parts, strict=True))) if parts else _NOBODY


_NOBODY = Users(*(np.zeros(0, np.int64) for _ in range(3)))


def _join(arrays):
    return np.concatenate(arrays).astype(np.int64)


class _StreamReader:
    """One stream's users in order, with a cheap way past those that are not wanted."""

    def __init__(self, plan, epoch, shards, verify, report):
        self._blocks = self._read(plan, epoch, shards, verify, report)
        self._first = self._end = 0  # the stream's users that the current block holds
        self._skip_to = 0

    def take(self, begin, end):
        """Users begin … end of the stream as a list of (numbers, lengths, items): fewer where it ends, or has gaps."""
        parts, self._skip_to = [], begin
        while begin < end:
            if begin >= self._end:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._first, self._numbers, self._lengths, self._offsets, self._items = block
                self._end = self._first + len(self._numbers)
                continue
            low, high = max(begin, self._first) - self._first, min(end, self._end) - self._first
            if low < high:  # else all of them come before the block: skipped
                items = self._items[self._offsets[low] : self._offsets[high]]
                parts.append((self._numbers[low:high], self._lengths[low:high], items))
            begin = self._first + high
        return parts

    def _read(self, plan, epoch, shards, verify, report):
        first = 0  # the stream's users before the shard
        for number in shards:
            shard = plan.dataset.shards[number]
            if first + shard.users > self._skip_to:
                for block in read_blocks(plan.dataset, shard, verify, report):
                    before = int(block.users_B[0]) - shard.first_user
                    if first + before + len(block.users_B) > self._skip_to:
                        place = before // plan.dataset.block_users
                        yield first + before, *_shuffled(plan, epoch, number, place, block)
            first += shard.users


def _shuffled(plan, epoch, shard, place, block):
    """A block's users in this epoch's order: numbers, lengths, offsets, items."""
    lengths = block.lengths_B.astype(np.int64)
    if not plan.shuffle:
        return block.users_B, lengths, np.concatenate([[0], np.cumsum(lengths)]), block.items_N
    order = permutation(len(lengths), plan.seed, _USERS, epoch, shard, place)
    starts, lengths = (np.cumsum(lengths) - lengths)[order], lengths[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    item = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return block.users_B[order], lengths, offsets, block.items_N[item]


@dataclass(frozen=True)
class Fed:
    """One step of one rank: its batch, and who is missing in it.

    users_B: numbers of the batch's real users, int64, in order. skipped: users that would be there too if they could be
    read. reasons: a line for each damaged place that this worker met for the first time since its last Fed; several
    workers read the same shards, so another may say the same.
    """

    batch: Batch
    users_B: np.ndarray
    skipped: int
    reasons: tuple[str, ...]

    def pin_memory(self):
        """The same with the batch in pinned memory (a DataLoader calls this)."""
        return replace(self, batch=self.batch.pin_memory())


class Reasons:
    """What was skipped and why, each line once; called with a line (see `read_blocks`)."""

    def __init__(self):
        self._known, self._new = set(), []

    def __call__(self, line):
        if line not in self._known:
            self._known.add(line)
            self._new.append(line)

    def take(self) -> tuple[str, ...]:
        """The lines since the last call."""
        taken, self._new = tuple(self._new), []
        return taken


class TrainBatches(torch.utils.data.IterableDataset):
    """What one rank is fed (Fed) from a position on, epoch after epoch, without end.

    Worker w of n builds every n-th batch, so that each arrives whole; reading what the other workers build is cheap
    beside building it.
    """

    def __init__(self, plan, rank, position, max_length, pooling, negatives: NegativesConfig, config: StreamConfig):
        super().__init__()
        self.plan, self.rank, self.position = plan, rank, position
        self.max_length, self.pooling, self.negatives, self.config = max_length, pooling, negatives, config

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        position = self.position + offset
        reasons = Reasons()
        report = reasons if self.config.damaged == "skip" else None
        while True:
            epoch, first = self.plan.locate(position)
            steps = range(first, self.plan.steps(epoch), stride)
            for step, users in read_users(self.plan, epoch, steps, self.rank, self.config.verify, report):
                skipped = self.plan.users(epoch, step, self.rank) - len(users.number_B)
                yield Fed(self.build(epoch, step, users), users.number_B, skipped, reasons.take())
            position += stride * len(steps)

    def build(self, epoch, step, users) -> Batch:
        """One rank's batch: training part, weight-zero users, negatives, both views."""
        dataset, seed = self.plan.dataset, self.plan.seed
        lengths_B = np.where(users.lengths_B >= SPLIT_LENGTH, users.lengths_B - _HELD_OUT, users.lengths_B)
        items_N, position_N, user_N = training_part(users, lengths_B)
        missing = self.plan.users_per_rank(step) - len(lengths_B)
        if missing:  # two interactions with the first item: one input, one target, weight zero
            lengths_B = np.append(lengths_B, np.full(missing, 2))
            items_N, user_N = np.append(items_N, np.zeros(2 * missing, np.int64)), np.append(user_N, np.zeros(2 * missing))
            position_N = np.append(position_N, np.tile([0, 1], missing))
        weight_B = (np.arange(len(lengths_B)) < len(lengths_B) - missing).astype(np.float32)
        domain_N = dataset.domain_of(items_N)
        numbered_N = np.arange(len(items_N))
        kept_N, lengths_B, domain_N = trim(numbered_N, lengths_B, domain_N, self.max_length)
        items_N, position_N, user_N = items_N[kept_N], position_N[kept_N], user_N[kept_N].astype(np.int64)
        items_D = np.array([domain.items for domain in dataset.domains])
        if self.negatives.shared:
            negatives = shared_negatives(seed, epoch, step, dataset.starts, items_D, self.negatives.shared)
        else:
            negatives = target_negatives(
                seed, epoch, user_N, position_N, items_N, domain_N, dataset.starts, items_D, self.negatives.per_target
            )
        return build_batch(items_N, lengths_B, domain_N, weight_B, negatives, items_D, self.max_length, self.pooling)


def training_part(users, lengths_B):
    """The first lengths_B interactions of each user: rows, place in the history, user number, each (N,)."""
    place = np.arange(len(users.items_N)) - np.repeat(np.cumsum(users.lengths_B) - users.lengths_B, users.lengths_B)
    keep = place < np.repeat(lengths_B, users.lengths_B)
    return users.items_N[keep], place[keep], np.repeat(users.number_B, lengths_B)


def ready(batches, config: StreamConfig, pin_memory: bool):
    """Yields what `batches` (an IterableDataset) builds, in order, built ahead in worker processes.

    pin_memory: for asynchronous copies to a CUDA device. Raises InputError as the worker did.
    """
    loader = torch.utils.data.DataLoader(
        _Guarded(batches),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )
    for batch in loader:
        if isinstance(batch, _Refusal):
            raise InputError(batch.reason, one_rank=True)
        yield batch


@dataclass(frozen=True)
class _Refusal:
    reason: str


class _Guarded(torch.utils.data.IterableDataset):
    """Hands an InputError over as a value: raised in a worker, it would arrive as a trace."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __iter__(self):
        try:
            yield from self.batches
        except InputError as error:
            yield _Refusal(str(error))


def _start_worker(_worker):
    # What the forked process inherits is not its own to collect: a process group that is garbage waits, when it is taken
    # away, for threads that only its maker has.
    gc.freeze()
    torch.set_num_threads(1)
    # A launcher that stops a run asks every process of it; the trainer still needs what is built to reach its checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
