"""What each rank is fed: batches built ahead by worker processes, which the plan says who is in."""

import gc
import math
import signal
import time
from dataclasses import dataclass, is_dataclass, replace

import numpy as np
import torch

from syncrec.batch.build import Batch, build_batch, trim, without_look_up
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import MEASURED, StreamConfig
from trainer.data.format.dataset import SPLIT_LENGTH
from trainer.data.format.shards import codec
from trainer.data.loading.batch_schedule import Plan
from trainer.data.loading.histories import NO_USERS, Histories
from trainer.data.loading.mutual_information_sample import draw_candidates
from trainer.data.loading.negative_sampling import shared_negatives, target_negatives
from trainer.data.loading.worker_handover import (
    Packed,
    Packer,
    refuse_small_shared_memory,
    unpack,
)
from trainer.distributed.resources import keep_freed_memory
from trainer.errors import InputError

_FEW_DOMAINS = 24
_HELD_OUT = 2  # the newest interactions of a user: validation, test
_WARM_UP, _MEASURED_STEPS = 5, 20  # steps that do not count, and those that do
_SPARE = 1.25  # worker processes beside what the mean asks for: batches differ, and so does the machine


@dataclass(frozen=True)
class Fed:
    """One step of one rank: its batch, and who is missing in it.

    users_B: numbers of the batch's real users, int64, in order; those without an interaction of `stream.domain` are not
    counted in the batch. skipped: users that would be there too if they could be
    read. reasons: a line for each damaged place that this worker met for the first time since its last Fed; several
    workers read the same shards, so another may say the same. seconds: what reading and building took.
    """

    batch: Batch
    users_B: np.ndarray
    skipped: int
    reasons: tuple[str, ...]
    seconds: float = 0.0

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

    def __init__(
        self,
        plan: Plan,
        rank: int,
        position: int,
        max_length: int,
        pooling: str,
        negatives: NegativesConfig,
        config: StreamConfig,
        candidates: int = 0,
    ):
        """candidates: the users a domain that stand for all of a batch with more users (SC-MIM); 0: all users do."""
        super().__init__()
        self.candidates = candidates
        self.plan, self.rank, self.position = plan, rank, position
        self.max_length, self.pooling, self.negatives, self.config = (
            max_length,
            pooling,
            negatives,
            config,
        )
        self.alone = (
            plan.dataset.domain_number(config.domain) if config.domain else None
        )

    def at(self, position) -> "TrainBatches":
        """The same from another position on."""
        options = (
            self.max_length,
            self.pooling,
            self.negatives,
            self.config,
            self.candidates,
        )
        return TrainBatches(self.plan, self.rank, position, *options)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        position, stride = (
            (self.position + worker.id, worker.num_workers)
            if worker
            else (self.position, 1)
        )
        reasons = Reasons()
        histories = Histories.of_plan(
            self.plan,
            self.config.verify,
            reasons if self.config.damaged == "skip" else None,
        )
        known = 0
        try:
            while True:
                begun = time.perf_counter()
                epoch, step = self.plan.locate(position)
                wanted_B = self.plan.users(epoch, step, self.rank)
                users = histories.read(
                    wanted_B, self.plan.home_shards(epoch, self.rank)
                )
                if (
                    histories.opened > known
                ):  # what comes after these may have to be fetched
                    known = histories.opened
                    self.plan.dataset.ahead(
                        self.plan.next_shards(epoch, step, self.rank)
                    )
                batch, skipped = (
                    self.build(epoch, step, users),
                    len(wanted_B) - len(users.number_B),
                )
                yield Fed(
                    batch,
                    users.number_B,
                    skipped,
                    reasons.take(),
                    time.perf_counter() - begun,
                )
                position += stride
        finally:
            histories.close()

    def build(self, epoch, step, users) -> Batch:
        """One rank's batch: training part, weight-zero users, negatives, both views.

        Who only fills up has two interactions, one input and one target, with a row that the batch looks up anyway: an
        optimizer like Adam moves each row that is looked up, whatever its gradient. Where there is none, nothing is.
        """
        dataset, seed = self.plan.dataset, self.plan.seed
        number_B, lengths_B, place_N, position_N = training_part(
            dataset, users, self.config.domain
        )
        items_N, ticks_N = users.items_N[place_N], users.ticks_N[place_N]
        items_D = np.array([domain.items for domain in dataset.domains])
        shared = None
        if self.negatives.shared:
            shared = shared_negatives(
                seed, epoch, step, dataset.starts, items_D, self.negatives.shared
            )
            if self.alone is not None:  # nothing of the others is predicted
                shared = [
                    rows if number == self.alone else rows[:0]
                    for number, rows in enumerate(shared)
                ]
        looked_up = items_N if shared is None else np.concatenate([items_N, *shared])
        filler = (
            looked_up[-1] if len(looked_up) else 0
        )  # the newest of the last user, which is not trimmed
        missing = max(0, self.plan.users_per_rank(epoch, step) - len(lengths_B))
        real_B = np.arange(len(lengths_B) + missing) < len(lengths_B)
        whole_B = lengths_B
        lengths_B = np.append(lengths_B, np.full(missing, 2))
        items_N = np.append(items_N, np.full(2 * missing, filler, items_N.dtype))
        ticks_N = np.append(ticks_N, np.zeros(2 * missing, ticks_N.dtype))
        kept_N, lengths_B, domain_N = trim(
            np.arange(len(items_N)),
            lengths_B,
            domains_of(dataset, items_N),
            self.max_length,
        )
        items_N, ticks_N = items_N[kept_N], ticks_N[kept_N]
        negatives = shared
        if negatives is None:
            real = (
                len(kept_N) - 2 * missing
            )  # those that fill up come last, and are not trimmed
            drawn = target_negatives(
                seed,
                epoch,
                np.repeat(number_B, whole_B)[kept_N[:real]],
                position_N[kept_N[:real]],
                items_N[:real],
                domain_N[:real],
                dataset.starts,
                items_D,
                self.negatives.per_target,
            )
            negatives = np.concatenate(
                [drawn, np.full((2 * missing, self.negatives.per_target), filler)]
            )
        weight_B = real_B.astype(np.float32)
        batch = build_batch(
            items_N,
            lengths_B,
            domain_N,
            weight_B,
            negatives,
            items_D,
            self.max_length,
            self.pooling,
            ticks_N,
        )
        batch = replace(batch, candidates=self._candidates(epoch, step, number_B))
        return batch if len(looked_up) else without_look_up(batch)

    def _candidates(self, epoch, step, number_B):
        """This rank's part of those who stand for all users of the step; None where all stand for themselves."""
        if not self.candidates:
            return None
        users_U, _ = self.plan.batch(epoch, step)
        if len(users_U) <= self.candidates:
            return None
        lengths_UD = self.plan.dataset.lengths[users_U]
        return draw_candidates(
            self.plan.seed, epoch, step, users_U, lengths_UD, number_B, self.candidates
        )


def training_part(dataset, users, domain=""):
    """What is trained on: (number_B, lengths_B, place_N, position_N), all int64, user after user.

    Users, how many interactions each has, and where these are: among all of `users`, and in the user's history. domain: its
    interactions alone, and users who have any.
    """
    lengths_B = np.where(
        users.lengths_B >= SPLIT_LENGTH, users.lengths_B - _HELD_OUT, users.lengths_B
    )
    user_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    position_N = np.arange(len(user_N)) - np.repeat(
        np.cumsum(lengths_B) - lengths_B, lengths_B
    )
    place_N = position_N + np.repeat(
        np.cumsum(users.lengths_B) - users.lengths_B, lengths_B
    )
    if not domain:
        return users.number_B, lengths_B, place_N, position_N
    own_N = domains_of(dataset, users.items_N[place_N]) == dataset.domain_number(domain)
    lengths_B = np.bincount(user_N[own_N], minlength=len(lengths_B))
    some_B = lengths_B > 0
    return users.number_B[some_B], lengths_B[some_B], place_N[own_N], position_N[own_N]


def domains_of(dataset, items_N):
    """`Dataset.domain_of`, quicker for a few domains."""
    if len(dataset.starts) > _FEW_DOMAINS:
        return dataset.domain_of(items_N)
    domain_N = np.zeros(len(items_N), np.int8)
    for start in dataset.starts[1:].astype(items_N.dtype):
        domain_N += items_N >= start
    return domain_N


class Feed:
    """What one rank is fed, step after step, built ahead by worker processes.

    Where their number is to be measured it begins with one. After some steps there are as many as it takes to build a batch,
    and a quarter more, while a step computes; the loader then begins anew where training is. Any number builds the same.
    """

    def __init__(self, batches: TrainBatches, pin_memory: bool, cores: int):
        """cores: those that this rank may use for itself, and so the most workers that are measured to be needed."""
        self._batches, self._pin_memory, self._cores = (
            batches,
            pin_memory,
            max(1, cores),
        )
        self._measures, self._build, self._compute = (
            batches.config.workers == MEASURED,
            [],
            [],
        )
        self.position, self.workers = (
            batches.position,
            1 if self._measures else batches.config.workers,
        )
        self._begin()

    def __next__(self) -> Fed:
        """Raises InputError as a worker did."""
        fed = next(self._stream)
        self.position += 1
        if self._measures:
            self._build.append(fed.seconds)
        return fed

    def without_users(self) -> Fed:
        """In place of the next step's batch, where that cannot be had: one in which this rank only takes part."""
        plan = self._batches.plan
        epoch, step = plan.locate(self.position)
        self.position += 1
        nobody = np.zeros(0, np.int64)
        return Fed(self._batches.build(epoch, step, NO_USERS), nobody, 0, ())

    def computed(self, seconds):
        """Called after each step with the seconds that it computed. Returns a line to log where the number of workers
        follows from them, else None."""
        if not self._measures:
            return None
        self._compute.append(seconds)
        if len(self._compute) < _WARM_UP + _MEASURED_STEPS:
            return None
        self._measures = False
        build, compute = (
            sum(taken[_WARM_UP:][:_MEASURED_STEPS]) / _MEASURED_STEPS
            for taken in (self._build, self._compute)
        )
        needed = workers_needed(build, compute)
        found = f"a batch takes {build:.3g} s to build and a step {compute:.3g} s: {needed} worker processes a rank"
        if needed > self._cores:
            found += f", of which {self._cores} are started for want of cores: training will wait for data"
        if min(needed, self._cores) > self.workers:
            self._stream.close()
            self.workers = min(needed, self._cores)
            self._begin()
        return found

    def close(self):
        """Ends the workers."""
        self._stream.close()

    def _begin(self):
        self._stream = ready(
            self._batches.at(self.position),
            self._batches.config,
            self._pin_memory,
            self.workers,
        )


def workers_needed(build_seconds, step_seconds):
    """How many processes build batches as fast as steps take them, with something to spare."""
    return max(1, math.ceil(_SPARE * build_seconds / max(step_seconds, 1e-9)))


def ready(batches, config: StreamConfig, pin_memory: bool, workers: int | None = None):
    """Yields what `batches` (an IterableDataset) builds, in order, built ahead in worker processes.

    pin_memory: for asynchronous copies to a CUDA device. workers: how many, where it is not the config that says so; one
    where that leaves it to be measured. Raises InputError as the worker did.
    """
    if workers is None:
        workers = 1 if config.workers == MEASURED else config.workers
    codec()  # loaders are forked: they share what is loaded here
    loader = torch.utils.data.DataLoader(
        _Guarded(batches),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=config.prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )
    looked_at = not workers
    for batch in loader:
        if isinstance(batch, _Refusal):
            raise InputError(batch.reason, one_rank=True)
        if not looked_at and isinstance(batch, Packed):
            refuse_small_shared_memory(
                len(batch.piece), workers, config.prefetch, batches.plan.world_size
            )
            looked_at = True
        yield unpack(batch) if isinstance(batch, Packed) else batch


@dataclass(frozen=True)
class _Refusal:
    reason: str


class _Guarded(torch.utils.data.IterableDataset):
    """Hands over in one piece what a worker builds, and an InputError as a value: raised, it would arrive as a trace."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __iter__(self):
        pack = Packer(shared=torch.utils.data.get_worker_info() is not None)
        try:
            for batch in self.batches:
                yield pack(batch) if is_dataclass(batch) else batch
        except InputError as error:
            yield _Refusal(str(error))


def _start_worker(_worker):
    # What the forked process inherits is not its own to collect: a process group that is garbage waits, when it is taken
    # away, for threads that only its maker has.
    gc.freeze()
    torch.set_num_threads(1)
    keep_freed_memory()
    # A launcher that stops a run asks every process of it; the trainer still needs what is built to reach its checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
