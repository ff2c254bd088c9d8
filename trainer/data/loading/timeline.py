"""The split by time: from the settings to two ticks, and what the training part has then.

The shards are read twice, by their home ranks, before anything is trained or ranked: once for
the times of all events, which say where the cuts are, and once for what comes before the
validation's cut. Two domains, with 10 events before the tick 50, and 3 and 4 events later:

    events by tick         5 … 49    50 … 79    80 … 95
    domain 0               6         1          2
    domain 1               4         2          2
                           training  validation test

All ranks hold the same `Dataset` then: its split, its `lengths` and `item_counts`. Letters at the
end of names: D domains, T ticks, U users, B users of a block, N events.
"""

import datetime
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.config.evaluation import (
    Days,
    Moment,
    Share,
    SplitConfig,
    parse_window,
)
from trainer.config.prepare import DATES, TIME_UNITS, UNKNOWN
from trainer.config.run import RunConfig
from trainer.config.stream import StreamConfig
from trainer.data.format.dataset import (
    LENGTHS_DTYPE,
    TICKS,
    Dataset,
    TrainingCounts,
)
from trainer.data.format.shards import Block
from trainer.data.loading.home_blocks import read_home_blocks
from trainer.data.loading.jagged import join_ranges, row_begins
from trainer.data.split import SPLITS, Timeline
from trainer.distributed.consensus import run_on_all_ranks
from trainer.distributed.process_group import sum_over_ranks
from trainer.errors import InputError
from trainer.files.redact import printable_text
from trainer.run_files import SPLIT

if TYPE_CHECKING:
    from trainer.distributed.process_group import Ranks

# What a run's split.json says, and an evaluation's record.
SplitRecord = dict[str, Any]
# Begins a pass over this rank's blocks: (number of the first user, block).
ReadBlocks = Callable[[], Iterator[tuple[int, Block]]]

_RECORDED: dict[str, Any] = {
    "dataset": str,
    "whose": str,
    "counts": str,
    "validation": str,
    "test": str,
    "validation_tick": int,
    "test_tick": int,
    "validation_time": (int, float),
    "test_time": (int, float),
}
_KINDS = ("training", "validation", "test")
_INT32_MAX = 2**31 - 1


def split_dataset(
    dataset: Dataset,
    config: RunConfig,
    ranks: "Ranks",
    recorded: SplitRecord | None = None,
) -> Dataset:
    """The dataset as a run's settings split it. Called on all ranks, which get the same.

    recorded: the split of a run (`describe_split`), whose cuts hold in place of the settings', by
    their times where this is another dataset. Leave-one-out is what a dataset has anyway.

    Raises InputError where a cut cannot be used: it is outside of the log's time, the times have no
    known unit, or it leaves a domain without events for training, validation or test.
    """
    if config.split.kind != Timeline.name:
        return dataset

    def read_blocks() -> Iterator[tuple[int, Block]]:
        return read_home_blocks(dataset, ranks, config.stream)

    count_DT = _count_ticks(dataset, read_blocks)
    count_T = count_DT.sum(0)
    split = _resolve(dataset, config.split, count_T, recorded)
    _refuse_empty_domains(dataset, split, count_DT)
    return hold_out(dataset, split, ranks, config.stream)


def hold_out(
    dataset: Dataset, split: Timeline, ranks: "Ranks", config: StreamConfig
) -> Dataset:
    """The dataset with a split by time, and what its training part has. Called on all ranks."""

    def read_blocks() -> Iterator[tuple[int, Block]]:
        return read_home_blocks(dataset, ranks, config)

    training = _count_training(dataset, split, read_blocks)
    return replace(
        dataset,
        split=split,
        training=training,
    )


def describe_split(dataset: Dataset) -> SplitRecord | None:
    """The split by time of a dataset for a record; None of leave-one-out.

    kind, whose, counts    as the settings say
    validation, test    the first moments, as text: dates where the log's times are
    validation_tick, test_tick    the same in ticks of this dataset
    validation_time, test_time    the same in the log's unit
    dataset    its fingerprint
    """
    split = dataset.split
    if not isinstance(split, Timeline):
        return None
    validation_time = dataset.time_of(split.validation_tick)
    test_time = dataset.time_of(split.test_tick)
    return {
        "kind": split.name,
        "whose": split.whose,
        "counts": split.counts,
        "validation": format_time(dataset, validation_time),
        "test": format_time(dataset, test_time),
        "validation_tick": split.validation_tick,
        "test_tick": split.test_tick,
        "validation_time": validation_time,
        "test_time": test_time,
        "dataset": dataset.fingerprint,
    }


def read_split(run: Path) -> SplitRecord | None:
    """The split by time that a run has recorded (`describe_split`); None of leave-one-out.

    Raises InputError where the record cannot be used.
    """
    file = run / SPLIT
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        for name, kind in _RECORDED.items():
            if not isinstance(record[name], kind):
                raise TypeError(f"its {name} is {record[name]!r}")
        if record["whose"] not in ("first", "newest", "all"):
            raise ValueError(f"its whose is {record['whose']!r}")
        if record["counts"] not in ("cut", "day"):
            raise ValueError(f"its counts are {record['counts']!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: cannot be used ({printable_text(error)}): copy the run again"
        ) from None
    return record


def format_tick(dataset: Dataset, tick: int) -> str:
    """The first time of a tick, as `format_time` gives it."""
    return format_time(dataset, dataset.time_of(tick))


def format_time(dataset: Dataset, time: float) -> str:
    """A time of the log: a date, where its unit is known.

    1404172800.0 of a log in seconds gives "2014-07-01 00:00".
    """
    second = _second_of(dataset)
    if second is None:
        return f"{time:.10g}"
    try:
        date = datetime.datetime.fromtimestamp(time / second, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return f"{time:.10g}"
    return date.strftime("%Y-%m-%d %H:%M")


def _second_of(dataset: Dataset) -> int | None:
    """How many of the log's units a second has; None where that is not known."""
    times = dataset.log_times
    if times.kind == DATES:
        return TIME_UNITS["us"]
    if times.unit == UNKNOWN:
        return None
    return TIME_UNITS[times.unit]


def _count_ticks(dataset: Dataset, read_blocks: ReadBlocks) -> np.ndarray:
    """Events of each domain and tick, of all ranks: int64 (D, TICKS + 1)."""
    domains = len(dataset.domains)
    ticks = TICKS + 1
    cells = np.zeros(domains * ticks, np.int64)

    def count() -> None:
        for _, block in read_blocks():
            domain_N = dataset.domain_of(block.items_N)
            cell_N = domain_N * ticks + block.ticks_N
            np.add.at(cells, cell_N, 1)

    run_on_all_ranks(count)
    total = sum_over_ranks(cells)
    return total.reshape(domains, ticks)


def _resolve(
    dataset: Dataset,
    config: SplitConfig,
    count_T: np.ndarray,
    recorded: SplitRecord | None,
) -> Timeline:
    """The split of the settings, or of a record. count_T: events of each tick."""
    if recorded is not None:
        return _resolve_recorded(dataset, recorded)
    end = TICKS + 1
    test = _find_cut(
        dataset,
        "split.test",
        config.test,
        count_T,
        end,
    )
    validation = _find_cut(
        dataset,
        "split.validation",
        config.validation,
        count_T,
        test,
    )
    if validation >= test:
        test_text = format_tick(dataset, test)
        raise InputError(
            f"split.validation={config.validation} does not begin before the test, "
            f"{test_text}: give an earlier date"
        )
    return Timeline(validation, test, config.whose, config.counts)


def _resolve_recorded(dataset: Dataset, recorded: SplitRecord) -> Timeline:
    """The split of a record: by its ticks, and of another dataset by its times."""
    validation = recorded["validation_tick"]
    test = recorded["test_tick"]
    if recorded["dataset"] != dataset.fingerprint:
        validation = _tick_from(dataset, recorded["validation_time"])
        test = _tick_from(dataset, recorded["test_time"])
    if not 0 < validation < test:
        raise InputError(
            f"the run's validation begins at {recorded['validation']} and its test at "
            f"{recorded['test']}, which leaves nothing of {dataset.place} before or after: "
            "give another --data"
        )
    return Timeline(validation, test, recorded["whose"], recorded["counts"])


def _tick_of(dataset: Dataset, time: float) -> int:
    """The tick of one time of the log."""
    ticks = dataset.ticks(np.array(time))
    return int(ticks)


def _tick_from(dataset: Dataset, time: float) -> int:
    """The first tick all of whose times are a time or later: what the run trained on is no target."""
    tick = _tick_of(dataset, time)
    if dataset.time_of(tick) < time:
        return tick + 1
    return tick


def _find_cut(
    dataset: Dataset,
    key: str,
    text: str,
    count_T: np.ndarray,
    end: int,
) -> int:
    """The first tick of a window that ends before the tick `end`.

    Never later than what is asked for: no event after the moment is trained on. Raises InputError
    where nothing is before or after it.
    """
    window = parse_window(key, text)
    tick = 0
    if isinstance(window, Share):
        tick = _find_share(window.value, count_T, end)
    else:
        second = _second_of(dataset)
        if second is None:
            raise InputError(
                f"{key}={text}: the times of {dataset.place} are numbers of no known unit: "
                "give a share of its events, as 0.1, or prepare it again with --time-unit"
            )
        time = _find_time(dataset, window, second, end)
        if dataset.first_time < time <= dataset.last_time:
            tick = _tick_of(dataset, time)
    if tick > 0:
        return tick
    first = format_time(dataset, dataset.first_time)
    last = format_time(dataset, dataset.last_time)
    raise InputError(
        f"{key}={text} leaves nothing before or after it: the log of {dataset.place} is from "
        f"{first} to {last}"
    )


def _find_share(share: float, count_T: np.ndarray, end: int) -> int:
    """The last tick from which on a share of all events comes before the tick `end`; 0 without.

    Of ten events, a share of 0.2 with the end at 9:

        tick       0    3    5    7    9
        events     4    1    2    1    2
        returns    5, from which on there are 3; from 7 on there is 1
    """
    events = int(count_T.sum())
    # Rounded, so that 0.1 of 10 events is one of them.
    wanted = round(share * events, 6)
    found = 0
    for tick in range(end - 1, 0, -1):
        found += int(count_T[tick])
        if found >= wanted:
            return tick
    return 0


def _find_time(
    dataset: Dataset,
    window: Days | Moment,
    second: int,
    end: int,
) -> float:
    """The time at which days or a date begin. second: in the log's unit. end: of the days, a tick."""
    length = window.seconds * second
    if isinstance(window, Moment):
        return length
    last = dataset.last_time
    if end <= TICKS:
        last = dataset.time_of(end)
    return last - length


def _refuse_empty_domains(
    dataset: Dataset,
    split: Timeline,
    count_DT: np.ndarray,
) -> None:
    """Raises InputError for the first domain that has no events in one of the three parts."""
    edges = (0, split.validation_tick, split.test_tick, TICKS + 1)
    for number, domain in enumerate(dataset.domains):
        count_T = count_DT[number]
        for index, kind in enumerate(_KINDS):
            begin = edges[index]
            end = edges[index + 1]
            if count_T[begin:end].any():
                continue
            cuts = _describe_cuts(dataset, split, count_T)
            raise InputError(
                f"domain {domain.name!r} has no events for {kind}: {cuts}: set split.validation "
                "and split.test otherwise, or prepare without the domain"
            )


def _describe_cuts(
    dataset: Dataset,
    split: Timeline,
    count_T: np.ndarray,
) -> str:
    """Where the cuts are, and the events of a domain."""
    validation = format_tick(dataset, split.validation_tick)
    test = format_tick(dataset, split.test_tick)
    cuts = f"validation begins at {validation} and test at {test}"
    ticks = np.flatnonzero(count_T).tolist()
    if not ticks:
        return cuts
    first = format_tick(dataset, ticks[0])
    last = format_tick(dataset, ticks[-1])
    return f"{cuts}, its events are from {first} to {last}"


class _TrainingCounter:
    """Counts what comes before the validation's cut, and the targets after it.

    lengths_UD: int32, interactions by user and domain. count_N: int64, by row of M. target_U: int32
    for each part, targets by user. without: for each part, as `TrainingCounts.without_history`.
    """

    def __init__(self, dataset: Dataset, split: Timeline):
        self.dataset = dataset
        self.split = split
        self.domains = len(dataset.domains)
        shape = (dataset.users, self.domains)
        self.lengths_UD = np.zeros(shape, np.int32)
        self.count_N = np.zeros(dataset.num_embeddings, np.int64)
        self.target_U = {}
        self.without = {}
        for part in SPLITS:
            self.target_U[part] = np.zeros(dataset.users, np.int32)
            self.without[part] = np.zeros(1, np.int64)

    def add(self, first_user: int, block: Block) -> None:
        """Adds a block, whose users are those from `first_user` on."""
        lengths_B = block.lengths_B.astype(np.int64)
        ticks_N = block.ticks_N
        users = len(lengths_B)
        own = slice(first_user, first_user + users)
        kept_B = self.split.training_lengths(lengths_B, ticks_N)
        begins_B = row_begins(lengths_B)
        kept_N = join_ranges(begins_B, kept_B)
        rows_N = block.items_N[kept_N]
        np.add.at(self.count_N, rows_N, 1)
        user_N = np.repeat(np.arange(users), kept_B)
        domain_N = self.dataset.domain_of(rows_N)
        cell_N = user_N * self.domains + domain_N
        count = np.bincount(cell_N, minlength=users * self.domains)
        self.lengths_UD[own] = count.reshape(users, self.domains)
        for part in SPLITS:
            user_T, _ = self.split.targets(part, lengths_B, ticks_N)
            targets_B = np.bincount(user_T, minlength=users)
            self.target_U[part][own] = targets_B
            self.without[part] += self.split.count_without_history(
                part,
                lengths_B,
                ticks_N,
            )

    def sum_up(self) -> TrainingCounts:
        """The counts of all ranks. Called on all of them."""
        longest = np.iinfo(LENGTHS_DTYPE).max
        total = sum_over_ranks(self.lengths_UD.reshape(-1))
        lengths_UD = total.reshape(self.lengths_UD.shape)
        lengths_UD = np.minimum(lengths_UD, longest)
        count_N = sum_over_ranks(self.count_N)
        count_N = np.minimum(count_N, _INT32_MAX)
        before = {}
        without = {}
        for part in SPLITS:
            total = sum_over_ranks(self.without[part])
            without[part] = int(total[0])
            if self.split.one_target:
                continue
            target_U = sum_over_ranks(self.target_U[part])
            ends_U = np.cumsum(target_U, dtype=np.int64)
            before[part] = np.concatenate([[0], ends_U])
        return TrainingCounts(
            lengths=lengths_UD.astype(LENGTHS_DTYPE),
            item_counts=count_N.astype(np.int32),
            targets=before,
            without_history=without,
        )


def _count_training(
    dataset: Dataset,
    split: Timeline,
    read_blocks: ReadBlocks,
) -> TrainingCounts:
    """What comes before the validation's cut, and how many targets there are, of all ranks."""
    counter = _TrainingCounter(dataset, split)

    def count() -> None:
        for first_user, block in read_blocks():
            counter.add(first_user, block)

    run_on_all_ranks(count)
    return counter.sum_up()
