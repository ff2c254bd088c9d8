"""The data loader: each rank's batches, built ahead by worker processes (prefetch).

    BatchSchedule ──▶ TrainBatches ──▶ worker processes ──▶ BatchFeed ──▶ the training loop
    who is in which    reads users,     pack each batch       one RankBatch
    batch and on       builds batches   in one piece of       a step
    which rank                          shared memory

Worker w of n builds every n-th batch. `worker_handover.py` draws how a batch comes to the trainer.

Letters at the end of names: B users, N interactions, D domains, U users of the batch of all ranks.
"""

import gc
import math
import signal
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from syncrec.batch import compiled
from syncrec.batch.build import build_batch, trim
from syncrec.batch.views import Batch, Candidates, drop_lookup
from trainer.config.negatives import NegativesConfig
from trainer.config.stream import MEASURED, StreamConfig
from trainer.data.format.dataset import Dataset
from trainer.data.format.shards import zstd_codec
from trainer.data.loading.batch_schedule import BatchSchedule
from trainer.data.loading.histories import NO_USERS, Histories, UserHistories
from trainer.data.loading.jagged import (
    count_within_rows,
    join_ranges,
    row_begins,
)
from trainer.data.loading.mutual_information_sample import draw_candidates
from trainer.data.loading.negative_sampling import (
    draw_shared_negatives,
    draw_target_negatives,
)
from trainer.data.loading.worker_handover import (
    BatchPacker,
    PackedBatch,
    refuse_small_shared_memory,
    unpack,
)
from trainer.distributed.resources import keep_freed_memory
from trainer.errors import InputError

_FEW_DOMAINS = 24
_FILLER_LENGTH = (
    2  # interactions of a user that only fills up: one input, one target
)
_WARM_UP = 5  # steps that do not count
_MEASURED_STEPS = 20
# Worker processes beside what the mean asks for: batches differ, and so does the machine.
_SPARE = 1.25


@dataclass(frozen=True)
class RankBatch:
    """One step of one rank: its batch, and who is missing in it.

    users_B: numbers of the batch's real users, int64, in order. Those without an interaction in the
    training part, or of `stream.domain`, are not counted in the batch. skipped: users that would be
    there too if they could be read. reasons: a line for each damaged place that this worker met for
    the first time since its last batch; several workers read the same shards, so another may say
    the same. seconds: what reading and building took.
    """

    batch: Batch
    users_B: np.ndarray
    skipped: int
    reasons: tuple[str, ...]
    seconds: float = 0.0

    def pin_memory(self) -> "RankBatch":
        """The same with the batch in pinned memory (a DataLoader calls this)."""
        return replace(self, batch=self.batch.pin_memory())


class DamageLog:
    """What was skipped and why, each line once; called with a line (see `read_blocks`)."""

    def __init__(self):
        self._known: set[str] = set()
        self._new: list[str] = []

    def __call__(self, line: str) -> None:
        if line not in self._known:
            self._known.add(line)
            self._new.append(line)

    def take(self) -> tuple[str, ...]:
        """The lines since the last call."""
        lines = tuple(self._new)
        self._new = []
        return lines


class TrainBatches(torch.utils.data.IterableDataset):
    """One rank's batches from a position on, epoch after epoch, without end.

    Worker w of n builds every n-th batch, so that each arrives whole. Reading what the other
    workers build is cheap beside building it.
    """

    def __init__(
        self,
        plan: BatchSchedule,
        rank: int,
        position: int,
        max_length: int,
        pooling: str,
        negatives: NegativesConfig,
        config: StreamConfig,
        candidates: int = 0,
        accumulation: int = 1,
    ):
        """candidates: the users a domain that stand for all of a larger batch (SC-MIM).

        0: all users do. accumulation: into how many micro-batches a batch is cut.
        """
        super().__init__()
        self.plan = plan
        self.rank = rank
        self.position = position
        self.max_length = max_length
        self.pooling = pooling
        self.negatives = negatives
        self.config = config
        self.candidates = candidates
        self.accumulation = accumulation
        self.only_domain: int | None = None
        if config.domain:
            self.only_domain = plan.dataset.domain_number(config.domain)
        self._drawn_rows = plan.dataset.drawn_rows
        self._items_D = plan.dataset.drawn_items

    def from_position(self, position: int) -> "TrainBatches":
        """The same from another position on."""
        return TrainBatches(
            self.plan,
            self.rank,
            position,
            self.max_length,
            self.pooling,
            self.negatives,
            self.config,
            self.candidates,
            self.accumulation,
        )

    def __iter__(self) -> Iterator[RankBatch]:
        position = self.position
        stride = 1
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            position += worker.id
            stride = worker.num_workers
        reasons = DamageLog()
        report = None
        if self.config.damaged == "skip":
            report = reasons
        histories = Histories.of_schedule(self.plan, self.config.verify, report)
        opened = 0
        try:
            while True:
                begun = time.perf_counter()
                epoch, step = self.plan.locate(position)
                wanted_B = self.plan.users(epoch, step, self.rank)
                home = self.plan.home_shards(epoch, self.rank)
                users = histories.read(wanted_B, home)
                if histories.opened > opened:
                    # What comes after these shards may have to be fetched.
                    opened = histories.opened
                    shards = self.plan.next_shards(epoch, step, self.rank)
                    self.plan.dataset.ahead(shards)
                batch = self.build(epoch, step, users)
                yield RankBatch(
                    batch=batch,
                    users_B=users.number_B,
                    skipped=len(wanted_B) - len(users.number_B),
                    reasons=reasons.take(),
                    seconds=time.perf_counter() - begun,
                )
                position += stride
        finally:
            histories.close()

    def build(
        self,
        epoch: int,
        step: int,
        users: UserHistories,
    ) -> Batch:
        """One rank's batch: training part, filler users of weight zero, negatives, both views.

        A filler user has two interactions, one input and one target, with a row that the batch
        looks up anyway: an optimizer like Adam moves each row that is looked up, whatever its
        gradient. Where there is no such row, nothing is looked up.

        An example: items of two domains at the rows 0–4 and 8–11, three of four users on this
        rank, where the rank with most users of the step has four.

            users           0 9 1 2 | 9 8 | 3 9 4      histories of the users 7, 3 and 9
            training part   0 9     | 9 8 | 3          without the newest two, if it has three
            filled up       0 9     | 9 8 | 3 | 3 3    a filler user with the row that came last
            lengths_B       [2, 2, 1, 2]
            domain_N        [0, 1, 1, 1, 0, 0, 0]
            weight_B        [1, 1, 1, 0]
        """
        dataset = self.plan.dataset
        part = _TrainingPart.of_users(dataset, users, self.config.domain)
        shared = self._draw_shared_negatives(epoch, step)
        negatives: np.ndarray | list[np.ndarray] | None = shared
        looked_up = part.items_N
        if shared is not None:
            looked_up = np.concatenate([part.items_N, *shared])
        filler = _choose_filler(looked_up)
        fillers = self.plan.users_per_rank(epoch, step) - len(part.number_B)
        filled = part.fill_up(max(0, fillers), filler)
        kept_N, lengths_B, domain_N = trim(
            np.arange(len(filled.items_N)),
            filled.lengths_B,
            find_domains(dataset, filled.items_N),
            self.max_length,
        )
        items_N = filled.items_N[kept_N]
        if negatives is None:
            negatives = self._draw_own_negatives(
                epoch, part, kept_N, items_N, domain_N, filler
            )
        batch = build_batch(
            items_N,
            lengths_B,
            domain_N,
            _weigh_users(len(lengths_B), len(part.number_B)),
            negatives,
            self._items_D,
            self.max_length,
            self.pooling,
            filled.ticks_N[kept_N],
            self.accumulation,
        )
        candidates = self._draw_candidates(epoch, step, part.number_B)
        batch = replace(batch, candidates=candidates)
        if len(looked_up) == 0:
            return drop_lookup(batch)
        return batch

    def _draw_shared_negatives(
        self, epoch: int, step: int
    ) -> list[np.ndarray] | None:
        """The rows of each domain; None where each target has its own."""
        if not self.negatives.shared:
            return None
        rows_of_domains = draw_shared_negatives(
            self.plan.seed,
            epoch,
            step,
            self.plan.dataset.starts,
            self._items_D,
            self.negatives.shared,
            self._drawn_rows,
        )
        if self.only_domain is not None:
            for domain, rows in enumerate(rows_of_domains):
                if domain != self.only_domain:  # nothing of it is predicted
                    rows_of_domains[domain] = rows[:0]
        return rows_of_domains

    def _draw_own_negatives(
        self,
        epoch: int,
        part: "_TrainingPart",
        kept_N: np.ndarray,
        items_N: np.ndarray,
        domain_N: np.ndarray,
        filler: int,
    ) -> np.ndarray:
        """Each target's own negatives, and `filler` for those of filler users: int64 (N, n)."""
        # Fillers come last, and are not trimmed: the rest of what is kept is the users'.
        targets = int(np.searchsorted(kept_N, len(part.items_N)))
        kept_targets = kept_N[:targets]
        user_N = np.repeat(part.number_B, part.lengths_B)
        drawn = draw_target_negatives(
            self.plan.seed,
            epoch,
            user_N[kept_targets],
            part.position_N[kept_targets],
            items_N[:targets],
            domain_N[:targets],
            self.plan.dataset.starts,
            self._items_D,
            self.negatives.per_target,
            self._drawn_rows,
        )
        filler_targets = len(kept_N) - targets
        of_fillers = np.full(
            (filler_targets, self.negatives.per_target), filler
        )
        return np.concatenate([drawn, of_fillers])

    def _draw_candidates(
        self,
        epoch: int,
        step: int,
        number_B: np.ndarray,
    ) -> Candidates | None:
        """This rank's part of those who stand for all users of the step in SC-MIM.

        None where all stand for themselves.
        """
        if not self.candidates:
            return None
        users_U, _ = self.plan.batch(epoch, step)
        if len(users_U) <= self.candidates:
            return None
        lengths_UD = self.plan.dataset.lengths[users_U]
        return draw_candidates(
            self.plan.seed,
            epoch,
            step,
            users_U,
            lengths_UD,
            number_B,
            self.candidates,
        )


def _weigh_users(users: int, real_users: int) -> np.ndarray:
    """1 for each real user, 0 for the filler users behind them: float32 (B,)."""
    weight_B = np.ones(users, np.float32)
    weight_B[real_users:] = 0
    return weight_B


def _choose_filler(looked_up: np.ndarray) -> int:
    """The row of filler users: the last one that is looked up, 0 where there is none."""
    if len(looked_up) == 0:
        return 0
    return looked_up[-1]  # among interactions the newest of all, never trimmed


@dataclass(frozen=True)
class _TrainingPart:
    """The interactions that users are trained on, jagged, oldest first."""

    number_B: np.ndarray
    lengths_B: np.ndarray
    position_N: np.ndarray  # in the user's history
    items_N: np.ndarray
    ticks_N: np.ndarray

    @classmethod
    def of_users(
        cls,
        dataset: Dataset,
        users: UserHistories,
        domain: str,
    ) -> "_TrainingPart":
        """domain: its interactions alone, and users who have any."""
        number_B, lengths_B, place_N, position_N = select_training_part(
            dataset, users, domain
        )
        return cls(
            number_B=number_B,
            lengths_B=lengths_B,
            position_N=position_N,
            items_N=users.items_N[place_N],
            ticks_N=users.ticks_N[place_N],
        )

    def fill_up(self, fillers: int, item: int) -> "_TrainingPart":
        """The same with filler users, who have no number, and no positions."""
        interactions = _FILLER_LENGTH * fillers
        lengths = np.full(fillers, _FILLER_LENGTH)
        items = np.full(interactions, item, self.items_N.dtype)
        ticks = np.zeros(interactions, self.ticks_N.dtype)
        return replace(
            self,
            lengths_B=np.append(self.lengths_B, lengths),
            items_N=np.append(self.items_N, items),
            ticks_N=np.append(self.ticks_N, ticks),
        )


def select_training_part(
    dataset: Dataset,
    users: UserHistories,
    domain: str = "",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The training part of the dataset's split: (number_B, lengths_B, place_N, position_N).

    All are int64, user after user: the users who have any, how many interactions each has, and where
    these are among all of `users`, and in the user's history. domain: its interactions alone.
    Leave-one-out with three users, items of two domains at the rows 0–4 and 8–11:

        users.number_B    [7,           3,    9      ]
        users.lengths_B   [4,           2,    3      ]
        users.items_N     [0, 9, 1, 2,  9, 8, 3, 9, 4]

                          both domains          the first one alone
        number_B          [7, 3, 9]             [7, 9]
        lengths_B         [2, 2, 1]             [1, 1]
        place_N           [0, 1, 4, 5, 6]       [0, 6]
        position_N        [0, 1, 0, 1, 0]       [0, 0]
    """
    lengths_B = dataset.split.training_lengths(users.lengths_B, users.ticks_N)
    position_N = count_within_rows(lengths_B)
    place_N = join_ranges(row_begins(users.lengths_B), lengths_B)
    if not domain:
        has_any_B = lengths_B > 0
        number_B = users.number_B[has_any_B]
        return number_B, lengths_B[has_any_B], place_N, position_N
    user_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
    domain_N = find_domains(dataset, users.items_N[place_N])
    in_domain_N = domain_N == dataset.domain_number(domain)
    lengths_B = np.bincount(user_N[in_domain_N], minlength=len(lengths_B))
    has_domain_B = lengths_B > 0
    return (
        users.number_B[has_domain_B],
        lengths_B[has_domain_B],
        place_N[in_domain_N],
        position_N[in_domain_N],
    )


def find_domains(dataset: Dataset, items_N: np.ndarray) -> np.ndarray:
    """The domain number of each row of M: `Dataset.domain_of`, quicker for a few domains."""
    if len(dataset.starts) > _FEW_DOMAINS:
        return dataset.domain_of(items_N)
    domain_N = np.zeros(len(items_N), np.int8)
    for start in dataset.starts[1:].astype(items_N.dtype):
        domain_N += items_N >= start
    return domain_N


class BatchFeed:
    """One rank's batches, step after step, built ahead by worker processes.

    Where the number of workers is to be measured, one begins. After some steps there are as many
    as it takes to build a batch, and a quarter more, while a step computes. The loader then begins
    anew where training is. Any number of workers builds the same batches.
    """

    def __init__(
        self,
        batches: TrainBatches,
        pin_memory: bool,
        cores: int,
    ):
        """cores: those that this rank may use for itself.

        They are the most workers that are started where the number is measured.
        """
        self._batches = batches
        self._pin_memory = pin_memory
        self._cores = max(1, cores)
        self._measures = batches.config.workers == MEASURED
        self._build_seconds: list[float] = []
        self._step_seconds: list[float] = []
        self.position = batches.position
        self.workers = _first_workers(batches.config)
        self._begin()

    def __next__(self) -> RankBatch:
        """Raises InputError as a worker did."""
        fed = next(self._stream)
        self.position += 1
        if self._measures:
            self._build_seconds.append(fed.seconds)
        return fed

    def build_without_users(self) -> RankBatch:
        """In place of the next step's batch, where that cannot be read: one without a real user.

        With it this rank only takes part in the step.
        """
        plan = self._batches.plan
        epoch, step = plan.locate(self.position)
        self.position += 1
        batch = self._batches.build(epoch, step, NO_USERS)
        return RankBatch(
            batch,
            users_B=np.zeros(0, np.int64),
            skipped=0,
            reasons=(),
        )

    def computed(self, seconds: float) -> str | None:
        """Notes how long a step computed: called after each step.

        Returns a line to log where the number of workers follows from the steps so far.
        """
        if not self._measures:
            return None
        self._step_seconds.append(seconds)
        if len(self._step_seconds) < _WARM_UP + _MEASURED_STEPS:
            return None
        self._measures = False
        build = _average_measured(self._build_seconds)
        compute = _average_measured(self._step_seconds)
        needed = count_workers_needed(build, compute)
        line = (
            f"a batch takes {build:.3g} s to build and a step {compute:.3g} s: "
            f"{needed} worker processes a rank"
        )
        if needed > self._cores:
            line += (
                f", of which {self._cores} are started for want of cores: "
                "training will wait for data"
            )
        workers = min(needed, self._cores)
        if workers > self.workers:
            self._stream.close()
            self.workers = workers
            self._begin()
        return line

    def close(self) -> None:
        """Ends the workers."""
        self._stream.close()

    def _begin(self) -> None:
        batches = self._batches.from_position(self.position)
        config = self._batches.config
        self._stream = batches_of_workers(
            batches, config, self._pin_memory, self.workers
        )


def count_workers_needed(build_seconds: float, step_seconds: float) -> int:
    """How many processes build batches as fast as steps take them, with something to spare."""
    build_seconds = _SPARE * build_seconds
    step_seconds = max(step_seconds, 1e-9)
    return max(1, math.ceil(build_seconds / step_seconds))


def _average_measured(seconds: list[float]) -> float:
    measured = seconds[_WARM_UP : _WARM_UP + _MEASURED_STEPS]
    return sum(measured) / _MEASURED_STEPS


def _first_workers(config: StreamConfig) -> int:
    """One where the number of workers is to be measured."""
    if config.workers == MEASURED:
        return 1
    return config.workers


class ScheduledBatches(Protocol):
    """A rank's batches, built one after the other, and the schedule that they follow."""

    plan: BatchSchedule

    def __iter__(self) -> Iterator[Any]: ...


def batches_of_workers(
    batches: ScheduledBatches,
    config: StreamConfig,
    pin_memory: bool,
    workers: int | None = None,
) -> Generator[Any, None, None]:
    """Yields what `batches` (an IterableDataset) builds, in order, prefetched by worker processes.

    pin_memory: for asynchronous copies to a CUDA device. workers: how many, where it is not the
    config that says so; one where the config leaves it to be measured. Raises InputError as the
    worker did.
    """
    if workers is None:
        workers = _first_workers(config)
    # Loaders are forked: they share what is loaded here.
    zstd_codec()
    compiled.why_missing()
    prefetch = None
    if workers:
        prefetch = config.prefetch
    loader = torch.utils.data.DataLoader(
        _PackedBatches(batches),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch,
        pin_memory=pin_memory,
        worker_init_fn=_set_up_worker,
    )
    memory_checked = workers == 0
    for batch in loader:
        if isinstance(batch, _WorkerError):
            raise InputError(batch.reason, one_rank=True)
        if not isinstance(batch, PackedBatch):
            yield batch
            continue
        if not memory_checked:
            piece_bytes = len(batch.piece)
            world_size = batches.plan.world_size
            refuse_small_shared_memory(
                piece_bytes, workers, config.prefetch, world_size
            )
            memory_checked = True
        yield unpack(batch)


@dataclass(frozen=True)
class _WorkerError:
    """An InputError on its way to the trainer."""

    reason: str


class _PackedBatches(torch.utils.data.IterableDataset):
    """Hands over in one piece what a worker builds.

    It hands over an InputError as a value: raised, it would arrive as a trace.
    """

    def __init__(self, batches: Iterable):
        super().__init__()
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        in_worker = torch.utils.data.get_worker_info() is not None
        pack = BatchPacker(shared=in_worker)
        try:
            for batch in self.batches:
                if is_dataclass(batch):
                    yield pack(batch)
                else:
                    yield batch
        except InputError as error:
            yield _WorkerError(str(error))


def _set_up_worker(_worker: int) -> None:
    # What the forked process inherits is not its own to collect: a process group that is garbage
    # waits, when it is taken away, for threads that only its maker has.
    gc.freeze()
    torch.set_num_threads(1)
    keep_freed_memory()
    # A launcher that stops a run asks every process of it; the trainer still needs what is built
    # to reach its checkpoint.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
